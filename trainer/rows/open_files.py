"""Open shard files, a bounded number of them over all arrays of a reader.

A cache of 1,281,167 samples in shards of 256 is 5,005 files an array, and a global shuffle touches all of them: opening
one costs about as much as reading a small row. So as many stay open as the process may hold beside its other needs.
"""

import contextlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...cache_specs.files.outside import open_regular

# A quarter of what the process may hold, of which a batch may take half again: there may be two readers, and other
# files are opened too. The usual limit is 1,024; repa-train raises it as far as it may (`raise_limit`).
SHARE_OF_LIMIT = 4
MOST = 32_768
CLOSED = -1

NDArray = np.ndarray[Any, Any]


def raise_limit() -> None:
    """Let this process open as many files as the system allows it, where the usual limit is for programs of 1990."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # other systems; limits that may not be raised
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def default_limit() -> int:
    """Return how many shard files a reader keeps open in this process."""
    try:
        import resource
    except ImportError:  # not a POSIX system: C libraries stop at 512
        return 512 // SHARE_OF_LIMIT
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(soft // SHARE_OF_LIMIT, MOST))


class OpenFiles:
    """Descriptors by file number; the least recently used are closed, but only between batches.

    16 bytes a file, open or not, and some 100 an open one. `limit` holds between batches; what one batch reads comes
    on top while it is read, and callers ask for no more than half of `limit` at once (row_reads.py). What is open is
    closed with the object.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = default_limit() if limit is None else limit
        self._open: dict[int, int] = {}  # number: descriptor
        self._descriptors = np.empty(0, dtype=np.int64)  # the same for many numbers at once
        self._used = np.empty(0, dtype=np.int64)  # the batch that last asked for the file, where some must be closed
        self._batch = 0
        weakref.finalize(self, _close_all, self._open)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, num: int) -> int:
        """Make room for `num` more files, closed for now; return the number of the first."""
        first = len(self._descriptors)
        self._descriptors = np.append(self._descriptors, np.full(num, CLOSED, dtype=np.int64))
        self._used = np.append(self._used, np.zeros(num, dtype=np.int64))
        return first

    def get(self, numbers: NDArray) -> NDArray:
        """Return the descriptors of files `numbers`, CLOSED for those to open; note their use where some must close."""
        if len(self._used) > self.limit:
            self._used[numbers] = self._batch
        return np.take(self._descriptors, numbers)

    def open(self, number: int, path: Path, *, check: Callable[[int], None]) -> None:
        """Open file `number` for reads at random places, unless `check` raises: what is open has been checked."""
        descriptor = open_regular(path)
        try:
            # Else the kernel reads on after each row, up to 8 MiB here for rows of 0.4.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            check(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._open[number] = self._descriptors[number] = descriptor

    def end_batch(self) -> None:
        """Close the least recently used where more than `limit` are open; nothing may be reading."""
        self._batch += 1
        if len(self) > self.limit:
            # An eighth more than needed: finding the oldest takes as long for one as for many.
            num = len(self) - self.limit + self.limit // 8
            numbers = np.fromiter(self._open, dtype=np.int64, count=len(self))
            for number in numbers[np.argpartition(self._used[numbers], num - 1)[:num]].tolist():
                self._descriptors[number] = CLOSED
                os.close(self._open.pop(number))

    def close(self) -> None:
        """Close all; a later `open` opens them again."""
        self._descriptors[:] = CLOSED
        _close_all(self._open)


def _close_all(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
