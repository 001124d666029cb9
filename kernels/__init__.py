"""The fused alignment loss and its specification.

`cosine_alignment(z, tokens, ...)` is the one op: dequantise, normalise over space, cosine, weighted mean and dL/dz
in a single pass. `reference` says in plain PyTorch what it computes. README.md has the equations and the figures.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .alignment import cosine_alignment

__all__ = ["cosine_alignment", "reference"]


def __getattr__(name: str) -> Any:
    if name == "cosine_alignment":
        return importlib.import_module(".alignment", __name__).cosine_alignment
    if name == "reference":
        return importlib.import_module(".reference", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
