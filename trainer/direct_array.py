"""Rows of one array straight from our own uncompressed shards: positioned reads into the caller's buffer.

A shard's index is parsed once; after that some megabytes of rows are one system call, which copies from the page cache
into the batch's memory with the GIL released (queued_reads.py). What is not in the page cache is asked for before it is
waited for: the first read of a batch that would have to wait has the kernel begin all of the batch's reads, so that the
disk sees them together and reads little else (mapped files read 9 times too much here, and a mapped file that is cut
kills the process).

A row is never another row: index and file size are checked when a shard is opened, and that it is still the same file
when it is opened again; every read is whole or an error. A file that is replaced by a rename while it is open goes on
being read as it was. What is written into an open file in place is seen only with `check_reads`, which compares the
crc32c of each row. A chunk that is not stored reads as the fill value, zero.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache_specs.errors import CacheError
from ..cache_specs.layout import ArrayLayout
from ..cache_specs.shard_index import ABSENT as NOT_STORED
from ..cache_specs.shard_index import CHECKSUM_BYTES, checksum, index_bytes, unpack_index
from .open_files import CLOSED, OpenFiles
from .queued_reads import MOST_AT_ONCE, NO_WAIT, QueuedReads, Reads

NDArray = np.ndarray[Any, Any]
Task = Callable[[], None]

ABSENT = -1  # offset of a chunk that is not stored, once parsed
TASK_BYTES = 2**22  # what a thread takes at a time: between two it waits for the GIL; and both need work to the end


@dataclass(slots=True)
class _Batch:
    """The reads of one batch from one array.

    Row i, `out[i]` of uint8 [B, row bytes], is at byte `offsets[i]` of the file `descriptors[i]` of shard `shards[i]`.
    """

    shards: NDArray
    descriptors: NDArray
    offsets: NDArray
    out: NDArray
    reads: Reads
    asked: bool = False  # whether the kernel has been asked for all of it


class DirectArray:
    """Reads uncompressed shards without a Zarr library.

    Memory: 8 bytes a chunk (a view of a sample) once its shard has been touched, 10 MB an array for 1,281,167 images
    of one view, and 44 bytes a shard. Nothing a sample is a Python object.
    """

    def __init__(
        self,
        folder: Path,
        layout: ArrayLayout,
        *,
        checksummed: bool,
        files: OpenFiles,
        queue: QueuedReads,
        check_reads: bool = False,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self._row_bytes = layout.inner_bytes
        self._stored_bytes = self._row_bytes + (CHECKSUM_BYTES if checksummed else 0)
        self._check = check_reads and checksummed
        self._views = layout.chunks_per_shard[1] if len(layout.chunks_per_shard) > 1 else 1
        self._files = files
        self._queue = queue
        self._first_file = files.add(layout.num_shards)
        # Zeros that take no memory until a shard's index is written there.
        self._offsets = np.zeros((layout.num_shards, math.prod(layout.chunks_per_shard)), dtype=np.int64)
        self._identity = np.zeros((layout.num_shards, 3), dtype=np.int64)  # of the files whose index stands there
        self._flags = NO_WAIT

    def begin(self, rows: NDArray, views: NDArray, out: NDArray) -> Sequence[Task]:
        shards, within = np.divmod(rows, self.layout.shard[0])
        descriptors = self._files.get(self._first_file + shards)
        if (descriptors == CLOSED).any():
            for shard in np.unique(shards[descriptors == CLOSED]).tolist():
                self._open(shard)
            descriptors = self._files.get(self._first_file + shards)
        chunks = within // self.layout.inner[0] * self._views + views  # inner[0] is 1, or a whole shard for `valid`
        offsets, out = self._offsets[shards, chunks], out.view(np.uint8).reshape(len(rows), -1)
        if (offsets == ABSENT).any():
            out[offsets == ABSENT] = 0
            stored = np.flatnonzero(offsets != ABSENT)
            batches = [(shards[i : i + 1], descriptors[i : i + 1], offsets[i : i + 1], out[i : i + 1]) for i in stored]
        else:
            batches = [(shards, descriptors, offsets, out)]
        return [task for parts in batches for task in self._begin(*parts)]

    def _begin(self, shards: NDArray, descriptors: NDArray, offsets: NDArray, out: NDArray) -> list[Task]:
        batch = _Batch(
            shards, descriptors, offsets, out, self._queue.prepare(descriptors, offsets, out, flags=self._flags)
        )
        if not self._flags:
            self._ask_for(batch)
        num, step = len(out), min(max(1, TASK_BYTES // self._row_bytes), MOST_AT_ONCE)
        return [functools.partial(self._read, batch, i, min(i + step, num)) for i in range(0, num, step)]

    def _read(self, batch: _Batch, start: int, stop: int) -> None:
        """Fill rows start .. stop - 1 of the batch."""
        try:
            got = batch.reads.read(start, stop)
        except OSError:  # NFS and tmpfs know no NO_WAIT
            self._flags = 0
            got = np.zeros(stop - start, dtype=np.int64)
        if got is not None:
            for i in np.flatnonzero(got != self._row_bytes).tolist():
                self._ask_for(batch)
                self._read_rest(batch, start + i, int(got[i]))
        if self._check:
            for i in range(start, stop):
                self._check_row(int(batch.shards[i]), int(batch.descriptors[i]), batch.out[i], int(batch.offsets[i]))

    def _read_rest(self, batch: _Batch, place: int, got: int) -> None:
        shard, descriptor, offset = (int(a[place]) for a in (batch.shards, batch.descriptors, batch.offsets))
        self._read_whole(shard, descriptor, batch.out[place, got:].data, offset + got)

    def _check_row(self, shard: int, descriptor: int, row: NDArray, offset: int) -> None:
        stored = bytearray(CHECKSUM_BYTES)
        self._read_whole(shard, descriptor, memoryview(stored), offset + self._row_bytes)
        if checksum(row) != stored:
            raise self._error(shard, f"holds a row, at byte {offset}, whose checksum does not hold")

    def _ask_for(self, batch: _Batch) -> None:
        """Have the kernel begin to read what it does not hold of the batch, without waiting for any of it."""
        if batch.asked or not hasattr(os, "posix_fadvise"):
            return
        batch.asked = True
        for descriptor, offset in zip(batch.descriptors.tolist(), batch.offsets.tolist(), strict=True):
            os.posix_fadvise(descriptor, offset, self._row_bytes, os.POSIX_FADV_WILLNEED)

    def _open(self, shard: int) -> None:
        """Open the file of `shard`; parse its index the first time, later make sure that it is the same file."""
        number = self._first_file + shard
        try:
            descriptor = self._files.open(number, self.folder / self.layout.shard_file(shard))
        except OSError as error:
            raise self._error(shard, f"cannot be opened: {error.strerror}") from error
        try:
            self._check_file(shard, descriptor)
        except BaseException:
            self._files.discard(number)  # what is open counts as checked
            raise

    def _check_file(self, shard: int, descriptor: int) -> None:
        status = os.fstat(descriptor)
        # The inode is unsigned and of 64 bits.
        identity = np.array([status.st_size, status.st_mtime_ns, status.st_ino & (2**63 - 1)], dtype=np.int64)
        if not self._identity[shard].any():
            self._offsets[shard] = self._read_index(shard, descriptor, status.st_size)
            self._identity[shard] = identity
        elif (identity != self._identity[shard]).any():
            raise self._error(shard, "is not the file that it was when this reader first opened it")

    def _read_index(self, shard: int, descriptor: int, file_bytes: int) -> NDArray:
        """Return the offset of every inner chunk [chunks] int64, ABSENT where none is stored."""
        tail = bytearray(min(index_bytes(self.layout), file_bytes))
        self._read_whole(shard, descriptor, memoryview(tail), file_bytes - len(tail))
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

    def _read_whole(self, shard: int, descriptor: int, buffer: memoryview, offset: int) -> None:
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

    def _error(self, shard: int, what: str) -> CacheError:
        first = shard * self.layout.shard[0]
        last = min(first + self.layout.shard[0], self.layout.shape[0]) - 1
        return CacheError(
            f"{self.folder / self.layout.shard_file(shard)} (samples {first} to {last}) {what}. `repa-cache verify` on "
            f"this cache lists everything damaged; restore the file, or delete {self.folder.parent} and build it again"
        )
