"""Any number of samples into one .npz, a batch at a time, over ranks, continued where it was interrupted.

In: a model and a request. Out: OUT.npz with `arr_0`, image i in row i, as the field's FID tools read it, and OUT.json,
the request that made it. Until then OUT.npz.partial/ holds

    request.json    what is being drawn; another request is refused
    images.npy      all rows, filled in any order
    done            a byte an image, 1 once its row is on disk

Batches are rows k B to (k + 1) B whatever the number of ranks, and batch k belongs to rank k modulo the ranks: so a run
may be continued by another number of ranks, and equals an uninterrupted one byte for byte for the same B and hardware.
Memory holds one batch. Disk holds the images twice for the moment in which they are packed.
"""

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cache_specs.errors import JobError, UsageError, writing
from ...cache_specs.files.outside import MOST_TABLE_BYTES, UnfitFileError, open_regular, read_file
from ...cache_specs.files.partial_files import new_file
from ...cache_specs.files.whole_file import write_whole
from ...cache_specs.fingerprint import weights_digest
from ..diffusion.latents import LatentNorm
from ..distributed import Stopped, World
from ..models.sit import SiT
from ..objectives.objective import Field
from .sample import Decoder, SampleRequest, draw_samples, finish

COPY_BYTES = 1 << 20


