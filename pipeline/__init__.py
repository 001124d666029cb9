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
    "BuildOptions": "building.plan",
    "ImportOptions": "importing.plan",
    "load_autoencoder": "models.autoencoders",
    "load_encoder": "models.encoders",
    "plan_import": "importing.plan",
    "run_build": "building.build",
    "run_import": "importing.latents",
    "scan_folder": "images.manifest",
}

if TYPE_CHECKING:
    from .building.build import run_build
    from .building.plan import BuildOptions
    from .images.manifest import scan_folder
    from .importing.latents import run_import
    from .importing.plan import ImportOptions, plan_import
    from .models.autoencoders import load_autoencoder
    from .models.encoders import load_encoder


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
