"""What a trained SiT holds inside: the mean-pooled tokens after its blocks, for noised latents at a given time.

REPA compares them with an encoder's (CKNNA). The noise of a sample is a function of (seed, row), labels are the true
ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from ..diffusion.interpolant import Interpolant
from ..diffusion.latents import LatentNorm, draw_latents, to_model_input
from ..reading.reader import CacheReader
from .sit import SiT

_LAYER_NOISE = 6  # the word of this use among the streams of one seed; see sampling/sample.py, evaluating/reference.py


@torch.no_grad()
def pooled_layers(
    model: SiT,
    reader: CacheReader,
    rows: np.ndarray,
    *,
    t: float,
    depths: Sequence[int],
    norm: LatentNorm,
    interpolant: Interpolant,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[int, Tensor]:
    """Return, by depth, the mean over tokens after block `depth` (from 1), [n, D] float32 on the CPU.

    Raises UsageError for a depth that the model does not have, a time outside 0 to 1, or latents that do not fit.
    """
    depths = tuple(dict.fromkeys(depths))
    outside = [depth for depth in depths if not 1 <= depth <= model.config.depth]
    if outside or not depths:
        raise UsageError(f"depth {outside or 'none'}: {model.config.name} has blocks 1 to {model.config.depth}")
    if not 0 <= t <= 1:
        raise UsageError(f"t is {t}; expected 0 (data) to 1 (noise)")
    shape = (reader.latents.channels, *reader.latents.size)
    expected = (model.config.in_channels, model.config.input_size, model.config.input_size)
    if shape != expected or reader.num_classes != model.config.num_classes:
        raise UsageError(
            f"{reader.path} has latents {list(shape)} of {reader.num_classes} classes; the model takes "
            f"{list(expected)} of {model.config.num_classes}"
        )
    device = model.pos_embed.device
    found: dict[int, list[Tensor]] = {depth: [] for depth in depths}

    def keep(depth: int) -> Any:
        return lambda _module, _inputs, tokens: found[depth].append(tokens.float().mean(1).cpu())

    hooks = [model.blocks[depth - 1].register_forward_hook(keep(depth)) for depth in depths]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = reader.rows(rows[start : start + batch_size])
            noise = np.stack([_noise(seed, int(row), shape) for row in batch.rows])
            posterior, eps = torch.from_numpy(noise).unbind(1)
            x = to_model_input(draw_latents(batch.moments, posterior, reader.latents.kind), *norm.tensors("cpu"))
            times = torch.full((len(x),), t)
            x_t, _ = interpolant.x_t_and_velocity(x, eps, times)
            model(x_t.to(device), times.to(device), batch.labels.to(device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {depth: torch.cat(parts) for depth, parts in found.items()}


def _noise(seed: int, row: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the posterior's and the path's noise of a sample, [2, *shape] float32."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_LAYER_NOISE, row))
    return np.random.Generator(np.random.PCG64(sequence)).standard_normal((2, *shape), dtype=np.float32)
