"""How fast a run is between two logs, and, once, what bounds it: the model or the data.

In, a log: steps done, seconds passed, seconds that the slowest rank waited for data, seconds in which its reading
thread was at work. The quotient of bytes and the last is what the thread could deliver if it never had to wait.
"""

from dataclasses import dataclass

from ...cache_specs.sizes import human_bytes

WARM_UP_STEPS = 20  # compilation, first touches of files and memory: not counted
MEASURED_STEPS = 50
DATA_BOUND = 0.05  # of the time spent waiting for data; below it there is little to win
READS_ALWAYS = 0.95  # of the time spent reading: the rest is what a thread at work all the time spends between batches


@dataclass(kw_only=True)
class Interval:
    """What happened between two logs, or over several such; `num_bytes` were read, over all ranks."""

    steps: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    reading_s: float = 0.0

    def add(self, other: "Interval") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Speed:
    """The speed of a run whose steps take `batch_size` samples over all ranks.

    `staged` says that the cache is read from a local copy already, `deepest` that no more can be read ahead.
    """

    def __init__(self, *, batch_size: int, staged: bool, deepest: bool) -> None:
        self._batch_size = batch_size
        self._staged = staged
        self._deepest = deepest
        self._warm_up = WARM_UP_STEPS  # steps still to come
        self._measured = Interval()
        self._said = False

    def record(self, interval: Interval) -> dict[str, float]:
        """Return samples_per_s, read_gb_per_s (10^9 bytes) and data_wait, a share of the time."""
        return {
            "samples_per_s": interval.steps * self._batch_size / interval.seconds,
            "read_gb_per_s": interval.num_bytes / interval.seconds / 1e9,
            "data_wait": interval.waited_s / interval.seconds,
        }

    def bound(self, interval: Interval, *, last: bool) -> str | None:
        """Take one more interval; return, once, the line that says what bounds the run.

        That is when MEASURED_STEPS have passed in intervals after the WARM_UP_STEPS, or at the `last` of them.
        """
        if self._warm_up > 0:
            self._warm_up -= interval.steps
            return None
        self._measured.add(interval)
        if self._said or not (last or self._measured.steps >= MEASURED_STEPS):
            return None
        self._said = True
        return self._verdict()

    def _verdict(self) -> str:
        measured = self._measured
        share = measured.waited_s / measured.seconds
        wait, used = 100 * share, f"{human_bytes(round(measured.num_bytes / measured.seconds))}/s"
        # Below a thousandth of the time, what a thread could read is a quotient of noise.
        known = measured.reading_s >= 1e-3 * measured.seconds
        possible = f"{human_bytes(round(measured.num_bytes / measured.reading_s))}/s" if known else "far more"
        if share <= DATA_BOUND:
            return f"bound by the model: {wait:.1f} % of the time waits for data ({used} read, {possible} possible)"
        remedies = [] if self._staged else ["stage the cache on a local disk (--stage DIR)"]
        remedies.append("read less (int8 tokens, fewer encoders)")
        # A thread that is always at work would not read more with more room to put it.
        if not self._deepest and measured.reading_s < READS_ALWAYS * measured.seconds:
            remedies.append("raise --prefetch-bytes")
        return (
            f"bound by data: {wait:.0f} % of the time waits for it, at {used} ({possible} while it is read); "
            f"{' or '.join(remedies)}"
        )
