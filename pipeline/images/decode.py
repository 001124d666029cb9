"""One image file becomes one uint8 square: decoded, turned upright, centre-cropped as ADM does.

Every mode of Pillow's is brought to 8-bit RGB: 16-bit grey is scaled by 1/257, CMYK, palette and grey are converted,
alpha is dropped, as the field's own tools do. EXIF rotation is applied, where it can be read. What cannot be decoded is
a `BadImage` with its reason; it never stops the others.
"""

import errno
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...cache_specs.errors import reason
from ...cache_specs.files.outside import UnfitFileError
from .formats import lacking_format, open_picture
from .manifest import ImageSource

# What the operating system says of a file that will be no better tomorrow. Anything else (EIO, ESTALE, ETIMEDOUT,
# ENOMEM) is the disk's, the network's or the machine's, and passes.
LASTING_ERRORS = frozenset(
    [errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG]
)
NO_MEMORY = "out of memory error"  # Pillow's words where one of its decoders could not allocate: an OSError, no number
EXTREME = 16  # times as long as wide: what is scaled is then only the middle, in the memory of the crop

# How what a camera stored is turned upright: EXIF 2.32, tag 0x0112.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """One picture that cannot be used, with the reason; always caught and listed by sample."""


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """A sub-batch of consecutive rows.

    `images` [b, H, W, 3] uint8, zeros where bad; `source_bytes` [b] int64, the size of each file, 0 where bad;
    `bad` gives the reason by offset in the batch; `passing` are those of them that are not the file's own fault.
    """

    images: np.ndarray
    source_bytes: np.ndarray
    bad: dict[int, str]
    passing: frozenset[int] = frozenset()


def decode_batch(
    source: ImageSource, sample_ids: Sequence[str], resolution: int, expected_bytes: np.ndarray
) -> DecodedBatch:
    """Decode consecutive samples.

    `expected_bytes` [b] int64: the size each file had when an earlier component of this cache was built, 0 where no
    component has it; another size is a bad image, since all components of a sample come from the same picture.
    """
    images = np.zeros((len(sample_ids), resolution, resolution, 3), dtype=np.uint8)
    source_bytes = np.zeros(len(sample_ids), dtype=np.int64)
    bad: dict[int, str] = {}
    passing = set()
    for i, sample_id in enumerate(sample_ids):
        try:
            data = source.read(sample_id)
            if expected_bytes[i] not in (0, len(data)):
                raise BadImage(
                    f"the file has {len(data)} bytes now, and had {expected_bytes[i]} when an earlier component of "
                    "this cache was built; put the old file back, or build a new cache"
                )
            images[i] = decode(data, resolution)
            source_bytes[i] = len(data)
        except MemoryError:
            bad[i] = "cannot be decoded (there was not enough memory)"
            passing.add(i)
        except OSError as error:
            bad[i] = f"cannot be read ({reason(error)})"
            if error.errno not in LASTING_ERRORS and not isinstance(error, UnfitFileError):
                passing.add(i)
        except BadImage as error:
            bad[i] = str(error)
    return DecodedBatch(images=images, source_bytes=source_bytes, bad=bad, passing=frozenset(passing))


def decode(data: bytes, resolution: int) -> np.ndarray:
    """Return the centre crop [resolution, resolution, 3] uint8 of an image file.

    Raises `BadImage` with the reason, and `MemoryError` where the machine had too little: no fault of the file.
    """
    if not data:
        raise BadImage("an empty file")
    try:
        with open_picture(io.BytesIO(data)) as image:
            image.load()
            return center_crop(_to_rgb(_upright(image)), resolution)
    except (BadImage, MemoryError):
        raise
    # Decoders of damaged files raise whatever they like (SyntaxError, struct.error, IndexError, ...): each is this
    # file's fault, and its name and reason are all that helps.
    except Exception as error:
        if isinstance(error, OSError) and (error.errno == errno.ENOMEM or NO_MEMORY in str(error)):
            raise MemoryError(str(error)) from error
        lacking = lacking_format(data)
        if lacking is not None:
            raise BadImage(f"a {lacking} file, which this machine's Pillow cannot decode") from error
        if isinstance(error, Image.UnidentifiedImageError):
            raise BadImage("not an image") from error
        raise BadImage(f"cannot be decoded ({reason(error)})") from error


def _upright(image: Image.Image) -> Image.Image:
    """Return the image as its EXIF orientation says, as it is stored where that says nothing that can be read."""
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # whatever Pillow makes of damaged EXIF: no pixel is in doubt
        method = None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion would clip at 255.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65_535:
            raise BadImage(f"grey values {values.min()} to {values.max()}, expected 0 to 65535")
        return Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels have no fixed white; convert it to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns of the direct way
    return image.convert("RGB")


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """Return ADM's centre crop (Dhariwal and Nichol, arXiv 2105.05233) of an RGB image.

    Halve with a box filter while the short side is at least twice the resolution, scale the short side to it
    (bicubic), cut out the centre: [resolution, resolution, 3] uint8. Of an extreme picture the same centre is scaled
    alone: a line of 5,000 pixels would become 4 GB.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    top, left = (size[1] - resolution) // 2, (size[0] - resolution) // 2
    if max(size) > EXTREME * resolution:
        x, y = image.width / size[0], image.height / size[1]
        right, bottom = min((left + resolution) * x, image.width), min((top + resolution) * y, image.height)
        box = (left * x, top * y, right, bottom)
        return np.asarray(image.resize((resolution, resolution), resample=Image.Resampling.BICUBIC, box=box))
    pixels = np.asarray(image.resize(size, resample=Image.Resampling.BICUBIC))
    return pixels[top : top + resolution, left : left + resolution]
