"""Positioned reads, many by one system call.

Python pays 1 to 3 microseconds for an `os.preadv`, much of it to release and take the GIL, for which two threads then
wait in turn: for small rows (scales, statistics) more than the read itself. Linux takes a whole queue of reads in one
call, io_submit(2); what is in the page cache has been copied when it returns, and the GIL is free all the time. Where
there is no such call (another system or processor, a sandbox that forbids it) `os.preadv` does the same, row by row.
"""

import collections
import ctypes
import errno
import functools
import os
import platform
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

NO_WAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux: return what is in the page cache and begin to read the rest
MOST_AT_ONCE = 512  # reads a call

NDArray = np.ndarray[Any, Any]

# The numbers of io_setup, io_destroy, io_getevents and io_submit: C libraries have no functions for them.
_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
# struct iocb of linux/aio_abi.h as eight words: data, flags of the read (high half), file (high half; in the low one
# opcode 0 = read and priority 0), address, bytes, offset, reserved, flags of the request. Both little-endian.
_REQUEST_WORDS = 8
_EVENT_WORDS, _DATA, _RESULT = 4, 0, 2  # struct io_event, and those that are read
_WORD = 8  # bytes


class QueuedReads:
    """Reads for several threads at once; each call takes a queue of the kernel's that no other uses."""

    def __init__(self) -> None:
        self._calls = _system_calls()
        self._more = True  # whether another queue may be had
        self._process = os.getpid()
        self._idle: collections.deque[int] = collections.deque()
        if self._calls is not None:
            weakref.finalize(self, _destroy_queues, self._calls, self._idle)

    def call(self, requests: "Requests", start: int, stop: int) -> int | None:
        """Do requests start .. stop - 1 by one call; return how many have ended, whose events are from `start` on.

        None where there is no such call.
        """
        calls, queue = self._calls, self._take_queue()
        if calls is None or queue is None:
            return None
        end = start
        try:
            begun = calls.submit(queue, stop - start, requests.pointers_at + _WORD * start)
            if begun < 0 and ctypes.get_errno() == errno.EOPNOTSUPP:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            # One that the kernel refuses keeps those after it from being begun: they stay failed, like it.
            while begun > 0:  # until nothing can write into the memory any more
                ended = calls.events(queue, begun, begun, requests.events_at + _EVENT_WORDS * _WORD * end, None)
                assert ended >= 0 or ctypes.get_errno() == errno.EINTR, os.strerror(ctypes.get_errno())
                end, begun = end + max(0, ended), begun - max(0, ended)
        except BaseException:  # Ctrl-C among them: what is left in the queue must not count for other reads
            calls.destroy(queue)
            raise
        if begun < 0 and os.getpid() != self._process:  # a parent's, in a forked child, would fail for ever
            calls.destroy(queue)
        else:
            self._idle.append(queue)
        return end - start

    def _take_queue(self) -> int | None:
        if self._idle:
            try:
                return self._idle.pop()
            except IndexError:  # another thread was faster
                pass
        queue = ctypes.c_ulong(0)
        if self._calls is None or not self._more or self._calls.setup(MOST_AT_ONCE, ctypes.addressof(queue)):
            self._more = False  # forbidden, or the machine's queues (fs.aio-max-nr) are used up: not tried again
            return None
        return queue.value


