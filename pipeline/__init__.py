"""Images to cache: manifest, decoding, frozen models, shards; and the latents of others. The command is `repa-cache`.

Imports cache_specs only. `repa.trainer` never imports this, but for its composition root, which borrows plain
callables to decode samples.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "BuildOptions",
    "ImportOptions",
    "load_autoencoder",
    "load_encoder",
    "plan_import",
    "run_build",
    "run_import",
    "scan_folder",
]

_HOMES = {
    "BuildOptions": "plan",
    "ImportOptions": "import_plan",
    "load_autoencoder": "autoencoders",
    "load_encoder": "encoders",
    "plan_import": "import_plan",
    "run_build": "build",
    "run_import": "import_latents",
    "scan_folder": "manifest",
}

if TYPE_CHECKING:
    from .autoencoders import load_autoencoder
    from .build import run_build
    from .encoders import load_encoder
    from .import_latents import run_import
    from .import_plan import ImportOptions, plan_import
    from .manifest import scan_folder
    from .plan import BuildOptions


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
