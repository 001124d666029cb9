"""Which files are pictures: the formats that are decoded, and the endings by which files of theirs are found.

The list is ours and fixed. Pillow would try every format that it knows, and one of them, EPS, starts Ghostscript on
what the file says; and the endings decide which images a data set has, which must not hang on what is installed.
"""

import functools
from typing import BinaryIO

from PIL import Image, features

# By Pillow's names, in the order in which they are tried; TGA, which has no magic number, is last.
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "TGA": (".tga",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# Formats that a Pillow can be built without: what it calls the feature, and by what (place, bytes) a file is known.
_OPTIONAL = {
    "WEBP": ("webp", (8, b"WEBP")),
    "AVIF": ("avif", (4, b"ftypavi")),
    "JPEG2000": ("jpg_2000", (4, b"jP  ")),
}


@functools.cache
def readable(name: str) -> bool:
    """Return whether this Pillow decodes a format of ours."""
    Image.init()
    missing = name in _OPTIONAL and _OPTIONAL[name][0] not in features.get_supported()
    return name in Image.OPEN and not missing


def open_picture(stream: BinaryIO) -> Image.Image:
    """Open a picture in one of our formats, its pixels not decoded yet; raise as Pillow does for what is none."""
    return Image.open(stream, formats=[name for name in FORMATS if readable(name)])


def lacking_format(data: bytes) -> str | None:
    """Return the format of a file that is one of ours and that this Pillow lacks."""
    for name, (_, (place, magic)) in _OPTIONAL.items():
        if data[place : place + len(magic)] == magic and not readable(name):
            return name
    return None
