"""Studies: many runs from one cache, planned from a file, scheduled, read back, compared and shown."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["RunRecord", "Study", "load"]

if TYPE_CHECKING:
    from .records import RunRecord, Study, load


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".records", __name__), name)
