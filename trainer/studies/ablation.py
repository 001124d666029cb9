"""A study's folder: every run of it once, named by what it is, and what of a machine each of them gets.

    STUDY/study.yaml            the file as it was last given
    STUDY/study.json            threads, ranks and device of its runs, fixed when it began: other numbers, other bits
    STUDY/<what varies>-<digest>/    a run of repa-train, with settings.json, log.txt and, if it failed, outcome.json

The digest decides which run is which (runs/identity.py): a run is never done twice, a study that grew adds runs, and
one whose `steps` grew goes on.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...cache_specs.errors import RepaError, UsageError
from ...cache_specs.files.outside import MOST_SETTINGS_BYTES, parse_json, read_file
from ...cache_specs.files.whole_file import write_whole
from ..distributed import World
from ..models.checkpoint import latest_checkpoint
from ..runs.config import RunConfig
from ..runs.identity import run_digest
from ..runs.run import open_cache
from ..runs.stored import CONFIG_FILE
from .probe import Cost, probe
from .study_file import Row, StudyFile, rows_of
from .trial import OUTCOME_FILE, SETTINGS_FILE, STOPPED_AS, Trial

STUDY_FILE, MACHINE_FILE = "study.yaml", "study.json"
MEMORY_SHARE = 0.8  # of what is free, for runs at once


@dataclass(kw_only=True)
class Planned:
    """One run of a study: its settings with nothing left to resolve, its folder, and how far it is."""

    row: Row
    config: RunConfig
    folder: Path
    same: list[Row] = dataclasses.field(default_factory=list)  # other rows that are this very run

    @property
    def done(self) -> int:
        """Steps of its newest checkpoint."""
        newest = latest_checkpoint(self.folder)
        return 0 if newest is None else int(newest.stem)

    @property
    def finished(self) -> bool:
        return self.done >= self.config.steps

    @property
    def failed(self) -> bool:
        return not self.finished and self._outcome.get("status") == "failed"

    @property
    def stopped_at(self) -> int | None:
        """The step at which its study let it go no further (halving.py)."""
        if self.finished or self._outcome.get("status") != STOPPED_AS:
            return None
        step = self._outcome.get("step")
        return step if type(step) is int else self.done

    @property
    def _outcome(self) -> dict[str, Any]:
        try:
            found = parse_json(read_file(self.folder / OUTCOME_FILE, most=MOST_SETTINGS_BYTES))
        except (OSError, ValueError):  # none, or damaged: then the run is simply gone on with
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(kw_only=True)
class Ablation:
    """The runs of a study, and what could not be planned: rows with the line that says why."""

    out: Path
    runs: list[Planned]
    refused: list[tuple[Row, str]]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What each run gets, the same for all of a study: another number of threads or ranks gives other bits."""

    device: str
    threads: int
    ranks: int = 1
    precision: str
    parallel: int  # runs at once on one machine; no part of what a run is


def plan(study: StudyFile, out: Path, *, device: str, ranks: int) -> Ablation:
    """Return the runs of a study with their folders in `out`; nothing is written.

    Raises UsageError where a row makes no sense, or `out` is a run and not a study. A row whose cache lacks what it
    reads is among `refused`.
    """
    if (out / CONFIG_FILE).exists() or latest_checkpoint(out) is not None:
        raise UsageError(f"{out} is a run, not a study; choose another --out")
    world = World(rank=0, size=ranks, device=torch.device(device))
    opened: dict[Any, tuple[RunConfig, dict[str, str]] | str] = {}
    runs: dict[str, Planned] = {}
    refused = []
    for row in rows_of(study):
        config = row.config
        reads = (config.cache, config.autoencoder, config.encoders, config.objective, config.alignment.projector)
        if reads not in opened:
            try:
                resolved, reader = open_cache(config, world)
                opened[reads] = resolved, reader.fingerprints
            except RepaError as error:
                opened[reads] = str(error)
        found = opened[reads]
        if isinstance(found, str):
            refused.append((row, found))
            continue
        resolved, fingerprints = found
        config = dataclasses.replace(
            config,
            cache=config.cache if "://" in config.cache else os.path.abspath(config.cache),  # whoever starts the run
            autoencoder=resolved.autoencoder,
            encoders=resolved.encoders,
            precision=resolved.precision,
        )
        digest = run_digest(config, fingerprints, world_size=ranks)
        if digest in runs:
            runs[digest].same.append(row)
            continue
        folder = next(iter(sorted(out.glob(f"*-{digest}"))), out / f"{row.label}-{digest}")
        runs[digest] = Planned(row=row, config=dataclasses.replace(config, out=str(folder)), folder=folder)
    return Ablation(out=out, runs=list(runs.values()), refused=refused)


