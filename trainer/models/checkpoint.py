"""Checkpoints: one file that is either whole or not there, in the layout that REPA and iREPA publish.

In: a run's state. Out: RUN/checkpoints/0000500.pt, a dict of

    model, ema    state dicts with the published names, projectors included
    emas          our addition, where a run keeps several averages: the others, by decay
    objective     our addition, where a method has state of its own
    opt           the optimizer's state dict
    args          the settings as a plain dict (published files hold an argparse.Namespace)
    steps         optimizer steps done
    architecture  our addition: what `SiT` is built from
    config        our addition: the resolved configuration of the run
    fingerprints  our addition: sha256 of every cache component that the run reads, and of its valid rows

REPA's generate.py loads "ema" strictly where the run has an MLP projector, its only kind.

Files are written beside their place, synced and renamed, so a kill or a full disk leaves the previous one in force.
PyTorch does not check the checksums that it writes, so loading does: a flipped byte would become a wrong weight.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...cache_specs.errors import RepaError
from ...cache_specs.files.impostors import impostor
from ...cache_specs.files.partial_files import new_file
from ...cache_specs.files.whole_file import partial_of, sync_folder, write_all
from .architectures import config_record
from .sit import SiT

FOLDER = "checkpoints"
EMA_FOLDER = "ema"


class CheckpointError(RepaError, RuntimeError):
    """A checkpoint is damaged, missing, of another kind, or could not be written."""


def save_checkpoint(
    run: Path,
    *,
    steps: int,
    model: SiT,
    ema: SiT,
    emas: Mapping[str, SiT] | None = None,
    objective: Mapping[str, Any] | None = None,
    opt: Mapping[str, Any],
    args: Mapping[str, Any],
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    keep_last: int,
) -> Path:
    """Write RUN/checkpoints/<steps>.pt, then remove all but the `keep_last` newest; return its path.

    model and ema are the bare modules, not their DDP or compiled wrappers. `args` adds to what the model says of
    itself. Raises CheckpointError where the bytes cannot be written; the checkpoints before it are then untouched.
    """
    payload = {
        "model": model.state_dict(),
        **_averages(ema, emas or {}),
        "opt": dict(opt),
        **_about(ema, steps, args, config, fingerprints),
    }
    if objective:
        payload["objective"] = dict(objective)
    path = run / FOLDER / f"{steps:07d}.pt"
    before = latest_checkpoint(run)
    _save(payload, path, f"{before.name} stays in force" if before else "there is none before it")
    for old in _checkpoints(run)[:-keep_last]:
        old.unlink(missing_ok=True)  # the user may tidy up too
    return path


def save_ema(
    run: Path,
    *,
    steps: int,
    ema: SiT,
    emas: Mapping[str, SiT],
    args: Mapping[str, Any],
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str],
) -> Path:
    """Write RUN/ema/<steps>.pt, the averages alone, to sample from; raises as `save_checkpoint`."""
    path = run / EMA_FOLDER / f"{steps:07d}.pt"
    payload = {**_averages(ema, emas), **_about(ema, steps, args, config, fingerprints)}
    _save(payload, path, "the checkpoints of the run are whole")
    return path


def _averages(ema: SiT, others: Mapping[str, SiT]) -> dict[str, Any]:
    states = {decay: average.state_dict() for decay, average in others.items()}
    return {"ema": ema.state_dict()} | ({"emas": states} if states else {})


def _about(
    model: SiT, steps: int, args: Mapping[str, Any], config: Mapping[str, Any], fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a file says of its weights: enough to build the model and to know what it was trained on."""
    return {
        "args": _published_args(model) | dict(args),
        "steps": steps,
        "architecture": {
            **config_record(model.config),
            "projectors": [dataclasses.asdict(projector) for projector in model.projector_configs],
            "encoder_depth": model.encoder_depth,
        },
        "config": dict(config),
        "fingerprints": dict(fingerprints),
    }


