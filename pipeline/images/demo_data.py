"""The demo's images: crops of the photographs that scikit-image ships, so that nothing is downloaded.

Only photographs with a free licence are used (scikit-image's data/README.txt); the class is the photograph. Crops are a
function of (photograph, index) alone: square, between a fifth and a half of the short side, at a random place.
"""

import functools
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from .manifest import FolderSource, ImageSource, Manifest

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
)
CROPS_PER_PHOTOGRAPH = 192  # 2,112 crops in all
CROP_SEED = 0


@functools.cache
def _photograph(name: str) -> np.ndarray:
    import skimage.data

    pixels = getattr(skimage.data, name)()
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


@dataclass(frozen=True)
class DemoSource:
    """Crops of `side` pixels as uncompressed PPM files, the same bytes on every machine."""

    side: int = 96

    def read(self, sample_id: str) -> bytes:
        name, index = PurePosixPath(sample_id).parts[0], int(PurePosixPath(sample_id).stem)
        pixels = _photograph(name)
        rng = np.random.default_rng([CROP_SEED, PHOTOGRAPHS.index(name), index])
        short = min(pixels.shape[:2])
        size = int(rng.integers(short // 5, short // 2 + 1))
        top = int(rng.integers(0, pixels.shape[0] - size + 1))
        left = int(rng.integers(0, pixels.shape[1] - size + 1))
        crop = Image.fromarray(pixels[top : top + size, left : left + size])
        stream = io.BytesIO()
        crop.resize((self.side, self.side), resample=Image.Resampling.BOX).save(stream, format="PPM")
        return stream.getvalue()


def demo_manifest() -> Manifest:
    """Return the manifest of the demo: 2,112 crops, 11 classes, in bytewise order of their ids."""
    ids = [f"{name}/{i:04d}.ppm" for name in PHOTOGRAPHS for i in range(CROPS_PER_PHOTOGRAPH)]
    labels = np.repeat(np.arange(len(PHOTOGRAPHS), dtype=np.int32), CROPS_PER_PHOTOGRAPH)
    return Manifest(
        where="demo",
        sample_ids=np.array(ids, dtype=np.dtypes.StringDType()),
        labels=labels,
        class_names=PHOTOGRAPHS,
        source=DemoSource(),
    )


def source_of(data: str) -> ImageSource:
    """Return where the pictures of a folder, or of the demo, are read from, without listing them."""
    return DemoSource() if data == "demo" else FolderSource(Path(data).absolute())
