"""Which way an array is read: by DirectArray where its shards are ours, raw and local, else by LibraryArray."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cache_specs.errors import CacheError
from ..cache_specs.layout import ArrayLayout
from .direct_array import DirectArray
from .open_files import OpenFiles
from .row_reads import NDArray, RowArray


class LibraryArray:
    """Reads any shards through zarr-python, one inner chunk at a time."""

    def __init__(self, folder: Path, layout: ArrayLayout) -> None:
        import zarr

        self.folder = folder
        self.layout = layout
        self._array = zarr.open_array(folder, mode="r")

    def begin(self, rows: NDArray, views: NDArray, out: NDArray) -> Sequence[Callable[[], None]]:
        return [functools.partial(self._read, rows, views, out)]

    def _read(self, rows: NDArray, views: NDArray, out: NDArray) -> None:
        for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            try:
                if len(self.layout.shape) == 1:
                    chunk = np.asarray(self._array[row : row + self.layout.inner[0]])
                    out[i, : len(chunk)] = chunk
                else:
                    out[i] = self._array[row, view]
            except (OSError, ValueError, RuntimeError) as error:
                raise CacheError(
                    f"{self.folder}: sample {row}, view {view} cannot be read ({error}). `repa-cache verify` on this "
                    f"cache lists everything damaged"
                ) from error


def open_array(group: Path, layout: ArrayLayout, *, files: OpenFiles, check_reads: bool) -> RowArray:
    """Open array `layout.name` of a component's group, by the direct path where its shards are stored raw.

    Raises CacheError where the array is missing or is not what the cache's contract says.
    """
    folder = group / layout.name
    try:
        metadata = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
        found = (tuple(metadata["shape"]), metadata["data_type"])
        codecs = [(codec["name"], codec.get("configuration", {})) for codec in metadata["codecs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{folder / 'zarr.json'} cannot be read ({error}); the cache is damaged") from error
    if found != (layout.shape, layout.dtype):
        raise CacheError(
            f"{folder} is {found[1]} {list(found[0])}; by the cache's attributes it should be {layout.dtype} "
            f"{list(layout.shape)}: the cache is damaged"
        )
    raw, checksummed = _stored_raw(metadata, codecs, layout)
    if raw:
        return DirectArray(folder, layout, checksummed=checksummed, files=files, check_reads=check_reads)
    return LibraryArray(folder, layout)


def _stored_raw(
    metadata: dict[str, Any], codecs: list[tuple[str, dict[str, Any]]], layout: ArrayLayout
) -> tuple[bool, bool]:
    """Say whether the shards are ours and uncompressed, and whether each chunk carries a crc32c."""
    if len(codecs) != 1 or codecs[0][0] != "sharding_indexed":
        return False, False
    sharding = codecs[0][1]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain_bytes = [little] if np.dtype(layout.dtype).itemsize > 1 else [little, {"name": "bytes"}]
    inner = sharding["codecs"]
    checksummed = inner[1:] == [{"name": "crc32c"}]
    raw = (
        inner[0] in plain_bytes
        and (checksummed or len(inner) == 1)
        and sharding.get("index_location", "end") == "end"
        and sharding["index_codecs"] == [little, {"name": "crc32c"}]
        and tuple(sharding["chunk_shape"]) == layout.inner
        and tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]) == layout.shard
        and metadata.get("chunk_key_encoding") == {"name": "default", "configuration": {"separator": "."}}
        and not metadata.get("fill_value")
    )
    return raw, checksummed
