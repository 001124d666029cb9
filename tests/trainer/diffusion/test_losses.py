"""Losses against sums written out in numpy, and the folding of weights."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.diffusion.losses import alignment_loss, denoising_loss


@dataclass
class Target:
    tokens: torch.Tensor
    token_scale: torch.Tensor | None = None
    channel_mean: torch.Tensor | None = None
    channel_std: torch.Tensor | None = None


def test_denoising_loss_is_the_mean_square_in_float32():
    generator = torch.Generator().manual_seed(0)
    prediction, velocity = torch.randn(2, 3, 4, 5, 5, generator=generator)
    per_image = ((prediction.double() - velocity.double()).numpy() ** 2).reshape(3, -1).mean(1)
    assert float(denoising_loss(prediction, velocity)) == pytest.approx(per_image.mean(), rel=1e-6)
    rounded = denoising_loss(prediction.bfloat16(), velocity)
    assert rounded.dtype == torch.float32
    exact = ((prediction.bfloat16().double() - velocity.double()) ** 2).mean()
    assert float(rounded) == pytest.approx(float(exact), rel=1e-6)  # squared after the cast, not before


def two_encoders() -> tuple[list[torch.Tensor], list[Target]]:
    generator = torch.Generator().manual_seed(0)
    projections = [torch.randn(3, 4, width, generator=generator) for width in (8, 5)]
    targets = []
    for width in (8, 5):
        tokens = (2 + torch.randn(3, 4, width, generator=generator)).half()
        exact = tokens.double()
        targets.append(
            Target(tokens, channel_mean=exact.mean(1).float(), channel_std=exact.std(1, correction=1).float())
        )
    return projections, targets


def expected_cosines(projections, targets, gamma: float | None) -> list[float]:
    """Return -cos of each encoder, averaged token by token in float64."""
    values = []
    for z, target in zip(projections, targets, strict=True):
        f = target.tokens.double().numpy()
        if gamma is not None:
            f = (f - gamma * f.mean(1, keepdims=True)) / (f.std(1, ddof=1, keepdims=True) + 1e-6)
        z = z.detach().double().numpy()
        cosines = (z * f).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(f, axis=-1)
        values.append(-cosines.mean())
    return values


@pytest.mark.parametrize("gamma", [None, 0.0, 0.6, 1.0])
def test_alignment_is_averaged_over_encoders(gamma: float | None):
    projections, targets = two_encoders()
    expected = np.mean(expected_cosines(projections, targets, gamma))
    assert float(alignment_loss(projections, targets, gamma=gamma)) == pytest.approx(expected, abs=1e-6)
    one = expected_cosines(projections[1:], targets[1:], gamma)[0]
    assert float(alignment_loss(projections[1:], targets[1:], gamma=gamma)) == pytest.approx(one, abs=1e-6)


def test_the_weight_scales_loss_and_gradient():
    projections, targets = two_encoders()
    plain = [z.clone().requires_grad_() for z in projections]
    weighted = [z.clone().requires_grad_() for z in projections]
    whole = alignment_loss(plain, targets, gamma=0.6)
    quarter = alignment_loss(weighted, targets, gamma=0.6, weight=0.25)
    whole.backward()
    quarter.backward()
    assert quarter.item() == pytest.approx(0.25 * whole.item(), rel=1e-6)
    for a, b in zip(plain, weighted, strict=True):
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(b.grad, 0.25 * a.grad)


def test_alignment_of_a_target_with_itself_is_minus_one():
    projections, targets = two_encoders()
    targets = [Target(z) for z in projections]
    assert float(alignment_loss(projections, targets, gamma=None, weight=2)) == pytest.approx(-2, abs=1e-6)


def test_misfits_are_refused():
    projections, targets = two_encoders()
    with pytest.raises(UsageError, match="weight is 0; to train without alignment"):
        alignment_loss(projections, targets, gamma=None, weight=0)
    with pytest.raises(ValueError, match=r"argument 2 is shorter"):
        alignment_loss(projections, targets[:1], gamma=None)
