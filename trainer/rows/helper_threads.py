"""Threads that do the parts of a job together with the caller's, which ends when none of them is at it any more.

Not concurrent.futures: its locks are taken in Python, where a Ctrl-C can leave one held, and the next batch then never
came. Here a queue and locks of the interpreter's own, in which there is no such moment, also wake a thread sooner.
"""

import collections
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable

Work = Callable[[], None]


class HelperThreads:
    """`num` threads beside the caller's. They begin with the first job, in a forked child anew, and end with this."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._process = 0  # that the threads live in
        self._jobs: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._busy: list[threading.Lock] = []  # one a thread, held while it is at a job

    def share(
        self,
        parts: Iterable[tuple[int, int]],
        do: Callable[[int, int], None],
        *,
        alone: bool = False,
        meanwhile: Work = lambda: None,
    ) -> None:
        """Call `do` once for each part, by any threads; no part runs any more when this returns or raises.

        `meanwhile` is called by the caller's thread once no part is left to begin, while others may still be at the
        last. Raises what went wrong first; what had not begun by then is left out. One call at a time.
        """
        left = collections.deque(parts)
        errors: list[BaseException] = []

        def work() -> None:
            while True:
                try:
                    part = left.popleft()
                except IndexError:
                    return
                try:
                    do(*part)
                except BaseException as error:
                    errors.append(error)
                    left.clear()

        try:
            if not alone:
                self._wake(work)
            work()
            meanwhile()
        except BaseException as error:  # no thread to be had; Ctrl-C between two parts
            errors.append(error)
        while True:
            try:
                left.clear()  # who begins now has nothing to do
                for busy in self._busy:
                    with busy:
                        pass
                break
            except BaseException as error:  # Ctrl-C, here: a helper still writes
                errors.append(error)
        if errors:
            raise errors[0]

    def _wake(self, work: Work) -> None:
        if self._process != os.getpid():  # a forked child has none of its parent's threads
            self._jobs, self._busy, self._process = queue.SimpleQueue(), [], os.getpid()
            weakref.finalize(self, _end, self._jobs, self._num)
        while len(self._busy) < self._num:
            busy = threading.Lock()
            thread = threading.Thread(target=_help, args=(self._jobs, busy), name="read-rows", daemon=True)
            self._busy.append(busy)  # first: a thread that is not waited for could write at any time
            try:
                thread.start()
            except RuntimeError:
                self._busy.pop()
                raise
        while not self._jobs.empty():  # who was too late for the job before
            try:
                self._jobs.get_nowait()
            except queue.Empty:
                break
        for _ in range(self._num):
            self._jobs.put(work)


def _help(jobs: "queue.SimpleQueue[Work | None]", busy: threading.Lock) -> None:
    while True:
        work = jobs.get()
        if work is None:
            return
        with busy:
            work()
        del work  # and with it the batch's memory


def _end(jobs: "queue.SimpleQueue[Work | None]", num: int) -> None:
    for _ in range(num):
        jobs.put(None)
