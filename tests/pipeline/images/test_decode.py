"""What is converted, and to which pixels; what is refused, and why."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa.pipeline.images.decode import BadImage, decode, decode_batch


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return stream.getvalue()


def halves(left: Any, right: Any, mode: str) -> Image.Image:
    """Return a 16 x 16 image of one colour on the left and another on the right."""
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def palette_with_alpha() -> Image.Image:
    image = halves(0, 1, "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.info["transparency"] = bytes([0, 128])
    return image


def sixteen_bits() -> Image.Image:
    values = np.full((16, 16), 30 * 257, dtype=np.uint16)
    values[:, 8:] = 65_535
    return Image.fromarray(values)


CONVERTED = {
    "rgb": (encoded(halves((10, 20, 30), (200, 100, 50), "RGB")), (10, 20, 30), (200, 100, 50)),
    "grey": (encoded(halves(10, 200, "L")), (10,) * 3, (200,) * 3),
    "grey and alpha": (encoded(halves((10, 255), (200, 0), "LA")), (10,) * 3, (200,) * 3),
    "alpha is dropped": (encoded(halves((10, 20, 30, 0), (200, 100, 50, 128), "RGBA")), (10, 20, 30), (200, 100, 50)),
    "palette and alpha": (
        encoded(palette_with_alpha(), transparency=bytes([0, 128])),
        (10, 20, 30),
        (200, 100, 50),
    ),
    "16-bit grey": (encoded(sixteen_bits()), (30,) * 3, (255,) * 3),
    "16-bit grey tiff": (encoded(sixteen_bits(), "TIFF"), (30,) * 3, (255,) * 3),
    "one bit": (encoded(halves(0, 1, "1")), (0,) * 3, (255,) * 3),
    "cmyk": (encoded(halves((255, 0, 0, 0), (0, 0, 255, 0), "CMYK"), "TIFF"), (0, 255, 255), (255, 255, 0)),
    "gif": (encoded(halves(10, 200, "L"), "GIF"), (10,) * 3, (200,) * 3),
    "webp": (encoded(halves((10, 20, 30), (200, 100, 50), "RGB"), "WEBP", lossless=True), (10, 20, 30), (200, 100, 50)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_every_mode_becomes_the_same_rgb(name: str) -> None:
    data, left, right = CONVERTED[name]
    pixels = decode(data, 16)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    assert (pixels[:, :8] == left).all()
    assert (pixels[:, 8:] == right).all()


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    pixels = decode(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95), 16)
    assert np.abs(pixels.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    # How a camera stores what, turned by this orientation, is upright: EXIF 2.32, tag 0x0112.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(decode(data, 16), upright)


def noise(form: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values), form)


REFUSED = {
    "an empty file": (b"", "an empty file"),
    "text": (b"certainly not a picture\n" * 9, "not an image"),
    "a cut JPEG": (noise("JPEG")[:-600], "truncated"),
    "a cut PNG": (noise("PNG")[:-600], "trunc"),
    "floating-point pixels": (encoded(Image.new("F", (16, 16), 0.5), "TIFF"), "floating-point"),
    "32-bit pixels out of range": (encoded(Image.new("I", (16, 16), 70_000), "TIFF"), "grey values 70000 to 70000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_says_why(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(BadImage, match=reason):
        decode(data, 16)


def test_no_cut_of_a_file_raises_anything_else() -> None:
    for data in (noise("JPEG"), encoded(palette_with_alpha()), encoded(sixteen_bits(), "TIFF")):
        whole = decode(data, 16)
        for keep in range(1, len(data), max(1, len(data) // 40)):
            # Where nothing is said, all that is cut off is what comes after the pixels.
            with contextlib.suppress(BadImage):
                np.testing.assert_array_equal(decode(data[:keep], 16), whole)


class _Source:
    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def read(self, sample_id: str) -> bytes:
        if sample_id not in self.files:
            raise FileNotFoundError(2, "No such file or directory")
        return self.files[sample_id]


def test_one_bad_file_leaves_the_others_of_its_batch_alone() -> None:
    good = encoded(Image.new("RGB", (16, 16), (1, 2, 3)))
    source = _Source({"a": good, "b": b"text", "d": good})
    batch = decode_batch(source, ["a", "b", "c", "d"], 16, np.array([0, 0, 0, len(good) + 1]))
    assert sorted(batch.bad) == [1, 2, 3]
    assert batch.bad[2] == "cannot be read (No such file or directory)"
    assert batch.bad[3].startswith(f"the file has {len(good)} bytes now, and had {len(good) + 1}")
    assert batch.source_bytes.tolist() == [len(good), 0, 0, 0]
    assert (batch.images[0] == [1, 2, 3]).all()
    assert not batch.images[1:].any()
