"""MeanFlow against golden values of the published code, finite differences, and data whose mean velocity is known.

For x ~ N(MU, S^2) the flow carries z at t to z_r = (1-r) MU + (sigma_r / sigma_t) (z - (1-t) MU) at r, where
sigma_t^2 = (1-t)^2 S^2 + t^2, so that u = (z - z_r) / (t - r), and one step from noise is MU + S noise.
"""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from repa.cache_specs.errors import UsageError
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.diffusion.latents import LatentNorm
from repa.trainer.models.blocks import TimestepEmbedder
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives import meanflow
from repa.trainer.objectives.alignment import AlignmentConfig
from repa.trainer.objectives.meanflow import MeanFlow, MeanFlowConfig, MeanFlowField, total_derivative
from repa.trainer.objectives.objective import Given
from repa.trainer.objectives.velocity import Velocity
from repa.trainer.reading.draws import DrawSpec
from repa.trainer.runs.start import take_over
from repa.trainer.sampling.samplers import SamplerConfig, sample_latents

from ..models.test_sit import randomized

NULL = 1
BAR = 0.2  # of the toy: the right derivative ends at 0.1 after 1000 steps, the wrong ones above 0.4
SMALL = SiTConfig(
    name="small/2", input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=NULL,
    second_time=True,
)  # fmt: skip


def objective(shape=(2, 1, 1), *, micro_batch=8, settings=None, kind=MeanFlow, dropout=0.0, **given):
    return kind(
        Given(
            **{
                "latent_shape": shape,
                "latent_kind": "sample",
                "norm": LatentNorm(scale=(1.0,) * shape[0], bias=(0.0,) * shape[0]),
                "num_views": 1,
                "features": (),
                "null_label": NULL,
                "label_dropout": dropout,
                "interpolant": Interpolant(),
                "alignment": AlignmentConfig(projector="none"),
                "micro_batch": micro_batch,
                "accumulation": 1,
                "precision": "fp32",
                "compile": False,
                "device": torch.device("cpu"),
            }
            | given
        ),
        settings if kind is Velocity else settings or MeanFlowConfig(),
    )


def batch_of(x, **draws):
    data = SimpleNamespace(moments=x, labels=torch.zeros(len(x), dtype=torch.int64), features=[])
    return SimpleNamespace(data=data, draws={"dropped": torch.zeros(len(x), dtype=torch.bool)} | draws)


