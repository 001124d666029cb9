"""Import from EDM2, the zip (or folder) of its dataset tool's encode command, and from REPA, whose tool is a copy.

Moments are mean and standard deviation, float32. REPA's (sihyun-yu/REPA: `images/` and `vae-sd/` in one folder) are of
pixels in [-1, 1], and its sample ids are those of the images, so that `repa-cache build --data FOLDER/images` adds
encoders' tokens. EDM2's (NVlabs/edm2) are of pixels in [0, 1]. Stable Diffusion's autoencoders expect [-1, 1], and what
they make of the one is no affine of what they make of the other: checks.py refuses such moments unless the user
has said to keep them as what they are.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np

from ...cache_specs.errors import UsageError
from ...cache_specs.layout import VIEWS
from ..images.manifest import scan_folder
from .npy import IMAGE_NAME, FolderMembers, NumberedLatents, ZipMembers, numbers_of
from .source import Kind, manifest_without_images

REPA_IMAGES = "images"
REPA_LATENTS = "vae-sd"


class NumberedSource:
    """EDM2's numbered moments, and the images of the same numbers where there are some: a `LatentSource`.

    `images` is the folder that the tool's convert command wrote, whose images the moments were made of.
    """

    layout: ClassVar[str] = "edm2"
    kind: Kind = "moments"
    views: tuple[str, ...] = VIEWS[:1]
    pixel_range: tuple[float, float] | None = (0.0, 1.0)

    def __init__(self, latents: NumberedLatents, images: Path | None) -> None:
        self._latents = latents
        self.where = latents.members.where
        self.image_root = images
        labels = latents.labels()
        if images is None:
            self.manifest, order = manifest_without_images(str(self.where), latents.names.tolist(), labels)
            self._numbers = latents.numbers[order]
            return
        self.manifest = scan_folder(images)
        ids = self.manifest.sample_ids.tolist()
        self._numbers = numbers_of(ids, IMAGE_NAME, images, "img00000000.png")
        self._check_pairs(labels)

    def read(self, row: int) -> np.ndarray:
        return self._latents.read(int(self._numbers[row]))[None]

    def source_bytes(self, row: int, stored: np.ndarray) -> int:
        if self.image_root is not None:
            return (self.image_root / str(self.manifest.sample_ids[row])).stat().st_size
        return self._latents.members.size(self._latents.name(int(self._numbers[row])))

    def published_statistics(self) -> None:
        return None

    def _check_pairs(self, labels: np.ndarray) -> None:
        """Raise `UsageError` where images and latents are not the same numbers with the same labels."""
        where = f"{self.image_root} and {self.where}"
        numbers, counts = np.unique(self._numbers, return_counts=True)
        if (counts > 1).any():
            raise UsageError(f"--data {self.image_root}: two images have the number {numbers[counts > 1][0]:08d}")
        for found, missing, what in (
            (numbers, self._latents.numbers, "images"),
            (self._latents.numbers, numbers, "latents"),
        ):
            lone = np.setdiff1d(missing, found)
            if len(lone):
                raise UsageError(
                    f"--data {where}: {len(lone)} numbers have no {what}, the first is {lone[0]:08d}; expected the "
                    "latents of these images, one each"
                )
        own = self.manifest.labels[np.argsort(self._numbers)]
        differ = np.flatnonzero(own != labels)
        if len(differ):
            row = differ[0]
            number = f"{self._latents.numbers[row]:08d}"
            raise UsageError(
                f"--data {where}: the labels differ for {len(differ)} samples, the first is {number}: "
                f"{own[row]} of the image, {labels[row]} of its latents; they are not of one data set"
            )


def open_edm2(data: Path, images: Path | None) -> NumberedSource:
    """Open `data`, a zip or a folder of EDM2's latents; raise `UsageError` where it is none."""
    members = ZipMembers(data) if data.is_file() else FolderMembers(data)
    return NumberedSource(NumberedLatents(members), images)


class RepaSource(NumberedSource):
    """REPA's numbered moments and images: a `LatentSource`."""

    layout: ClassVar[str] = "repa"
    pixel_range: tuple[float, float] | None = (-1.0, 1.0)


def open_repa(data: Path, images: Path | None) -> RepaSource:
    """Open REPA's folder, its images elsewhere if `images` says so; raise `UsageError` where it is none."""
    if not (data / REPA_LATENTS).is_dir():
        raise UsageError(
            f"--data {data}: no folder {REPA_LATENTS}/ in it; expected REPA's, with {REPA_IMAGES}/ and {REPA_LATENTS}/"
        )
    if images is None and (data / REPA_IMAGES).is_dir():
        images = data / REPA_IMAGES
    return RepaSource(NumberedLatents(FolderMembers(data / REPA_LATENTS)), images)
