"""Which way an array is read: by DirectArray where its shards are ours, raw and local, else by LibraryArray."""

import json
from typing import Any

import numpy as np

from ...cache_specs.errors import CacheError
from ...cache_specs.group import METADATA
from ...cache_specs.layout import ArrayLayout
from ...cache_specs.storage import LocalPath, Location
from .direct_array import DirectArray
from .library_array import LibraryArray
from .row_reads import RowArray, RowReads

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}
KEY_ENCODING = {"name": "default", "configuration": {"separator": "."}}


def open_array(group: Location, layout: ArrayLayout, *, reads: RowReads, check_reads: bool) -> RowArray:
    """Open array `layout.name` of a component's group, by the direct path where its shards are stored raw.

    Raises CacheError where the array is missing or is not what the cache's contract says.
    """
    folder = group / layout.name
    try:
        metadata = json.loads((folder / METADATA).read() or b"")
        found = (tuple(metadata["shape"]), metadata["data_type"])
        codecs = [(codec["name"], codec.get("configuration", {})) for codec in metadata["codecs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{folder / METADATA} cannot be read ({error}); the cache is damaged") from error
    if found != (layout.shape, layout.dtype):
        raise CacheError(
            f"{folder} is {found[1]} {list(found[0])}; by the cache's attributes it should be {layout.dtype} "
            f"{list(layout.shape)}: the cache is damaged"
        )
    raw, checksummed = _stored_raw(metadata, codecs, layout)
    if raw and isinstance(folder, LocalPath):
        return DirectArray(folder.path, layout, checksummed=checksummed, files=reads.files, check_reads=check_reads)
    return LibraryArray(folder, layout, in_shard_files=_in_shard_files(metadata, layout))


def in_checked_shards(metadata: dict[str, Any], layout: ArrayLayout) -> bool:
    """Say whether an array is in shards as the contract has them, each chunk with its crc32c, compressed or not."""
    codecs = [(codec["name"], codec.get("configuration", {})) for codec in metadata["codecs"]]
    return _in_our_shards(metadata, codecs, layout) and codecs[0][1]["codecs"][-1] == CRC32C


def _in_shard_files(metadata: dict[str, Any], layout: ArrayLayout) -> bool:
    """Say whether a file is one range of samples, named as the contract names it."""
    grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return tuple(grid) == layout.shard and metadata["chunk_key_encoding"] == KEY_ENCODING


def _in_our_shards(metadata: dict[str, Any], codecs: list[tuple[str, dict[str, Any]]], layout: ArrayLayout) -> bool:
    """Say whether each file is a shard with the contract's inner chunks and an index at its end."""
    if len(codecs) != 1 or codecs[0][0] != "sharding_indexed":
        return False
    sharding = codecs[0][1]
    return (
        _in_shard_files(metadata, layout)
        and tuple(sharding["chunk_shape"]) == layout.inner
        and sharding.get("index_location", "end") == "end"
        and sharding["index_codecs"] == [LITTLE, CRC32C]
        and not metadata.get("fill_value")
    )


def _stored_raw(
    metadata: dict[str, Any], codecs: list[tuple[str, dict[str, Any]]], layout: ArrayLayout
) -> tuple[bool, bool]:
    """Say whether the shards are ours and uncompressed, and whether each chunk carries a crc32c."""
    if not _in_our_shards(metadata, codecs, layout):
        return False, False
    inner = codecs[0][1]["codecs"]
    plain_bytes = [LITTLE] if np.dtype(layout.dtype).itemsize > 1 else [LITTLE, {"name": "bytes"}]
    checksummed = inner[1:] == [CRC32C]
    return inner[0] in plain_bytes and (checksummed or len(inner) == 1), checksummed
