"""The one place where the host asks the device how training goes.

In: each step's losses, as they lie on the device. Out, at a log: one record a step for metrics.jsonl, TensorBoard and
the screen, and the first step that was not finite; and once the line that says what bounds the run.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..evaluating.validation import as_line
from ..reading.prefetch import MOST_AHEAD, ReadAhead
from ..reading.speed import Interval, Speed
from ..runs.board import TensorBoard
from ..runs.identity import run_digest
from ..runs.loggers import Logger, Told
from ..runs.metrics import MetricsFile, Progress, Record
from ..runs.run import Run
from ..runs.settings import RESOLVED, flatten, used


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The numbers of one step, float32 on the device, in the order of `names`.

    The objective's losses are means over the rank's micro-batches; the last is the gradient norm before clipping.
    """

    names: tuple[str, ...]
    values: Tensor


class Reporter:
    """Collects the steps since the last log; every rank has one, rank 0's writes.

    `figures` are the names of what evaluations will say; `clock` gives seconds.
    """

    def __init__(
        self,
        run: Run,
        ahead: ReadAhead,
        *,
        figures: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._figures = figures
        self._run = run
        self._ahead = ahead
        self._clock = clock
        self._speed = Speed(
            batch_size=run.config.batch_size,
            staged=run.config.stage is not None,
            deepest=ahead.depth == MOST_AHEAD,
        )
        self._steps: list[StepResult] = []
        self._last_log = (0.0, 0.0, 0.0)
        self._entered = 0.0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        run = self._run
        if run.world.is_main:
            with contextlib.ExitStack() as opened:
                self._file = opened.enter_context(MetricsFile(run.folder, done=run.step))
                self._board = opened.enter_context(self._open_board())
                told = Told(folder=run.folder, config=run.record(), digest=_digest(run), step=run.step)
                self._logger = opened.enter_context(Logger(run.config.logger, told))
                self._progress = opened.enter_context(Progress(done=run.step, total=run.config.steps))
                self._open = opened.pop_all()
        self._last_log = self._now()
        self._entered = self._last_log[0]
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, result: StepResult) -> None:
        """Take the result of `train_step` for the step just done."""
        self._steps.append(result)
        if self._run.world.is_main:
            self._progress.advance(1)

    def log(self, judge: Callable[[Run], dict[str, float]] | None = None) -> tuple[int, dict[str, float]] | None:
        """Write every step since the last log; return the first that was not finite, with its numbers.

        What `judge` says of the run at this step stands in its record; it is called on every rank.

        The steps before that one are written, it and what follows are not: the state has not moved since.
        """
        world, num = self._run.world, len(self._steps)
        if num == 0:
            return None
        # The host waits for the device here, and nowhere else.
        values = iter(world.mean(torch.cat([result.values for result in self._steps])).tolist())
        steps = [dict(zip(result.names, values, strict=False)) for result in self._steps]
        first = self._run.step - num + 1
        interval = self._interval(range(first, first + num))
        self._steps.clear()
        records: list[Record] = []
        bad = None
        for step, named in enumerate(steps, start=first):
            if not all(math.isfinite(number) for number in named.values()):
                bad = (step, named)
                break
            records.append({"step": step, **named})
        judged: dict[str, float] = {}
        try:
            if judge is not None and bad is None:
                judged = judge(self._run)
        finally:  # where it fails, the steps are told all the same
            if world.is_main and records:
                self._write(records, judged, interval)
        return bad

    def _write(self, records: list[Record], judged: dict[str, float], interval: Interval) -> None:
        wall_s = self._file.wall_s + self._clock() - self._entered
        finite = {name: value for name, value in judged.items() if math.isfinite(value)}
        records[-1] = {**records[-1], **finite, "wall_s": wall_s, **self._speed.record(interval)}
        self._file.write(records)
        self._board.write(records)
        self._logger.write(records)
        self._progress.log(records[-1])
        if judged:
            self._progress.say(as_line(self._run.step, judged))
        verdict = self._speed.bound(interval, last=self._run.step == self._run.config.steps)
        if verdict is not None:
            self._progress.say(verdict)

    def evaluated(self, record: Record | None) -> None:
        """Take the figures of an evaluation at this step, None where it ended early or was another rank's."""
        if record is not None and self._run.world.is_main:
            self._board.evaluated(record)
            self._logger.write([record])

    def drawn(self, sheet: np.ndarray | None) -> None:
        """Take the sheet of samples [H,W,3] uint8 of this step, None where they are latents."""
        if sheet is not None:
            self._board.drawn(self._run.step, sheet)

    def resume_clock(self) -> None:
        """Count time from now on: what was done since the last log is no part of the speed of steps."""
        assert not self._steps
        self._last_log = self._now()

    def _open_board(self) -> TensorBoard:
        settings = flatten(used({key: value for key, value in self._run.record().items() if key != RESOLVED}))
        return TensorBoard(self._run.folder, done=self._run.step, settings=settings, figures=self._figures)

    def _now(self) -> tuple[float, float, float]:
        return self._clock(), self._ahead.waited_s, self._ahead.reading_s

    def _interval(self, steps: range) -> Interval:
        """Return the steps (from 1) since the last log: one rank that waits for its data makes all wait for it."""
        now = self._now()
        passed = [end - start for end, start in zip(now, self._last_log, strict=True)]
        self._last_log = now
        seconds, waited, reading = self._run.world.most(passed)
        num_bytes = sum(self._run.config.batch_size * self._run.batches.row_bytes(step - 1) for step in steps)
        return Interval(steps=len(steps), num_bytes=num_bytes, seconds=seconds, waited_s=waited, reading_s=reading)


def _digest(run: Run) -> str:
    return run_digest(run.config, run.reader.fingerprints, world_size=run.world.size)
