"""What a run reports: metrics.jsonl with each step exactly once, TensorBoard beside it, a line or a bar on the screen.

A record is one step: {"step": 1, "denoising_loss": ..., "alignment_loss": ..., "grad_norm": ...}, losses averaged
over micro-batches and ranks. The last step of each log also carries, for the time since the last one (less what saving,
grids and evaluation took) and all ranks together, samples_per_s, read_gb_per_s (10^9 bytes that the reader returned, a
second) and data_wait, the share of it that the slowest rank waited for data.
"""

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from ...cache_specs.errors import JobError, writing
from ...cache_specs.files.whole_file import write_all

Record = Mapping[str, float | int]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
RESUME = "continue with --resume auto"
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
MOST_LINE_BYTES = 1 << 20  # of the file: a longer one is none of ours


class MetricsFile:
    """metrics.jsonl of a run, continued after step `done`: later lines are cut, as their steps will run again.

    A file that was lost begins anew at step `done` + 1, and says so. Raises JobError where a line up to `done` is
    missing or damaged, or the disk refuses a write.
    """

    def __init__(self, folder: Path, *, done: int) -> None:
        self.path = folder / METRICS_FILE
        if self.path.is_symlink() or self.path.is_fifo():
            raise JobError(f"{self.path} is a link or a pipe, not a file of the run; remove it, then {RESUME}")
        with writing(self.path, then=RESUME):
            first, end = self._lines_of(done) if self.path.exists() else (done + 1, 0)
            # Unbuffered: what a full disk refused must not be tried again when the file is closed.
            self._file = os.fdopen(os.open(self.path, APPEND, 0o666), "ab", buffering=0)
            self._file.truncate(end)
        if first > 1:
            print(f"{self.path} begins at step {first}: the steps before it were lost", file=sys.stderr)

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
        return first, end


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


class Board(Protocol):
    """What is used of a TensorBoard writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...
    def flush(self) -> Any: ...
    def close(self) -> None: ...


class TensorBoard:
    """The same records as TensorBoard scalars, where tensorboard is installed; says once where it is not.

    Raises JobError where the disk refuses a write.
    """

    def __init__(self, folder: Path, *, done: int) -> None:
        self._folder = folder / TENSORBOARD_FOLDER
        self._board: Board | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print(f"tensorboard is not installed: scalars are in {METRICS_FILE} only", file=sys.stderr)
            return
        # Steps after the checkpoint run again: the events of an interrupted run past it are hidden.
        with writing(self._folder, then=RESUME):
            self._board = SummaryWriter(str(self._folder), purge_step=done + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):  # `write` has flushed what it wrote
                self._board.close()

    def write(self, records: Sequence[Record]) -> None:
        if self._board is None:
            return
        with writing(self._folder, then=RESUME):
            for record in records:
                for name, value in record.items():
                    if name != "step":
                        self._board.add_scalar(name, value, int(record["step"]))
            self._board.flush()


class Progress:
    """A bar on a terminal (where tqdm is installed), a line a log elsewhere."""

    def __init__(self, *, done: int, total: int, unit: str = "step", shown: bool = True) -> None:
        self._total = total
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
        """Print a line of its own."""
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def log(self, record: Record) -> None:
        values = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        if self._bar is not None:
            self._bar.set_postfix_str(values)
        else:
            print(f"step {record['step']}/{self._total}  {values}", flush=True)