def write_settings(run: Planned) -> Path:
    """Write the file that the run is started from, and return it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    file = run.folder / SETTINGS_FILE
    write_whole(file, (json.dumps(run.config.plain(), indent=1) + "\n").encode())
    return file


def stored_machine(out: Path) -> Machine | None:
    """Return what the runs of a study have got so far; raise UsageError where the file is damaged."""
    file = out / MACHINE_FILE
    if not file.exists():
        return None
    try:
        return Machine(**parse_json(read_file(file, most=MOST_SETTINGS_BYTES)))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{file} is damaged ({error}), and with it how many threads the study's runs have; write it anew, or "
            f"choose another --out"
        ) from error


def machine_for(runs: Sequence[Planned], cost: Cost | None, *, device: str, ranks: int, per_gpu: float) -> Machine:
    """Return how many runs go at once and what each gets: all cores and, of free memory, no more than fits.

    `cost` is that of the largest run; on CUDA `per_gpu` is the share of a device that a run has.
    """
    cores = len(os.sched_getaffinity(0))
    parallel = min(len(runs), cores)
    if device == "cuda":
        parallel = min(len(runs), max(1, int(torch.cuda.device_count() / per_gpu)))
    elif cost is not None:
        parallel = max(1, min(parallel, int(MEMORY_SHARE * free_memory() / cost.peak_bytes)))
    parallel = max(1, parallel)
    precision = runs[0].config.precision
    return Machine(
        device=device, threads=max(1, cores // parallel), ranks=ranks, precision=precision, parallel=parallel
    )


def store_machine(out: Path, machine: Machine) -> None:
    """Fix what the runs of a study get."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / MACHINE_FILE, (json.dumps(dataclasses.asdict(machine), indent=1) + "\n").encode())


def trial_of(run: Planned, machine: Machine, *, until: int | None = None) -> Trial:
    """Return the run as something to be done, to its end or `until` a step."""
    folder = str(run.folder.resolve())
    return Trial(folder=folder, device=machine.device, threads=machine.threads, ranks=machine.ranks, until=until)


def costs(runs: Sequence[Planned], *, device: str, threads: int) -> dict[str, Cost]:
    """Return what a step of each run costs, by folder; runs that differ in numbers alone are measured once.

    Nothing is written into the study.
    """
    measured: dict[Any, Cost] = {}
    found = {}
    for run in runs:
        config = run.config
        kind = (
            config.model,
            config.objective,
            config.encoders,
            config.alignment.projector,
            config.alignment.hidden_dim,
            config.alignment.kernel_size,
            config.batch_size,
            config.accumulation,
            config.precision,
            config.compile,
            config.activation_checkpointing,
            config.cache,
        )
        if kind not in measured:
            with tempfile.TemporaryDirectory() as folder:
                settings = Path(folder) / SETTINGS_FILE
                settings.write_text(json.dumps(config.plain()), encoding="utf-8")
                measured[kind] = probe(settings, device=device, threads=threads)
        found[run.folder.name] = measured[kind]
    return found


def free_memory() -> int:
    """Return the bytes of memory that processes may still take on this machine."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(kilobytes)
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
