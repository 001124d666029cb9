"""Where every byte of a cache lies: groups, arrays, shapes, dtypes, chunks, shard files.

A cache is one Zarr v3 group (README.md beside this file). A component is a group of arrays with one row a sample; its
arrays share one sample range a shard, so that one range of one component is one unit of work: V views of
`shard_samples` samples. The inner chunk is one view of one sample, the unit in which training reads at random.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from .errors import CacheError, UsageError

FORMAT = "repa-cache"
FORMAT_VERSION = 1
VIEWS = ("identity", "flip")  # view 1, where present, is the horizontal mirror of view 0
STORED_VIEWS = "views"  # key of the spec of a component that holds fewer than its cache's: pixels as uint8
LEVEL_SCALE, LEVEL_BIAS = 2 / 255, -1.0  # a level u of a pixel, 0 to 255, is the latent u * LEVEL_SCALE + LEVEL_BIAS
CROP = "adm-center"
METADATA_CHUNK = 65_536  # rows a chunk of sample_id and label
DEFAULT_SHARD_SAMPLES = 256

# What is believed of a file's numbers: more is damage, and would be waited for or allocated.
MOST_SAMPLES = 10**9  # of a cache
MOST_SHARD_SAMPLES = 2**20  # of a shard, whose index is held in memory
MOST_SIDE = 2**16  # of an image in pixels, of a grid in tokens
MOST_WIDTH = 2**16  # channels of a token or a latent
MOST_LAYERS = 1000  # of one encoder
MOST_ROW_BYTES = 2**30  # of one view of one sample

COMPLETE = "complete"  # attribute of a finished component; absent until then
BAD_FILES = "bad_files"  # attribute: {sample id: reason}, only where a build was told --skip-bad
PARTIAL_FOLDER = (
    ".partial"  # half-written shards, locks of running builds, commands that finish what is not whole; else absent
)


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array of a component.

    `shape`, `inner` (the inner chunk) and `shard` have one entry a dimension; `dtype` is numpy's name. Every
    dimension but the first (samples) and, where it has views, the second is stored whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    inner: tuple[int, ...]
    shard: tuple[int, ...]

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """Inner chunks along each dimension of a shard; the index has this shape with a last axis of 2."""
        return tuple(s // c for s, c in zip(self.shard, self.inner, strict=True))

    @property
    def inner_bytes(self) -> int:
        """Bytes of one uncompressed inner chunk, without its checksum."""
        return math.prod(self.inner) * np.dtype(self.dtype).itemsize

    @property
    def num_views(self) -> int:
        """Views a sample, 1 where the array has none."""
        return self.chunks_per_shard[1] if len(self.shape) > 1 else 1

    @property
    def num_shards(self) -> int:
        return -(-self.shape[0] // self.shard[0])

    def num_chunks(self, samples: int) -> int:
        """Return how many inner chunks of a shard hold its first `samples` samples; they come first in C order."""
        return math.prod(self.chunks_per_shard) * samples // self.shard[0] if self.inner[0] == 1 else 1

    def shard_file(self, shard: int) -> str:
        """Return the file name, relative to the array's folder, of the shard of sample range `shard`."""
        return ".".join(["c", str(shard)] + ["0"] * (len(self.shape) - 1))


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """What the root group says: which samples, in which order, cut how.

    `shard_samples` is fixed at creation; `sample_range(k)` is the same in every component array.
    """

    num_samples: int
    resolution: int
    views: tuple[str, ...]
    class_names: tuple[str, ...]
    shard_samples: int
    manifest_fingerprint: str
    dataset_fingerprint: str
    crop: str = CROP

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UsageError("a cache needs at least one sample")
        if not 1 <= self.shard_samples <= MOST_SHARD_SAMPLES:
            raise UsageError(
                f"--shard-samples {self.shard_samples}: expected at least 1, and at most {MOST_SHARD_SAMPLES}"
            )
        if self.views not in (VIEWS[:1], VIEWS):
            raise UsageError(f"views {self.views}: expected {VIEWS[:1]} or {VIEWS}")

    @property
    def num_views(self) -> int:
        return len(self.views)

    @property
    def num_ranges(self) -> int:
        return -(-self.num_samples // self.shard_samples)

    def sample_range(self, index: int) -> tuple[int, int]:
        """Return the half-open sample range of shard `index`."""
        start = index * self.shard_samples
        return start, min(start + self.shard_samples, self.num_samples)

    def attributes(self) -> dict[str, Any]:
        """Return the root group's attributes, in the order in which they are written."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "num_samples": self.num_samples,
            "resolution": self.resolution,
            "crop": self.crop,
            "views": list(self.views),
            "shard_samples": self.shard_samples,
            "manifest_fingerprint": self.manifest_fingerprint,
            "dataset_fingerprint": self.dataset_fingerprint,
            "class_names": list(self.class_names),
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], where: Path | str) -> Self:
        """Read the root group's attributes; raise `CacheError` where they are not a cache's."""
        found = attributes.get("format")
        if found != FORMAT:
            raise CacheError(
                f"{where}: a Zarr group, but not a cache (attribute format is {found!r}, expected {FORMAT!r})"
            )
        version = attributes.get("format_version")
        if version != FORMAT_VERSION:
            raise CacheError(f"{where}: cache format version {version!r}; this version of repa reads {FORMAT_VERSION}")
        try:
            class_names = tuple(attributes["class_names"])
            if not all(isinstance(name, str) for name in class_names):
                raise TypeError("class_names are not all text")
            return cls(
                num_samples=whole(attributes["num_samples"], "num_samples", most=MOST_SAMPLES),
                resolution=whole(attributes["resolution"], "resolution", most=MOST_SIDE),
                crop=str(attributes["crop"]),
                views=tuple(attributes["views"]),
                class_names=class_names,
                shard_samples=whole(attributes["shard_samples"], "shard_samples", most=MOST_SHARD_SAMPLES),
                manifest_fingerprint=str(attributes["manifest_fingerprint"]),
                dataset_fingerprint=str(attributes["dataset_fingerprint"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"{where}: damaged attributes of the root group ({error!r})") from error


def whole(value: Any, name: str, *, most: int, least: int = 1) -> int:
    """Return a whole number that a file says; raise `ValueError` where it is none, or not `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {str(value)[:80]}, expected a whole number from {least} to {most}")
    return value


def views_of(spec: Mapping[str, Any], cache: CacheLayout) -> tuple[str, ...]:
    """Return the views that a component holds: the cache's, or those of its spec."""
    found = spec.get(STORED_VIEWS)
    if found not in (None, list(VIEWS[:1])):
        raise ValueError(f"{STORED_VIEWS} are {str(found)[:80]}, expected {list(VIEWS[:1])} or nothing")
    return cache.views if found is None else VIEWS[:1]


def _per_view(
    name: str, cache: CacheLayout, row: Sequence[int], dtype: str, *, num_views: int | None = None
) -> ArrayLayout:
    n, v = cache.num_samples, cache.num_views if num_views is None else num_views
    return ArrayLayout(
        name=name,
        shape=(n, v, *row),
        dtype=dtype,
        inner=(1, 1, *row),
        shard=(cache.shard_samples, v, *row),
    )


def _per_sample(name: str, cache: CacheLayout, dtype: str) -> ArrayLayout:
    # One inner chunk a shard: a byte a sample is not worth an index entry of 16.
    shard = (cache.shard_samples,)
    return ArrayLayout(name=name, shape=(cache.num_samples,), dtype=dtype, inner=shard, shard=shard)


def layer_array(name: str, layer: int | None) -> str:
    """Return the name of array `name` of one layer: `patch_tokens_layer8`; None is the only one, `patch_tokens`."""
    return name if layer is None else f"{name}_layer{layer}"


def feature_arrays(
    cache: CacheLayout,
    *,
    grid: tuple[int, int],
    width: int,
    cls_token: bool,
    dtype: str,
    layers: Sequence[int | None] = (None,),
) -> tuple[ArrayLayout, ...]:
    """Return the arrays of an encoder's group, `valid` last: T = h * w tokens, E = width, stored as `dtype`.

    Several `layers` are the same arrays once a layer: what is read together (a token's scale, its image's statistics)
    lies under one suffix, and a reader that has picked a layer sees a group like any other.
    """
    tokens = grid[0] * grid[1]
    arrays = []
    for layer in layers:
        arrays.append(_per_view(layer_array("patch_tokens", layer), cache, (tokens, width), dtype))
        if dtype == "int8":
            arrays.append(_per_view(layer_array("token_scale", layer), cache, (tokens,), "float16"))
        arrays.append(_per_view(layer_array("channel_mean", layer), cache, (width,), "float32"))
        arrays.append(_per_view(layer_array("channel_std", layer), cache, (width,), "float32"))
        if cls_token:
            arrays.append(_per_view(layer_array("cls_token", layer), cache, (width,), "float16"))
    return (*arrays, *record_arrays(cache))


def latent_arrays(
    cache: CacheLayout, *, channels: int, size: tuple[int, int], dtype: str, num_views: int
) -> tuple[ArrayLayout, ...]:
    """Return the arrays of an autoencoder's group, `valid` last: M = `channels` planes of h, w = `size`."""
    moments = _per_view("moments", cache, (channels, *size), dtype, num_views=num_views)
    return (moments, *record_arrays(cache))


def record_arrays(cache: CacheLayout) -> tuple[ArrayLayout, ...]:
    """Return what every component has. The shard of `valid` is written last: it records that a range is done."""
    return (_per_sample("source_bytes", cache, "int64"), _per_sample("valid", cache, "bool"))
