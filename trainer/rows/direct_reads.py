"""The rows of one batch from all its directly read arrays: positioned reads into the caller's buffers.

The reads of all arrays are one table, made out once for a batch's memory and placed anew for each batch of rows: after
megabytes have been copied everything else has left the processor's caches, and each call of numpy's counts. A few
threads do the reads in parts, some megabytes by one system call that copies from the page cache into the batch's memory
with the GIL released (queued_reads.py).

What is not in the page cache is asked for before it is waited for: once the kernel has said what that is, it is to
begin all of it, so that the disk sees the reads together and reads little else (mapped files read 9 times too much
here, and a mapped file that is cut kills the process).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .direct_array import ABSENT, DirectArray
from .helper_threads import HelperThreads
from .open_files import CLOSED, OpenFiles
from .queued_reads import MOST_AT_ONCE, NO_WAIT, QueuedReads, Requests

NDArray = np.ndarray[Any, Any]

WORTH_A_THREAD = 2**20  # bytes of a batch: for less, the caller's thread is done before another is awake
LEAST_COST = 2**20  # bytes of a part: before each one a thread waits for the GIL
READ_COST = 2**13  # bytes that are copied in the time that a read takes beside its copying


class DirectReads:
    """Reads batches with threads, and with the open files that the arrays of one reader share.

    The caller's thread is one of `num_threads`. Two share what a warm cache costs, which is copying; a cold one needs
    none, its reads are queued in the kernel.
    """

    def __init__(self, num_threads: int) -> None:
        self.files = OpenFiles()
        self._queues = QueuedReads()
        self._num_threads = num_threads
        self._helpers = HelperThreads(num_threads - 1)
        self._flags = NO_WAIT

    def prepare(self, reads: Sequence[tuple[DirectArray, NDArray]]) -> "DirectBuffers":
        """Prepare to read rows of each array into its buffer [B, *row], C-contiguous."""
        return DirectBuffers(reads, self._queues, self._num_threads)

    def read(self, buffers: "DirectBuffers", rows: NDArray, views: NDArray, meanwhile: Callable[[], None]) -> None:
        """Fill the buffers with inner chunks (rows[i], views[i]) of their arrays.

        The caller's thread calls `meanwhile` once nothing is left to begin. On return, or once this has raised, nothing
        writes into the buffers. One call at a time. Raises CacheError naming file and samples where a stored row cannot
        be read whole.
        """
        batch = _Batch(buffers, rows, views, self.files)
        if not self._flags:
            batch.ask_for(range(len(batch.offsets)))
        buffers.requests.place(batch.descriptors, batch.offsets, batch.lengths, flags=self._flags)

        def read(start: int, stop: int) -> None:
            try:
                buffers.requests.read(start, stop)
            except OSError:  # NFS and tmpfs know no NO_WAIT
                self._flags = 0

        alone = buffers.num_bytes < WORTH_A_THREAD
        self._helpers.share(buffers.parts, read, alone=alone, meanwhile=meanwhile)
        missing = buffers.requests.missing()
        if missing is not None:
            requests, got = (values.tolist() for values in missing)
            batch.ask_for(requests)
            self._helpers.share(list(zip(requests, got, strict=True)), batch.wait_for)
        if buffers.checks:
            self._helpers.share(buffers.parts, batch.check)


class DirectBuffers:
    """The memory of a batch as a table of reads, array by array and row by row, cut into parts for threads.

    arrays      in the order of the table
    rows        [B, row_bytes] uint8, the memory of each array
    lengths     [arrays * B] int64, bytes of a request
    num_bytes   of all
    checks      whether an array's rows are to be checked
    most_files  that one batch may lie in
    parts       ranges of requests, the larger first: threads that begin at different times then end together
    """

    def __init__(self, reads: Sequence[tuple[DirectArray, NDArray]], queues: QueuedReads, num_threads: int) -> None:
        num = len(reads[0][1])
        self.arrays = [array for array, _ in reads]
        self._queues, self._num_threads = queues, num_threads
        assert len({array.cut[:2] for array in self.arrays}) == 1, "the arrays of a batch are cut alike"
        self._as_many_views = len({array.cut for array in self.arrays}) == 1
        self.rows = [out.view(np.uint8).reshape(num, array.row_bytes) for array, out in reads]
        self.first_files = np.array([[array.first_file] for array in self.arrays])
        self.strides = np.array([[array.stride] for array in self.arrays])
        row_bytes = np.array([[array.row_bytes] for array in self.arrays])
        addresses = np.array([[rows.ctypes.data] for rows in self.rows]) + row_bytes * np.arange(num)
        self.lengths = np.repeat(row_bytes, num)
        self.requests = Requests(queues, addresses.ravel(), self.lengths)
        self.checks = any(array.checks for array in self.arrays)
        self.num_bytes = int(self.lengths.sum())
        self.most_files = sum(min(num, array.layout.num_shards) for array in self.arrays)
        self.parts = list(self._cut(num_threads))

    def locate(self, rows: NDArray, views: NDArray) -> tuple[NDArray, NDArray]:
        """Return the shards [B] of inner chunks (rows[i], views[i]), and their numbers in them, [B] or [arrays, B]."""
        shards, chunks = self.arrays[0].locate(rows, views)
        if not self._as_many_views:
            chunks = np.stack([array.locate(rows, views)[1] for array in self.arrays])
        return shards, chunks

    def __getitem__(self, part: slice) -> "DirectBuffers":
        """Return the buffers of some rows."""
        reads = [(array, rows[part]) for array, rows in zip(self.arrays, self.rows, strict=True)]
        return DirectBuffers(reads, self._queues, self._num_threads)

    def _cut(self, num_threads: int) -> Iterator[tuple[int, int]]:
        ends = np.cumsum(self.lengths + READ_COST)
        start = done = 0
        while start < len(ends):
            cost = max((int(ends[-1]) - done) // num_threads, LEAST_COST)
            stop = int(np.searchsorted(ends, done + cost, side="right"))
            stop = min(max(stop, start + 1), start + MOST_AT_ONCE)
            yield start, stop
            start, done = stop, int(ends[stop - 1])


class _Batch:
    """Where the rows of one batch lie: descriptors, offsets and lengths [arrays * B] int64 of its requests."""

    def __init__(self, buffers: DirectBuffers, rows: NDArray, views: NDArray, files: OpenFiles) -> None:
        self._buffers = buffers
        self._shards, chunks = buffers.locate(rows, views)
        numbers = buffers.first_files + self._shards
        descriptors = files.get(numbers)
        if descriptors.min(initial=0) == CLOSED:
            for array, closed in zip(buffers.arrays, descriptors == CLOSED, strict=True):
                for shard in np.unique(self._shards[closed]).tolist():
                    array.open(shard)
            descriptors = files.get(numbers)
        offsets = buffers.strides * chunks
        self.descriptors, self.offsets, self.lengths = descriptors.reshape(-1), offsets.reshape(-1), buffers.lengths
        if not all(array.counted for array in buffers.arrays):
            places = np.broadcast_to(chunks, offsets.shape)
            for array, of_chunks, of_array in zip(buffers.arrays, places, offsets, strict=True):
                array.look_up(self._shards, of_chunks, of_array)
            if self.offsets.min(initial=0) == ABSENT:
                self._fill_absent()

    def ask_for(self, requests: Iterable[int]) -> None:
        """Have the kernel begin to read what it does not hold of some requests, without waiting for any of it."""
        if hasattr(os, "posix_fadvise"):
            for i in requests:
                where = int(self.descriptors[i]), int(self.offsets[i]), int(self.lengths[i])
                os.posix_fadvise(*where, os.POSIX_FADV_WILLNEED)

    def wait_for(self, request: int, got: int) -> None:
        """Read what is left of a request of which `got` bytes have come."""
        array, shard, row = self._whose(request)
        array.read_whole(shard, int(self.descriptors[request]), row[got:].data, int(self.offsets[request]) + got)

    def check(self, start: int, stop: int) -> None:
        """Check the rows of requests start .. stop - 1 against their checksums."""
        for request in range(start, stop):
            array, shard, row = self._whose(request)
            if array.checks and self.lengths[request]:
                array.check_row(shard, int(self.descriptors[request]), row, int(self.offsets[request]))

    def _fill_absent(self) -> None:
        """Fill the rows that are not stored with zeros, and let their requests be of nothing."""
        absent = self.offsets == ABSENT
        for request in np.flatnonzero(absent).tolist():
            self._whose(request)[2][:] = 0
        self.offsets[absent] = 0
        self.lengths = np.where(absent, 0, self.lengths)

    def _whose(self, request: int) -> tuple[DirectArray, int, NDArray]:
        """Return array, shard and memory [row_bytes] uint8 of a request."""
        which, place = divmod(request, len(self._shards))
        return self._buffers.arrays[which], int(self._shards[place]), self._buffers.rows[which][place]