def small_batch(num=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, 4, 4, generator=generator)
    times = torch.rand(2, num, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    return batch_of(x, noise=noise, t=times[0], other_t=times[1])


@torch.no_grad()
def pose(method, batch, model):
    return method.pose(batch, model, model)


# Golden values


class Sine(nn.Module):
    """u = sin(w z) + 0.7 t z - 0.4 r^2 + 0.3 t r + s, with w = 1.5 and s = 0.5 of the class, -0.25 of none."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, z, t, y, h):
        s = torch.where(y == NULL, -0.25, 0.5).double().view(-1, 1, 1, 1)
        t, h = t.view(-1, 1, 1, 1), h.view(-1, 1, 1, 1)
        r = t - h
        return torch.sin(self.w * z) + 0.7 * t * z - 0.4 * r**2 + 0.3 * t * r + s


def golden_batch(dropped=False):
    """Return A and C four times each: as themselves at places 3 and 7, with r = t elsewhere, which of A is B."""
    a, c = ((0.2, -0.5), (-0.7, 0.9), 0.8, 0.3), ((1.0, 0.3), (0.4, -1.2), 0.6, 0.0)
    samples = [a, a, a, a, c, c, c, c]
    x, noise, t, other_t = zip(*samples, strict=True)
    as_latents = [torch.tensor(part, dtype=torch.float64).view(8, 2, 1, 1) for part in (x, noise)]
    times = [torch.tensor(part, dtype=torch.float64) for part in (other_t, t)]  # in the other order: they are sorted
    return batch_of(as_latents[0], noise=as_latents[1], t=times[0], other_t=times[1], dropped=torch.full((8,), dropped))


GUIDED = {  # (omega, kappa): v, guided, and the target, of A and of C
    (1.0, 0.0): (((-0.9, 1.4), (-0.031133362, 0.118274319)), ((-0.6, -1.5), (-0.407899208, -0.030826543))),
    (1.0, 0.5): (((-0.525, 1.775), (0.038922206, 0.220133511)), ((-0.225, -1.125), (-0.320962203, 0.039880093))),
}


@pytest.mark.parametrize(("omega", "kappa"), GUIDED)
def test_targets_are_the_published_ones(omega, kappa):
    method, batch = objective(settings=MeanFlowConfig(omega=omega, kappa=kappa)), golden_batch()
    posed = pose(method, batch, Sine())
    z, t, labels, h = posed.inputs
    np.testing.assert_allclose(h, [0, 0, 0, 0.5, 0, 0, 0, 0.6], atol=1e-12)
    np.testing.assert_allclose(t, [0.8] * 4 + [0.6] * 4)
    u = Sine()(z, t, labels, h).detach().numpy()[:, :, 0, 0]
    np.testing.assert_allclose(u[[3, 7]], [[-0.458479419, 1.684819941], [1.587991568, -0.535326910]], atol=1e-9)
    for place, (v, target) in zip((3, 7), GUIDED[omega, kappa], strict=True):
        found = posed.target[:, :, 0, 0].numpy()
        np.testing.assert_allclose(found[place], target, atol=1e-7)
        np.testing.assert_allclose(found[place - 3], v, atol=1e-7)  # r = t


@pytest.mark.parametrize(
    ("omega", "kappa", "expected"),
    [(1.0, 0.0, 0.977225535), (1.0, 0.5, 0.927288134), (2.0, 0.0, 0.976988345), (0.2, 0.92, 0.746597996)],
)
def test_losses_are_the_published_ones(omega, kappa, expected):
    method, batch, model = objective(settings=MeanFlowConfig(omega=omega, kappa=kappa)), golden_batch(), Sine()
    posed = pose(method, batch, model)
    chosen = [3, 0, 7]  # A, B, C
    inputs = tuple(part[chosen] for part in posed.inputs)
    posed = dataclasses.replace(posed, inputs=inputs, target=posed.target[chosen])
    squared, weighted = method.terms(model(*inputs), (), posed, batch, 0)
    assert squared.value is None
    assert weighted.value.item() == pytest.approx(expected, abs=1e-6)
    if (omega, kappa) == (1.0, 0.0):
        assert squared.logged.item() == pytest.approx((2.636689839 + 0.150794718 + 4.238100609) / 6, abs=1e-6)
    if (omega, kappa) == (1.0, 0.5):
        (plain,) = torch.autograd.grad(2 * squared.logged, model.w, retain_graph=True)
        assert plain.item() == pytest.approx(1.055918480, abs=1e-5)  # of the mean of L, through u alone


def test_dropped_labels_leave_the_velocity_unguided():
    method, batch, model = objective(settings=MeanFlowConfig(omega=2.0)), golden_batch(dropped=True), Sine()
    posed = pose(method, batch, model)
    assert (posed.inputs[2] == NULL).all()
    errors = (model(*posed.inputs) - posed.target).square().flatten(1).sum(1)
    np.testing.assert_allclose(errors.detach()[[3, 0, 7]], [2.052890492, 0.486283935, 3.126014996], atol=1e-8)


def test_guidance_acts_inside_its_closed_interval():
    plain, model = objective(), Sine()
    inside = objective(settings=MeanFlowConfig(omega=2.0, guidance_low=0.6, guidance_high=0.7))
    batch = golden_batch()
    found, without = (pose(method, batch, model).target for method in (inside, plain))
    assert torch.equal(found[:4], without[:4])  # t = 0.8
    assert not torch.isclose(found[4:], without[4:]).any()  # t = 0.6


# The derivative


def double_sit(monkeypatch) -> SiT:
    """Return a random SiT in float64; its embedders round times to float32, which no difference survives."""
    embed = TimestepEmbedder.forward
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    monkeypatch.setattr(TimestepEmbedder, "forward", embed)
    return randomized(SiT(SMALL), seed=1).double()


def test_the_derivative_is_a_central_difference_along_v_0_1(monkeypatch):
    model, batch = double_sit(monkeypatch), small_batch()
    z, v = batch.data.moments.double(), batch.draws["noise"].double()
    r, t = (batch.draws[name].double() for name in ("t", "other_t"))
    y, step = batch.data.labels, 2e-4

    def u(z, r, t):
        return model.forward(z, t, y, t - r)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = meanflow._model_derivative(model, z, r, t, v, y)
        whole, half = ((u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h) for h in (step, step / 2))
    difference = (4 * half - whole) / 3  # to fourth order
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, difference, rtol=0, atol=1e-9 * float(difference.abs().max()))


MU, S = torch.tensor([1.5, -0.5], dtype=torch.float64).view(2, 1, 1), 0.3


def column(t):
    return torch.as_tensor(t, dtype=torch.float64).view(-1, 1, 1, 1)


def gaussian_u(z, r, t):
    """The mean velocity of the Gaussian from r to t, in the limit the velocity."""
    r, t = column(r), column(t)
    variance_r, variance_t = ((1 - time) ** 2 * S**2 + time**2 for time in (r, t))
    z_r = (1 - r) * MU + (variance_r / variance_t).sqrt() * (z - (1 - t) * MU)
    velocity = -MU + (t - (1 - t) * S**2) / variance_t * (z - (1 - t) * MU)
    apart = (t - r) > 0
    return torch.where(apart, (z - z_r) / torch.where(apart, t - r, 1), velocity)


class Gaussian(nn.Module):
    null_label = NULL

    def forward(self, z, t, y, h):
        return gaussian_u(z, t - h, t)


TANGENTS = {"v01": (1, 0, 1), "v00": (1, 0, 0), "v10": (1, 1, 0), "v11": (1, 1, 1), "-v01": (-1, 0, 1)}


def along(name):
    """Return `total_derivative`, but along other tangents."""
    by_v, by_r, by_t = TANGENTS[name]

    def derivative(u, z, r, t, v):
        return torch.func.jvp(u, (z, r, t), (by_v * v, by_r * torch.ones_like(r), by_t * torch.ones_like(t)))[1]

    return derivative


def test_the_identity_holds_on_the_gaussian_for_the_right_tangent_alone():
    z, r, t = (
        torch.tensor([0.4, -1.1], dtype=torch.float64).view(1, 2, 1, 1),
        column(0.2)[0, 0, 0],
        column(0.7)[0, 0, 0],
    )
    v, u = gaussian_u(z, t, t), gaussian_u(z, r, t)
    np.testing.assert_allclose(v.flatten(), [-1.56755672, -0.78357759], atol=1e-8)
    np.testing.assert_allclose(u.flatten(), [-1.55573437, -0.55895305], atol=1e-8)
    assert float((v - 0.5 * total_derivative(gaussian_u, z, r, t, v) - u).abs().max()) < 2e-15

    generator = torch.Generator().manual_seed(0)
    z = MU + torch.randn(200, 2, 1, 1, generator=generator, dtype=torch.float64)
    r, t = torch.rand(2, 200, generator=generator, dtype=torch.float64).sort(0)[0]
    v, u = gaussian_u(z, t, t), gaussian_u(z, r, t)
    errors = {
        name: float((v - column(t - r) * along(name)(gaussian_u, z, r, t, v) - u).abs().max()) for name in TANGENTS
    }
    assert errors.pop("v01") < 2e-14
    assert min(errors.values()) > 2, errors
    assert torch.equal(along("v01")(gaussian_u, z, r, t, v), total_derivative(gaussian_u, z, r, t, v))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_steps_is_the_solution_on_the_gaussian(steps):
    noise = torch.randn(50, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    field = MeanFlow.field(Interpolant(), MeanFlowConfig())
    labels = torch.zeros(50, dtype=torch.int64)
    (found,) = sample_latents(Gaussian(), (noise,), labels, SamplerConfig(steps=steps), field=field)
    torch.testing.assert_close(found, MU + S * noise, rtol=0, atol=1e-12)


def test_other_samplers_and_guidance_are_refused():
    noise, labels = torch.zeros(1, 2, 1, 1), torch.zeros(1, dtype=torch.int64)
    field = MeanFlowField(interpolant=Interpolant())
    for config, words in (
        (SamplerConfig(cfg_scale=1.5), "learns its guidance while training"),
        (SamplerConfig(sampler="heun"), "this model's method has euler"),
        (SamplerConfig(sampler="sde"), "this model's method has euler"),
    ):
        with pytest.raises(UsageError, match=words):
            sample_latents(Gaussian(), (noise,), labels, config, field=field)


# Training


def test_where_r_is_t_it_is_flow_matching_to_the_bit(monkeypatch):
    """Inputs, target and error are SiT's, and so is the model's answer once a SiT's weights are in it."""
    monkeypatch.setattr(meanflow, "APART", slice(0, 0))
    batch = small_batch()
    sit = randomized(SiT(dataclasses.replace(SMALL, second_time=False)), seed=2)
    model = randomized(SiT(SMALL), seed=3)
    take_over(model, sit)
    posed = pose(objective((3, 4, 4)), batch, model)
    batch.draws["t"] = torch.maximum(batch.draws["t"], batch.draws["other_t"])
    expected = pose(objective((3, 4, 4), kind=Velocity), batch, sit)
    for found, wanted in zip((*posed.inputs[:3], posed.target), (*expected.inputs, expected.target), strict=True):
        assert torch.equal(found, wanted)
    assert not posed.inputs[3].any()
    assert torch.equal(model(*posed.inputs), sit(*expected.inputs))
    assert torch.equal(model(*posed.inputs[:3]), sit(*expected.inputs))  # as CKNNA asks


def test_the_second_time_embedder_changes_no_other_weight():
    with_it, without = SiT(SMALL, seed=5), SiT(dataclasses.replace(SMALL, second_time=False), seed=5)
    state = with_it.state_dict()
    assert all(torch.equal(state[name], value) for name, value in without.state_dict().items())
    assert float(state["r_embedder.mlp.2.weight"].std()) == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(with_it.r_embedder.mlp[2].weight, with_it.t_embedder.mlp[2].weight)


class Mlp(nn.Module):
    """4-64-64-2 on (z, t, h)."""

    null_label = NULL

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        for parameter in self.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1])
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, z, t, y, h):
        return self.layers(torch.cat([z.flatten(1), t[:, None], h[:, None]], 1)).view_as(z)


