"""Which way an array is read: by DirectArray where its shards are ours, raw and local, else by LibraryArray."""

from typing import Any

import numpy as np

from ...cache_specs.components import CRC32C, KEY_ENCODING, LITTLE, check_array, read_array_metadata
from ...cache_specs.errors import CacheError
from ...cache_specs.layout import ArrayLayout
from ...cache_specs.storage import LocalPath, Location
from .direct_array import DirectArray
from .library_array import LibraryArray
from .row_reads import RowArray, RowReads


def open_array(
    group: Location, layout: ArrayLayout, *, reads: RowReads, check_reads: bool, compressor: str | None = None
) -> RowArray:
    """Open array `layout.name` of a component's group, by the direct path where its shards are stored raw.

    `compressor` is the component's; with None any chunks and codecs will do. Raises CacheError where the array is
    missing or is not what the cache's contract says.
    """
    folder = group / layout.name
    metadata = read_array_metadata(folder, layout)
    if compressor is not None:
        check_array(metadata, folder, layout, compressor)
    try:
        codecs = [(codec["name"], codec.get("configuration", {})) for codec in metadata["codecs"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise CacheError(f"{folder}: its codecs cannot be read ({error}); the cache is damaged") from error
    raw, checksummed = _stored_raw(metadata, codecs, layout)
    if raw and isinstance(folder, LocalPath):
        return DirectArray(folder.path, layout, checksummed=checksummed, files=reads.files, check_reads=check_reads)
    return LibraryArray(folder, layout, in_shard_files=_in_shard_files(metadata, layout))


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