class Requests:
    """Reads into the same pieces of memory, again and again: placed in files, done in parts, and then looked at.

    addresses  [n] of the memory, which whoever reads keeps until the reads have ended
    lengths    [n] int64, bytes of each, unless it is placed with others
    """

    def __init__(self, queues: QueuedReads, addresses: NDArray, lengths: NDArray) -> None:
        num = len(addresses)
        places = np.arange(num)
        self._queues = queues
        self._table = np.zeros((num, _REQUEST_WORDS), dtype=np.int64)
        self._table[:, 0] = places
        self._table[:, 3] = addresses
        self._files, self._offsets, self._lengths = self._table[:, 2], self._table[:, 5], self._table[:, 4]
        self._pointers = self._table.ctypes.data + places * (_REQUEST_WORDS * _WORD)
        self._events = np.zeros((num, _EVENT_WORDS), dtype=np.int64)
        self.pointers_at, self.events_at = self._pointers.ctypes.data, self._events.ctypes.data
        self._set: tuple[NDArray | None, int] = (None, 0)
        self._set_all(lengths, 0)

    def place(self, files: NDArray, offsets: NDArray, lengths: NDArray, *, flags: int) -> None:
        """Let read i be of lengths[i] bytes at offsets[i] of descriptor files[i]; none may be under way.

        files, offsets and lengths are [n] int64; `lengths` is not changed between two calls that are given it.
        """
        if lengths is not self._set[0] or flags != self._set[1]:
            self._set_all(lengths, flags)
        np.left_shift(files, 32, out=self._files)
        self._offsets[:] = offsets

    def _set_all(self, lengths: NDArray, flags: int) -> None:
        """Set what seldom changes; a Ctrl-C on the way has it set again the next time."""
        self._set = (None, 0)
        self._lengths[:] = lengths
        self._table[:, 1] = flags << 32
        self._num_bytes = int(lengths.sum())
        self._set = (lengths, flags)

    def read(self, start: int, stop: int) -> None:
        """Do requests start .. stop - 1, MOST_AT_ONCE at most; threads may, each its own.

        Raises OSError with EOPNOTSUPP where a file system does not know the flags.
        """
        ended = 0
        try:
            done = self._queues.call(self, start, stop)
            ended = self._read_one_by_one(start, stop) if done is None else done
        finally:
            if ended < stop - start:
                self._events[start + ended : stop] = -1

    def missing(self) -> tuple[NDArray, NDArray] | None:
        """Return which requests got less than they asked for [m], and how many bytes they got [m], both int64.

        None says that all came, as is usual. Fewer than asked come where the file ends, where a read failed (0), and
        with NO_WAIT where they are not in the page cache. Every request must have been read since it was placed.
        """
        places, came = self._events[:, _DATA], self._events[:, _RESULT]
        if came.sum() == self._num_bytes:  # none gives more than was asked for
            return None
        lengths = self._lengths.copy()
        got = np.zeros_like(lengths)
        ended = places >= 0
        got[places[ended]] = came[ended].clip(min=0)
        short = np.flatnonzero(got != lengths)
        return short, got[short]

    def _read_one_by_one(self, start: int, stop: int) -> int:
        for i, (_, flags, file, address, length, offset, *_) in enumerate(self._table[start:stop].tolist(), start):
            self._events[i, _DATA], self._events[i, _RESULT] = i, 0
            try:
                self._events[i, _RESULT] = os.preadv(
                    file >> 32, [(ctypes.c_char * length).from_address(address)], offset, flags >> 32
                )
            except OSError as error:
                if flags and error.errno == errno.EOPNOTSUPP:
                    raise
        return stop - start


@dataclass(frozen=True)
class _Calls:
    """System calls on a queue, which release the GIL; each returns a number below zero, and sets errno, on failure."""

    setup: Callable[..., int]
    destroy: Callable[..., int]
    events: Callable[..., int]
    submit: Callable[..., int]


def _system_calls() -> _Calls | None:
    numbers = _NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
    if numbers is None:
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *types: Any) -> Callable[..., int]:
        function = libc["syscall"]  # an object of its own each time
        function.argtypes, function.restype = (ctypes.c_long, *types), ctypes.c_long
        return functools.partial(function, number)

    setup, destroy, events, submit = numbers
    queue, count, address = ctypes.c_ulong, ctypes.c_long, ctypes.c_void_p
    return _Calls(
        setup=call(setup, count, address),
        destroy=call(destroy, queue),
        events=call(events, queue, count, count, address, address),
        submit=call(submit, queue, count, address),
    )


def _destroy_queues(calls: _Calls, queues: "collections.deque[int]") -> None:
    while queues:
        calls.destroy(queues.pop())
