"""What `repa-ablate` does once it knows its runs: one at a time in its folder, pauses at rungs, a line a run."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache_specs.errors import JobError, UsageError
from ...cache_specs.files.locks import locked
from ...cache_specs.files.whole_file import write_whole
from ..studies.ablation import (
    STUDY_FILE,
    Ablation,
    Machine,
    Planned,
    costs,
    machine_for,
    store_machine,
    stored_machine,
    trial_of,
    write_settings,
)
from ..studies.halving import Rung, judge, mark_stopped, reach
from ..studies.probe import Cost
from ..studies.schedule import run_here
from ..studies.trial import OUTCOME_FILE, STOPPED, Trial
from .said import say


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How the runs share machines, as the command line says."""

    device: str
    ranks: int
    per_gpu: float
    serial: bool
    address: str | None


def list_runs(ablation: Ablation) -> None:
    """Say of every run how far it is, and of every row that is none why."""
    for run in ablation.runs:
        how = "done" if run.finished else f"step {run.done}" + (", failed" if run.failed else "")
        how += "" if run.stopped_at is None else ", stopped there"
        same = f"; {len(run.same)} more rows are this very run" if run.same else ""
        say(f"{run.folder.name}: {how} of {run.config.steps}{same}")
    for row, why in ablation.refused:
        say(f"{row.label}: {why}")


def train_runs(ablation: Ablation, study: Path, rungs: Sequence[Rung], sharing: Sharing) -> None:
    """Train what is missing; raise JobError where a run failed, or another process works there."""
    if ablation.refused:
        row, why = ablation.refused[0]
        raise UsageError(f"{len(ablation.refused)} runs cannot be trained, {row.label} first: {why}")
    out = ablation.out
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".ablating" / "lock", wait=False, option="--out") as alone:
        if not alone:
            raise JobError(f"{out}: another repa-ablate works there. Wait for its end, or choose another --out")
        todo = [run for run in ablation.runs if not run.finished and not (rungs and run.stopped_at is not None)]
        list_runs(ablation)
        if not todo:
            say(f"{out}: {_how_many(ablation)}")
            return
        machine = _machine(out, todo, sharing)
        write_whole(out / STUDY_FILE, study.read_bytes())
        for run in todo:
            write_settings(run)
        at_once = 1 if sharing.serial else machine.parallel
        say(f"{len(todo)} runs to do, {at_once} at once on {machine.threads} threads each")
        failed = _Schedule(machine, sharing).all(ablation.runs, rungs)
    if failed:
        raise JobError(
            f"{out}: {len(failed)} of {len(ablation.runs)} runs failed, {failed[0]} first; log.txt in its folder says "
            f"why. Give the same command again to go on with them"
        )
    say(f"{out}: {_how_many(ablation)}")


def _how_many(ablation: Ablation) -> str:
    runs = ablation.runs
    stopped, left = (
        sum(run.stopped_at is not None for run in runs),
        sum(not run.finished and run.stopped_at is None for run in runs),
    )
    said = f"{sum(run.finished for run in runs)} of {len(runs)} runs done"
    said += f", {stopped} stopped by --stop-worst; without it the same command finishes them" if stopped else ""
    return said + ("; the same command goes on" if left else "")


def _machine(out: Path, todo: list[Planned], sharing: Sharing) -> Machine:
    """Return what each run gets: what the study's have got so far, or what a probe of the largest says is best."""
    cores = len(os.sched_getaffinity(0))
    device, ranks = sharing.device, sharing.ranks
    machine = stored_machine(out)
    if machine is not None:
        if machine.threads > cores:
            say(f"{out}: its runs have {machine.threads} threads, this machine has {cores}: slower, other last bits")
        if (machine.device, machine.ranks) != (device, ranks):
            say(f"{out}: its runs so far were on {machine.device} with {machine.ranks} ranks; the digests differ")
            machine = dataclasses.replace(machine, device=device, ranks=ranks)
        return machine
    largest: Cost | None = None
    if device == "cpu" and not sharing.serial and len(todo) > 1:
        largest = max(costs(todo, device=device, threads=cores).values(), key=lambda cost: cost.peak_bytes)
    runs = todo[:1] if sharing.serial else todo
    machine = machine_for(runs, largest, device=device, ranks=ranks, per_gpu=sharing.per_gpu)
    store_machine(out, machine)
    return machine


