"""`repa-ablate`: the runs of a study file, each once, as many at a time as the machine holds."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import one_line_errors
from .said import run_command, say
from .train import CONTEXT

if TYPE_CHECKING:
    from ..studies.ablation import Ablation


@click.command(context_settings=CONTEXT)
@click.argument("study", type=click.Path(path_type=Path), metavar="STUDY.yaml")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="STUDY", help="Folder of the runs.")
@click.option("--cache", metavar="DIR|URL", help="The cache of all runs; wins over the file's.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--gpus-per-run", type=float, default=1.0, show_default=True, help="8: torchrun; 0.25: four on a GPU.")
@click.option("--serial", is_flag=True, help="One run after another, each with all threads.")
@click.option(
    "--stop-worst", multiple=True, metavar="FRACTION@STEP", help="Let the worst settings go no further; 0.5@10000."
)
@click.option("--address", metavar="ADDR", help="Ray cluster for the runs; all its nodes must see STUDY.")
@click.option("--dry-run", is_flag=True, help="Show the runs, what they lack and what they would cost; train nothing.")
def ablate_command(
    study: Path,
    out: Path,
    cache: str | None,
    device: str | None,
    gpus_per_run: float,
    serial: bool,
    stop_worst: tuple[str, ...],
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
        from ..studies.halving import check_rungs, read_rungs
        from ..studies.study_file import read_study
        from .ablating import Sharing, train_runs

        rungs = read_rungs(stop_worst)
        read = read_study(study)
        if cache is not None:
            read = _with_cache(read, cache)
        device = device or default_device()
        ranks = _ranks(gpus_per_run, device, on_cluster=address is not None)
        ablation = plan(read, out, device=device, ranks=ranks)
        check_rungs(rungs, ablation.runs)
        if dry_run:
            _explain(ablation, device=device, serial=serial)
            for rung in rungs:
                say(f"at step {rung.step} the worst {rung.fraction:g} of the settings stop, so that it takes less")
            raise SystemExit(1 if ablation.refused else 0)
        sharing = Sharing(device=device, ranks=ranks, per_gpu=gpus_per_run, serial=serial, address=address)
        train_runs(ablation, study, rungs, sharing)


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
    from .ablating import list_runs

    list_runs(ablation)
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


def ablate() -> None:
    """Entry point of repa-ablate."""
    run_command(ablate_command, "repa-ablate", aborted="stopped; the same command goes on where it was")


if __name__ == "__main__":
    ablate()
