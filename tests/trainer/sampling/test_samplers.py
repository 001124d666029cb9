"""Samplers on Gaussian data, where the velocity, the ODE's solution and the SDE's marginals are known exactly.

With x ~ N(m, s^2) the velocity is a' m + (a' a s^2 + b' b) / (a^2 s^2 + b^2) (x_t - a m), b = sigma(t): the ODE carries
noise n at t = 1 to m + s n, and the SDE ends in N(m, s^2).
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.objectives.velocity import VelocityField
from repa.trainer.sampling.samplers import SamplerConfig, check_sampler, sample_latents, score

DEVIATION = 0.5
MEANS = np.array([1.5, -2.0, 0.3])  # of class 0, class 1 and, for the null label 2, of everything
PATHS = ("linear", "cosine")

FIELD = VelocityField(interpolant=Interpolant())


def coefficients(path: str, t):
    if path == "linear":
        return 1 - t, t, -np.ones_like(t), np.ones_like(t)
    half = math.pi / 2
    return np.cos(half * t), np.sin(half * t), -half * np.sin(half * t), half * np.cos(half * t)


def exact_velocity(path: str, x, t, mean):
    a, b, da, db = coefficients(path, t)
    variance = a**2 * DEVIATION**2 + b**2
    return da * mean + (da * a * DEVIATION**2 + db * b) / variance * (x - a * mean)


def exact_score(path: str, x, t, mean):
    a, b, _, _ = coefficients(path, t)
    return -(x - a * mean) / (a**2 * DEVIATION**2 + b**2)


class GaussianModel:
    """The exact velocity as a model, which notes what it was asked for."""

    null_label = 2

    def __init__(self, path: str) -> None:
        self.path = path
        self.calls: list[tuple[float, int]] = []

    def __call__(self, x, t, y):
        assert x.dtype == t.dtype
        assert (t == t[0]).all()
        self.calls.append((float(t[0]), len(x)))
        t = t.double().numpy()[:, None, None, None]
        mean = MEANS[y.numpy()][:, None, None, None]
        return torch.from_numpy(exact_velocity(self.path, x.double().numpy(), t, mean)).to(x.dtype)


def start(num: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num, 1, 2, 2, generator=generator, dtype=torch.float64)
    return noise, torch.arange(num) % 2


def solve(path: str, config: SamplerConfig, noise, labels, seed: int = 1):
    model, generator = GaussianModel(path), torch.Generator().manual_seed(seed)
    (latents,) = sample_latents(
        model,
        (noise,),
        labels,
        config,
        field=VelocityField(interpolant=Interpolant(path=path)),
        sde_noise=lambda: (torch.randn(noise.shape, generator=generator),),
    )
    return latents, model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_the_ode_converges_to_its_solution_at_the_methods_order(path: str, sampler: str, order: int):
    noise, labels = start()
    solution = torch.from_numpy(MEANS[labels.numpy()])[:, None, None, None] + DEVIATION * noise
    errors = []
    for steps in (100, 200, 400):
        latents, _ = solve(path, SamplerConfig(sampler=sampler, steps=steps), noise, labels)
        errors.append(float((latents - solution).abs().max()))
    assert errors[0] < (0.05 if order == 1 else 2e-3)
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("path", PATHS)
def test_each_sampler_is_the_published_recursion(path: str):
    """The same steps written out in numpy, with guidance on part of the path, agree to rounding."""
    noise, labels = start()
    means = MEANS[labels.numpy()][:, None, None, None]
    low, high, scale = 0.33, 0.77, 2.5

    def guided(drift, x, t, at):
        if low <= at <= high:
            return drift(x, t, MEANS[2]) + scale * (drift(x, t, means) - drift(x, t, MEANS[2]))
        return drift(x, t, means)

    def velocity(x, t, mean):
        return exact_velocity(path, x, t, mean)

    def sde_drift(x, t, mean):
        return velocity(x, t, mean) - 0.5 * (2 * t) * exact_score(path, x, t, mean)

    settings = {"cfg_scale": scale, "guidance_low": low, "guidance_high": high}
    steps = 10
    times = np.linspace(1, 0, steps + 1)
    euler = heun = noise.numpy()
    for k in range(steps):
        t, dt = times[k], times[k + 1] - times[k]
        euler = euler + dt * guided(velocity, euler, t, t)
        first = guided(velocity, heun, t, t)
        if k < steps - 1:
            second = guided(velocity, heun + dt * first, times[k + 1], t)
            first = 0.5 * first + 0.5 * second
        heun = heun + dt * first

    times = np.append(np.linspace(1, 0.04, steps), 0)
    sde, generator = noise.numpy(), torch.Generator().manual_seed(1)
    for k in range(steps):
        t, dt = times[k], times[k + 1] - times[k]
        n = torch.randn(noise.shape, generator=generator).double().numpy() if k < steps - 1 else 0
        sde = sde + dt * guided(sde_drift, sde, t, t) + np.sqrt(2 * t) * np.sqrt(abs(dt)) * n

    for sampler, expected in (("euler", euler), ("heun", heun), ("sde", sde)):
        config = SamplerConfig(sampler=sampler, steps=steps, **settings)
        latents, _ = solve(path, config, noise, labels)
        np.testing.assert_allclose(latents.numpy(), expected, rtol=1e-9, atol=1e-9, err_msg=sampler)


@pytest.mark.parametrize("path", PATHS)
def test_the_sde_ends_in_the_datas_distribution(path: str):
    noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents, _ = solve(path, SamplerConfig(sampler="sde", steps=400), noise, torch.zeros(20_000, dtype=torch.int64))
    assert float(latents.mean()) == pytest.approx(MEANS[0], abs=0.02)
    assert float(latents.std()) == pytest.approx(DEVIATION, rel=0.03)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.04, 0.5, 1.0])
def test_score_from_velocity(path: str, t: float):
    x = np.linspace(-3, 3, 7).reshape(7, 1, 1, 1)
    velocity = torch.from_numpy(exact_velocity(path, x, np.float64(t), 1.5))
    found = score(velocity, torch.from_numpy(x), t, Interpolant(path=path))
    np.testing.assert_allclose(found.numpy(), exact_score(path, x, np.float64(t), 1.5), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sampler", "steps", "evaluations"),
    [("euler", 7, 7), ("heun", 7, 13), ("heun", 1, 1), ("sde", 7, 7), ("sde", 1, 1)],
)
def test_drift_evaluations(sampler: str, steps: int, evaluations: int):
    noise, labels = start()
    _, model = solve("linear", SamplerConfig(sampler=sampler, steps=steps), noise, labels)
    assert len(model.calls) == evaluations
    assert {num for _, num in model.calls} == {len(noise)}
    times = [t for t, _ in model.calls]
    assert times[0] == 1
    if sampler == "sde":
        assert times == pytest.approx(np.linspace(1, 0.04, steps))
    else:
        assert min(times) == pytest.approx(1 / steps)  # t = 0 is never evaluated


def test_the_guidance_interval_holds_both_its_ends():
    noise, labels = start()
    config = SamplerConfig(steps=4, cfg_scale=1.5, guidance_low=0.25, guidance_high=0.75)
    _, model = solve("linear", config, noise, labels)
    assert model.calls == [(1.0, 6), (0.75, 12), (0.5, 12), (0.25, 12)]
    _, model = solve("linear", SamplerConfig(steps=4, cfg_scale=1.0), noise, labels)
    assert [num for _, num in model.calls] == [6, 6, 6, 6]
    # Heun's correction follows the start of its step: guided at t = 0.5 (start 0.75), not at 0.75 (start 1).
    config = SamplerConfig(sampler="heun", steps=4, cfg_scale=1.5, guidance_low=0.7, guidance_high=0.8)
    _, model = solve("linear", config, noise, labels)
    assert model.calls == [(1.0, 6), (0.75, 6), (0.75, 12), (0.5, 12), (0.5, 6), (0.25, 6), (0.25, 6)]


def test_the_model_sees_float32_and_the_state_is_float64():
    """In float32 the state would lose 1e-7 a step; in float64 only the model's answers are rounded."""
    noise, labels = start()
    config = SamplerConfig(steps=1000)
    exact, _ = solve("linear", config, noise.float().double(), labels)
    found, _ = solve("linear", config, noise.float(), labels)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 1e-6


