"""`repa-ablate`: the runs of a study file, each once, as many at a time as the machine holds."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import expand_home, one_line_errors
from .said import say
from .train import CONTEXT

if TYPE_CHECKING:
    from ..studies.ablation import Ablation, Machine, Planned
    from ..studies.probe import Cost


@click.command(context_settings=CONTEXT)
@click.argument("study", type=click.Path(path_type=Path), metavar="STUDY.yaml")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="STUDY", help="Folder of the runs.")
@click.option("--cache", metavar="DIR|URL", help="The cache of all runs; wins over the file's.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--gpus-per-run", type=float, default=1.0, show_default=True, help="8: torchrun; 0.25: four on a GPU.")
@click.option("--serial", is_flag=True, help="One run after another, each with all threads.")
@click.option("--address", metavar="ADDR", help="Ray cluster for the runs; all its nodes must see STUDY.")
@click.option("--dry-run", is_flag=True, help="Show the runs, what they lack and what they would cost; train nothing.")
def ablate_command(
    study: Path,
    out: Path,
    cache: str | None,
    device: str | None,
    gpus_per_run: float,
    serial: bool,
    address: str | None,
    dry_run: bool,
) -> None:
    """Train the runs of a study from one cache: encoders, projectors, coefficients, methods, seeds.

    \b
    repa-ablate study.yaml --out studies/gamma --dry-run
    repa-ablate study.yaml --out studies/gamma
    repa-report studies/gamma --out gamma.html

    The same command goes on with what is missing, after whatever ended it; a study file that grew adds runs.
    """
    with one_line_errors("repa-ablate"):
        from ..distributed import default_device
        from ..studies.ablation import plan
        from ..studies.study_file import read_study

        read = read_study(study)
        if cache is not None:
            read = _with_cache(read, cache)
        device = device or default_device()
        ranks = _ranks(gpus_per_run, device, on_cluster=address is not None)
        ablation = plan(read, out, device=device, ranks=ranks)
        if dry_run:
            _explain(ablation, device=device, serial=serial)
            raise SystemExit(1 if ablation.refused else 0)
        _run(ablation, study, device=device, ranks=ranks, per_gpu=gpus_per_run, serial=serial, address=address)


def _with_cache(study: Any, cache: str) -> Any:
    import dataclasses

    return dataclasses.replace(study, base={**study.base, "cache": cache})


def _ranks(gpus: float, device: str, *, on_cluster: bool) -> int:
    """Return the processes of a run; raise UsageError for what no machine here can give it."""
    import torch

    from ...cache_specs.errors import UsageError

    if not gpus > 0 or (gpus > 1 and gpus != int(gpus)):
        raise UsageError(f"--gpus-per-run {gpus:g}: expected a part of a GPU, as 0.25, or a whole number of them")
    if device != "cuda" or gpus <= 1:
        return 1
    here = torch.cuda.device_count()
    if not on_cluster and gpus > here:
        raise UsageError(
            f"--gpus-per-run {gpus:g}: this machine has {here}. A run over several machines is started by hand: "
            f"torchrun --nnodes N --nproc-per-node {max(here, 1)} --no-python -- repa-train --config RUN/settings.json "
            f"--out RUN --resume auto"
        )
    return int(gpus)


def _explain(ablation: "Ablation", *, device: str, serial: bool) -> None:
    from ...cache_specs.sizes import human_bytes
    from ..runs.metrics import human_seconds
    from ..studies.ablation import costs, machine_for

    _list(ablation)
    todo = [run for run in ablation.runs if not run.finished]
    if not todo:
        say("every run is done; nothing would be trained")
        return
    cores = len(os.sched_getaffinity(0))
    measured = costs(todo, device=device, threads=cores)
    largest = max(measured.values(), key=lambda cost: cost.peak_bytes)
    machine = machine_for(todo, largest, device=device, ranks=1, per_gpu=1.0)
    seconds = sum(measured[run.folder.name].step_s * (run.config.steps - run.done) for run in todo)
    read = sum(
        measured[run.folder.name].row_bytes * run.config.batch_size * (run.config.steps - run.done) for run in todo
    )
    at_once = 1 if serial else machine.parallel
    say(
        f"{len(todo)} runs to do: {human_seconds(seconds)} of this machine one after another with all {cores} threads, "
        f"measured on {len({id(cost) for cost in measured.values()})} kinds of run; {at_once} at once, "
        f"{human_bytes(largest.peak_bytes)} each at most; {human_bytes(read)} read from the cache"
    )
    say("dry run: nothing was trained or written")


def _list(ablation: "Ablation") -> None:
    for run in ablation.runs:
        how = "done" if run.finished else f"step {run.done}" + (", failed" if run.failed else "")
        same = f"; {len(run.same)} more rows are this very run" if run.same else ""
        say(f"{run.folder.name}: {how} of {run.config.steps}{same}")
    for row, why in ablation.refused:
        say(f"{row.label}: {why}")


def _run(
    ablation: "Ablation",
    study: Path,
    *,
    device: str,
    ranks: int,
    per_gpu: float,
    serial: bool,
    address: str | None,
) -> None:
    from ...cache_specs.errors import JobError, UsageError
    from ...cache_specs.files.locks import locked
    from ...cache_specs.files.whole_file import write_whole
    from ..studies.ablation import STUDY_FILE, trial_of, write_settings

    if ablation.refused:
        row, why = ablation.refused[0]
        raise UsageError(f"{len(ablation.refused)} runs cannot be trained, {row.label} first: {why}")
    out = ablation.out
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".ablating" / "lock", wait=False, option="--out") as alone:
        if not alone:
            raise JobError(f"{out}: another repa-ablate works there. Wait for its end, or choose another --out")
        todo = [run for run in ablation.runs if not run.finished]
        _list(ablation)
        if not todo:
            say(f"{out}: all {len(ablation.runs)} runs done")
            return
        machine = _machine(out, todo, device=device, ranks=ranks, per_gpu=per_gpu, serial=serial)
        write_whole(out / STUDY_FILE, study.read_bytes())
        by_folder = {}
        for run in todo:
            write_settings(run)
            by_folder[trial_of(run, machine).folder] = run
        say(f"{len(todo)} runs to do, {1 if serial else machine.parallel} at once on {machine.threads} threads each")
        failed = _schedule(list(by_folder), by_folder, machine, serial=serial, address=address, per_gpu=per_gpu)
    if failed:
        raise JobError(
            f"{out}: {len(failed)} of {len(ablation.runs)} runs failed, {failed[0]} first; log.txt in its folder says "
            f"why. Give the same command again to go on with them"
        )
    left = [run for run in ablation.runs if not run.finished]
    again = "; the same command goes on" if left else ""
    say(f"{out}: {len(ablation.runs) - len(left)} of {len(ablation.runs)} runs done{again}")


def _machine(out: Path, todo: list["Planned"], *, device: str, ranks: int, per_gpu: float, serial: bool) -> "Machine":
    """Return what each run gets: what the study's have got so far, or what a probe of the largest says is best."""
    import dataclasses

    from ..studies.ablation import costs, machine_for, store_machine, stored_machine

    cores = len(os.sched_getaffinity(0))
    machine = stored_machine(out)
    if machine is not None:
        if machine.threads > cores:
            say(f"{out}: its runs have {machine.threads} threads, this machine has {cores}: slower, other last bits")
        if (machine.device, machine.ranks) != (device, ranks):
            say(f"{out}: its runs so far were on {machine.device} with {machine.ranks} ranks; the digests differ")
            machine = dataclasses.replace(machine, device=device, ranks=ranks)
        return machine
    largest: Cost | None = None
    if device == "cpu" and not serial and len(todo) > 1:
        largest = max(costs(todo, device=device, threads=cores).values(), key=lambda cost: cost.peak_bytes)
    machine = machine_for(todo[:1] if serial else todo, largest, device=device, ranks=ranks, per_gpu=per_gpu)
    store_machine(out, machine)
    return machine


