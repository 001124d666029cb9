"""What a trained SiT holds inside: the patches' tokens after its blocks, for noised latents at a given time.

    x_t = alpha(t) x + sigma(t) eps        t = 0 data, t = 1 noise, as in training
    f_l = tokens of the patches after block l, l from 1; f_0 before the first: patches embedded, positions added

Labels are the null label: a true one would be in the tokens, and whatever is measured on them would measure it.

`pooled_layers` is REPA's measurement (CKNNA with an encoder): latents drawn from the posterior, noise a function of
(seed, row), tokens averaged. A SiT as an encoder: layer_tokens.py.
"""

import math
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
    noise_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[int, Tensor]:
    """Return, by depth, the mean over tokens after block `depth` (from 1), [n, D] float32 on the CPU.

    `noise_scale` is that of the field of the model's method. A model with a class token is given that of the reader's
    first encoder, noised too; only the patches' tokens are in the mean.

    Raises UsageError for a depth that the model does not have, a time outside 0 to 1, or latents and a class token that
    do not fit.
    """
    depths = tuple(dict.fromkeys(depths))
    check_depths(model, depths)
    check_fits(model, reader, t)
    width = model.config.cls_width
    if width is not None and not (
        reader.features and reader.features[0].cls_token and reader.features[0].width == width
    ):
        found_names = ", ".join(features.name for features in reader.features) or "no encoder"
        raise UsageError(
            f"{reader.path}: {model.config.name} takes a class token of {width} channels, which {found_names} has not. "
            f"Name a cache that holds the encoder it was trained with"
        )
    device = model.pos_embed.device
    shape = (reader.latents.channels, *reader.latents.size)
    found: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = reader.rows(rows[start : start + batch_size])
            drawn = [_noise(seed, int(row), shape, width or 0) for row in batch.rows]
            noise, cls_noise = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
            posterior, eps = noise.unbind(1)
            x = to_model_input(draw_latents(batch.moments, posterior, reader.latents.kind), *norm.tensors("cpu"))
            times = torch.full((len(x),), t)
            x_t, _ = interpolant.x_t_and_velocity(x, noise_scale * eps, times)
            inputs: list[Tensor | None] = [x_t, times, null_labels(model, len(x))]
            if width is not None:
                cls_token = batch.features[0].cls_token
                assert cls_token is not None
                inputs += [None, interpolant.x_t_and_velocity(cls_token.float(), cls_noise, times)[0]]
            given = tuple(None if value is None else value.to(device) for value in inputs)
            for depth, tokens in tokens_after(model, given, depths).items():
                found[depth].append(tokens.float().mean(1).cpu())
    finally:
        model.train(was_training)
    return {depth: torch.cat(parts) for depth, parts in found.items()}


def check_depths(model: SiT, depths: Sequence[int], *, first: int = 1) -> None:
    """Raise UsageError unless `depths` are some of the model's, from `first` on."""
    outside = [depth for depth in depths if not first <= depth <= model.config.depth]
    if outside or not depths:
        raise UsageError(
            f"depth {', '.join(map(str, outside)) or 'none'}: {model.config.name} has blocks {first} to "
            f"{model.config.depth}"
        )


def check_fits(model: SiT, reader: CacheReader, t: float) -> None:
    """Raise UsageError for a time that is none, or latents that the model does not take."""
    if not 0 <= t <= 1:
        raise UsageError(f"t is {t}; expected 0 (data) to 1 (noise)")
    shape = (reader.latents.channels, *reader.latents.size)
    expected = (model.config.in_channels, model.config.input_size, model.config.input_size)
    if shape != expected:
        raise UsageError(f"{reader.path} has latents {list(shape)}; the model takes {list(expected)}")


class _Reached(Exception):  # no error: the last block that was asked for has answered
    pass


def tokens_after(model: SiT, inputs: tuple[Tensor | None, ...], depths: Sequence[int]) -> dict[int, Tensor]:
    """Return the patches' tokens [b,T,D] after each of these blocks, 0 before the first; no later block is run."""
    num_patches = math.prod(model.grid)  # what stands before them are class tokens
    found: dict[int, Tensor] = {}

    def keep(depth: int, tokens: Tensor) -> None:
        found[depth] = tokens[:, -num_patches:]
        if len(found) == len(set(depths)):
            raise _Reached

    def before(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        keep(0, inputs[0])

    def after(depth: int) -> Any:
        return lambda _module, _inputs, tokens: keep(depth, tokens)

    hooks = [
        model.blocks[depth - 1].register_forward_hook(after(depth))
        if depth
        else model.blocks[0].register_forward_pre_hook(before)
        for depth in set(depths)
    ]
    try:
        model(*inputs)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return {depth: found[depth] for depth in depths}


def null_labels(model: SiT, num: int) -> Tensor:
    """Return the null label `num` times, on the model's device."""
    return torch.full((num,), model.null_label, device=model.pos_embed.device)


def _noise(seed: int, row: int, shape: tuple[int, ...], cls_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the posterior's and the path's noise of a sample [2, *shape], and a class token's [cls_width], float32."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_LAYER_NOISE, row))
    generator = np.random.Generator(np.random.PCG64(sequence))
    both = generator.standard_normal((2, *shape), dtype=np.float32)
    return both, generator.standard_normal(cls_width, dtype=np.float32)
