"""Sizes in bytes as people write and read them."""

import math

from .errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str, *, where: str) -> int:
    """Return the bytes of `500GB`, `1.5TB`, `800GiB` or a plain number; raise UsageError naming `where` it stands."""
    number = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * _UNITS[unit]
    except (KeyError, ValueError) as error:
        raise UsageError(f"{where} {text}: expected a size, as in 500GB, 1.5TB or 800GiB") from error
    if not (math.isfinite(size) and size > 0):
        raise UsageError(f"{where} {text}: expected more than nothing")
    return int(size)


def human_bytes(size: float) -> str:
    """Return a size with a decimal unit, as disks are sold: `504.0 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