def test_misfits_are_refused():
    with pytest.raises(UsageError, match="did you mean 'heun'"):
        SamplerConfig(sampler="huen")
    with pytest.raises(UsageError, match="steps is 0"):
        SamplerConfig(steps=0)
    with pytest.raises(UsageError, match=r"cfg_scale is 0\.5; expected 1"):
        SamplerConfig(cfg_scale=0.5)
    with pytest.raises(UsageError, match=r"interval is 0\.8 to 0\.3"):
        SamplerConfig(guidance_low=0.8, guidance_high=0.3)
    noise, labels = start()
    with pytest.raises(UsageError, match="needs a source of noise"):
        sample_latents(GaussianModel("linear"), (noise,), labels, SamplerConfig(sampler="sde"), field=FIELD)
    with pytest.raises(UsageError, match=r"sampler is heun; this model's method has euler, sde"):
        check_sampler(SamplerConfig(sampler="heun"), replace(FIELD, samplers=("euler", "sde")))
    with pytest.raises(UsageError, match=r"cfg_scale is 1\.5; .* Sample with cfg_scale 1"):
        check_sampler(SamplerConfig(cfg_scale=1.5), replace(FIELD, guided=False))


def test_a_method_may_have_its_guidance_judged_at_each_evaluations_own_time():
    noise, labels = start()
    config = SamplerConfig(sampler="heun", steps=4, cfg_scale=1.5, guidance_low=0.7, guidance_high=0.8)
    model = GaussianModel("linear")
    sample_latents(model, (noise,), labels, config, field=replace(FIELD, own_times=True))
    assert model.calls == [(1.0, 6), (0.75, 12), (0.75, 12), (0.5, 6), (0.5, 6), (0.25, 6), (0.25, 6)]