def one_step_error(steps: int) -> float:
    """Train the toy on the Gaussian; return the RMS of its one-step samples to MU + S noise."""
    method, model = objective(micro_batch=256), Mlp()
    spec = DrawSpec(seed=1, draws=method.draws())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - 0.98 * step / steps)
        x = MU.float() + S * torch.randn(256, 2, 1, 1, generator=generator)
        batch = batch_of(x)
        batch.draws |= spec.draw(256, step=step, micro=0, rank=0)
        posed = pose(method, batch, model)
        _, weighted = method.terms(model(*posed.inputs), (), posed, batch, step)
        optimizer.zero_grad()
        weighted.value.backward()
        optimizer.step()
    noise, labels = torch.randn(1000, 2, 1, 1, generator=generator), torch.zeros(1000, dtype=torch.int64)
    field = MeanFlow.field(Interpolant(), MeanFlowConfig())
    (samples,) = sample_latents(model, (noise,), labels, SamplerConfig(steps=1), field=field)
    return float((samples - MU - S * noise).square().mean().sqrt())


def test_the_toy_learns_to_sample_in_one_step_and_by_no_other_derivative(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert one_step_error(700) < BAR
        for name in ("v00", "v10", "-v01"):
            monkeypatch.setattr(meanflow, "total_derivative", along(name))
            assert one_step_error(300) > 2 * BAR, name
        monkeypatch.undo()
        monkeypatch.setattr(meanflow, "APART", slice(0, 0))  # r = t everywhere
        assert one_step_error(300) > 2 * BAR
    finally:
        torch.set_num_threads(threads)
