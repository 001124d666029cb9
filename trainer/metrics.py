"""What a run reports: metrics.jsonl with each step exactly once, TensorBoard beside it, a line or a bar on the screen.

A record is one step: {"step": 1, "denoising_loss": ..., "alignment_loss": ..., "grad_norm": ...}, losses averaged
over micro-batches and ranks. The last step of each log also carries samples_per_s and data_wait, the share of wall
time since the last log that was spent waiting for data.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from ..cache_specs.errors import JobError

Record = Mapping[str, float | int]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsFile:
    """metrics.jsonl of a run, continued after step `done`: later lines are cut, as their steps will run again.

    Raises JobError where a line up to `done` is missing or damaged, or the disk refuses a write.
    """

    def __init__(self, folder: Path, *, done: int) -> None:
        self.path = folder / METRICS_FILE
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        try:
            self._file.truncate(self._end_of(done))
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, records: Sequence[Record]) -> None:
        """Append records and make them durable: a checkpoint saved after this finds its steps here."""
        try:
            self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JobError(
                f"{self.path} cannot be written ({error.strerror}). Make room, then continue with --resume auto"
            ) from error

    def _end_of(self, done: int) -> int:
        """Return the offset after the line of step `done`."""
        end = 0
        for step in range(1, done + 1):
            line = self._file.readline()
            try:
                found = json.loads(line)["step"] if line else None
            except (ValueError, KeyError, TypeError):
                found = "a damaged line"
            if found != step:
                raise JobError(
                    f"{self.path}: line {step} should be step {step}, found {found}; the run is at step {done}. "
                    f"Restore the file, or move the run's last checkpoint to a new --out"
                )
            end += len(line)
        return end


class Board(Protocol):
    """What is used of a TensorBoard writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...
    def close(self) -> None: ...


class TensorBoard:
    """The same records as TensorBoard scalars, where tensorboard is installed; says once where it is not."""

    def __init__(self, folder: Path, *, done: int) -> None:
        self._board: Board | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print(f"tensorboard is not installed: scalars are in {METRICS_FILE} only", file=sys.stderr)
            return
        # Steps after the checkpoint run again: the events of an interrupted run past it are hidden.
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=done + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, records: Sequence[Record]) -> None:
        if self._board is None:
            return
        for record in records:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(record["step"]))


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

    def log(self, record: Record) -> None:
        values = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        if self._bar is not None:
            self._bar.set_postfix_str(values)
        else:
            print(f"step {record['step']}/{self._total}  {values}", flush=True)
