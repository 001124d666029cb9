"""A cache of random numbers, for measuring: the contract's layout and bytes, no images and no encoder.

Written through the pipeline's own store and shard writer. Its components are named `synthetic`, and nothing about them
is a result. Needs neither ray, timm nor diffusers.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from repa.cache_specs.fingerprint import manifest_fingerprint, transform_fingerprint
from repa.cache_specs.layout import CROP, VIEWS, ArrayLayout, CacheLayout
from repa.cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from repa.cache_specs.shard_index import ABSENT, checksum, pack_index, padding
from repa.pipeline.images.manifest import FolderSource, Manifest
from repa.pipeline.store.shards import ShardWriter
from repa.pipeline.store.statistics import component_statistics
from repa.pipeline.store.store import CacheStore

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
) -> Path:
    """Write a complete cache of SD-VAE-shaped moments and `grid` x `grid` tokens of `width` channels."""
    rng = np.random.default_rng(0)
    store = make_root(path, num_samples=num_samples, grid=grid, num_views=num_views, shard_samples=shard_samples)
    for component in _components(grid=grid, width=width, dtype=dtype):
        store.create_component(component)
        for index in range(store.layout.num_ranges):
            _write_range(store, component, index, rng)
        store.complete_component(component, component_statistics(store, component))
    return path


def make_sparse_cache(path: Path, *, num_samples: int, grid: int = 16, width: int = 768) -> Path:
    """Write a complete cache whose rows are holes: all zero, of full size, and on disk only its indexes.

    A million samples are 410 GB to a reader and take 0.4 GB and half a minute. Rows carry no checksum, which zeros that
    nobody wrote could not have: their arrays are declared without, in metadata and index. The rest is as in any cache:
    checksums of the indexes, of `valid` and of `source_bytes` hold.
    """
    store = make_root(path, num_samples=num_samples, grid=grid, num_views=1, shard_samples=256)
    for component in _components(grid=grid, width=width, dtype="float16"):
        store.create_component(component)
        for layout in component.arrays(store.layout):
            folder = path / component.path / layout.name
            if len(layout.shape) > 1:
                _declare_without_checksum(folder / "zarr.json")
            for index in range(layout.num_shards):
                start, stop = store.layout.sample_range(index)
                _write_holes(folder / layout.shard_file(index), layout, layout.num_chunks(stop - start))
        one, zero = [1.0] * 4, [0.0] * 4
        store.complete_component(component, {"latent_mean": zero, "latent_std": one})
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


def _components(*, grid: int, width: int, dtype: str) -> tuple[ComponentSpec, ComponentSpec]:
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
        "cls_token": False,
        "random_weights": True,
    }
    return (
        ComponentSpec(kind=LATENTS, name="synthetic", spec=latents, weights="none", dtype="float16"),
        ComponentSpec(kind=FEATURES, name="synthetic", spec=tokens, weights="none", dtype=dtype),
    )


def _declare_without_checksum(file: Path) -> None:
    metadata = json.loads(file.read_text(encoding="utf-8"))
    (sharding,) = metadata["codecs"]
    sharding["configuration"]["codecs"] = [
        codec for codec in sharding["configuration"]["codecs"] if codec["name"] != "crc32c"
    ]
    file.write_text(json.dumps(metadata), encoding="utf-8")


def _write_holes(path: Path, layout: ArrayLayout, num_chunks: int) -> None:
    entries = np.full((math.prod(layout.chunks_per_shard), 2), ABSENT, dtype=np.uint64)
    entries[:num_chunks, 0] = np.arange(num_chunks) * (layout.inner_bytes + padding(layout.inner_bytes))
    entries[:num_chunks, 1] = layout.inner_bytes
    data = b""
    if len(layout.shape) == 1:
        data = np.ones(layout.inner, dtype=layout.dtype).tobytes()
        data += checksum(data)
        entries[0, 1] = len(data)
    index = pack_index(entries)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(int(entries[:num_chunks].sum(axis=1).max()))
        file.seek(0, os.SEEK_END)
        file.write(index)


def _write_range(store: CacheStore, component: ComponentSpec, index: int, rng: np.random.Generator) -> None:
    start, stop = store.layout.sample_range(index)
    partials, numbers = {}, {}
    with store.lock(component.path):
        folder = store.partial_folder(component.path)
        folder.mkdir(parents=True)
        for layout in component.arrays(store.layout):
            writer = ShardWriter(folder / layout.name, layout, "none")
            for _ in range(layout.num_chunks(stop - start)):
                writer.append(_random_chunk(layout, rng))
            writer.close()
            partials[layout.name], numbers[layout.name] = writer.path, writer.number
        store.commit_range(component, index, partials, numbers)


def _random_chunk(layout: ArrayLayout, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = (1, *(layout.inner if len(layout.inner) == 1 else layout.inner[2:]))
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
