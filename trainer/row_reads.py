"""The reads of one batch: the same rows of several arrays, all in flight together.

Two kinds of array have this interface, and `shards.open_array` chooses:

    DirectArray   (direct_array.py) our own shards, stored raw, on a local disk: positioned reads by a few threads
    LibraryArray  (library_array.py) everything else: compressed shards, object stores, other people's sharding
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from ..cache_specs.layout import ArrayLayout
from .open_files import OpenFiles
from .queued_reads import QueuedReads

NUM_THREADS = 2
WORTH_A_THREAD = 2**20  # bytes of a batch: for less, the caller's thread is done before another is awake

NDArray = np.ndarray[Any, Any]
Task = Callable[[], None]


class RowArray(Protocol):
    """What a batch asks of an array; `begin` is called by one thread at a time."""

    layout: ArrayLayout

    def begin(self, rows: NDArray, views: NDArray, out: NDArray) -> Sequence[Task]:
        """Begin to fill `out` [B, *row], C-contiguous, with inner chunk (rows[i], views[i]) of the array.

        Returns what is left to do, to be called once each, by any threads in any order: `out` is whole when all have
        returned. Reads that need no thread are under way by then and one task waits for them. `begin` and tasks raise
        CacheError naming file and samples where a stored row cannot be read whole.
        """
        ...


class RowReads:
    """Reads batches with the threads and open files that the arrays of one reader share.

    The caller's thread is one of `num_threads`. Two share what a warm cache costs, which is copying; a cold
    one needs none, its reads are queued in the kernel (direct_array.py).
    """

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self.files = OpenFiles()
        self.queue = QueuedReads()
        self._helpers = num_threads - 1
        self._pool = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="read-rows") if num_threads > 1 else None

    def read(self, reads: Sequence[tuple[RowArray, NDArray]], rows: NDArray, views: NDArray) -> None:
        """Fill the buffer [B, *row] of each array with `rows` [B] in `views` [B], as `RowArray.begin` says.

        On return, or once this has raised, nothing writes into the buffers. One call at a time.
        """
        assert all(out.flags.c_contiguous and len(out) == len(rows) for _, out in reads), "buffers of another batch"
        # Each row of an array may lie in a file of its own, and these many may be open beside those of other batches.
        at_once = max(1, self.files.limit // 2 // max(1, len(reads)))
        # The largest first: helpers are at its rows while the others are made out.
        by_size = sorted(reads, key=lambda read: read[1].nbytes, reverse=True)
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            try:
                self._read([(array, out[part]) for array, out in by_size], rows[part], views[part])
            finally:
                self.files.end_batch()

    def _read(self, reads: Sequence[tuple[RowArray, NDArray]], rows: NDArray, views: NDArray) -> None:
        tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        errors: list[BaseException] = []

        def work() -> None:
            while (task := tasks.get()) is not None:
                if not errors:
                    try:
                        task()
                    except BaseException as error:
                        errors.append(error)

        worth_it = sum(out.nbytes for _, out in reads) >= WORTH_A_THREAD
        helpers = [self._pool.submit(work) for _ in range(self._helpers)] if self._pool and worth_it else []
        try:
            for array, out in reads:
                for task in array.begin(rows, views, out):
                    tasks.put(task)
        except BaseException as error:
            errors.append(error)
        for _ in range(len(helpers) + 1):
            tasks.put(None)
        work()
        for helper in helpers:
            # One that has not begun has nothing left to do. (In a forked child none ever begins.)
            if not helper.cancel():
                helper.result()
        if errors:
            raise errors[0]
