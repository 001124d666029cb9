"""What is converted, and to which pixels; what is refused, and why."""

import contextlib
import io
import math
import os
import struct
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from repa.pipeline.images import formats
from repa.pipeline.images.decode import BadImage, center_crop, decode, decode_batch
from repa.pipeline.images.manifest import FolderSource


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


def test_memory_that_is_not_there_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(Image.new("RGB", (16, 16)))
    errors = iter(
        [MemoryError(), OSError(12, "Cannot allocate memory"), OSError("out of memory error when reading image file")]
    )
    monkeypatch.setattr(Image.Image, "convert", lambda *_, **__: (_ for _ in ()).throw(next(errors)))
    batch = decode_batch(_Source(dict.fromkeys("abc", good)), ["a", "b", "c"], 16, np.zeros(3, np.int64))
    assert batch.passing == {0, 1, 2}
    assert set(batch.bad.values()) == {"cannot be decoded (there was not enough memory)"}


def bitmap(width: int) -> bytes:
    """Return the head of a BMP of one line and no pixels; Pillow says that it lacks memory for lines of 2^31 bits."""
    info = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 32, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_always_claims_too_much_memory_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    width = 80_000_000
    with pytest.raises(MemoryError):
        Image.open(io.BytesIO(bitmap(width))).load()
    batch = decode_batch(_Source({"a": bitmap(width)}), ["a"], 16, np.zeros(1, np.int64))
    assert batch.passing == frozenset()
    assert batch.bad == {0: f"cannot be decoded (it asks for more memory than its {width} x 1 pixels take)"}
    # Where the machine has no room for so many pixels, the file may still be right.
    monkeypatch.setattr("repa.pipeline.images.decode.PIXEL_BYTES", 2**32)
    assert decode_batch(_Source({"a": bitmap(width)}), ["a"], 16, np.zeros(1, np.int64)).passing == {0}


@pytest.mark.parametrize("times", [1, 2])
def test_a_decoder_that_lacks_memory_is_asked_again(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    errors, load = [OSError("out of memory error when reading image file")] * times, PngImageFile.load

    def once(self: PngImageFile) -> Any:
        if errors:
            raise errors.pop()
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", once)
    good = encoded(Image.new("RGB", (16, 16)))
    batch = decode_batch(_Source({"a": good}), ["a"], 16, np.zeros(1, np.int64))
    assert (list(batch.bad), batch.passing) == ([0], frozenset({0} if times == 1 else ()))


def test_memory_that_is_not_there_for_the_file_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _Source({})
    monkeypatch.setattr(source, "read", lambda _: bytes(2**62))
    batch = decode_batch(source, ["a"], 16, np.zeros(1, np.int64))
    assert (batch.passing, list(batch.bad)) == ({0}, [0])


def test_an_exception_without_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_, **__: (_ for _ in ()).throw(IndexError()))
    with pytest.raises(BadImage, match=r"cannot be decoded \(IndexError\)"):
        decode(encoded(Image.new("RGB", (16, 16))), 16)


def orientation_alone(kind: int, value: bytes, *others: bytes, order: str = "<") -> bytes:
    """Return EXIF of an orientation of TIFF's type `kind` and `value` [4 bytes], and other entries [12 bytes each]."""
    entries = [struct.pack(f"{order}HHI", 0x0112, kind, 1) + value, *others]
    head = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return b"Exif\0\0" + head + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)


