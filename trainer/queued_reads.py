"""Positioned reads, many by one system call.

Python pays 1 to 3 microseconds for an `os.preadv`, much of it to release and take the GIL, for which two threads then
wait in turn: for small rows (scales, statistics) more than the read itself. Linux takes a whole queue of reads in one
call, io_submit(2); what is in the page cache has been copied when it returns, and the GIL is free all the time. Where
there is no such call (another system or processor, a sandbox that forbids it) `os.preadv` does the same, row by row.
"""

import collections
import ctypes
import errno
import os
import platform
import sys
import weakref
from typing import Any

import numpy as np

NO_WAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux: return what is in the page cache and begin to read the rest
MOST_AT_ONCE = 256  # reads a call

NDArray = np.ndarray[Any, Any]

# The numbers of io_setup, io_destroy, io_getevents and io_submit: C libraries have no functions for them.
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
# struct iocb of linux/aio_abi.h as eight words: data, flags of the read (high half), file (high half; in the low one
# opcode 0 = read and priority 0), address, bytes, offset, reserved, flags of the request. Both little-endian.
_REQUEST_WORDS = 8
_EVENT_WORDS, _DATA, _RESULT = 4, 0, 2  # struct io_event, and those that are read
_WORD = 8  # bytes


class QueuedReads:
    """Reads for several threads at once; each call takes a queue of the kernel's that no other uses."""

    def __init__(self) -> None:
        calls = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
        self._setup, self._destroy, self._events, self._submit = calls or (0,) * 4
        self._libc = ctypes.CDLL(None, use_errno=True) if calls else None
        self._idle: collections.deque[ctypes.c_ulong] = collections.deque()
        weakref.finalize(self, _destroy_queues, self._libc, self._destroy, self._idle)

    def prepare(self, files: NDArray, offsets: NDArray, out: NDArray, *, flags: int) -> "Reads":
        """Prepare to read row i of `out` [n, bytes] uint8, contiguous, from byte offsets[i] of descriptor files[i]."""
        return Reads(self, files, offsets, out, flags)

    def call(self, reads: "Reads", start: int, stop: int) -> bool:
        """Read rows start .. stop - 1 by one call, which fills the events of `reads`; say whether there is one."""
        queue = self._take_queue()
        if queue is None:
            return False
        assert self._libc is not None
        syscall, num = self._libc.syscall, stop - start
        try:
            begun = syscall(self._submit, queue, _long(num), _pointer(reads.pointers_at + _WORD * start))
            if begun < 0 and ctypes.get_errno() == errno.EOPNOTSUPP:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            # One that the kernel refuses keeps those after it from being begun: they stay failed, like it.
            while begun > 0:  # until nothing can write into the rows any more
                events = _pointer(reads.events_at + _EVENT_WORDS * _WORD * start)
                ended = syscall(self._events, queue, _long(begun), _long(begun), events, None)
                assert ended >= 0 or ctypes.get_errno() == errno.EINTR, os.strerror(ctypes.get_errno())
                start, begun = start + max(0, ended), begun - max(0, ended)
        except BaseException:  # Ctrl-C among them: what is left in the queue must not count for other reads
            _destroy_queues(self._libc, self._destroy, collections.deque([queue]))
            raise
        self._idle.append(queue)
        return True

    def _take_queue(self) -> ctypes.c_ulong | None:
        if self._idle:
            try:
                return self._idle.pop()
            except IndexError:  # another thread was faster
                pass
        queue = ctypes.c_ulong(0)
        if self._libc is None or self._libc.syscall(self._setup, _long(MOST_AT_ONCE), ctypes.byref(queue)):
            self._libc = None  # forbidden, or the machine's queues (fs.aio-max-nr) are used up: not tried again
            return None
        return queue


class Reads:
    """The reads of a batch from one array, made out once and begun in parts by any threads."""

    def __init__(self, queues: QueuedReads, files: NDArray, offsets: NDArray, out: NDArray, flags: int) -> None:
        num, row_bytes = out.shape
        places = np.arange(num)
        self._queues = queues
        self._files, self._offsets, self._out, self._flags = files, offsets, out, flags
        self._requests = np.zeros((num, _REQUEST_WORDS), dtype=np.int64)
        self._requests[:, 0] = places
        self._requests[:, 1] = flags << 32
        self._requests[:, 2] = files.astype(np.int64) << 32
        self._requests[:, 3] = out.ctypes.data + places * row_bytes
        self._requests[:, 4] = row_bytes
        self._requests[:, 5] = offsets
        self._pointers = self._requests.ctypes.data + places * (_REQUEST_WORDS * _WORD)
        self._events = np.full((num, _EVENT_WORDS), -1, dtype=np.int64)
        self.pointers_at, self.events_at = self._pointers.ctypes.data, self._events.ctypes.data

    def read(self, start: int, stop: int) -> NDArray | None:
        """Read rows start .. stop - 1, MOST_AT_ONCE at most; return how many bytes came [stop - start] int64.

        None says that all came, as is usual. Fewer than asked come where the file ends, where a read failed (0), and
        with NO_WAIT where they are not in the page cache. Raises OSError with EOPNOTSUPP where the file system does not
        know the flag.
        """
        if not self._queues.call(self, start, stop):
            return self._read_one_by_one(start, stop)
        events = self._events[start:stop]
        if (events[:, _RESULT] == self._out.shape[1]).all():
            return None
        got = np.zeros(stop - start, dtype=np.int64)
        ended = events[events[:, _DATA] >= 0]
        got[ended[:, _DATA] - start] = ended[:, _RESULT].clip(min=0)
        return got

    def _read_one_by_one(self, start: int, stop: int) -> NDArray:
        got = np.zeros(stop - start, dtype=np.int64)
        for i in range(start, stop):
            try:
                got[i - start] = os.preadv(int(self._files[i]), [self._out[i].data], int(self._offsets[i]), self._flags)
            except OSError as error:
                if self._flags and error.errno == errno.EOPNOTSUPP:
                    raise
        return got


def _long(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _destroy_queues(libc: Any, call: int | None, queues: "collections.deque[ctypes.c_ulong]") -> None:
    while queues:
        libc.syscall(call, queues.pop())