def _schedule(
    folders: list[str],
    by_folder: dict[str, "Planned"],
    machine: "Machine",
    *,
    serial: bool,
    address: str | None,
    per_gpu: float,
) -> list[str]:
    """Do the runs; return the names of those that failed."""
    from ..studies.ablation import trial_of
    from ..studies.schedule import run_here
    from ..studies.trial import STOPPED, Trial

    trials = [trial_of(by_folder[folder], machine) for folder in folders]
    failed: list[str] = []
    asked: list[int] = []
    number = [0]

    def on_done(trial: Trial, code: int) -> None:
        number[0] += 1
        run = by_folder[trial.folder]
        how = "stopped" if code == STOPPED else "done" if code == 0 else f"FAILED (exit {code})"
        if code not in (0, STOPPED):
            failed.append(run.folder.name)
        say(f"{number[0]} of {len(trials)}  {run.folder.name}: {how} at step {run.done}")

    def ask(_signal: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(1)
        os.write(2, b"\nstopping: runs save at their next step. Ctrl-C again aborts\n")

    # A shell's background job ignores interrupts, and goes on doing so.
    heard = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) is not signal.SIG_IGN]
    before = {kind: signal.signal(kind, ask) for kind in heard}
    try:
        at_once = 1 if serial else machine.parallel
        # Which GPU a run gets is for Ray to decide; on a CPU it would have nothing to do.
        if address is not None or (machine.device == "cuda" and at_once > 1):
            from .borrowed import run_on_ray

            gpus = per_gpu if machine.device == "cuda" else 0.0
            run_on_ray(trials, address=address, gpus=gpus, on_done=on_done, stop=lambda: bool(asked))
        else:
            run_here(trials, parallel=at_once, stop=lambda: bool(asked), on_done=on_done)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    return failed


def ablate() -> None:
    """Entry point of repa-ablate."""
    expand_home()
    ablate_command(prog_name="repa-ablate")


if __name__ == "__main__":
    ablate()
