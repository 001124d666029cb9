"""A cache of random numbers, for measuring: the contract's layout and bytes, no images and no encoder.

Written through the pipeline's own store and shard writer. Its components are named `synthetic`, and nothing about them
is a result. Needs neither ray, timm nor diffusers.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from repa.cache_specs.fingerprint import manifest_fingerprint, transform_fingerprint
from repa.cache_specs.layout import CROP, VIEWS, ArrayLayout, CacheLayout
from repa.cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from repa.pipeline.images.manifest import FolderSource, Manifest
from repa.pipeline.store.binding import bind_ranges, binding
from repa.pipeline.store.shards import ShardWriter
from repa.pipeline.store.statistics import component_statistics
from repa.pipeline.store.store import CacheStore

NDArray = np.ndarray[Any, Any]

NUM_CLASSES = 1000


def make_cache(
    path: Path,
    *,
    num_samples: int,
    grid: int = 16,
    width: int = 768,
    dtype: str = "float16",
    num_views: int = 1,
    shard_samples: int = 256,
    cls_token: bool = False,
) -> Path:
    """Write a complete cache of SD-VAE-shaped moments and `grid` x `grid` tokens of `width` channels."""
    rng = np.random.default_rng(0)
    store = make_root(path, num_samples=num_samples, grid=grid, num_views=num_views, shard_samples=shard_samples)
    for component in _components(grid=grid, width=width, dtype=dtype, cls_token=cls_token):
        store.create_component(component)
        for index in range(store.layout.num_ranges):
            _write_range(store, component, index, functools.partial(_random_chunk, rng))
        _complete(store, component, component_statistics(store, component))
    return path


def make_large_cache(path: Path, *, num_samples: int, grid: int = 16, width: int = 768) -> Path:
    """Write a complete cache whose rows are all the same: the full shards of an array are hard links to one file.

    A million samples are 410 GB to a reader and take 0.3 GB. Latents have mean 0 and deviation 1, tokens are zero, and
    `repa-cache verify` finds nothing wrong. What no other cache has: all shards share the page cache of one.
    """
    store = make_root(path, num_samples=num_samples, grid=grid, num_views=1, shard_samples=256)
    for component in _components(grid=grid, width=width, dtype="float16"):
        store.create_component(component)
        first = _write_range(store, component, 0, _constant_chunk)
        for index in range(1, store.layout.num_ranges):
            start, stop = store.layout.sample_range(index)
            if stop - start < store.layout.shard_samples:
                _write_range(store, component, index, _constant_chunk)
                continue
            for layout in component.arrays(store.layout):
                folder = path / component.path / layout.name
                (folder / layout.shard_file(index)).hardlink_to(folder / layout.shard_file(0))
            store.write_numbers(component, index, first)
        statistics = {"latent_mean": [0.0] * 4, "latent_std": [1.0] * 4}  # reading all rows gives the same
        _complete(store, component, statistics if component.kind == LATENTS else {"float16_error": 0.0})
    return path


def make_root(path: Path, *, num_samples: int, grid: int, num_views: int, shard_samples: int) -> CacheStore:
    """Write the cache's root: ids, labels drawn at random, no component yet."""
    ids = np.array([f"{i:07d}" for i in range(num_samples)], dtype=np.dtypes.StringDType())
    labels = np.random.default_rng(1).integers(0, NUM_CLASSES, num_samples).astype(np.int32)
    classes = tuple(str(i) for i in range(NUM_CLASSES))
    manifest = Manifest(
        where="synthetic", sample_ids=ids, labels=labels, class_names=classes, source=FolderSource(path)
    )
    fingerprint = manifest_fingerprint(ids.tolist(), labels.tolist())
    layout = CacheLayout(
        num_samples=num_samples,
        resolution=16 * grid,
        views=VIEWS[:num_views],
        class_names=classes,
        shard_samples=shard_samples,
        manifest_fingerprint=fingerprint,
        dataset_fingerprint=transform_fingerprint(
            fingerprint, resolution=16 * grid, crop=CROP, views=VIEWS[:num_views], class_names=classes
        ),
    )
    return CacheStore.create_or_open(path, layout, manifest)


def _components(*, grid: int, width: int, dtype: str, cls_token: bool = False) -> tuple[ComponentSpec, ComponentSpec]:
    latents = {
        "entry": "sd-vae-ft-mse",
        "loader": "synthetic",
        "model": "random numbers",
        "kind": "mean_std",
        "latent_channels": 4,
        "moment_channels": 8,
        "latent_size": [2 * grid, 2 * grid],
        "pixel_range": [-1.0, 1.0],
        "random_weights": True,
    }
    tokens = {
        "entry": "synthetic",
        "loader": "synthetic",
        "model": "random numbers",
        "width": width,
        "grid": [grid, grid],
        "cls_token": cls_token,
        "random_weights": True,
    }
    return (
        ComponentSpec(kind=LATENTS, name="synthetic", spec=latents, weights="none", dtype="float16"),
        ComponentSpec(kind=FEATURES, name="synthetic", spec=tokens, weights="none", dtype=dtype),
    )


def _complete(store: CacheStore, component: ComponentSpec, results: dict[str, Any]) -> None:
    store.complete_component(component, results | binding(store, component, bind_ranges(store, component)))


def _write_range(
    store: CacheStore, component: ComponentSpec, index: int, make_chunk: Callable[[ArrayLayout], NDArray]
) -> list[int]:
    """Write one range as a build does; return the numbers of its shards."""
    start, stop = store.layout.sample_range(index)
    partials, numbers = {}, {}
    with store.lock(component.path):
        folder = store.partial_folder(component.path)
        folder.mkdir(parents=True)
        for layout in component.arrays(store.layout):
            writer = ShardWriter(folder / layout.name, layout, "none")
            for _ in range(layout.num_chunks(stop - start)):
                writer.append(make_chunk(layout))
            writer.close()
            partials[layout.name], numbers[layout.name] = writer.path, writer.number
        store.commit_range(component, index, partials, numbers)
    return list(numbers.values())


def _chunk_shape(layout: ArrayLayout) -> tuple[int, ...]:
    return (1, *(layout.inner if len(layout.inner) == 1 else layout.inner[2:]))


def _constant_chunk(layout: ArrayLayout) -> NDArray:
    shape = _chunk_shape(layout)
    if len(layout.inner) == 1:  # what is recorded of a sample
        return np.ones(shape, dtype=layout.dtype)
    chunk = np.zeros(shape, dtype=layout.dtype)
    if layout.name == "moments":
        chunk[:, shape[1] // 2 :] = 1
    return chunk


def _random_chunk(rng: np.random.Generator, layout: ArrayLayout) -> NDArray:
    shape = _chunk_shape(layout)
    if layout.name == "valid":
        return np.ones(shape, dtype=bool)
    if layout.dtype == "int8":
        return rng.integers(-127, 128, shape, dtype=np.int8)
    if layout.name in ("token_scale", "channel_std"):
        return rng.uniform(0.5, 1.5, shape).astype(layout.dtype)
    if layout.name == "moments":
        half = rng.standard_normal((1, shape[1] // 2, *shape[2:]), dtype=np.float32)
        return np.concatenate([half, np.full_like(half, 0.1)], axis=1).astype(layout.dtype)
    if layout.name == "source_bytes":
        return np.ones(shape, dtype=np.int64)
    return rng.standard_normal(shape, dtype=np.float32).astype(layout.dtype)