SIX = struct.pack("<HH", 6, 0)
ODD_EXIF = {
    "a resolution that is not a number": (
        orientation_alone(3, SIX, struct.pack("<HHIf", 0x011A, 11, 1, math.nan)),
        True,
    ),
    "a resolution in words": (orientation_alone(3, SIX, struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0")), True),
    "the other order of bytes": (orientation_alone(3, struct.pack(">HH", 6, 0), order=">"), True),
    "a cut header": (b"Exif\0\0MM\0", False),
    "an orientation in words": (orientation_alone(2, b"6\0\0\0"), False),
    "an orientation that is not there": (orientation_alone(3, struct.pack("<HH", 77, 0)), False),
    "an orientation that is not a number": (orientation_alone(11, struct.pack("<f", math.nan)), False),
    "no EXIF at all": (b"Exif\0\0certainly not", False),
}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("what", ODD_EXIF)
def test_odd_exif_never_costs_a_picture(what: str, form: str) -> None:
    exif, applied = ODD_EXIF[what]
    image = Image.new("RGB", (32, 16), (200, 30, 30))
    image.paste((20, 30, 200), (16, 0, 32, 16))
    options = {"lossless": True} if form == "WEBP" else {"quality": 95, "subsampling": 0}
    pixels = decode(encoded(image, form, exif=exif, **options), 16).astype(int)
    upright = decode(encoded(image.transpose(Image.Transpose.ROTATE_270) if applied else image), 16)
    assert np.abs(pixels - upright).max() < 40


def test_no_mutated_exif_costs_a_picture() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x0132] = 6, "maker" * 9, 72.5, "2026:01:01 00:00:00"
    stored = exif.tobytes()
    image = Image.new("RGB", (32, 16), (200, 30, 30))
    rng = np.random.default_rng(0)
    for _ in range(300):
        mutated = bytearray(stored)
        for place in rng.integers(6, len(stored), 4):
            mutated[place] = rng.integers(256)
        assert np.abs(decode(encoded(image, exif=bytes(mutated)), 16).astype(int) - [200, 30, 30]).max() == 0


def test_extreme_pictures_take_no_memory_and_keep_their_centre() -> None:
    assert (decode(encoded(Image.new("RGB", (1, 5000), (200, 30, 30))), 256) == [200, 30, 30]).all()
    waves = np.arange(3 * 300 * 3).reshape(3, 300, 3) / np.array([40, 55, 70])
    values = (127.5 + 127.5 * np.sin(waves)).astype(np.uint8)
    for picture in (values, values.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(picture))
        whole = np.asarray(image.resize([round(side * 16 / 3) for side in image.size], Image.Resampling.BICUBIC))
        top, left = ((side - 16) // 2 for side in whole.shape[:2])
        tracemalloc.start()
        pixels = decode(encoded(image), 16)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert np.abs(pixels.astype(int) - whole[top : top + 16, left : left + 16]).max() <= 1
        assert most < 10**6


@pytest.mark.parametrize(("width", "height"), [(5000, 1), (50_001, 2), (7001, 63), (4999, 3), (999, 37), (100_001, 5)])
@pytest.mark.parametrize("lying", [True, False])
def test_of_noise_too_an_extreme_picture_s_centre_is_that_of_the_whole_scaled(
    width: int, height: int, lying: bool
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(np.ascontiguousarray(noise if lying else noise.transpose(1, 0, 2)))
    pixels = center_crop(image, 32)
    scale = 32 / height  # nothing is halved first
    size = [round(side * scale) for side in image.size]
    if not lying and scale < 1:  # the order of passes that Pillow takes from 13 on
        image = image.resize((image.width, size[1]), Image.Resampling.BICUBIC)
    whole = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = ((side - 32) // 2 for side in whole.shape[:2])
    differs = np.abs(pixels.astype(int) - whole[top : top + 32, left : left + 32])
    assert differs.max() <= 1
    assert np.mean(differs > 0) < 0.001


def test_an_extreme_picture_is_never_scaled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        scaled.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    decode(encoded(Image.new("L", (5000, 1))), 256)
    assert scaled == [(256, 1), (256, 256)]


def test_no_other_program_is_started_for_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(x) run\nshowpage\n%%EOF\n"
    for data in (eps, encoded(Image.new("RGB", (16, 16)), "EPS")):
        with pytest.raises(BadImage, match="not an image"):
            decode(data, 16)


@pytest.mark.parametrize(("form", "name"), [("WEBP", "WEBP"), ("AVIF", "AVIF"), ("JPEG2000", "JPEG2000")])
def test_a_format_that_pillow_lacks_is_bad_by_name(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (16, 16)), form) if formats.readable(name) else pytest.skip(f"no {name} here")
    assert decode(data, 16).shape == (16, 16, 3)
    monkeypatch.setattr(formats, "readable", lambda asked: asked != name)
    with pytest.raises(BadImage, match=f"a {name} file, which this machine's Pillow cannot decode"):
        decode(data, 16)


def test_pictures_are_opened_in_one_place() -> None:
    house = Path(formats.__file__).parents[2]
    opening = [file for room in ("pipeline", "trainer") for file in (house / room).rglob("*.py")]
    assert [file.name for file in opening if "Image.open(" in file.read_text()] == ["formats.py"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device", "sparse"])
def test_only_files_of_a_sensible_size_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**42)
    else:
        path.symlink_to("/dev/zero")
    batch = decode_batch(FolderSource(tmp_path), ["a.png"], 16, np.zeros(1, np.int64))
    words = {"fifo": "a FIFO", "folder": "Is a directory", "sparse": f"{2**42} bytes", "link to a device": "a device"}
    assert words[kind] in batch.bad[0]
    assert not batch.passing
