"""What a cache is: names, shapes, dtypes, fingerprints, and the tables of encoders and autoencoders.

Neither torch nor ray is imported here: `repa.pipeline` writes by this contract, `repa.trainer` reads by it.
README.md beside this file documents the format for readers in any language.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "ArrayLayout",
    "CacheError",
    "CacheLayout",
    "ComponentSpec",
    "JobError",
    "RepaError",
    "UsageError",
    "component_arrays",
]

_HOMES = {
    "ArrayLayout": "layout",
    "CacheError": "errors",
    "CacheLayout": "layout",
    "ComponentSpec": "schema",
    "JobError": "errors",
    "RepaError": "errors",
    "UsageError": "errors",
    "component_arrays": "schema",
}

if TYPE_CHECKING:
    from .errors import CacheError, JobError, RepaError, UsageError
    from .layout import ArrayLayout, CacheLayout
    from .schema import ComponentSpec, component_arrays


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
