"""Precompute frozen-encoder tokens once, then train diffusion transformers on them.

`repa.pipeline` turns images into a cache, `repa.cache_specs` says what a cache is, `repa.kernels` holds the
alignment op, `repa.trainer` trains and samples SiT from a cache.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["CacheError", "JobError", "RepaError", "UsageError", "__version__"]

if TYPE_CHECKING:
    from .cache_specs.errors import CacheError, JobError, RepaError, UsageError

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("repa-cache")
        except PackageNotFoundError:  # a checkout that is on the path and not installed
            return "unknown"
    if name in __all__:
        from .cache_specs import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
