"""Names of models: a family, a size of its table, and any patch, as in SiT-B/2."""

from collections.abc import Mapping
from typing import TypeVar

from ...cache_specs.errors import UsageError, nearest

Row = TypeVar("Row")


def read_name(name: str, family: str, sizes: Mapping[str, Row], *, usual_patch: int) -> tuple[Row, int]:
    """Return the size's row and the patch in latent pixels a side; raise UsageError with the nearest for another."""
    size, slash, patch = name.removeprefix(f"{family}-").partition("/")
    if name.startswith(f"{family}-") and size in sizes and slash and patch.isdecimal() and int(patch) > 0:
        return sizes[size], int(patch)
    known = [f"{family}-{size}/{patch if patch.isdecimal() else usual_patch}" for size in sizes]
    raise UsageError(f"unknown model {name!r}; {nearest(name, known)} (any patch size)")
