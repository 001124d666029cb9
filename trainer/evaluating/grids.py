"""Sheets of samples: those that a run draws while it trains, and the first ones of a file of samples.

In: a run or an .npz, and a decoder. Out: a PNG; without a decoder the latents, as .npy. A run's grids always show the
same images, the same noise and labels from the EMA in eval mode, and draw from no generator that training uses.
"""

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...cache_specs.errors import UsageError, writing
from ...cache_specs.files.npz import MEMBER, open_rows
from ...cache_specs.files.whole_file import write_whole
from ..runs.metrics import RESUME
from ..runs.run import Run
from ..sampling.sample import Decoder, SampleRequest, draw_samples, labels_of, save_grid

FOLDER = "samples"
GRID_IMAGES = 64
MOST_CLASS_ROWS = 16  # up to here a sheet has one row a class


def draw_training_grid(run: Run, decode: Decoder | None) -> np.ndarray | None:
    """Draw `grid.num` samples of the EMA at this step into RUN/samples; return the sheet [H,W,3], None of latents.

    Raises JobError where the disk refuses it.
    """
    settings = run.config.grid
    request = SampleRequest(
        num=settings.num,
        seed=run.config.seed,
        labels="balanced",
        sampler=settings.sampler_config(),
    )
    with run.autocast():
        images = draw_samples(
            run.ema.model,
            range(settings.num),
            request,
            field=run.field,
            norm=run.norm,
            decode=decode,
        )
    path = run.folder / FOLDER / f"{run.step:07d}.png"
    with writing(path, then=RESUME):
        return write_sheet(images, path, request=request, num_classes=run.model.config.num_classes)[1]


def sheet_of_file(npz: Path, *, request: SampleRequest, num_classes: int) -> Path:
    """Write the first images of a finished file of samples beside it, as one sheet; return its path.

    Raises JobError where the disk refuses it.
    """
    images, path = first_rows(npz, min(GRID_IMAGES, request.num)), npz.with_suffix(".png")
    with writing(path, then="give the same command again"):
        return write_sheet(images, path, request=request, num_classes=num_classes)[0]


def first_rows(npz: Path, num: int) -> np.ndarray:
    """Return rows 0 .. num - 1 of `arr_0`, reading no more than them (np.load would read all)."""
    return next(pictures_of(npz, num))


def pictures_of(npz: Path, batch_size: int) -> Iterator[np.ndarray]:
    """Yield the rows of `arr_0` in batches, in order; np.load would hold all of them.

    Raises UsageError where the file is damaged.
    """
    try:
        stream, rows = open_rows(npz)
        # Through the archive, which checks the sum of what was read at its end.
        with stream, zipfile.ZipFile(stream) as archive, archive.open(MEMBER) as file:
            file.read(rows.header_bytes)
            for start in range(0, rows.shape[0], batch_size):
                num = min(batch_size, rows.shape[0] - start)
                data = file.read(num * rows.row_bytes)
                yield np.frombuffer(data, dtype=rows.dtype).reshape(num, *rows.shape[1:])
    except (OSError, EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{npz} is damaged ({str(error) or type(error).__name__}); delete it, and it is drawn again"
        ) from error


def write_sheet(
    images: np.ndarray, path: Path, *, request: SampleRequest, num_classes: int
) -> tuple[Path, np.ndarray | None]:
    """Write pictures [n,H,W,3] uint8 as a PNG, one row a class where that fits; latents as .npy.

    Returns the path, and the sheet's pixels [H,W,3] uint8 where it has any.
    """
    if images.dtype != np.uint8:
        path = path.with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        np.save(data, images)
        write_whole(path, data.getvalue())
        return path, None
    labels = labels_of(range(len(images)), request, num_classes).tolist()
    order, columns = arrange(labels)
    return path, save_grid(images[order], path, columns=columns)


def arrange(labels: Sequence[int]) -> tuple[list[int], int]:
    """Return the order of images with these labels on a sheet, and its columns.

    Where each class has as many images as the others, and there are not too many, a class is a row.
    """
    counts = np.unique(labels, return_counts=True)[1]
    if len(set(counts.tolist())) == 1 and 1 < len(counts) <= MOST_CLASS_ROWS and counts[0] > 1:
        return np.argsort(labels, kind="stable").tolist(), int(counts[0])
    return list(range(len(labels))), max(1, round(len(labels) ** 0.5))
