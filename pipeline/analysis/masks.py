"""Foreground masks for SRSS: one PNG a sample, aligned with the cache's crop, pooled to the token grid.

The mask of sample `cat/001.jpg` is `cat/001.png` below the folder: one channel, as wide and high as the cache's images,
foreground where it is not zero. A grid cell is foreground if any of its pixels is (max-pooling, as iREPA does).
"""

import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F

from ...cache_specs.errors import UsageError, reason
from ...cache_specs.files.outside import read_file
from ..images.formats import open_picture
from ..images.manifest import MOST_IMAGE_BYTES

# Images need so many tokens of either kind, the study's 64 of 256: below, SRSS is the noise of a few anchors.
FEWEST_SHARE = 0.25


class MaskFolder:
    """Masks below `folder` for images of `resolution` pixels a side."""

    def __init__(self, folder: Path, sample_ids: Sequence[str], resolution: int) -> None:
        """Raise `UsageError` where the folder is missing, empty, or holds a name that is no sample's."""
        if not folder.is_dir():
            raise UsageError(f"--masks {folder}: no such folder")
        self._folder = folder
        self._resolution = resolution
        known = {str(PurePosixPath(sample_id).with_suffix(".png")) for sample_id in sample_ids}
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
        strangers = sorted(found - known)
        if strangers or not found:
            what = (
                f"{len(strangers)} of {len(found)} masks match no sample id, the first is {strangers[0]}"
                if strangers
                else "no .png below it"
            )
            raise UsageError(f"--masks {folder}: {what}; expected names such as {min(known)}")
        self._found = found

    def read(self, sample_id: str, grid: tuple[int, int]) -> np.ndarray | None:
        """Return the foreground [T] bool of a sample, None where it has no mask or too little of either kind.

        Raises `UsageError` for a mask of another size or with colours.
        """
        name = str(PurePosixPath(sample_id).with_suffix(".png"))
        if name not in self._found:
            return None
        path = self._folder / name
        try:
            with open_picture(io.BytesIO(read_file(path, most=MOST_IMAGE_BYTES))) as image:
                pixels = np.asarray(image)
        except Exception as error:  # a damaged picture raises what it likes
            raise UsageError(f"--masks: {path} cannot be read ({reason(error)})") from error
        side = self._resolution
        if pixels.shape != (side, side):
            raise UsageError(
                f"--masks: {path} has shape {' x '.join(map(str, pixels.shape))}; expected one channel of {side} x "
                f"{side}, the crop that the cache was built from"
            )
        foreground = torch.from_numpy(pixels != 0).float()[None, None]
        pooled = F.adaptive_max_pool2d(foreground, grid).flatten() > 0
        share = pooled.float().mean().item()
        return pooled.numpy() if FEWEST_SHARE <= share <= 1 - FEWEST_SHARE else None
