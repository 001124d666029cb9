"""Micro-batches read ahead of the step by one thread, into a ring of reused buffers.

In: `Batches` and the steps to serve. Out: `next()`, a micro-batch on the training device. Reading whole batches in
one thread beats splitting a batch over threads, and worker processes, which copy every batch again, lose to both;
fresh buffers cost page faults (measured for this project). On CUDA the buffers are pinned and the copies do not wait.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from .batches import Batches, MicroBatch
from .reader import Batch


class ReadAhead:
    """Serves the micro-batches of steps `first` to `last` - 1 in order, `depth` of them read ahead.

    A batch is valid until the next `next()`: its buffers are then filled anew. What the thread raises is raised by
    `next()`. `waited_s` is the time that `next()` has spent waiting, in seconds. Use it in a `with` block: leaving it
    ends the thread.
    """

    def __init__(self, batches: Batches, *, first: int, last: int, depth: int, device: torch.device) -> None:
        self._batches = batches
        self._steps = range(first, last)
        self._device = device
        self.waited_s = 0.0
        self._in_use: Batch | None = None
        # A free buffer comes with the copy that last read from it: it may still be under way.
        self._free: queue.SimpleQueue[tuple[Batch, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[MicroBatch | BaseException] = queue.SimpleQueue()
        for _ in range(depth + 1):
            buffers = batches.reader.empty_batch(batches.place.micro_batch, pin_memory=device.type == "cuda")
            self._free.put((buffers, None))
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
        if self._in_use is not None:
            self._free.put((self._in_use, None))
            self._in_use = None
        start = time.perf_counter()
        item = self._ready.get()
        self.waited_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        if self._device.type == "cpu":
            self._in_use = item.data
            return item
        moved = map_tensors(item, lambda tensor: tensor.to(self._device, non_blocking=True))
        copied = torch.cuda.Event()
        copied.record()
        self._free.put((item.data, copied))
        return moved

    def _read(self) -> None:
        pin = self._device.type == "cuda"
        try:
            for step in self._steps:
                for micro in range(self._batches.place.accumulation):
                    free = self._free.get()
                    if free is None or self._stop.is_set():
                        return
                    buffers, copied = free
                    if copied is not None:
                        copied.synchronize()
                    batch = self._batches.read(step, micro, out=buffers)
                    if pin:
                        batch = replace(batch, draws=map_tensors(batch.draws, Tensor.pin_memory))
                    self._ready.put(batch)
        except BaseException as error:  # whatever it is, the loop must hear of it
            self._ready.put(error)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested dataclasses and lists with `change` applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: map_tensors(getattr(value, item.name), change) for item in fields(value)})
    return value
