"""Where a run's weights begin: drawn from the seed, or taken from another run or a published checkpoint.

Weights alone are taken, never optimizer, step or data order. A checkpoint in SiT's own convention (t = 1 is data) keeps
it: the architecture of the run is the checkpoint's.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...cache_specs.errors import UsageError
from ..models.ema import EMA
from ..models.pretrained import TrainedModel, open_model
from ..models.sit import SiT


@lru_cache(maxsize=1)  # asked for the shape, then for the weights
def initial(path: str) -> TrainedModel:
    """Return the checkpoint that `init` names: a file, or a run's newest."""
    return open_model(Path(path))


def conventions(path: str | None) -> dict[str, Any]:
    """Return the fields of `SiTConfig` that come with the weights of `init`."""
    if path is None:
        return {}
    shape = initial(path).model.config
    return {"convention": shape.convention, "learn_sigma": shape.learn_sigma}


def take_weights(path: str, model: SiT, averages: Sequence[EMA]) -> list[str]:
    """Give a model and its averages the weights that `init` names; return what to say of it.

    Parts that the checkpoint lacks, a method's own or projectors, stay as the seed drew them; so do projectors of
    another shape. Raises UsageError where the rest does not fit.
    """
    trained = initial(path)
    found, ours = trained.model.state_dict(), model.state_dict()
    taken = {name: tensor for name, tensor in found.items() if name in ours and tensor.shape == ours[name].shape}
    unfit = [name for name in found if name not in taken and not name.startswith("projectors.")]
    if unfit:
        name = unfit[0]
        has = list(ours[name].shape) if name in ours else "none"
        raise UsageError(
            f"init: {trained.path} holds {name} {list(found[name].shape)}, and {model.config.name} has {has} "
            f"({len(unfit)} names differ); start from weights of the same model, latents and classes"
        )
    model.load_state_dict(ours | taken)
    for average in averages:
        average.model.load_state_dict(model.state_dict())
    fresh = sorted({name.partition(".")[0] for name in ours if name not in taken})
    initial.cache_clear()
    drawn = f"; drawn from the seed: {', '.join(fresh)}" if fresh else ""
    return [*trained.assumed, f"init: {trained.path}, {len(taken)} of {len(ours)} tensors{drawn}"]
