"""Rows of one cached array, by global index, from disk into a caller's buffer.

Two readers with one interface, `begin(rows, views, out)`, which starts a read and returns what waits for its end:

    DirectArray   our own shards, stored raw: the index of a shard is parsed once, then each row is one positioned
                  read straight into the buffer, with the GIL released. The crc32c after each row is left to
                  `repa-cache verify` unless it is asked for (`check_reads`).
    LibraryArray  anything else (compressed shards), row by row through zarr-python: correct, and some 40 times slower.

The index is described in cache_specs/shard_index.py. A chunk that is not stored reads as the fill value, zero.
"""

import functools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..cache_specs.errors import CacheError
from ..cache_specs.layout import ArrayLayout
from ..cache_specs.shard_index import ABSENT as NOT_STORED
from ..cache_specs.shard_index import CHECKSUM_BYTES, checksum, index_bytes, unpack_index

ABSENT = -1  # offset of a chunk that is not stored, once parsed
MAX_OPEN_FILES = 256  # over all arrays of a reader; the usual limit of a process is 1,024

NDArray = np.ndarray[Any, Any]


class RowArray(Protocol):
    """What the cache's reader asks of an array; used by one thread at a time."""

    layout: ArrayLayout

    def begin(self, rows: NDArray, views: NDArray, out: NDArray) -> Callable[[], None]:
        """Begin to fill `out` [B, *row], C-contiguous, with inner chunk (rows[i], views[i]) of the array.

        The reader begins the arrays of a batch one after the other and then calls what each returned, which comes
        back once `out` is whole and nothing writes into it any more. Either raises CacheError naming file and samples
        where a stored row cannot be read whole.
        """
        ...


def read_all(reads: Sequence[tuple[RowArray, NDArray]], rows: NDArray, views: NDArray) -> None:
    """Fill the buffer of each array, all in flight together; raise the first error once nothing is."""
    errors: list[Exception] = []
    waits: list[Callable[[], None]] = []
    for array, out in reads:
        try:
            waits.append(array.begin(rows, views, out))
        except Exception as error:
            errors.append(error)
    for wait in waits:
        try:
            wait()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


