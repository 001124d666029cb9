"""The alignment loss that trainers call: checks the arguments and picks the path by z's device."""

from __future__ import annotations

from torch import Tensor

from . import arguments, reference


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
    """Return weight * mean over rows of -cos(z, target), a float32 scalar whose gradient flows to z alone.

    z            [B,T,E] float32 or bfloat16, the projector's output; [B,K,E] with row_index
    tokens       [B,T,E] as stored: float16, bfloat16, float32, or int8 with token_scale and both statistics
    token_scale  [B,T] float16, int8 tokens only
    channel_mean, channel_std   [B,E] float32 over the image's T tokens, std unbiased; computed from tokens where
                 gamma needs them and they are None
    gamma        spatial normalisation, target = (f - gamma * mean) / (std + 1e-6); None takes f as it is
    weight       coefficient, folded into loss and gradient so that the upstream gradient is exactly 1
    row_weight   [B,T] (or [B,K]), floating point or bool, not negative: the mean becomes
                 sum(row_weight * -cos) / sum(row_weight). 0 leaves a token out: neither its z nor its target is
                 looked at, and 0/1 weights equal a row_index of the tokens kept. All zero: loss and gradient are 0
    row_index    [B,K] int64 or int32 in [0, T): row k of z is aligned with token row_index[b, k]

    Negative is good: aligned tokens give -weight. A batch of no rows gives 0. Raises ValueError naming the argument
    that does not fit. REPA arXiv 2410.06940 eq. 8; iREPA arXiv 2512.10794; equations in `reference`.
    """
    arguments.check(z, tokens, token_scale, channel_mean, channel_std, gamma, weight, row_weight, row_index)
    return reference.cosine_alignment(
        z,
        tokens,
        token_scale=token_scale,
        channel_mean=channel_mean,
        channel_std=channel_std,
        gamma=gamma,
        weight=weight,
        row_weight=row_weight,
        row_index=row_index,
    )
