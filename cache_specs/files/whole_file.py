"""Files that are whole or not there: written beside their place, made durable, then renamed.

The name beside the place may be taken: by what a killed process left or, in a folder that others write too, by a link
to a file that is none of ours. It is never opened: the name goes (of a link the link, not what it names) and the file
is made new, or not at all. All functions raise OSError; who calls them knows what to advise.
"""

import contextlib
import os
from pathlib import Path

from .partial_files import new_file


def partial_of(path: Path) -> Path:
    """Return the name under which `path` is written: hidden, so that no pattern for finished files finds it."""
    return path.with_name(f".{path.name}.partial")


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte of `data`; the operating system may take fewer at a time."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whose folder is there: a reader, or a crash, finds what was there before or all of it."""
    partial = partial_of(path)
    try:
        descriptor = new_file(partial)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
