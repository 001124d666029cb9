"""Successive halving (arXiv 1502.07943): at given steps the worst settings of a study are stopped, the others go on.

All runs are trained to the step and evaluated there; settings, which are runs that differ in their seed alone, are
ranked by the mean over seeds of one figure that all of them have, and a share of them is stopped with all their seeds:
to stop single seeds would leave each setting's lucky ones. A stopped run says so in its outcome.json, with the figure.

The decision is a function of the evaluations on disk, so that after any kill the same one is made again. Ray Tune is
not asked: its trials report into a driver that must live, and its schedulers decide by whichever trials came first.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...cache_specs.errors import JobError, UsageError
from ...cache_specs.files.whole_file import write_whole
from ..runs.config import RunConfig
from ..runs.settings import flatten, used
from .ablation import Planned
from .compare import at_step
from .figures import SETTINGS, Figure, describe, quality_order
from .records import RunRecord
from .trial import OUTCOME_FILE, STOPPED_AS


@dataclass(frozen=True, kw_only=True)
class Rung:
    """At `step` the worst `fraction` of the settings are stopped."""

    fraction: float
    step: int

    def __str__(self) -> str:
        return f"{self.fraction:g}@{self.step}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Planned]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rung found: settings best first with their mean, those to stop, and those that cannot be judged yet."""

    figure: Figure
    ranked: list[tuple[Setting, float]]
    worst: list[Setting]
    unjudged: list[Setting]
    biased: list[Setting]  # aligned with the network that judges


def read_rungs(texts: Sequence[str]) -> list[Rung]:
    """Return the rungs of `FRACTION@STEP` texts, ascending; raise UsageError for what is none."""
    rungs = []
    for text in texts:
        fraction, at, step = text.partition("@")
        try:
            rung = Rung(fraction=float(fraction), step=int(float(step)))
        except (ValueError, OverflowError):
            rung = Rung(fraction=0, step=0)
        if not (at and 0 < rung.fraction < 1 and rung.step >= 1):
            raise UsageError(f"--stop-worst {text}: expected FRACTION@STEP, as 0.5@10000")
        rungs.append(rung)
    if len({rung.step for rung in rungs}) < len(rungs):
        raise UsageError(f"--stop-worst: two shares at one step, {', '.join(texts)}")
    return sorted(rungs, key=lambda rung: rung.step)


def check_rungs(rungs: Sequence[Rung], runs: Sequence[Planned]) -> None:
    """Raise UsageError where runs would not be evaluated at a rung, or not alike, before any of them is trained."""
    for rung in rungs:
        for run in runs:
            settings = run.config.evaluation
            if not settings.every or rung.step % settings.every or rung.step >= run.config.steps:
                raise UsageError(
                    f"--stop-worst {rung}: {run.folder.name} is not judged at step {rung.step} of {run.config.steps} "
                    f"(evaluation.every {settings.every}); name a step before the last that evaluation.every divides"
                )
    if not rungs:
        return
    judges = {_judges(run.config) for run in runs} - {""}
    alike = {
        (one.cache, one.num, one.num_real, one.pooling, one.neighbours, one.sampler, one.steps, one.cfg_scale)
        for one in (run.config.evaluation for run in runs)
    }
    if len(judges) > 1 or len(alike) > 1:
        raise UsageError(
            "--stop-worst: the runs are not judged alike (" + ", ".join(sorted(judges)) + "); one evaluation for all, "
            "with one encoder: evaluation: {every: STEPS, encoders: [NAME]}"
        )


def _judges(config: RunConfig) -> str:
    """Return the encoders in whose spaces a run is judged, "" where it is the only one of a cache."""
    judged = config.evaluation
    return "+".join(judged.encoders or (config.encoders if judged.cache is None else ()))


def settings_of(runs: Sequence[Planned]) -> list[Setting]:
    """Return the runs by everything but their seed."""
    found: dict[str, Setting] = {}
    for run in runs:
        settings = {
            key: value for key, value in flatten(used(run.config.plain())).items() if key not in ("seed", "out")
        }
        name = " ".join(f"{key} {value}" for key, value in run.row.varied.items() if key != "seed") or "all runs"
        key = json.dumps(settings, sort_keys=True, default=str)
        found.setdefault(key, Setting(name=name, runs=[])).runs.append(run)
    return list(found.values())


