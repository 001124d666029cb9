"""Latents, the model's input, and the numbers between them."""

import pytest
import torch

from repa.cache_specs.errors import CacheError, UsageError
from repa.trainer.diffusion.latents import LatentNorm, LatentSource, draw_latents, resolve_latent_norm, to_model_input

SOURCE = {"channels": 2, "published": (0.18215, 0.0), "where": "cache/latents/toy"}


def test_draws_have_the_posterior_mean_and_deviation():
    generator = torch.Generator().manual_seed(0)
    moments = torch.cat([torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 0.5)], dim=1).half()
    draws = draw_latents(
        moments.expand(20_000, -1, -1, -1), torch.randn(20_000, 2, 1, 1, generator=generator), "mean_std"
    )
    assert draws.dtype == torch.float32
    assert abs(draws.mean().item() - 3) < 0.01
    assert abs(draws.std().item() - 0.5) < 0.01
    stored = torch.randn(2, 3, 4, 4).half()
    assert torch.equal(draw_latents(stored, None, "sample"), stored.float())


def test_fixed_and_channel_normalisation():
    fixed = resolve_latent_norm("fixed", mean=None, std=None, **SOURCE)
    assert fixed == LatentNorm(scale=(0.18215, 0.18215), bias=(0.0, 0.0))
    channel = resolve_latent_norm("channel", mean=[1.0, -2.0], std=[0.5, 4.0], **SOURCE)
    assert channel == LatentNorm(scale=(2.0, 0.25), bias=(1.0, -2.0))
    z = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1) + torch.tensor([0.5, 4.0]).view(1, 2, 1, 1) * torch.randn(3, 2, 4, 4)
    scale, bias = channel.tensors("cpu")
    x = to_model_input(z, scale, bias)
    torch.testing.assert_close(x[:, 1], (z[:, 1] + 2) / 4)
    torch.testing.assert_close(x / scale + bias, z)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (None, None, "no per-channel statistics"),
        ([0.0], [1.0], "of 2 channels"),
        ([0.0, 0.0], [1.0, 0.0], "channel 1 .* constant"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(mean, std, message):
    with pytest.raises(CacheError, match=message):
        resolve_latent_norm("channel", mean=mean, std=std, **SOURCE)


def test_the_source_of_latents_survives_storage():
    source = LatentSource.published("sd-vae-ft-mse", input_size=32, channels=4)
    assert LatentSource.from_plain(source.plain()) == source
    assert source.spec["latent_size"] == [32, 32]
    assert source.norm.scale == (0.18215,) * 4
    with pytest.raises(UsageError, match="did you mean 'sd-vae-ft-mse'"):
        LatentSource.published("sd-vae-ft-ms", input_size=32, channels=4)
    with pytest.raises(UsageError, match="latents of 4 channels; the model draws 3"):
        LatentSource.published("sd-vae-ft-mse", input_size=32, channels=3)
    with pytest.raises(UsageError, match="e2e-sdvae has no published scale"):
        LatentSource.published("e2e-sdvae", input_size=32, channels=4)
