"""The metadata of a cache as zarr renders it: every file of the root, of a component and of a fit, as bytes.

Rendered in memory and written by the store, so that a kill leaves either the old file or the new one. Metadata holds no
time, host, path or job state, and its order is fixed: the same build gives the same bytes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from ...cache_specs.binding import checksums_layout
from ...cache_specs.derived import Fit
from ...cache_specs.group import METADATA, with_digest
from ...cache_specs.layout import METADATA_CHUNK, ArrayLayout, CacheLayout
from ...cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from .shards import COMPRESSOR_CONFIGS


def _render(
    attributes: Mapping[str, Any],
    arrays: Mapping[str, dict[str, Any]],
    rows: Mapping[str, np.ndarray] | None = None,
) -> dict[str, bytes]:
    """Return every file of a group, by relative path, as zarr writes it; `rows` fills the arrays that it names."""
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=with_digest(attributes))
    for name, options in arrays.items():
        array = group.create_array(name, **options)
        if rows and name in rows:
            array[:] = rows[name]
    return {path: buffer.to_bytes() for path, buffer in files.items()}


def root_files(cache: CacheLayout, rows: Mapping[str, np.ndarray] | None = None) -> dict[str, bytes]:
    """Return the files of a cache that belong to no component, by relative path, the root group's metadata last.

    `rows` are the manifest's `sample_id` and `label`; without them only metadata is returned.
    """
    common = {
        "shape": (cache.num_samples,),
        "chunks": (METADATA_CHUNK,),
        "compressors": [ZstdCodec(level=1, checksum=False), Crc32cCodec()],
        "config": {"write_empty_chunks": True},  # a chunk whose labels are all 0 is written too
    }
    arrays: dict[str, dict[str, Any]] = {
        "sample_id": {"dtype": np.dtypes.StringDType(), **common},
        "label": {"dtype": "int32", **common},
    }
    files = _render(cache.attributes(), arrays, rows)
    root = files.pop(METADATA)
    groups = {f"{group}/{METADATA}": _render({}, {})[METADATA] for group in (LATENTS, FEATURES)}
    return {**groups, **files, METADATA: root}


def component_files(
    component: ComponentSpec, cache: CacheLayout, results: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Return the metadata files of a component, by path relative to its group, the group's own last."""
    arrays = {layout.name: _array_options(layout, component.compressor) for layout in component.arrays(cache)}
    # Beside the group's own record: whose shards these are is still known where that one was deleted.
    arrays["valid"]["attributes"] = {"component_fingerprint": component.fingerprint(cache)}
    numbers = checksums_layout(cache, len(arrays))
    arrays[numbers.name] = {
        **_array_options(numbers, "none"),
        "shards": None,  # a row is a chunk, and a file
        "attributes": {"arrays": list(arrays)},
    }
    files = _render({**component.attributes(cache), **(results or {})}, arrays)
    group = files.pop(METADATA)
    return {**files, METADATA: group}


def fit_files(fit: Fit) -> dict[str, bytes]:
    """Return the files of a fit, by path relative to its group, the group's own metadata last."""
    arrays: dict[str, dict[str, Any]] = {
        name: {
            "shape": values.shape,
            "dtype": values.dtype.name,
            "chunks": values.shape,
            "filters": None,
            "serializer": BytesCodec(endian="little"),
            "compressors": [Crc32cCodec()],
            "fill_value": 0,
            "chunk_key_encoding": {"name": "default", "separator": "."},
            "config": {"write_empty_chunks": True},
        }
        for name, values in fit.arrays.items()
    }
    files = _render(fit.attributes(), arrays, fit.arrays)
    group = files.pop(METADATA)
    return {**files, METADATA: group}


def fits_file() -> bytes:
    """Return the metadata of the group of all fits, which a cache has from its first one on."""
    return _render({}, {})[METADATA]


def _array_options(layout: ArrayLayout, compressor: str) -> dict[str, Any]:
    compressors: list[Any] = []
    if compressor == "zstd":
        compressors.append(ZstdCodec(**COMPRESSOR_CONFIGS["zstd"]))
    elif compressor == "blosc":
        itemsize = np.dtype(layout.dtype).itemsize
        config = {**COMPRESSOR_CONFIGS["blosc"], "shuffle": "shuffle" if itemsize > 1 else "noshuffle"}
        compressors.append(BloscCodec(typesize=itemsize, **config))
    compressors.append(Crc32cCodec())
    endian = "little" if np.dtype(layout.dtype).itemsize > 1 else None
    return {
        "shape": layout.shape,
        "dtype": layout.dtype,
        "chunks": layout.inner,
        "shards": layout.shard,
        "filters": None,
        "serializer": BytesCodec(endian=endian),
        "compressors": compressors,
        "fill_value": 0,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }
