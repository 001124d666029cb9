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
from .sit import SiT

FOLDER = "checkpoints"
PARTIAL = ".partial"


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
    folder = run / FOLDER
    path = folder / f"{steps:07d}.pt"
    partial = folder / f".{path.name}{PARTIAL}"
    payload = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "opt": dict(opt),
        "args": _published_args(model) | dict(args),
        "steps": steps,
        "architecture": {
            "sit": dataclasses.asdict(model.config),
            "projectors": [dataclasses.asdict(projector) for projector in model.projector_configs],
            "encoder_depth": model.encoder_depth,
        },
        "config": dict(config),
        "fingerprints": dict(fingerprints),
    }
    if emas:
        payload["emas"] = {decay: average.state_dict() for decay, average in emas.items()}
    if objective:
        payload["objective"] = dict(objective)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".*{PARTIAL}"):  # of a save that was killed
            leftover.unlink()
        _write_durably(payload, partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        before = latest_checkpoint(run)
        kept = f"{before.name} stays in force" if before else "there is none before it"
        raise CheckpointError(
            f"{path}: the checkpoint of step {steps} could not be written: {error.strerror or error}; {kept}. "
            f"Make room or mend the folder, then continue with --resume auto"
        ) from error
    for old in _checkpoints(run)[:-keep_last]:
        old.unlink(missing_ok=True)  # the user may tidy up too
    return path


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
        raise CheckpointError(f"{path}: there is no such checkpoint")
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not match its bytes")
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except pickle.UnpicklingError as error:
        if not zipped:  # cut off, the zip's directory is gone, and PyTorch takes what is left for an old pickle
            raise CheckpointError(_damaged(path, "it is not a whole PyTorch file")) from error
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors, plain values and argparse.Namespace ({reason.strip()}). "
            f"Unpickling it could run code; save its state dicts alone"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(_damaged(path, str(error).splitlines()[0] if str(error) else "it ends early")) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; expected a dict of state dicts")
    return loaded


def _checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoints by steps, fewest first."""
    return sorted((p for p in (run / FOLDER).glob("*.pt") if p.stem.isdecimal()), key=lambda p: int(p.stem))


def _published_args(model: SiT) -> dict[str, Any]:
    """Return what the published `args` say about the architecture, in their words."""
    projector = model.projector_configs[0] if model.projector_configs else None
    args: dict[str, Any] = {
        "model": model.config.name,
        "num_classes": model.config.num_classes,
        "qk_norm": False,
        "prediction": "v",
    }
    if projector is not None:
        args |= {
            "encoder_depth": model.encoder_depth,
            "projection_layer_type": projector.kind,
            "proj_kwargs_kernel_size": projector.kernel_size,
        }
    return args


def _damaged(path: Path, reason: str) -> str:
    message = f"{path}: the checkpoint is damaged: {reason}. "
    if path.parent.name != FOLDER or not path.stem.isdecimal():
        return message + "Fetch or copy it again"
    older = [p for p in _checkpoints(path.parent.parent) if int(p.stem) < int(path.stem)]
    if older:
        return message + f"Delete it to resume from {older[-1].name}, the one before"
    return message + "There is none before it: delete it and start the run again"


class _File(io.FileIO):
    """A file for torch.save that keeps the OSError of a failed write, which PyTorch replaces by one of its own."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            write_all(self.fileno(), data)
        except OSError as error:
            self.error = error
            raise
        return len(data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte of `data`; the operating system may take fewer at a time."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _write_durably(payload: dict[str, Any], partial: Path, path: Path) -> None:
    """Write `payload` to `partial`, sync, rename to `path`, sync the folder; raise OSError where any of it fails."""
    with _File(partial, "wb") as file:
        try:
            torch.save(payload, file)
        except (OSError, RuntimeError):
            if file.error is not None:
                raise file.error from None
            raise
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
