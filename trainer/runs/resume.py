"""Starting in an empty run folder, continuing in one's own, and refusing everything else.

A resume is exact: parameters, EMA and optimizer come from the newest checkpoint, every other number of the run is a
function of the step. So settings and data must be those of the checkpoint (config.MAY_CHANGE names what may differ).

On the CPU that holds to the bit, for the same hardware, versions, threads and number of ranks. On CUDA the state, the
samples and the noise are as exact, but not every gradient: the backward passes of flash and memory-efficient attention
add in the order in which blocks finish, so that two equal steps differ by a rounding, resumed or not. Convolutions are
deterministic (run.settle_convolutions), the alignment loss and its gradient too; with PyTorch's math attention a test
asks a GPU for equal bits.
"""

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...cache_specs.errors import JobError, UsageError
from ...cache_specs.files.locks import locked
from ...cache_specs.files.outside import MOST_TABLE_BYTES, parse_json, read_file
from ...cache_specs.files.whole_file import write_whole
from ..models.checkpoint import FOLDER, CheckpointError, damaged, latest_checkpoint, load_own_checkpoint
from ..reading.reader import CacheReader
from .history import start_of
from .metrics import METRICS_FILE, say
from .run import Run
from .settings import FINGERPRINTS, HISTORY, differences, used
from .start import take_weights
from .stored import CONFIG_FILE, in_todays_words

LOCK_FOLDER = ".training"  # there while a process trains


@contextlib.contextmanager
def enter_folder(run: Run, *, resume: bool) -> Iterator[None]:
    """Hold the run's folder: restore its newest checkpoint if `resume`, then write config.json.

    Raises as `check_folder`, and JobError where another process trains there: a job that was queued again while the
    first has not ended yet. Both would write one metrics file.
    """
    lock = run.folder / LOCK_FOLDER / "lock"
    with locked(lock, wait=False, option="--out") if run.world.is_main else contextlib.nullcontext(True) as alone:
        (taken,) = run.world.most([0.0 if alone else 1.0])
        if taken:
            raise JobError(f"{run.folder}: another process trains there. Wait for its end, or choose another --out")
        stored = check_folder(run.folder, run.record(), run.reader, resume=resume)
        said: list[str] = []
        if stored is not None:
            restore(run, stored)
        elif run.config.init is not None:
            said = take_weights(run.config.init, run.model, (run.ema, *run.more_emas), run.norm)
        run.world.wait()  # every rank has looked before rank 0 writes
        if run.world.is_main:
            write_config(run)
            for line in said:
                say(line)
        yield


def check_folder(
    folder: Path, record: Mapping[str, Any], reader: CacheReader, *, resume: bool
) -> dict[str, Any] | None:
    """Return the newest checkpoint of a run, its tensors still on disk, or None where the run would begin.

    Raises UsageError where the folder holds a run and `resume` is false, or the checkpoint is of another run or past
    the steps asked for; CheckpointError where it is damaged (an older one is never taken silently).
    """
    path = latest_checkpoint(folder)
    if not resume and (path is not None or (folder / METRICS_FILE).exists()):
        raise UsageError(
            f"{folder} already holds a run{f' at {path.name}' if path else ''}. Continue it with --resume auto, or "
            f"choose another --out"
        )
    if path is None:
        return None
    # Mapped, not loaded: eight ranks of a machine would each hold all of it, 11 GB for SiT-XL, beside what they copy.
    stored = load_own_checkpoint(path)
    check_same(in_todays_words(stored["config"], source=str(path)), record, where=str(path))
    check_same_data(stored["fingerprints"], reader.fingerprints, where=str(path), cache=str(reader.path))
    if stored["steps"] > record["steps"]:
        raise UsageError(f"{path} has done {stored['steps']} steps, and --steps asks for {record['steps']} in all")
    return stored


def restore(run: Run, stored: Mapping[str, Any]) -> None:
    """Take model, EMA, optimizer and step from a checkpoint of this very run."""
    try:
        run.model.load_state_dict(stored["model"])
        run.ema.model.load_state_dict(stored["ema"])
        for ema in run.more_emas:
            ema.model.load_state_dict(stored["emas"][str(ema.decay)])
        run.objective.load_state_dict(stored.get("objective", {}))
        run.optimizer.load_state_dict(stored["opt"])
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # it may list 1,000 names
        path = run.folder / FOLDER / f"{stored['steps']:07d}.pt"
        reason = "its weights or its optimizer's state are not those of the model that its settings describe"
        raise CheckpointError(damaged(path, reason)) from error
    run.step = stored["steps"]


def check_same(stored: Mapping[str, Any], asked: Mapping[str, Any], *, where: str) -> None:
    """Raise UsageError, naming every field, where a resume asks for other settings than the stored ones."""
    changed = differences(stored, asked)
    if changed:
        raise UsageError(
            f"{where} was made with other settings: {'; '.join(changed)}. Go on with its own by repa-train --resume "
            f"{shlex.quote(str(Path(where).parent.parent))}, or start another run with another --out"
        )


def check_same_data(stored: Mapping[str, str], found: Mapping[str, str], *, where: str, cache: str) -> None:
    """Raise UsageError, naming every component, where the cache is not the one that the checkpoint was trained on."""
    other = sorted(name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name))
    if other:
        raise UsageError(
            f"{where} was trained on other data: {', '.join(other)} in {cache} has another fingerprint. Continue with "
            f"the cache that it was trained from, or start another run with another --out"
        )


def write_config(run: Run) -> None:
    """Write config.json: the settings in force, what the cache made of them, what is trained on, and how it came."""
    path = run.folder / CONFIG_FILE
    record = used(run.record())
    record[FINGERPRINTS] = run.reader.fingerprints
    record[HISTORY] = [*_history(path), start_of(run.step, run.world)]
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise JobError(f"{path} cannot be written ({error.strerror}); make room, or choose another --out") from error


def _history(path: Path) -> list[Any]:
    """Return the starts that config.json holds already; none where it is new, lost or of an older version."""
    try:
        found = parse_json(read_file(path, most=MOST_TABLE_BYTES))[HISTORY]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found if isinstance(found, list) else []
