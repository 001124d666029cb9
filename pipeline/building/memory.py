"""What is freed between two forwards on a CPU stays with the process.

Activations of a convolutional network are tens and hundreds of MB. glibc maps each such block afresh and gives it back
when it is freed, so that every forward faults all its pages in again: MobileNetV2 at 256 px in batches of 64 spent 64 %
of its time there (benchmarks/README.md). Smaller batches help too, and give other last bits; this changes none.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
DEFAULTS = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}  # of glibc


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed; return whether it does. A user's own MALLOC_ settings stand."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    return _set({M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0})


def give_freed_memory_back() -> None:
    """Undo `keep_freed_memory`."""
    if _set(DEFAULTS):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def freed_memory_kept(device: str) -> Iterator[None]:
    """Keep what is freed in this block, on a CPU."""
    kept = device == "cpu" and keep_freed_memory()
    try:
        yield
    finally:
        if kept:
            give_freed_memory_back()


def _set(values: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    return mallopt is not None and all(mallopt(*one) for one in values.items())
