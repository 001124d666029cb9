"""Train and sample SiT from a cache: reader, batches, model, loss, checkpoint, samples.

No encoder, autoencoder or Ray is needed, or imported, to train.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Batch", "CacheReader", "FeatureBatch", "SiT", "load_model", "stage_cache"]

_HOMES = {
    "Batch": "row_batch",
    "CacheReader": "reader",
    "FeatureBatch": "row_batch",
    "SiT": "sit",
    "load_model": "pretrained",
    "stage_cache": "stage",
}

if TYPE_CHECKING:
    from .pretrained import load_model
    from .reader import CacheReader
    from .row_batch import Batch, FeatureBatch
    from .sit import SiT
    from .stage import stage_cache


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
