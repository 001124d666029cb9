"""One array in our own uncompressed shards: where each row lies, and whether it is the row that was asked for.

A shard's index is parsed once, when its file is first opened; after that a row is a descriptor and an offset, and many
rows, of all arrays of a batch, are one system call (direct_reads.py). Where the index says that chunks lie as the build
writes them, their places are counted: a table of all chunks takes 10 MB an array, mostly not in a processor's cache.

A row is never another row: index and file size are checked when a shard is opened, and that it is still the same file
when it is opened again; every read is whole or an error. A file that is replaced by a rename while it is open goes on
being read as it was. What is written into an open file in place is seen only with `check_reads`, which compares the
crc32c of each row. A chunk that is not stored reads as the fill value, zero.
"""

import errno
import functools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...cache_specs.errors import CacheError
from ...cache_specs.layout import ArrayLayout
from ...cache_specs.shard_index import ABSENT as NOT_STORED
from ...cache_specs.shard_index import CHECKSUM_BYTES, checksum, index_bytes, padding, unpack_index
from .open_files import OpenFiles

NDArray = np.ndarray[Any, Any]

ABSENT = -1  # offset of a chunk that is not stored, once parsed


class DirectArray:
    """Uncompressed shards without a Zarr library.

    row_bytes   of an inner chunk, without its checksum
    cut         samples a shard, samples an inner chunk, and views
    first_file  number of shard 0 among `files`; shard k is first_file + k
    stride      bytes from an inner chunk to the next in the shards of a build
    counted     whether that holds of all shards that have been opened
    checks      whether each row that is read is to be checked by `check_row`

    Memory: 41 bytes a shard; where shards are not as the build writes them, 8 a chunk (a view of a sample) besides.
    """

    def __init__(
        self, folder: Path, layout: ArrayLayout, *, checksummed: bool, files: OpenFiles, check_reads: bool = False
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.row_bytes = layout.inner_bytes
        self.checks = check_reads and checksummed
        self._stored_bytes = self.row_bytes + (CHECKSUM_BYTES if checksummed else 0)
        self.cut = (layout.shard[0], layout.inner[0], layout.num_views)
        self._files = files
        self.first_file = files.add(layout.num_shards)
        self.stride = self._stored_bytes + padding(self._stored_bytes)
        self.counted = True
        self._chunks = math.prod(layout.chunks_per_shard)
        # Offsets [num_shards * chunks a shard], ABSENT where a chunk is not stored, and which shards [num_shards] go by
        # them. Zeros take no memory until something is written there.
        self._offsets = np.zeros(layout.num_shards * self._chunks, dtype=np.int64)
        self._not_counted = np.zeros(layout.num_shards, dtype=bool)
        self._identity = np.zeros((layout.num_shards, 3), dtype=np.int64)  # of the files whose index stands there

    def locate(self, rows: NDArray, views: NDArray) -> tuple[NDArray, NDArray]:
        """Return the shards of inner chunks (rows[i], views[i]), and their numbers in them, both [B].

        An array of one view has that alone, whatever `views` are.
        """
        shard_samples, inner_samples, num_views = self.cut
        shards, chunks = np.divmod(rows, shard_samples)
        if inner_samples > 1:  # a whole shard, as of `valid`
            chunks //= inner_samples
        return shards, chunks if num_views == 1 else chunks * num_views + views

    def look_up(self, shards: NDArray, chunks: NDArray, offsets: NDArray) -> None:
        """Correct `offsets` [B] of inner chunks in shards not as the build writes them; ABSENT if not stored."""
        there = np.take(self._offsets, shards * self._chunks + chunks)
        np.copyto(offsets, there, where=self._not_counted[shards])

    def open(self, shard: int) -> None:
        """Open the file of `shard`; parse its index the first time, later make sure that it is the same file."""
        path = self.folder / self.layout.shard_file(shard)
        try:
            self._files.open(self.first_file + shard, path, check=functools.partial(self._check_file, shard))
        except OSError as error:
            advice = None
            if error.errno in (errno.EMFILE, errno.ENFILE):
                advice = f"This reader holds {len(self._files)} open; raise the limit (ulimit -n) or open fewer readers"
            raise self._error(shard, f"cannot be opened: {error.strerror}", advice) from error

    def read_whole(self, shard: int, descriptor: int, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`: a read may return less than asked, and nothing means that the file was cut."""
        filled = 0
        while filled < len(buffer):
            try:
                got = os.preadv(descriptor, [buffer[filled:]], offset + filled)
            except OSError as error:  # a failing disk, a file server that has lost the file
                raise self._error(shard, f"cannot be read at byte {offset + filled}: {error.strerror}") from error
            if got == 0:
                raise self._error(shard, f"ends at byte {offset + filled}, inside a row that its index places there")
            filled += got

    def check_row(self, shard: int, descriptor: int, row: NDArray, offset: int) -> None:
        """Raise CacheError unless `row` [row_bytes] uint8 has the crc32c that is stored behind it."""
        stored = bytearray(CHECKSUM_BYTES)
        self.read_whole(shard, descriptor, memoryview(stored), offset + self.row_bytes)
        if checksum(row) != stored:
            raise self._error(shard, f"holds a row, at byte {offset}, whose checksum does not hold")

    def _check_file(self, shard: int, descriptor: int) -> None:
        status = os.fstat(descriptor)
        # The inode is unsigned and of 64 bits.
        identity = np.array([status.st_size, status.st_mtime_ns, status.st_ino & (2**63 - 1)], dtype=np.int64)
        if not self._identity[shard].any():
            offsets = self._read_index(shard, descriptor, status.st_size)
            samples = min(self.layout.shape[0] - shard * self.layout.shard[0], self.layout.shard[0])
            as_built = np.arange(self.layout.num_chunks(samples)) * self.stride
            counted = np.array_equal(offsets[: len(as_built)], as_built)
            if not counted:
                self._offsets[shard * self._chunks :][: self._chunks] = offsets
                self.counted = False
            self._not_counted[shard] = not counted
            self._identity[shard] = identity  # last: a Ctrl-C before it has the index parsed again
        elif (identity != self._identity[shard]).any():
            raise self._error(shard, "is not the file that it was when this reader first opened it")

    def _read_index(self, shard: int, descriptor: int, file_bytes: int) -> NDArray:
        """Return the offset of every inner chunk [chunks] int64, ABSENT where none is stored."""
        tail = bytearray(min(index_bytes(self.layout), file_bytes))
        self.read_whole(shard, descriptor, memoryview(tail), file_bytes - len(tail))
        try:
            entries = unpack_index(bytes(tail), self.layout, file_bytes=file_bytes, where="")
        except CacheError as error:
            raise self._error(shard, f"cannot be used{error}") from error
        stored = (entries != NOT_STORED).any(axis=1)
        if (entries[stored, 1] != self._stored_bytes).any():
            raise self._error(shard, f"has an index with chunks that are not of {self._stored_bytes} bytes")
        offsets = np.full(len(entries), ABSENT, dtype=np.int64)
        offsets[stored] = entries[stored, 0]
        if (np.diff(np.sort(offsets[stored])) < self._stored_bytes).any():
            raise self._error(shard, "has an index with chunks that overlap")
        return offsets

    def _error(self, shard: int, what: str, advice: str | None = None) -> CacheError:
        first = shard * self.layout.shard[0]
        last = min(first + self.layout.shard[0], self.layout.shape[0]) - 1
        mend = (
            "`repa-cache verify` on this cache lists everything damaged; restore the file, or delete "
            f"{self.folder.parent} and build it again"
        )
        file = self.folder / self.layout.shard_file(shard)
        return CacheError(f"{file} (samples {first} to {last}) {what}. {advice or mend}")