def reach(rung: Rung, runs: Sequence[Planned]) -> tuple[list[Planned], list[Planned]]:
    """Return the runs that are judged at the rung, and those of them that have not been evaluated there yet.

    Runs that were stopped at an earlier rung are not among them.
    """
    judged = [run for run in runs if run.stopped_at is None or run.stopped_at >= rung.step]
    return judged, [run for run in judged if run.done <= rung.step and _evaluation(run, rung) is None]


def judge(rung: Rung, runs: Sequence[Planned]) -> Verdict:
    """Rank the settings of `runs` by their evaluations at the rung; raise JobError where no figure is in all of them.

    Of the figures that have a direction the first in the order of reports is taken that judges the fewest settings by
    the network they are aligned with.
    """
    settings, unjudged = [], []
    records: dict[str, list[dict[str, float]]] = {}
    for one in settings_of(runs):
        found = [_evaluation(run, rung) for run in one.runs]
        whole = [record for record in found if record is not None]
        if len(whole) == len(found):
            settings.append(one)
            records[_id(one)] = whole
        else:
            unjudged.append(one)
    names = [{name for record in some for name in record if name not in SETTINGS} for some in records.values()]
    known = [figure for figure in map(describe, set.intersection(*names) if names else set()) if figure.better]

    def worth(figure: Figure) -> tuple[int, tuple[int, str]]:
        return sum(map(figure.biased_for, encoders.values())), quality_order(figure.name)

    encoders = {_id(one): _seen(one.runs[0]) for one in settings}
    if not known:
        lacking = f"; {len(unjudged)} settings were not evaluated" if unjudged else ""
        raise JobError(f"--stop-worst {rung}: the runs have no figure in common at step {rung.step}{lacking}")
    figure = min(known, key=worth)
    means = {_id(one): float(np.mean([record[figure.name] for record in records[_id(one)]])) for one in settings}

    def order(one: Setting) -> tuple[bool, float, str]:
        value = means[_id(one)]
        return not math.isfinite(value), -value if figure.better == "higher" else value, _id(one)

    ranked = sorted(settings, key=order)
    num = min(math.floor(rung.fraction * len(ranked) + 1e-9), len(ranked) - 1)  # 0.29 * 100 is 29, too
    return Verdict(
        figure=figure,
        ranked=[(one, means[_id(one)]) for one in ranked],
        worst=ranked[len(ranked) - num :],
        unjudged=unjudged,
        biased=[one for one in ranked if figure.biased_for(encoders[_id(one)])],
    )


def _seen(run: Planned) -> tuple[str, ...]:
    """Return the networks that a run is aligned with or trained on."""
    return (*run.config.encoders, (run.config.autoencoder or "").removeprefix("features/"))


def _evaluation(run: Planned, rung: Rung) -> dict[str, float] | None:
    return at_step(RunRecord(folder=run.folder, config={}), rung.step)


def _id(one: Setting) -> str:
    return min(run.folder.name for run in one.runs)


def mark_stopped(verdict: Verdict, rung: Rung) -> list[Planned]:
    """Leave in the folder of each run that is stopped at the rung that it is, and why; return those runs.

    A run that has gone past the rung before is not stopped any more: its study has grown since.
    """
    means = {_id(one): mean for one, mean in verdict.ranked}
    stopped = [(one, run) for one in verdict.worst for run in one.runs if run.done <= rung.step]
    for one, run in stopped:
        reason = (
            f"among the worst {len(verdict.worst)} of {len(verdict.ranked)} settings at step {rung.step} "
            f"(--stop-worst {rung}): {verdict.figure.title} {means[_id(one)]:.4g}"
        )
        what = {"status": STOPPED_AS, "step": rung.step, "reason": reason}
        write_whole(run.folder / OUTCOME_FILE, (json.dumps(what) + "\n").encode())
    return [run for _, run in stopped]