def sample_to_npz(
    model: SiT,
    request: SampleRequest,
    out: Path,
    *,
    field: Field,
    norm: LatentNorm,
    decode: Decoder | None,
    decoder: str,
    batch_size: int,
    world: World,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """Draw a request into the file `out` (.npz) and return its path; draw nothing where that has been done.

    `decoder` names what `decode` is ("none" for latents); it, `about` (whatever else shapes the result, such as the
    precision) and the weights' digest are part of the request on disk. `progress` is told how many rows are done by
    each batch of this rank; `stop` is asked before each one. Every rank calls this. Without a decoder `arr_0` is
    [num,C,h,w] float32.

    Raises UsageError where `out` or what is left of it belongs to another request, JobError where the disk refuses a
    write or a rank's rows are missing, and Stopped on all ranks where `stop` said so on one; what is done is kept and
    the same call continues.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; expected 1 or more")
    request.check_labels(model.config.num_classes)
    if out.suffix != ".npz":
        raise UsageError(f"{out}: expected a name that ends in .npz")
    asked = _identity(model, request, field, norm, decoder, about or {})
    partial = out.with_name(f"{out.name}.partial")
    if out.exists():
        _check_same(out.with_suffix(".json"), asked, out)
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # of a run killed once `out` was whole
        return out

    with writing(out, then="give the same command again: it goes on where it was"):
        if world.is_main:
            _enter(partial, asked, _row(model, norm, decode), request.num)
        world.wait()
        rows = _Rows(partial, request.num)
        stopped = False
        try:
            for first in range(world.rank * batch_size, request.num, world.size * batch_size):
                if stop is not None and stop():
                    stopped = True
                    break
                batch = range(first, min(first + batch_size, request.num))
                if not rows.done(batch):
                    images = draw_samples(model, batch, request, field=field, norm=norm, decode=decode)
                    rows.write(batch, images)
                if progress is not None:
                    progress(len(batch))
        finally:
            rows.close()
        world.wait()
        if stop is not None and world.most([float(stopped)]) != [0.0]:
            raise Stopped
        if world.is_main:
            _pack(partial, out, asked, request.num)
        world.wait()
    return out


def _identity(
    model: SiT,
    request: SampleRequest,
    field: Field,
    norm: LatentNorm,
    decoder: str,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that the images depend on, as JSON values."""
    weights = weights_digest(
        (name, str(value.dtype), value.shape, value.cpu().contiguous().numpy().data)
        for name, value in sorted(model.state_dict().items())
        if not name.startswith("projectors.")
    )
    identity = {
        **dataclasses.asdict(request),
        "model": model.config.name,
        "weights_sha256": weights,
        **field.identity(),
        "latent_norm": dataclasses.asdict(norm),
        "decoder": decoder,
        **about,
    }
    if request.sampler.cls_cfg_scale is None:  # as in requests from before there was one
        del identity["sampler"]["cls_cfg_scale"]
    if request.sampler.internal_guidance == 1:
        del identity["sampler"]["internal_guidance"]
    if model.config.convention != "repa":  # the same weights, read the other way, draw other images
        identity["convention"] = model.config.convention
    return json.loads(json.dumps(identity))


def _row(model: SiT, norm: LatentNorm, decode: Decoder | None) -> np.ndarray:
    """Return one image of zeros in model space: its shape and dtype are those of every row."""
    config = model.config
    zeros = torch.zeros(1, config.in_channels, config.input_size, config.input_size, device=model.pos_embed.device)
    with torch.no_grad():
        return finish(zeros, norm, decode)[0]


def _enter(partial: Path, asked: dict[str, Any], row: np.ndarray, num: int) -> None:
    """Make the folder of an unfinished file, or check that the one there belongs to this request."""
    if partial.is_symlink():
        raise UsageError(f"{partial} is a link, which is not followed: remove it, or choose another name")
    request = partial / "request.json"
    if request.exists():
        _check_same(request, asked, partial)
        return
    shutil.rmtree(partial, ignore_errors=True)  # of a run killed before its request was written
    partial.mkdir(parents=True)
    header = {"descr": np.lib.format.dtype_to_descr(row.dtype), "fortran_order": False, "shape": (num, *row.shape)}
    with open(partial / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + num * row.nbytes)
    (partial / "done").write_bytes(bytes(num))
    _write_json(request, asked)


class _Rows:
    """The rows of an unfinished file, written in place by any number of processes."""

    def __init__(self, partial: Path, num: int) -> None:
        try:
            os.close(open_regular(partial / "done"))
            with os.fdopen(open_regular(partial / "images.npy"), "rb") as file:
                np.lib.format.read_magic(file)
                shape, _, self._dtype = np.lib.format.read_array_header_1_0(file)
                self._header_bytes = file.tell()
            self._shape = shape[1:]
            self._row_bytes = int(np.prod(self._shape)) * self._dtype.itemsize
            sizes = [os.stat(partial / name).st_size for name in ("images.npy", "done")]
            if shape[0] != num or sizes != [self._header_bytes + num * self._row_bytes, num]:
                raise ValueError("its files are not of the request's size")
        except (FileNotFoundError, UnfitFileError, ValueError) as error:
            raise UsageError(f"{partial} is damaged ({error}); delete it, then give the same command again") from error
        self._images = os.open(partial / "images.npy", os.O_WRONLY | os.O_NOFOLLOW)
        self._done = os.open(partial / "done", os.O_RDWR | os.O_NOFOLLOW)

    def close(self) -> None:
        os.close(self._images)
        os.close(self._done)

    def done(self, batch: range) -> bool:
        """Whether every row of `batch` is on disk."""
        return os.pread(self._done, len(batch), batch.start) == b"\1" * len(batch)

    def write(self, batch: range, images: np.ndarray) -> None:
        """Write the rows of `batch`, and only once they are on disk, that they are."""
        if images.shape != (len(batch), *self._shape) or images.dtype != self._dtype:
            raise TypeError(f"{images.dtype} {images.shape} do not fit rows of {self._dtype} {self._shape}")
        write_at(self._images, np.ascontiguousarray(images).data, self._header_bytes + batch.start * self._row_bytes)
        os.fsync(self._images)
        write_at(self._done, b"\1" * len(batch), batch.start)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte of `data` at `offset`; the operating system may take fewer at a time."""
    rest = memoryview(data).cast("B")
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _pack(partial: Path, out: Path, asked: dict[str, Any], num: int) -> None:
    """Turn the finished rows into `out`, the request beside it, and remove the folder."""
    missing = (partial / "done").read_bytes().count(0)
    if missing:
        raise JobError(f"{out}: {missing} of {num} images are missing, a rank did not finish. Give the command again")
    packed = partial / "packed.npz"
    entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))  # the same bytes at any time of day
    with open(new_file(packed), "wb") as file:
        with (
            open(partial / "images.npy", "rb") as rows,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(entry, "w", force_zip64=True) as member,
        ):
            shutil.copyfileobj(rows, member, COPY_BYTES)
        file.flush()
        os.fsync(file.fileno())
    _write_json(out.with_suffix(".json"), asked)
    os.replace(packed, out)
    shutil.rmtree(partial)


def _check_same(record: Path, asked: dict[str, Any], where: Path) -> None:
    """Raise UsageError where `record`, the request on disk of the samples at `where`, is not what is asked."""
    try:
        found = json.loads(read_file(record, most=MOST_TABLE_BYTES))
        if not isinstance(found, dict):
            raise ValueError("not a request")
    except FileNotFoundError:
        found = {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{record} cannot be read ({error}), so nobody knows which request {where} belongs to. Choose another "
            f"name, or delete both"
        ) from error
    for key in sorted(found.keys() | asked.keys()):
        if found.get(key) != asked.get(key):
            raise UsageError(
                f"{where} belongs to another request: {key} was {found.get(key)!r}, asked {asked.get(key)!r}. "
                f"Choose another name, or delete it"
            )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())
