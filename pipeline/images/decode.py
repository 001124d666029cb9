"""One image file becomes one uint8 square: decoded, turned upright, centre-cropped as ADM does.

Every mode of Pillow's is brought to 8-bit RGB: 16-bit grey is scaled by 1/257, CMYK, palette and grey are converted,
alpha is dropped, as the field's own tools do. EXIF rotation is applied, where it can be read. What cannot be decoded is
a `BadImage` with its reason; it never stops the others.
"""

import errno
import io
import math
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
LARGE_PIXELS = 2**26  # beyond it a lack of memory may be the file's: a side that no decoder of Pillow's takes. From
# 179 million on Pillow refuses the file itself.
PIXEL_BYTES = 16  # of memory, more than decoding any mode takes
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
            _load(image, data)
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


def _load(image: Image.Image, data: bytes) -> None:
    """Decode an opened picture's pixels; raise `BadImage` where memory fails because of what the file claims.

    A damaged file may have tiles or lines of a size that is never allocated, and would pass for the machine's fault for
    ever. It is the file's where one of Pillow's decoders says so, or the pixels are many, and a fresh attempt fails
    too, with room for several times as many pixels before and after it.
    """
    try:
        image.load()
    except (MemoryError, OSError) as error:
        pixels = image.width * image.height
        if NO_MEMORY not in str(error) and not (isinstance(error, MemoryError) and pixels > LARGE_PIXELS):
            raise
        if _has_room(pixels) and _lacks_memory(data) and _has_room(pixels):
            raise BadImage(
                f"cannot be decoded (it asks for more memory than its {image.width} x {image.height} pixels take)"
            ) from error
        raise


def _has_room(pixels: int) -> bool:
    try:
        bytearray(PIXEL_BYTES * pixels + 2**20)  # allocated, never touched
    except MemoryError:
        return False
    return True


def _lacks_memory(data: bytes) -> bool:
    try:
        with open_picture(io.BytesIO(data)) as image:
            image.load()
    except MemoryError:
        return True
    except OSError as error:
        return NO_MEMORY in str(error)
    return False


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
    alone: a line of 5,000 pixels would become 4 GB. Its values are those of the whole scaled, within 1.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if max(size) > EXTREME * resolution:
        return _centre_scaled(image, size)
    top, left = (size[1] - resolution) // 2, (size[0] - resolution) // 2
    pixels = np.asarray(image.resize(size, resample=Image.Resampling.BICUBIC))
    return pixels[top : top + resolution, left : left + resolution]


def _centre_scaled(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return the centre square of the image scaled to `size`, scaling no more than it.

    Scaled alone, a box of noise differs by up to 10 levels from the whole scaled, for two reasons. Pillow keeps a box's
    edges as float32, 0.004 apart at pixel 50,000: so the surroundings are cut out first, all that bicubic reaches, and
    the edges are small numbers. And it rounds to 8 bits between its two passes, whose order Pillow 13 chooses by the
    shape: here it is the one that it was found to take for the whole, the height first where a tall picture is made
    smaller. Earlier ones begin with the width always, and of such a picture they would make another whole.
    """
    side, tall = min(size), image.height > image.width
    whole, step, start = max(image.size), max(image.size) / max(size), (max(size) - side) // 2
    low, high = start * step, min((start + side) * step, whole)
    reach = math.ceil(2 * max(step, 1)) + 1
    first, last = max(0, math.floor(low) - reach), min(whole, math.ceil(high) + reach)
    part = image.crop((0, first, image.width, last) if tall else (first, 0, last, image.height))
    columns: tuple[float, float] = (0, part.width) if tall else (low - first, high - first)
    rows: tuple[float, float] = (low - first, high - first) if tall else (0, part.height)
    bicubic = Image.Resampling.BICUBIC
    if tall and step > 1:
        part = part.resize((part.width, side), bicubic, box=(0, rows[0], part.width, rows[1]))
        part = part.resize((side, side), bicubic)
    else:
        part = part.resize((side, part.height), bicubic, box=(columns[0], 0, columns[1], part.height))
        part = part.resize((side, side), bicubic, box=(0, rows[0], side, rows[1]))
    return np.asarray(part)