class _Schedule:
    """Runs given to this machine or to Ray, until Ctrl-C asks them to save and end."""

    def __init__(self, machine: Machine, sharing: Sharing) -> None:
        self._machine = machine
        self._sharing = sharing
        self._failed: list[str] = []
        self._asked: list[int] = []

    def all(self, runs: Sequence[Planned], rungs: Sequence[Rung]) -> list[str]:
        """Train to each rung, stop the worst there, then finish the others; return the names of those that failed."""
        for rung in rungs:
            judged, missing = reach(rung, runs)
            self._some([run for run in missing if run.folder.name not in self._failed], until=rung.step)
            if self._asked:
                return self._failed
            self._stop_worst(rung, judged)
        left = [run for run in runs if not run.finished and run.folder.name not in self._failed]
        if rungs:
            left = [run for run in left if run.stopped_at is None]
        for run in left:
            if run.stopped_at is not None:  # asked for without --stop-worst: it goes on
                (run.folder / OUTCOME_FILE).unlink(missing_ok=True)
        self._some(left, until=None)
        return self._failed

    def _stopping(self) -> bool:
        return bool(self._asked)

    def _stop_worst(self, rung: Rung, judged: list[Planned]) -> None:
        verdict = judge(rung, judged)
        stopped = mark_stopped(verdict, rung)
        best, value = verdict.ranked[0]
        say(
            f"step {rung.step}: {len(verdict.worst)} of {len(verdict.ranked)} settings stopped ({len(stopped)} run"
            f"{'' if len(stopped) == 1 else 's'}), "
            f"by {verdict.figure.title}; best is {best.name} with {value:.4g}"
        )
        if verdict.biased:
            names = ", ".join(one.name for one in verdict.biased)
            say(f"  biased: judged by the network that they are aligned with: {names}", err=True)
        for one in verdict.unjudged:
            say(f"  not judged, and not stopped: {one.name}: not all of its seeds were evaluated there", err=True)

    def _some(self, runs: Sequence[Planned], *, until: int | None) -> None:
        """Do the runs, to their end or `until` a step."""
        machine, sharing = self._machine, self._sharing
        by_folder = {trial_of(run, machine).folder: run for run in runs}
        trials = [trial_of(run, machine, until=until) for run in runs]
        number = 0

        def on_done(trial: Trial, code: int) -> None:
            nonlocal number
            number += 1
            run = by_folder[trial.folder]
            ended = "done" if until is None else "judged"
            how = "stopped" if code == STOPPED else ended if code == 0 else f"FAILED (exit {code})"
            if code not in (0, STOPPED):
                self._failed.append(run.folder.name)
            say(f"{number} of {len(trials)}  {run.folder.name}: {how} at step {run.done}")

        def ask(_signal: int, _frame: Any) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked.append(1)
            os.write(2, b"\nstopping: runs save at their next step. Ctrl-C again aborts\n")

        # A shell's background job ignores interrupts, and goes on doing so.
        heard = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) is not signal.SIG_IGN]
        before = {kind: signal.signal(kind, ask) for kind in heard}
        try:
            at_once = 1 if sharing.serial else machine.parallel
            # Which GPU a run gets is for Ray to decide; on a CPU it would have nothing to do.
            if sharing.address is not None or (machine.device == "cuda" and at_once > 1):
                from .borrowed import run_on_ray

                gpus = sharing.per_gpu if machine.device == "cuda" else 0.0
                run_on_ray(trials, address=sharing.address, gpus=gpus, on_done=on_done, stop=self._stopping)
            else:
                run_here(trials, parallel=at_once, on_done=on_done, stop=self._stopping)
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
