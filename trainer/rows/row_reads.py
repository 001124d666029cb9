"""The reads of one batch: the same rows of several arrays, all in flight together.

There are two kinds of array, and `shards.open_array` chooses:

    DirectArray   (direct_array.py) our own shards, stored raw, on a local disk: positioned reads by a few threads
    LibraryArray  (library_array.py) everything else: compressed shards, object stores, other people's sharding
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .direct_array import DirectArray
from .direct_reads import DirectBuffers, DirectReads
from .library_array import LibraryArray
from .open_files import OpenFiles

NUM_THREADS = 2

NDArray = np.ndarray[Any, Any]
RowArray = DirectArray | LibraryArray


def _nothing() -> None:
    pass


class RowReads:
    """Reads batches of the arrays of one reader, which share its threads and open files.

    num_threads  that read directly, the caller's among them
    """

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._direct = DirectReads(num_threads)

    @property
    def files(self) -> OpenFiles:
        """Shard files that stay open."""
        return self._direct.files

    def prepare(self, reads: Sequence[tuple[RowArray, NDArray]]) -> "Buffers":
        """Prepare to read rows of each array into its buffer [B, *row], C-contiguous; once for a ring's batch."""
        return Buffers(reads, self._direct)

    def read(
        self, buffers: "Buffers", rows: NDArray, views: NDArray, *, meanwhile: Callable[[], None] = _nothing
    ) -> None:
        """Fill the buffers with inner chunks (rows[i], views[i]) of their arrays, and call `meanwhile`.

        On return, or once this has raised, nothing writes into the buffers. One call at a time. Raises CacheError
        naming file and samples where a stored row cannot be read whole.
        """
        waits = [array.begin(rows, views, out) for array, out in buffers.library]
        most_files = self.files.limit // 2  # beside those of other batches
        if buffers.direct is None:
            meanwhile()
        elif buffers.direct.most_files <= most_files:
            self._read_direct(buffers.direct, rows, views, meanwhile)
        else:  # each row of an array may lie in a file of its own
            at_once = max(1, most_files // len(buffers.direct.arrays))
            for first in range(0, len(rows), at_once):
                part = slice(first, first + at_once)
                self._read_direct(buffers.direct[part], rows[part], views[part], _nothing)
            meanwhile()
        for wait in waits:
            wait()

    def _read_direct(
        self, buffers: DirectBuffers, rows: NDArray, views: NDArray, meanwhile: Callable[[], None]
    ) -> None:
        try:
            self._direct.read(buffers, rows, views, meanwhile)
        finally:
            self.files.end_batch()


class Buffers:
    """Arrays of both kinds, and the memory [B, *row] that their rows are read into."""

    def __init__(self, reads: Sequence[tuple[RowArray, NDArray]], direct: DirectReads) -> None:
        num = len(reads[0][1])
        assert all(out.flags.c_contiguous and len(out) == num for _, out in reads), "buffers of one batch"
        # The largest first, so that what threads are left with at the end is small.
        by_size = sorted(reads, key=lambda read: read[1].nbytes, reverse=True)
        self.library = [(array, out) for array, out in by_size if isinstance(array, LibraryArray)]
        ours = [(array, out) for array, out in by_size if isinstance(array, DirectArray)]
        self.direct = direct.prepare(ours) if ours else None
