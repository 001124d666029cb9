"""Runs at once on this machine: a few processes, each on its own threads or its own share of a GPU.

In: trials, and how many go at once. Out: an exit code for each, told as it comes. On a cluster the same trials go
through Ray (`repa.pipeline.building.ray_tasks`, by the door of commands/borrowed.py). Here it would cost 4 s and 1 GB
to start, and has nothing to decide: all runs of a study get the same.
"""

import queue
import threading
from collections.abc import Callable, Sequence

from .trial import STOPPED, Trial, run_trial

OnDone = Callable[[Trial, int], None]


def run_here(trials: Sequence[Trial], *, parallel: int, stop: Callable[[], bool], on_done: OnDone) -> None:
    """Do the trials, `parallel` at once, in order; `on_done` is called for each, from this thread.

    Once `stop` says so no further one begins, and those that run are asked to save and end.
    """
    if parallel == 1:
        for trial in trials:
            on_done(trial, STOPPED if stop() else run_trial(trial, stop))
        return
    waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Trial, int | BaseException]] = queue.SimpleQueue()
    for trial in trials:
        waiting.put(trial)

    def work() -> None:
        while True:
            try:
                trial = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((trial, STOPPED if stop() else run_trial(trial, stop)))
            except BaseException as error:
                done.put((trial, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(parallel, len(trials)))]
    for thread in threads:
        thread.start()
    for _ in trials:
        trial, code = done.get()
        if isinstance(code, BaseException):
            raise code
        on_done(trial, code)
    for thread in threads:
        thread.join()