@dataclass(frozen=True, kw_only=True)
class TwoParts(VelocityField):
    """A second part of the state with the same velocity, guided three times as strongly."""

    def velocities(self, model, state, t, t_next, labels):
        return tuple(model(part, t, labels) for part in state)

    def scales(self, cfg_scale: float, cls_cfg_scale: float | None) -> tuple[float, ...]:
        return cfg_scale, 3 * cfg_scale


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_each_part_of_a_state_moves_as_it_would_alone(sampler: str):
    """Euler, Heun and the SDE are the same recursion for every part, each with its noise and its guidance scale."""
    noise, labels = start()
    draws = torch.randn(20, *noise.shape, generator=torch.Generator().manual_seed(3))
    first, second = iter(draws), iter(draws)
    both = TwoParts(interpolant=Interpolant())
    config = SamplerConfig(sampler=sampler, steps=5, cfg_scale=1.5)
    model = GaussianModel("linear")
    together = sample_latents(
        model, (noise, noise + 1), labels, config, field=both, sde_noise=lambda: (next(first), torch.zeros_like(noise))
    )
    (alone,) = sample_latents(model, (noise,), labels, config, field=FIELD, sde_noise=lambda: (next(second),))
    torch.testing.assert_close(together[0], alone, rtol=0, atol=0)
    strong = replace(config, cfg_scale=4.5)
    (other,) = sample_latents(
        model, (noise + 1,), labels, strong, field=FIELD, sde_noise=lambda: (torch.zeros_like(noise),)
    )
    torch.testing.assert_close(together[1], other, rtol=0, atol=0)
