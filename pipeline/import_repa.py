"""Import from REPA: the folder that its preprocessing writes, `images/` and `vae-sd/` (sihyun-yu/REPA).

Both tools of the preprocessing are EDM2's but for the pixels, which are in [-1, 1] here. The sample ids are those of
the images, so that `repa-cache build --data FOLDER/images` adds encoders' tokens to the imported cache.
"""

from pathlib import Path
from typing import ClassVar

from ..cache_specs.errors import UsageError
from .import_edm2 import NumberedSource
from .import_npy import FolderMembers, NumberedLatents

IMAGES = "images"
LATENTS = "vae-sd"


class RepaSource(NumberedSource):
    """REPA's folder: a `LatentSource`."""

    layout: ClassVar[str] = "repa"
    pixel_range: tuple[float, float] | None = (-1.0, 1.0)


def open_repa(data: Path, images: Path | None) -> RepaSource:
    """Open REPA's folder, its images elsewhere if `images` says so; raise `UsageError` where it is none."""
    if not (data / LATENTS).is_dir():
        raise UsageError(f"--data {data}: no folder {LATENTS}/ in it; expected REPA's, with {IMAGES}/ and {LATENTS}/")
    if images is None and (data / IMAGES).is_dir():
        images = data / IMAGES
    return RepaSource(NumberedLatents(FolderMembers(data / LATENTS)), images)
