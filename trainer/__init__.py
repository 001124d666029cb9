"""Train and sample SiT from a cache: reader, batches, model, loss, checkpoint, samples.

No encoder, autoencoder or Ray is needed, or imported, to train.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Batch",
    "CacheDataset",
    "CacheReader",
    "FeatureBatch",
    "LatentNorm",
    "SiT",
    "draw_latents",
    "load_model",
    "reader_norm",
    "stage_cache",
    "to_latents",
    "to_model_input",
]

_HOMES = {
    "Batch": "rows.row_batch",
    "CacheDataset": "reading.dataset",
    "CacheReader": "reading.reader",
    "FeatureBatch": "rows.row_batch",
    "LatentNorm": "diffusion.latents",
    "SiT": "models.sit",
    "draw_latents": "diffusion.latents",
    "load_model": "models.pretrained",
    "reader_norm": "reading.norm",
    "stage_cache": "reading.stage",
    "to_latents": "diffusion.latents",
    "to_model_input": "diffusion.latents",
}

if TYPE_CHECKING:
    from .diffusion.latents import LatentNorm, draw_latents, to_latents, to_model_input
    from .models.pretrained import load_model
    from .models.sit import SiT
    from .reading.dataset import CacheDataset
    from .reading.norm import reader_norm
    from .reading.reader import CacheReader
    from .reading.stage import stage_cache
    from .rows.row_batch import Batch, FeatureBatch


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
