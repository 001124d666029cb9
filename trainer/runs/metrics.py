"""What a run reports: metrics.jsonl with each step exactly once, and a line or a bar on the screen.

A record is one step: {"step": 1, "denoising_loss": ..., "alignment_loss": ..., "grad_norm": ...}, losses averaged
over micro-batches and ranks. The last step of each log also carries wall_s, the seconds that the run has trained, over
all its sessions; and for the time since the last one (less what saving, grids and evaluation took) and all ranks
together, samples_per_s, read_gb_per_s (10^9 bytes that the reader returned, a second) and data_wait, the share of it
that the slowest rank waited for data. A validated step has val_denoising_loss and so on, of the trained weights, and
val_ema_denoising_loss, of their average (evaluating/validation.py).
"""

import contextlib
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ...cache_specs.errors import JobError, printable, writing
from ...cache_specs.files.whole_file import write_all

Record = Mapping[str, float | int]

METRICS_FILE = "metrics.jsonl"
RESUME = "continue with --resume auto"
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
MOST_LINE_BYTES = 1 << 20  # of the file: a longer one is none of ours
LINE_EVERY_S = 60.0  # where there is no terminal to draw a bar on
WIDTH = 80  # columns of what is printed
_FOLD = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


class MetricsFile:
    """metrics.jsonl of a run, continued after step `done`: later lines are cut, as their steps will run again.

    A file that was lost begins anew at step `done` + 1, and says so. `wall_s` is what the last line with one says, 0
    where none does. Raises JobError where a line up to `done` is missing or damaged, or the disk refuses a write.
    """

    def __init__(self, folder: Path, *, done: int) -> None:
        self.path = folder / METRICS_FILE
        if self.path.is_symlink() or self.path.is_fifo():
            raise JobError(f"{self.path} is a link or a pipe, not a file of the run; remove it, then {RESUME}")
        self.wall_s = 0.0
        with writing(self.path, then=RESUME):
            first, end = self._lines_of(done) if self.path.exists() else (done + 1, 0)
            # Unbuffered: what a full disk refused must not be tried again when the file is closed.
            self._file = os.fdopen(os.open(self.path, APPEND, 0o666), "ab", buffering=0)
            self._file.truncate(end)
        if first > 1:
            print(printable(f"{self.path} begins at step {first}: the steps before it were lost"), file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # `write` has made durable what it wrote
            self._file.close()

    def write(self, records: Sequence[Record]) -> None:
        """Append records and make them durable: a checkpoint saved after this finds its steps here."""
        with writing(self.path, then=RESUME):
            write_all(self._file.fileno(), b"".join(json.dumps(record).encode() + b"\n" for record in records))
            os.fsync(self._file.fileno())

    def _lines_of(self, done: int) -> tuple[int, int]:
        """Return the first step of the file and the offset after the line of step `done`, with no holes between."""
        first, step, end = 1, 0, 0
        with self.path.open("rb") as file:
            for number in range(1, done + 1):
                line = file.readline(MOST_LINE_BYTES)
                found = _step_of(line)
                if number == 1 and isinstance(found, int):
                    first = min(found, done + 1)
                step = first + number - 1
                if step > done:
                    break
                if found != step:
                    raise JobError(
                        f"{self.path}: line {number} should be step {step}, found {found}; the run is at step {done}. "
                        f"Restore the file, or move it away: a new one then begins at step {done + 1}"
                    )
                end += len(line)
                if b'"wall_s"' in line:
                    self.wall_s = self._wall_s_of(line, number)
        return first, end

    def _wall_s_of(self, line: bytes, number: int) -> float:
        try:
            return float(json.loads(line)["wall_s"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise JobError(
                f"{self.path}: line {number} has a wall_s that is no number of seconds; restore the file, or move it "
                f"away, then {RESUME}"
            ) from error


def _step_of(line: bytes) -> int | str:
    """Return the step of a line of the file, or what the line is instead."""
    if not line:
        return "the end of the file"
    if not line.endswith(b"\n"):
        return "a line that was cut"
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a damaged line"
    return step if type(step) is int and step < 2**63 else "a damaged line"


class Progress:
    """A bar on a terminal (where tqdm is installed); elsewhere a line at the first log, each minute, and at the end."""

    def __init__(
        self,
        *,
        done: int,
        total: int,
        unit: str = "step",
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._unit = unit
        self._clock = clock
        self._began = self._shown_at = (clock(), done)
        self._first = True
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(initial=done, total=total, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, num: int) -> None:
        if self._bar is not None:
            self._bar.update(num)

    def say(self, line: str) -> None:
        """Print a line of its own, not onto the bar."""
        say(line)

    def log(self, record: Record) -> None:
        """Show the losses of a logged step, the rate and the time left."""
        losses = "  ".join(
            f"{name.removesuffix('_loss')} {value:.4f}"
            for name, value in record.items()
            if name.endswith("_loss") and not name.startswith("val_")
        )
        if self._bar is not None:
            self._bar.set_postfix_str(losses)
            return
        now, step = self._clock(), int(record["step"])
        due = self._first or step == self._total or now - self._shown_at[0] >= LINE_EVERY_S
        if not due:
            return
        since, before = self._began if self._first else self._shown_at
        self._first, self._shown_at = False, (now, step)
        speed = f"  {record['samples_per_s']:.4g} samples/s" if "samples_per_s" in record else ""
        if step < self._total and step > before and now > since:
            speed += f"  {human_seconds((self._total - step) * (now - since) / (step - before))} left"
        print(folded(f"step {step}/{self._total}  {losses}{speed}"), flush=True)


def say(line: str) -> None:
    """Print a line, folded; above the bar, where there is one on this terminal."""
    text = folded(printable(line))
    if sys.stderr.isatty() and "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text)
    else:
        print(text, flush=True)


def folded(line: str) -> str:
    """Return a line in as many as fit WIDTH columns, names and paths whole."""
    return _FOLD.fill(line)


def human_seconds(seconds: float) -> str:
    """Return a duration in the two units that matter: 40 s, 12 min, 3 h 20 min, 4 d 7 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
