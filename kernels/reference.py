"""The alignment loss in plain PyTorch: the specification that every faster path is tested against.

In: projected hidden states z and a frozen encoder's tokens as the cache stores them. Out: one scalar. Nothing here
is fused or chunked and autograd makes the gradient, so it moves about 78 bytes an element of z where the fused
kernel moves 6; it is meant to be read, and to be run in float64.

    f     = tokens                                                   float tokens
    f     = channel_std * token_scale * tokens + channel_mean        int8 tokens
    f'    = (f - gamma * channel_mean) / (channel_std + 1e-6)        gamma given, otherwise f' = f
    loss  = weight * mean over rows of -cos(z, f')

The mean of -cos is REPA's projection loss (arXiv 2410.06940, eq. 8): aligned tokens give -1, so negative is good.
f' is iREPA's spatial normalisation (arXiv 2512.10794, section 4): per image and channel, over the image's T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STD_EPS = 1e-6  # iREPA adds it to the standard deviation
NORM_EPS = 1e-12  # F.normalize's default, under which a row counts as zero


def channel_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased standard deviation over T of tokens [B,T,E], each [B,E] float64.

    Accumulated in float64, as the cache's own statistics are: there the sum of T equal float32 numbers is exact, so
    a constant channel has a deviation of 0, not a rounding error that would then be divided by 1e-6.
    """
    x = tokens.double()
    mean = x.mean(dim=1)
    std = ((x - mean.unsqueeze(1)).square().sum(dim=1) / (x.shape[1] - 1)).sqrt()
    return mean, std


def target_features(
    tokens: Tensor,
    *,
    token_scale: Tensor | None = None,
    channel_mean: Tensor | None = None,
    channel_std: Tensor | None = None,
    gamma: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return f' [B,T,E] in `dtype`: tokens dequantised and, if gamma is given, normalised over space.

    Shapes as in `cosine_alignment`. For int8 tokens f - gamma * channel_mean is simplified on paper, not left to
    floating point: where mean/std is 5000 the difference would lose 4 digits.
    """
    f = tokens.to(dtype)
    if gamma is None and token_scale is None:
        return f
    if channel_mean is None or channel_std is None:
        channel_mean, channel_std = channel_statistics(tokens)
    mean, std = (x.to(dtype).unsqueeze(1) for x in (channel_mean, channel_std))
    if token_scale is not None:
        kept = 1.0 if gamma is None else 1.0 - gamma
        f = std * (token_scale.to(dtype).unsqueeze(-1) * f) + kept * mean
    elif gamma is not None:
        f = f - gamma * mean
    return f if gamma is None else f / (std + STD_EPS)


def cosine_alignment(
    z: Tensor,
    tokens: Tensor,
    *,
    token_scale: Tensor | None = None,
    channel_mean: Tensor | None = None,
    channel_std: Tensor | None = None,
    gamma: float | None = None,
    weight: float = 1.0,
    row_weight: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """Return the alignment loss, a scalar in promote_types(z.dtype, float32), with autocast off.

    Arguments and meaning are those of `repa.kernels.cosine_alignment`; this one checks none of them and takes
    float64 z too.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        f = target_features(
            tokens,
            token_scale=token_scale,
            channel_mean=channel_mean,
            channel_std=channel_std,
            gamma=gamma,
            dtype=dtype,
        )
        if row_index is not None:
            f = f.gather(1, row_index.long().unsqueeze(-1).expand(-1, -1, f.shape[-1]))
        z = z.to(dtype)
        if row_weight is None:
            w = torch.ones(z.shape[:2], dtype=dtype, device=z.device)
        else:
            # A row left out is not looked at: whatever it holds, NaN included, gives 0 and a gradient of 0.
            w = row_weight.to(dtype)
            kept = (w != 0).unsqueeze(-1)
            z, f = torch.where(kept, z, 0), torch.where(kept, f, 0)
        cos = (F.normalize(z, dim=-1, eps=NORM_EPS) * F.normalize(f, dim=-1, eps=NORM_EPS)).sum(-1)
        total = w.sum()
        return weight * -(w * cos).sum() / torch.where(total == 0, 1, total)
