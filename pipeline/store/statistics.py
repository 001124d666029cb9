"""What a component knows about itself once all its ranges are there: one pass over its shards, in order, in float64."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...cache_specs.errors import CacheError
from ...cache_specs.layout import LEVEL_BIAS, LEVEL_SCALE, layer_array
from ...cache_specs.schema import LATENTS, ComponentSpec, stored_layers
from .records import read_valid
from .shards import read_shard
from .store import CacheStore

EPS = 1e-6  # of spatial normalisation: (f - gamma * mean) / (std + EPS)


def component_statistics(store: CacheStore, component: ComponentSpec) -> dict[str, Any]:
    """Return the attributes that completion adds: latent statistics, or the storage error of float16 tokens."""
    if component.kind == LATENTS:
        return latent_statistics(store, component)
    if component.dtype == "float16":
        return {"float16_error": float16_error(store, component)}
    return {}


def latent_statistics(store: CacheStore, component: ComponentSpec) -> dict[str, Any]:
    """Return per-channel mean and std [C] of sampled latents over all valid samples, views and pixels.

    For kind mean_std a latent is mean + std * noise, so E[z] = E[mean] and Var[z] = Var[mean] + E[std^2].
    """
    channels = component.spec["latent_channels"]
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for moments in _valid_rows(store, component, "moments"):
        wide = moments.astype(np.float64)
        if component.dtype == "uint8":
            wide = wide * LEVEL_SCALE + LEVEL_BIAS
        mean = wide[:, :channels]
        count += mean.size // channels
        total += mean.sum(axis=(0, 2, 3))
        squares += (mean**2).sum(axis=(0, 2, 3))
        if component.spec["kind"] == "mean_std":
            squares += (wide[:, channels:] ** 2).sum(axis=(0, 2, 3))
    if count == 0:
        raise CacheError(f"{store.path}: {component.path}: not one valid sample, so it cannot be completed")
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)
    return {"latent_mean": mean.tolist(), "latent_std": np.sqrt(variance).tolist()}


def float16_error(store: CacheStore, component: ComponentSpec) -> float:
    """Return the largest rounding error of a channel's mean in float16, in units of that channel's std.

    Rounding to float16 moves x by at most 2^-11 |x|; what spatial normalisation divides by is std + 1e-6. A channel
    that hardly varies around a large mean loses most, and is where int8 is the better of the two.
    """
    largest = 0.0
    for layer in stored_layers(component.spec):
        means = _valid_rows(store, component, layer_array("channel_mean", layer))
        stds = _valid_rows(store, component, layer_array("channel_std", layer))
        for mean, std in zip(means, stds, strict=True):
            ratio = np.abs(mean.astype(np.float64)) / (std.astype(np.float64) + EPS) * 2.0**-11
            largest = max(largest, float(np.max(ratio, where=std > 0, initial=0.0)))
    return largest


def _valid_rows(store: CacheStore, component: ComponentSpec, name: str) -> Iterator[np.ndarray]:
    """Yield, shard by shard, the rows [n, ...] of every valid sample and view."""
    layout = next(array for array in component.arrays(store.layout) if array.name == name)
    for index in range(store.layout.num_ranges):
        path = store.path / component.path / name / layout.shard_file(index)
        start, stop = store.layout.sample_range(index)
        rows = layout.num_chunks(stop - start)
        chunks, problems = read_shard(path, layout, component.compressor, num_chunks=rows)
        if problems:
            raise CacheError(f"{path}: {next(iter(problems.values()))}; delete this file and run the build again")
        valid = read_valid(store, component, index)
        yield chunks[:rows][np.repeat(valid, layout.num_views)]