class OpenFiles:
    """Descriptors of the most recently used files, a bounded number of them."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, int] = OrderedDict()

    def get(self, path: Path) -> int | None:
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
        return descriptor

    def open(self, path: Path) -> int:
        descriptor = self._open[path] = os.open(path, os.O_RDONLY)
        while len(self._open) > self._limit:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


class DirectArray:
    """Reads uncompressed shards without a Zarr library.

    Holds 8 bytes a stored chunk once its shard has been touched: 10 MB an array for 1,281,167 images.
    """

    def __init__(
        self, folder: Path, layout: ArrayLayout, *, checksummed: bool, files: OpenFiles, check_reads: bool = False
    ) -> None:
        self.folder = folder
        self.layout = layout
        self._row_bytes = layout.inner_bytes
        self._crc_bytes = CHECKSUM_BYTES if checksummed else 0
        self._check = check_reads and checksummed
        self._views = layout.chunks_per_shard[1] if len(layout.chunks_per_shard) > 1 else 1
        self._files = files
        self._paths: dict[int, Path] = {}
        self._offsets: dict[int, NDArray] = {}
        self._file_bytes: dict[int, int] = {}

    def begin(self, rows: NDArray, views: NDArray, out: NDArray) -> Callable[[], None]:
        return functools.partial(self._read, rows, views, out)

    def _read(self, rows: NDArray, views: NDArray, out: NDArray) -> None:
        buffer = out.reshape(-1).view(np.uint8).data
        inner = self.layout.inner[0]  # samples an inner chunk: 1, or a whole shard for `valid`
        shards, within = np.divmod(rows, self.layout.shard[0])
        chunks = within // inner * self._views + views
        row_bytes = self._row_bytes
        for i, (shard, chunk) in enumerate(zip(shards.tolist(), chunks.tolist(), strict=True)):
            descriptor = self._descriptor(shard)
            offset = int(self._offsets[shard][chunk])
            row = buffer[i * row_bytes : (i + 1) * row_bytes]
            if offset == ABSENT:
                out[i] = 0
            elif self._check:
                self._read_checked(shard, descriptor, row, offset)
            elif self._preadv(shard, descriptor, row, offset) != row_bytes:
                self._read_whole(shard, descriptor, row, offset)

    def _descriptor(self, shard: int) -> int:
        """Return the open file of `shard`, its index parsed."""
        path = self._paths.get(shard)
        if path is None:
            path = self._paths[shard] = self.folder / self.layout.shard_file(shard)
        descriptor = self._files.get(path)
        known = shard in self._offsets
        if descriptor is None or not known:  # open already, where another reader of this array (two layers) opened it
            try:
                descriptor = self._files.open(path) if descriptor is None else descriptor
                file_bytes = os.fstat(descriptor).st_size
            except OSError as error:
                raise self._error(shard, f"cannot be opened: {error.strerror}") from error
            if not known:
                self._offsets[shard] = self._read_index(shard, descriptor, file_bytes)
                self._file_bytes[shard] = file_bytes
            elif file_bytes != self._file_bytes[shard]:
                raise self._error(shard, f"changed while in use: {file_bytes} bytes, {self._file_bytes[shard]} before")
        return descriptor

    def _read_index(self, shard: int, descriptor: int, file_bytes: int) -> NDArray:
        """Return the offset of every inner chunk [chunks] int64, ABSENT where none is stored."""
        tail = bytearray(min(index_bytes(self.layout), file_bytes))
        self._read_whole(shard, descriptor, memoryview(tail), file_bytes - len(tail))
        try:
            entries = unpack_index(bytes(tail), self.layout, file_bytes=file_bytes, where="")
        except CacheError as error:
            raise self._error(shard, f"cannot be used{error}") from error
        stored = (entries != NOT_STORED).any(axis=1)
        stored_bytes = self._row_bytes + self._crc_bytes
        if (entries[stored, 1] != stored_bytes).any():
            raise self._error(shard, f"has an index with chunks that are not of {stored_bytes} bytes")
        offsets = np.full(len(entries), ABSENT, dtype=np.int64)
        offsets[stored] = entries[stored, 0]
        return offsets

    def _read_whole(self, shard: int, descriptor: int, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`: a read may return less than asked, and less for ever means that the file was cut."""
        filled = 0
        while filled < len(buffer):
            got = self._preadv(shard, descriptor, buffer[filled:], offset + filled)
            if got == 0:
                raise self._error(shard, f"ends at byte {offset + filled}, inside a row that its index places there")
            filled += got

    def _preadv(self, shard: int, descriptor: int, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(descriptor, [buffer], offset)
        except OSError as error:  # a failing disk, a file server that has lost the file
            raise self._error(shard, f"cannot be read at byte {offset}: {error.strerror}") from error

    def _read_checked(self, shard: int, descriptor: int, row: memoryview, offset: int) -> None:
        stored = memoryview(bytearray(self._row_bytes + CHECKSUM_BYTES))
        self._read_whole(shard, descriptor, stored, offset)
        row[:] = stored[:-CHECKSUM_BYTES]
        if checksum(bytes(row)) != bytes(stored[-CHECKSUM_BYTES:]):
            raise self._error(shard, f"holds a row, at byte {offset}, whose checksum does not hold")

    def _error(self, shard: int, what: str) -> CacheError:
        first = shard * self.layout.shard[0]
        last = min(first + self.layout.shard[0], self.layout.shape[0]) - 1
        return CacheError(
            f"{self.folder / self.layout.shard_file(shard)} (samples {first} to {last}) {what}. `repa-cache verify` on "
            f"this cache lists everything damaged; restore the file, or delete {self.folder.parent} and build it again"
        )


class LibraryArray:
    """Reads any shards through zarr-python, one inner chunk at a time."""

    def __init__(self, folder: Path, layout: ArrayLayout) -> None:
        import zarr

        self.folder = folder
        self.layout = layout
        self._array = zarr.open_array(folder, mode="r")

    def begin(self, rows: NDArray, views: NDArray, out: NDArray) -> Callable[[], None]:
        return functools.partial(self._read, rows, views, out)

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