def _save(payload: dict[str, Any], path: Path, kept: str) -> None:
    """Write a file whole or not at all; raise CheckpointError, which says what is `kept`, where it cannot be."""
    folder, partial = path.parent, partial_of(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(partial_of(Path("*.pt")).name):  # of a save that was killed
            leftover.unlink()
        try:
            _write_durably(payload, partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint of step {payload['steps']} could not be written: {error.strerror or error}; "
            f"{kept}. Make room or mend the folder, then continue with --resume auto"
        ) from error


def latest_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint of the most steps in the run's folder, or None; it is not opened."""
    found = _checkpoints(run)
    return found[-1] if found else None


def load_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint, ours or a published one, onto the CPU.

    Only tensors, plain containers and argparse.Namespace are unpickled: a file that asks for anything else is
    refused. With `mmap` tensors stay on disk until they are read. Raises CheckpointError naming the file and the way
    out where it is missing, damaged or refused; nothing older is taken in its stead.
    """
    if not path.is_file():
        what = "it is no regular file" if path.exists() else "there is no such checkpoint"
        raise CheckpointError(f"{path}: {what}")
    zipped = False
    try:
        zipped = zipfile.is_zipfile(path)
        if not zipped and (instead := impostor(path)):
            raise CheckpointError(f"{path}: no checkpoint: {instead}")
        if zipped:
            _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except RepaError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{path}: more than this machine has memory for") from error
    except pickle.UnpicklingError as error:
        if not zipped:  # cut off, the zip's directory is gone, and PyTorch takes what is left for an old pickle
            raise CheckpointError(damaged(path, "it is not a whole PyTorch file")) from error
        # Its text is ten lines of which the first advises to unpickle without any check.
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "its pickle is not a plain one")
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors, plain values and argparse.Namespace ({reason.strip()}). "
            f"Unpickling it could run code; save its state dicts alone"
        ) from error
    except Exception as error:  # all of it reads bytes of somebody else: struct, zlib, index errors and many more
        ends_early = isinstance(error, EOFError) and not str(error)
        reason = "it ends early" if ends_early else str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(damaged(path, reason)) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; expected a dict of state dicts")
    return loaded


def load_own_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint that `save_checkpoint` wrote, its tensors still on disk, with every part that a resume takes.

    Raises as `load_checkpoint`, and CheckpointError for a published file, or one that lacks a part.
    """
    stored = load_checkpoint(path, mmap=True)
    if "config" not in stored:
        raise CheckpointError(f"{path} is not a checkpoint of repa-train; it cannot be resumed, only sampled from")
    mappings = ("config", "fingerprints", "model", "ema", "opt")
    wrong = [name for name in mappings if not isinstance(stored.get(name), Mapping)]
    if type(stored.get("steps")) is not int or stored["steps"] < 0:
        wrong.append("steps")
    if wrong:
        raise CheckpointError(damaged(path, f"it holds no {' and no '.join(wrong)} that could be resumed"))
    return stored


def _check_archive(path: Path) -> None:
    """Raise BadZipFile where the archive is none of PyTorch's, claims more than the file holds, or lost a byte."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise zipfile.BadZipFile("it is a zip archive, but not one that torch.save writes")
        if any(name.endswith("constants.pkl") for name in names):
            raise zipfile.BadZipFile("it is a TorchScript program, not a dict of weights")
        claimed, held = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        if claimed > held:  # torch.save compresses nothing
            raise zipfile.BadZipFile(f"it claims {claimed:,} bytes and has {held:,}")
        lost = archive.testzip()
    if lost:
        raise zipfile.BadZipFile(f"the checksum of {lost} does not match its bytes")


def _checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoints by steps, fewest first."""
    found = (run / FOLDER).glob("*.pt")
    return sorted((p for p in found if p.stem.isdecimal() and p.is_file()), key=lambda p: int(p.stem))


def _published_args(model: SiT) -> dict[str, Any]:
    """Return what the published `args` say about the architecture, in their words."""
    projector = model.projector_configs[0] if model.projector_configs else None
    args: dict[str, Any] = {
        "model": model.config.name,
        "num_classes": model.config.num_classes,
        "qk_norm": False,
        "prediction": "v" if model.config.convention == "repa" else "velocity",  # SiT's word, whose time it counts
    }
    if projector is not None:
        args |= {
            "encoder_depth": model.encoder_depth,
            "projection_layer_type": projector.kind,
            "proj_kwargs_kernel_size": projector.kernel_size,
        }
    return args


def damaged(path: Path, reason: str) -> str:
    """Return the one line for a checkpoint that cannot be used, with the way out."""
    message = f"{path}: the checkpoint is damaged: {reason}. "
    if path.parent.name != FOLDER or not path.stem.isdecimal():
        return message + "Fetch or copy it again"
    older = [p for p in _checkpoints(path.parent.parent) if int(p.stem) < int(path.stem)]
    if older:
        return message + f"Delete it to resume from {older[-1].name}, the one before"
    return message + "There is none before it: delete it and start the run again"


class _File(io.FileIO):
    """A file for torch.save that keeps what ended a write, which PyTorch replaces by an error of its own."""

    error: BaseException | None = None

    def write(self, data: Any, /) -> int:
        try:
            write_all(self.fileno(), data)
        except BaseException as error:  # a full disk, an interrupt
            self.error = error
            raise
        return len(data)


def _write_durably(payload: dict[str, Any], partial: Path, path: Path) -> None:
    """Write `payload` to `partial`, sync, rename to `path`, sync the folder; raise OSError where any of it fails."""
    with _File(new_file(partial), "wb") as file:
        try:
            torch.save(payload, file)
        except (OSError, RuntimeError) as error:
            # PyTorch closes its archive whatever happened, and raises again because that is cut off.
            if file.error is not None:
                raise file.error from None
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)
