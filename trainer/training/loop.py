"""The training step, top to bottom, and the loop around it.

State is (model, EMA, optimizer, step), and what the method adds. A step's losses stay on the device; the host asks for
them at a log, and only there: it then writes every step since the last one to metrics.jsonl, and finds out whether all
of them were finite. What a method reads, draws, asks of the model and calls its losses is its own (objectives/).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...cache_specs.errors import JobError
from ..distributed import StopRequest, averaging, settle_buckets
from ..evaluating.validation import Validation
from ..models.checkpoint import save_checkpoint, save_ema
from ..reading.prefetch import ReadAhead, batches_ahead
from ..runs.run import Run
from .reporter import Reporter, StepResult

if TYPE_CHECKING:
    from ..evaluating.evaluation import Evaluation


def train_step(run: Run, ahead: ReadAhead) -> StepResult:
    """Run one optimizer step."""
    accumulation, objective, autocast = run.config.accumulation, run.objective, run.autocast()
    names: tuple[str, ...] = ()
    losses = torch.zeros((), device=run.world.device)

    for micro in range(accumulation):
        # Batch
        batch = ahead.next()

        # Noise, x_t and what the model should answer
        with torch.no_grad():
            posed = objective.pose(batch, run.model, run.ema.model)

        with averaging(run.wrapped, last=micro == accumulation - 1):
            # Forward
            with autocast:
                prediction, projections = run.forward(posed.inputs)

            # Denoising loss, alignment loss and the method's own (their weights folded in)
            terms = objective.terms(prediction, projections, posed, batch, run.step)
            first, *rest = (term.value for term in terms if term.value is not None)
            loss = sum(rest, start=first)

            # Backward; the gate judges the gradient, which ranks share: a loss that is not finite must show in it.
            # (As a factor: given to `backward` as its gradient, it has torch import sympy, half a second of a start.)
            (loss * torch.where(torch.isfinite(loss), 1.0, torch.nan)).backward()
        names = tuple(term.name for term in terms)
        losses = losses + torch.stack([term.logged.detach() for term in terms])

    # Clip and finiteness, optimizer, EMA, step count
    grad_norm = run.optimizer.step(run.step)
    for ema in (run.ema, *run.more_emas):
        ema.update(run.model, run.optimizer.halted)
    run.step += 1
    return StepResult(names=(*names, "grad_norm"), values=torch.cat([losses, grad_norm.view(1)]))


def train(
    run: Run,
    *,
    until: int | None = None,
    draw_grid: Callable[[Run], np.ndarray | None] | None = None,
    evaluation: "Evaluation | None" = None,
) -> None:
    """Train from `run.step` to `config.steps`, or to the step after a SIGTERM or Ctrl-C; save, and leave metrics.

    It ends at step `until` where that comes before, as if it had been stopped there.

    `draw_grid` is called on rank 0 every `grid.every` steps and gives a sheet; `evaluation` is on every rank, every
    `evaluation.every` steps, once they are saved: it may take so long that it is killed, or stopped, and a resume then
    begins with it. Both must change nothing in the run. Raises JobError naming the first step that was not finite, once
    the state before it is saved.
    """
    config, world = run.config, run.world
    end = config.steps if until is None else min(until, config.steps)
    run.follow_alignment()
    settle(run)
    saved = run.step
    save_after_s = None if config.save_minutes is None else 60 * config.save_minutes
    validation = None if run.validation is None else Validation(run, run.validation)
    depth = batches_ahead(config.prefetch_bytes, run.batches.num_bytes)
    with (
        ReadAhead(run.batches, first=run.step, last=max(run.step, end), depth=depth, device=world.device) as ahead,
        Reporter(run, ahead, figures=() if evaluation is None else evaluation.figures) as reporter,
        StopRequest(world, save_after_s=save_after_s) as stop,
    ):
        stopped = False
        if evaluation is not None and evaluation.missing(run):
            reporter.evaluated(evaluation.at(run, stop.asked))
            stopped = stop.agreed()
            reporter.resume_clock()
        while run.step < end and not stopped:
            if run.follow_alignment():
                settle(run)
            reporter.add(train_step(run, ahead))

            asked, overdue = stop.due()
            last = asked or run.step == end
            evaluate = evaluation is not None and run.step % config.evaluation.every == 0
            keep = config.keep_every is not None and run.step % config.keep_every == 0
            save = last or evaluate or keep or overdue or run.step % config.save_every == 0
            grid = config.grid.every > 0 and run.step % config.grid.every == 0
            validate = validation is not None and validation.due(run)
            if save or grid or validate or run.step % config.log_every == 0:
                bad = reporter.log(saved_first(validation.at, saved) if validation is not None and validate else None)
                if bad is not None:
                    run.step = bad[0] - 1  # the state that the gate has kept
                    if run.step > saved:
                        save_state(run)
                    world.wait()  # where one rank ends with an error, torchrun kills those that still save
                    raise JobError(not_finite(run, *bad))
            if save:
                save_state(run)
                saved = run.step
                stop.saved()
            if keep and world.is_main:
                save_average(run)
            try:
                if grid and draw_grid is not None and world.is_main:
                    reporter.drawn(draw_grid(run))
            except Exception:
                if run.step > saved:
                    save_state(run)  # the pictures failed, not the training
                raise
            if evaluation is not None and evaluate:
                reporter.evaluated(evaluation.at(run, stop.asked))
                last = last or stop.agreed()
            if last:
                break
            if save or grid or validate:
                world.wait()  # for what rank 0 did alone
                reporter.resume_clock()


def saved_first(judge: Callable[[Run], dict[str, float]], saved: int) -> Callable[[Run], dict[str, float]]:
    """Return `judge`, which saves a run newer than step `saved` where it fails: that is no fault of the training."""

    def judged(run: Run) -> dict[str, float]:
        try:
            return judge(run)
        except Exception:
            if run.step > saved:
                save_state(run)
            raise

    return judged


def settle(run: Run) -> None:
    """Have gradients averaged, from the first step on, in the order in which all others will be."""
    if run.world.size > 1:
        settle_buckets(run.wrapped, run.answers)


def not_finite(run: Run, step: int, numbers: dict[str, float]) -> str:
    """Return the one line for a run that stopped being finite at `step`."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    kept = f", and the state of step {step - 1} is saved" if step > 1 else ""
    precision = ", or with --set precision=fp32" if run.config.precision == "bf16" else ""
    return (
        f"{run.folder}: step {step} is not finite ({values}); nothing was updated by it or after it{kept}. Start a "
        f"run with a smaller optimizer.learning_rate or optimizer.clip{precision}"
    )


def save_state(run: Run) -> None:
    """Save a checkpoint of the run's state, on rank 0; the metrics of its steps are on disk by then."""
    if run.world.is_main:
        save_checkpoint(
            run.folder,
            steps=run.step,
            model=run.model,
            ema=run.ema.model,
            emas={str(ema.decay): ema.model for ema in run.more_emas},
            opt=run.optimizer.state_dict(),
            objective=run.objective.state_dict(),
            args=run.config.plain(),
            config=run.record(),
            fingerprints=run.reader.fingerprints,
            keep_last=run.config.keep_last,
        )


def save_average(run: Run) -> None:
    """Save the EMA alone, to stay: what a curve over training samples from, a quarter of a checkpoint's bytes."""
    save_ema(
        run.folder,
        steps=run.step,
        ema=run.ema.model,
        emas={str(ema.decay): ema.model for ema in run.more_emas},
        args=run.config.plain(),
        config=run.record(),
        fingerprints=run.reader.fingerprints,
    )
