"""TensorBoard, where it is installed: scalars of metrics.jsonl, settings, figures of evaluations, sheets of samples.

In the run's one folder of events, by the library's own writers; nothing is read back from it.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from ...cache_specs.errors import JobError, writing
from .metrics import METRICS_FILE, RESUME, Record

FOLDER = "tensorboard"
EVALUATION, SHEET = "evaluation/", "samples"  # tags
NO_SCALARS = ("step", "num")


class Board(Protocol):
    """What is used of a TensorBoard writer."""

    file_writer: Any

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...
    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str) -> Any: ...
    def flush(self) -> Any: ...
    def close(self) -> None: ...


class TensorBoard:
    """A run's events; says once where tensorboard is not installed, and does nothing then.

    `settings` by dotted key go to the page of hyperparameters with the first records, beside their losses and the
    `figures` that evaluations will have. Raises JobError where the disk refuses a write.
    """

    def __init__(
        self, folder: Path, *, done: int, settings: Mapping[str, Any] | None = None, figures: Sequence[str] = ()
    ) -> None:
        self._folder = folder / FOLDER
        self._settings = settings
        self._figures = figures
        self._board: Board | None = None
        if self._folder.is_symlink():  # its files would be made in whatever folder somebody has it name
            raise JobError(f"{self._folder} is a link, not a folder of the run; remove it, then {RESUME}")
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
            with contextlib.suppress(OSError):  # what was written is flushed
                self._board.close()

    def write(self, records: Sequence[Record]) -> None:
        """Write the scalars of steps."""
        if self._board is None:
            return
        with writing(self._folder, then=RESUME):
            if self._settings is not None:
                losses = [name for name in records[-1] if name.endswith("_loss")]
                self._describe(
                    self._board, self._settings, [*losses, *(f"{EVALUATION}{name}" for name in self._figures)]
                )
                self._settings = None
            for record in records:
                for name, value in record.items():
                    if name != "step":
                        self._board.add_scalar(name, value, int(record["step"]))
            self._board.flush()

    def evaluated(self, record: Record) -> None:
        """Write the figures of an evaluation."""
        self.write(
            [{"step": record["step"]} | {f"{EVALUATION}{k}": v for k, v in record.items() if k not in NO_SCALARS}]
        )

    def drawn(self, step: int, sheet: np.ndarray) -> None:
        """Write a sheet of samples [H,W,3] uint8."""
        if self._board is None:
            return
        with writing(self._folder, then=RESUME):
            self._board.add_image(SHEET, sheet, step, dataformats="HWC")
            self._board.flush()

    @staticmethod
    def _describe(board: Board, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        # As SummaryWriter.add_hparams does, which would write it into a run of its own below this one.
        from torch.utils.tensorboard.summary import hparams

        values = {key: _value(value) for key, value in settings.items()}
        experiment, started, _ = hparams(values, dict.fromkeys(metrics, 0.0))
        board.file_writer.add_summary(experiment)
        board.file_writer.add_summary(started)


def _value(value: Any) -> bool | int | float | str:
    """Return a setting as one of the types that the page of hyperparameters knows."""
    if isinstance(value, bool | int | float | str):
        return value
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
