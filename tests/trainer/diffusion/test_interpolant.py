"""Paths and time distributions against their equations."""

import math

import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.diffusion.interpolant import Interpolant

PATHS = ("linear", "cosine")


def test_linear_path():
    x, eps = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 5.0)
    x_t, velocity = Interpolant(path="linear").x_t_and_velocity(x, eps, torch.tensor([0.25, 1.0]))
    assert x_t.flatten().tolist() == [3.5, 5.0]
    assert velocity.flatten().tolist() == [2.0, 2.0]  # eps - x at any t


def test_cosine_path():
    x, eps = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 5.0)
    x_t, velocity = Interpolant(path="cosine").x_t_and_velocity(x, eps, torch.tensor([0.5, 0.0]))
    half = math.sqrt(0.5)
    assert x_t.flatten().tolist() == pytest.approx([8 * half, 3.0])
    assert velocity.flatten().tolist() == pytest.approx([math.pi / 2 * 2 * half, math.pi / 2 * 5])


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_x_t(path: str):
    interpolant = Interpolant(path=path)
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    t, step = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64), 1e-6
    later, _ = interpolant.x_t_and_velocity(x, eps, t + step)
    earlier, _ = interpolant.x_t_and_velocity(x, eps, t - step)
    _, velocity = interpolant.x_t_and_velocity(x, eps, t)
    torch.testing.assert_close(velocity, (later - earlier) / (2 * step), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_data_and_noise_in_float32(path: str):
    interpolant = Interpolant(path=path)
    x, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t, velocity = interpolant.x_t_and_velocity(x, eps, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(x_t[0], x[0])
    torch.testing.assert_close(x_t[1], eps[1])
    assert x_t.dtype == velocity.dtype == torch.float32
    for coefficient in interpolant.coefficients(torch.rand(5)):
        assert coefficient.shape == (5,)
        assert coefficient.dtype == torch.float32


def draws(path: str, distribution: str) -> torch.Tensor:
    interpolant = Interpolant(path=path, time_distribution=distribution)
    return interpolant.sample_t(200_000, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("path", PATHS)
def test_uniform_times(path: str):
    t = draws(path, "uniform")
    assert t.dtype == torch.float32
    assert 0 <= t.min() <= t.max() < 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.003)
    assert float(t.var()) == pytest.approx(1 / 12, abs=0.001)


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_have_a_standard_normal_log_ratio_of_noise_to_data(path: str):
    t = draws(path, "lognormal")
    assert 0 < t.min() <= t.max() < 1
    alpha, sigma, _, _ = Interpolant(path=path).coefficients(t.double())
    log_ratio = (sigma / alpha).log()
    assert float(log_ratio.mean()) == pytest.approx(0, abs=0.01)
    assert float(log_ratio.std()) == pytest.approx(1, abs=0.01)
    assert float((log_ratio**4).mean()) == pytest.approx(3, abs=0.1)


def test_times_come_from_the_generator_alone():
    before = torch.get_rng_state()
    for distribution in ("uniform", "lognormal"):
        assert torch.equal(draws("linear", distribution), draws("linear", distribution))
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match=r"interpolant\.path is 'cosin'; did you mean 'cosine'"):
        Interpolant(path="cosin")
    with pytest.raises(UsageError, match=r"interpolant\.time_distribution is 'normal'; did you mean 'lognormal'"):
        Interpolant(time_distribution="normal")
