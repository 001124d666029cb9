"""Images to cache: manifest, decoding, frozen models, shards. The command is `repa-cache`.

Imports cache_specs only. `repa.trainer` never imports this, but for its composition root, which borrows plain
callables to decode samples.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["BuildOptions", "load_autoencoder", "load_encoder", "run_build", "scan_folder"]

_HOMES = {
    "BuildOptions": "plan",
    "load_autoencoder": "autoencoders",
    "load_encoder": "encoders",
    "run_build": "build",
    "scan_folder": "manifest",
}

if TYPE_CHECKING:
    from .autoencoders import load_autoencoder
    from .build import run_build
    from .encoders import load_encoder
    from .manifest import scan_folder
    from .plan import BuildOptions


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
