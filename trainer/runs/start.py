"""Where a run's weights begin: drawn from the seed, or taken from another run or a published checkpoint.

Weights alone are taken, never optimizer, step or data order. A checkpoint in SiT's own convention (t = 1 is data) keeps
it: the architecture of the run is the checkpoint's.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from ..diffusion.latents import LatentNorm
from ..models.checkpoint import latest_checkpoint
from ..models.ema import EMA
from ..models.pretrained import TrainedModel, open_model
from ..models.sit import SiT


@lru_cache(maxsize=1)  # asked for the shape, then for the weights
def initial(path: str) -> TrainedModel:
    """Return the checkpoint that `init` names: a file, or a run's newest."""
    return open_model(Path(path))


def conventions(init: str | None, out: str) -> dict[str, Any]:
    """Return the fields of `SiTConfig` that came with the weights of `init`: a run that has begun needs it no more."""
    if init is None:
        return {}
    own = latest_checkpoint(Path(out))
    shape = initial(init if own is None else str(own)).model.config
    return {"convention": shape.convention, "learn_sigma": shape.learn_sigma}


def take_weights(path: str, model: SiT, averages: Sequence[EMA], norm: LatentNorm) -> list[str]:
    """Give a model and its averages the weights that `init` names, for latents normalised by `norm`.

    Returns what to say of it. Raises UsageError where they do not fit, or their latents are normalised otherwise.
    """
    trained = initial(path)
    check_weights(path, model, norm)
    fresh = take_over(model, trained.model)
    for average in averages:
        average.model.load_state_dict(model.state_dict())
    initial.cache_clear()
    drawn = f"; drawn from the seed: {', '.join(sorted({name.partition('.')[0] for name in fresh}))}" if fresh else ""
    num = len(model.state_dict())
    return [*trained.assumed, f"init: {trained.path}, {num - len(fresh)} of {num} tensors{drawn}"]


def check_weights(path: str, model: SiT, norm: LatentNorm) -> None:
    """Raise UsageError where a model, or only its shapes, cannot begin with the weights that `init` names."""
    trained = initial(path)
    if trained.config is not None and (found := trained.latents(None).norm) != norm:  # a published file does not say
        raise UsageError(
            f"init: the latents of {trained.path} are normalised otherwise (scale {list(found.scale)}, bias "
            f"{list(found.bias)}; here {list(norm.scale)}, {list(norm.bias)}). Train with its latent_norm"
        )
    try:
        _fitting(model.state_dict(), trained.model.state_dict(), model.config.name)
    except UsageError as error:
        raise UsageError(f"init: {trained.path} {error}") from error


def _fitting(ours: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of `found` that `ours` have a place for; raise UsageError for others than projectors'."""
    taken = {name: tensor for name, tensor in found.items() if name in ours and tensor.shape == ours[name].shape}
    unfit = [name for name in found if name not in taken and not name.startswith("projectors.")]
    if unfit:
        first = unfit[0]
        has = list(ours[first].shape) if first in ours else "none"
        raise UsageError(
            f"holds {first} {list(found[first].shape)}, and {name} has {has} ({len(unfit)} names differ); start from "
            f"weights of the same model, latents and classes"
        )
    return taken


@torch.no_grad()
def take_over(model: SiT, trained: SiT) -> list[str]:
    """Copy the weights of `trained` into `model`; return the names of those that stay as the seed drew them.

    They are what `trained` lacks, projectors of another shape among them. MeanFlow's second time embedder then ends in
    zero, so that the model answers what the trained one did. Raises UsageError where the rest does not fit.
    """
    ours = model.state_dict()
    taken = _fitting(ours, trained.state_dict(), model.config.name)
    model.load_state_dict(ours | taken)
    if model.r_embedder is not None and not any(name.startswith("r_embedder") for name in taken):
        for parameter in model.r_embedder.mlp[-1].parameters():
            parameter.zero_()
    return [name for name in ours if name not in taken]
