"""Micro-batches read ahead of the step by one thread, into a ring of reused buffers.

In: `Batches` and the steps to serve. Out: `next()`, a micro-batch on the training device. One batch is read at a time,
by two threads (rows/direct_reads.py): two at a time, a thread each, lose to that, as two batches do not fit in the
processor's cache where one does; worker processes, which copy every batch again, lose to both; fresh buffers cost page
faults (measured for this project).

On CUDA the buffers are pinned, and the thread copies each batch to the device as soon as it is read, on a stream of
its own: on the compute stream a copy would stand behind every step that the host has queued, and the host would then
wait for the device where it means to wait for data.
"""

import collections
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from .batches import Batches, MicroBatch

RUN_AHEAD = 2  # micro-batches that the host may queue before the device has begun them
READING_BYTES = 2**24  # code, tables and threads of reading itself: 13 to 15 MB measured
MOST_AHEAD = 32  # micro-batches read ahead: small ones are evened out by then, and more would only take memory


def batches_ahead(prefetch_bytes: int, batch_bytes: int) -> int:
    """Return how many micro-batches of `batch_bytes` to read ahead within `prefetch_bytes`, at least 1.

    READING_BYTES of the bound are what reading takes beside the batches.
    The ring holds one more, the one in use, so that its memory is at most the bound and one micro-batch; a single one
    larger than the bound is read ahead all the same.
    """
    return max(1, min(MOST_AHEAD, (prefetch_bytes - READING_BYTES) // batch_bytes))


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A micro-batch on the training device, the one of the ring that it was read into, and on CUDA the copy's end."""

    batch: MicroBatch
    buffers: MicroBatch
    copied: torch.cuda.Event | None


class ReadAhead:
    """Serves the micro-batches of steps `first` to `last` - 1 in order, `depth` of them read ahead.

    The ring has `depth` + 1 buffers, on CUDA pinned ones (torch rounds each tensor there up to a power of two: up to
    twice the bytes), and the device has as many micro-batches beside those in use. A batch is valid until the next
    `next()`: its buffers are then filled anew. What the thread raises is raised by `next()`. Use it in a `with` block:
    leaving it ends the thread.

    waited_s   seconds that `next()` has waited for the thread; the device may have had work left meanwhile
    reading_s  seconds that the thread has spent on the batches that it has read: rows, random numbers, copies begun
    """

    def __init__(self, batches: Batches, *, first: int, last: int, depth: int, device: torch.device) -> None:
        self._batches = batches
        self._steps = range(first, last)
        self._copies = CopyStream(device) if device.type == "cuda" else None
        self.depth = depth
        self.waited_s = 0.0
        self.reading_s = 0.0
        self._in_use: MicroBatch | None = None
        # A free buffer comes with the copy that last read from it: it may still be under way.
        self._free: queue.SimpleQueue[tuple[MicroBatch, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Ready | BaseException] = queue.SimpleQueue()
        self._to_allocate = depth + 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._free.put(None)  # wakes the thread where it waits for a buffer
        self._thread.join()

    def next(self) -> MicroBatch:
        """Return the next micro-batch on the device."""
        if self._copies is not None:
            self._copies.pace()
        elif self._in_use is not None:
            self._free.put((self._in_use, None))
            self._in_use = None
        start = time.perf_counter()
        item = self._ready.get()
        self.waited_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        if item.copied is None or self._copies is None:
            self._in_use = item.buffers
            return self._batches.complete(item.batch)
        # Given back here and not by the thread: the ring also bounds how many batches wait on the device.
        self._free.put((item.buffers, item.copied))
        return self._batches.complete(self._copies.hand_over(item.batch, item.copied))

    def _read(self) -> None:
        try:
            if self._copies is not None:
                torch.cuda.set_device(self._copies.device)  # of this thread; it starts at device 0
            for step in self._steps:
                for micro in range(self._batches.place.accumulation):
                    buffers = self._next_buffers()
                    if buffers is None:
                        return
                    start = time.perf_counter()
                    batch, copied = self._batches.read(step, micro, out=buffers), None
                    if self._copies is not None:
                        batch, copied = self._copies.begin(batch)
                    self.reading_s += time.perf_counter() - start
                    self._ready.put(_Ready(batch=batch, buffers=buffers, copied=copied))
        except BaseException as error:  # whatever it is, the loop must hear of it
            self._ready.put(error)

    def _next_buffers(self) -> MicroBatch | None:
        """Return buffers to fill, new ones until the ring is whole; None where the reading is to stop."""
        if self._to_allocate > 0 and self._free.empty():
            self._to_allocate -= 1
            return self._batches.empty(pin_memory=self._copies is not None)
        free = self._free.get()
        if free is None or self._stop.is_set():
            return None
        buffers, copied = free
        if copied is not None:
            copied.synchronize()
        return buffers


class CopyStream:
    """Copies of micro-batches to a CUDA device, beside the compute stream.

    The reading thread calls `begin`; the loop calls `pace`, then `hand_over`, on the stream that it computes on.
    """

    def __init__(self, device: torch.device) -> None:
        # A thread is set to a device by its number, which "cuda" alone does not name.
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self._stream = torch.cuda.Stream(self.device)
        self._begun: collections.deque[torch.cuda.Event] = collections.deque()

    def begin(self, batch: MicroBatch) -> tuple[MicroBatch, torch.cuda.Event]:
        """Queue the copy of a micro-batch in pinned memory; return the copy, and the event at which it is whole."""
        with torch.cuda.stream(self._stream):
            moved = map_tensors(batch, lambda tensor: tensor.to(self.device, non_blocking=True))
            copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            copied.record(self._stream)
        return moved, copied

    def pace(self) -> None:
        """Wait until the device has begun all micro-batches handed over but the last RUN_AHEAD.

        A batch holds memory until the device is through with it; this bounds how many do, and leaves the device
        enough to do.
        """
        if len(self._begun) > RUN_AHEAD:
            self._begun.popleft().synchronize()

    def hand_over(self, moved: MicroBatch, copied: torch.cuda.Event) -> MicroBatch:
        """Let the current stream wait for the copy, and keep the copy's memory until this stream has used it."""
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(copied)
        # The allocator knows only the stream that the memory was allocated on.
        map_tensors(moved, lambda tensor: tensor.record_stream(compute))
        begun = torch.cuda.Event(blocking=True)
        begun.record(compute)
        self._begun.append(begun)
        return moved


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a copy of nested dataclasses, lists and dicts with `change` applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    if isinstance(value, dict):
        return {name: map_tensors(item, change) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: map_tensors(getattr(value, item.name), change) for item in fields(value)})
    return value
