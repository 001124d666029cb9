"""Precompute frozen-encoder tokens once, then train diffusion transformers on them.

`repa.pipeline` turns images into a cache, `repa.cache_specs` says what a cache is, `repa.kernels` holds the
alignment op, `repa.trainer` trains and samples SiT from a cache.
"""
