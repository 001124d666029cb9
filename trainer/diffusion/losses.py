"""The two losses of a step: denoising on the velocity, and alignment of hidden states with the encoders' tokens.

    total = denoising + proj_coeff * alignment        (REPA, arXiv 2410.06940, section 3.2)

Both are means, in float32, whatever autocast made of the model's output.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ...cache_specs.errors import UsageError
from ...kernels import cosine_alignment


class AlignmentTarget(Protocol):
    """One encoder's tokens as the cache stores them; shapes and dtypes as in `kernels.cosine_alignment`."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def token_scale(self) -> Tensor | None: ...
    @property
    def channel_mean(self) -> Tensor | None: ...
    @property
    def channel_std(self) -> Tensor | None: ...


def denoising_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Return the squared error of the velocity, a float32 scalar: mean over C, H, W, then over B (both [B,C,H,W])."""
    return (prediction.float() - velocity.float()).square().mean()


def alignment_loss(
    projections: Sequence[Tensor], targets: Sequence[AlignmentTarget], *, gamma: float | None, weight: float = 1.0
) -> Tensor:
    """Return weight * mean over encoders of the alignment loss, a float32 scalar; -weight is perfect alignment.

    Arguments and errors as in `alignment_losses`.
    """
    share = weight / len(projections)
    losses = alignment_losses(projections, targets, gamma=gamma, weights=[share] * len(projections))
    return sum(losses[1:], start=losses[0])


def alignment_losses(
    projections: Sequence[Tensor],
    targets: Sequence[AlignmentTarget],
    *,
    gamma: float | None,
    weights: Sequence[float],
) -> list[Tensor]:
    """Return each encoder's alignment loss times its weight, float32 scalars.

    projections are [B,T,E_k], one an encoder, in the order of `targets`; gamma None leaves the targets as they are.
    A weight is proj_coeff times what the loop scales losses by. It is folded into the encoder's gradient, so the
    loop calls backward on the sum of its losses as they are, and logs a value divided by its weight.

    Raises UsageError for a weight that is not positive, ValueError where projections and targets differ in number.
    """
    for weight in weights:
        if weight <= 0:
            raise UsageError(f"the alignment's weight is {weight:g}; to train without alignment, choose no projector")
    return [
        cosine_alignment(
            z,
            target.tokens,
            token_scale=target.token_scale,
            channel_mean=target.channel_mean,
            channel_std=target.channel_std,
            gamma=gamma,
            weight=weight,
        )
        for z, target, weight in zip(projections, targets, weights, strict=True)
    ]
