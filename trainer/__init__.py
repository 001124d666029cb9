"""Train and sample SiT from a cache: reader, batches, model, loss, checkpoint, samples.

No encoder, autoencoder or Ray is needed, or imported, to train.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Batch", "CacheDataset", "CacheReader", "FeatureBatch", "SiT", "load_model", "stage_cache"]

_HOMES = {
    "Batch": "rows.row_batch",
    "CacheDataset": "reading.dataset",
    "CacheReader": "reading.reader",
    "FeatureBatch": "rows.row_batch",
    "SiT": "models.sit",
    "load_model": "models.pretrained",
    "stage_cache": "reading.stage",
}

if TYPE_CHECKING:
    from .models.pretrained import load_model
    from .models.sit import SiT
    from .reading.dataset import CacheDataset
    from .reading.reader import CacheReader
    from .reading.stage import stage_cache
    from .rows.row_batch import Batch, FeatureBatch


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
