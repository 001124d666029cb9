"""How far a command is: a bar on a terminal, elsewhere (a log, a batch job) a line a minute."""

import sys
import threading
import time
from typing import Self

from ...cache_specs.errors import printable
from .said import say

INTERVAL_S = 60.0


class Progress:
    """Counts `unit` of a job, on the standard error; a context manager. `of` says of what, before the numbers."""

    def __init__(self, unit: str, *, of: str = "", interval_s: float = INTERVAL_S) -> None:
        from tqdm import tqdm

        self._unit = unit
        self._of = f"{of}: " if of else ""
        self._done, self._total, self._before = 0, 0, 0
        self._started = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(unit=f" {unit}", desc=of or None, smoothing=0.1, disable=not terminal)
        self._closed = threading.Event()
        self._lines = (
            None if terminal else threading.Thread(target=self._tell, args=(interval_s,), name="progress", daemon=True)
        )

    def __enter__(self) -> Self:
        if self._lines is not None:
            self._lines.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        if self._lines is not None:
            self._lines.join()
        self._bar.close()

    def start(self, done: int, total: int) -> None:
        """Begin to count at `done` of `total`: what was there before has no part in the rate."""
        self._done = self._before = done
        self._total = total
        self._started = time.monotonic()
        self._bar.reset(total=total)
        self._bar.n = self._bar.last_print_n = self._bar.initial = done
        self._bar.refresh()

    def advance(self, num: int) -> None:
        """Count `num` more."""
        self._done += num
        self._bar.update(num)

    def reach(self, done: int, total: int) -> None:
        """Be at `done` of `total`; fewer than before are another count's."""
        if total != self._total or done < self._done:
            self.start(0, total)
        self.advance(done - self._done)

    def say(self, text: str, *, err: bool = True) -> None:
        """Print lines above the bar, to the standard error if `err`."""
        for line in text.split("\n"):
            self._bar.write(printable(line), file=sys.stderr if err else sys.stdout)

    def line(self, seconds: float) -> str:
        """Return how far it is `seconds` after its start: `1280 of 5000 images (26 %), 21.3 images/s, 3 min left`."""
        percent = 100 * self._done // max(1, self._total)
        where = f"{self._of}{self._done} of {self._total} {self._unit} ({percent} %)"
        rate = (self._done - self._before) / max(seconds, 1e-9)
        if not rate:
            return f"{where}, none in {_span(seconds)}"
        return f"{where}, {rate:.3g} {self._unit}/s, {_span((self._total - self._done) / rate)} left"

    def _tell(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            if self._total:
                say(self.line(time.monotonic() - self._started), err=True)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
