"""What tests of several objectives need: a run of the small model on a cache, and the inputs of golden values."""

from pathlib import Path

import torch

from repa.trainer.distributed import World
from repa.trainer.runs.run import Run, prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve, set_layer


def golden(shape: tuple[int, ...], m: int, s: int) -> torch.Tensor:
    """((k m + s) mod 11 - 5) / 4 in C order."""
    k = torch.arange(torch.Size(shape).numel())
    return (((k * m + s) % 11 - 5) / 4).reshape(shape)


def make_run(cache: Path, recipe: str, *assignments: str, model: str = "SiT-Ti/2") -> Run:
    """Return a run of eight samples a step, aligned after the first block unless an assignment says otherwise."""
    flags = {"cache": str(cache), "out": "unused", "model": model, "batch_size": 8, "alignment.encoder_depth": 1}
    layers = [recipe_layer(recipe, model), Layer(source="flags", values=flags), set_layer(assignments)]
    return prepare(resolve(layers), World(rank=0, size=1, device=torch.device("cpu")))
