"""Cold files: put a folder out of the page cache, and count what a process reads from the disk."""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np


def write_back(folder: Path) -> None:
    """Have every file of `folder` written to the disk, and stay in the page cache as it is."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def evict(folder: Path) -> float:
    """Drop every file of `folder` from the page cache; return the share of its bytes that stayed there.

    Dirty pages are written first. Pages that a process has mapped stay.
    """
    total = stayed = 0
    for file in folder.rglob("*"):
        if file.is_file() and (num_bytes := file.stat().st_size):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                stayed += _resident_pages(descriptor, num_bytes) * mmap.PAGESIZE
            finally:
                os.close(descriptor)
            total += num_bytes
    return stayed / max(total, 1)


def read_in_order(folder: Path) -> None:
    """Read every file of `folder` from its begin to its end, as `cat` or `repa-cache verify` does."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(2**20):
                    pass


def _resident_pages(descriptor: int, num_bytes: int) -> int:
    """Return how many pages of a file lie in the page cache."""
    pages = -(-num_bytes // mmap.PAGESIZE)
    resident = np.empty(pages, dtype=np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    with mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        start, answer = (ctypes.c_void_p(array.ctypes.data) for array in (view, resident))
        failed = mincore(start, ctypes.c_size_t(num_bytes), answer)
        del view  # or the map could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return int((resident & 1).sum())


def bytes_from_disk() -> int:
    """Return the bytes that this process, all its threads, has had read from block devices; 0 on a tmpfs."""
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    raise KeyError("read_bytes")
