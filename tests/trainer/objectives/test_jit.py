"""JiT's method against golden values of the published code, the exact denoiser of a Gaussian, and whole small runs."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.diffusion.latents import LatentNorm
from repa.trainer.models import jit as jit_models
from repa.trainer.models.pretrained import open_model
from repa.trainer.objectives.alignment import AlignmentConfig
from repa.trainer.objectives.choose import stored_field
from repa.trainer.objectives.jit import JiT, JiTMethodConfig
from repa.trainer.objectives.objective import Given
from repa.trainer.reading.order import GlobalOrder
from repa.trainer.reading.prefetch import ReadAhead
from repa.trainer.sampling.samplers import SamplerConfig, sample_latents
from repa.trainer.training import loop

from .small_runs import make_run

GIVEN = Given(
    latent_shape=(3, 1, 2),
    latent_kind="sample",
    norm=LatentNorm(scale=(1.0,) * 3, bias=(0.0,) * 3),
    num_views=1,
    features=(),
    null_label=2,
    label_dropout=0.0,
    interpolant=Interpolant(),
    alignment=AlignmentConfig(projector="none"),
    micro_batch=1,
    accumulation=1,
    precision="fp32",
    compile=False,
    device=torch.device("cpu"),
)
RECIPE = ("--recipe", "jit", "--model", "JiT-Ti/2")


@pytest.fixture
def small_jit(small_sit, monkeypatch):
    """Make JiT-Ti two blocks of width 32, with dropout in its middle half, and two class tokens."""
    monkeypatch.setitem(jit_models.SIZES, "Ti", (4, 32, 2, 8, 2, 0.2))
    monkeypatch.setattr(jit_models, "NUM_CLASS_TOKENS", 2)


def pose(x, noise, t, settings):
    draws = {"noise": noise, "t": t, "dropped": torch.zeros(len(t), dtype=torch.bool), "dropout": torch.arange(len(t))}
    batch = SimpleNamespace(
        data=SimpleNamespace(moments=x, labels=torch.zeros(len(t)).long(), features=[]), draws=draws
    )
    method = JiT(replace(GIVEN, latent_shape=tuple(x.shape[1:])), settings)
    posed = method.pose(batch, None, None)
    return posed, lambda prediction: method.terms(prediction, (), posed, batch, 0)[0].value


@pytest.mark.parametrize(("t", "expected"), [(0.7, 1.405559715), (0.04, 42.084106622), (0.02, 39.886280992)])
def test_the_loss_is_the_published_one_clipped_on_both_sides(t: float, expected: float):
    x, eps = (torch.tensor(pair, dtype=torch.float64).expand(1, 3, 1, 2) for pair in ((0.3, -0.6), (-1.1, 0.8)))
    time = torch.tensor([t], dtype=torch.float64)
    posed, loss = pose(x, eps, time, JiTMethodConfig(noise_scale=1.0))
    z, given_t, labels, seeds = posed.inputs
    torch.testing.assert_close(z.double(), (1 - t) * x + t * eps, rtol=0, atol=1e-7)
    assert (given_t.item(), labels.item(), seeds.item()) == (t, 0, 0)
    assert loss(0.9 * z / (1 + (1 - t)) + 0.1).item() == pytest.approx(expected, rel=1e-6)
    assert loss(x).item() == 0  # the minimiser is x, below the floor too


def test_a_fresh_network_loses_the_mean_of_the_weights_times_the_data():
    num = 400_000
    method = JiT(GIVEN, JiTMethodConfig())
    t = torch.empty(num)
    (draw,) = [draw for draw in method.draws() if draw.name == "t"]
    draw.fill(t, torch.Generator().manual_seed(0))
    logits = torch.logit(t.double())
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((0.8, 0.8), abs=0.005)
    x = torch.full((num, 3, 1, 1), 0.5)
    _, loss = pose(x, torch.zeros_like(x), t, JiTMethodConfig())
    assert loss(torch.zeros_like(x)).item() == pytest.approx(2.963716 * 0.25, rel=5e-3)


@pytest.mark.parametrize(("side", "given", "expected"), [(256, None, 1.0), (512, None, 2.0), (64, 1.5, 1.5)])
def test_noise_grows_with_the_images_side(side: int, given: float | None, expected: float):
    settings, x = JiTMethodConfig(noise_scale=given), torch.zeros(1, 3, side, side)
    posed, _ = pose(x, torch.ones_like(x), torch.tensor([0.5]), settings)
    assert posed.inputs[0].unique().tolist() == [0.5 * expected]
    model = SimpleNamespace(config=SimpleNamespace(input_size=side))
    assert JiT.field(Interpolant(), settings).noise_scale(model) == expected


def test_draws_come_after_those_of_sit():
    names = [draw.name for draw in JiT(GIVEN, JiTMethodConfig()).draws()]
    assert names == ["views", "t", "noise", "dropped", "dropout"]


class Denoiser:
    """The mean of x ~ N(mean, deviation^2) given z; notes the times and sizes that it was asked at."""

    null_label = 2

    def __init__(self, mean: float, deviation: float, scale: float = 1.0) -> None:
        self.mean, self.variance, self.scale = mean, deviation**2, scale
        self.calls: list[tuple[float, int]] = []

    def __call__(self, z, t, y):
        self.calls.append((round(float(t[0]), 4), len(z)))
        t = t.view(-1, 1, 1, 1)
        gain = (1 - t) * self.variance / ((1 - t) ** 2 * self.variance + (t * self.scale) ** 2)
        return self.mean + gain * (z - (1 - t) * self.mean)


def solve(model, noise, config, **settings):
    field = JiT.field(Interpolant(), JiTMethodConfig(**settings))
    (found,) = sample_latents(model, (noise,), torch.zeros(len(noise)).long(), config, field=field)
    return found


def test_samples_of_the_exact_denoiser_are_the_data():
    noise = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [
        float((solve(Denoiser(0.4, 0.3, 2.0), 2 * noise, SamplerConfig(sampler="heun", steps=steps), floor=1e-6)
               - (0.4 + 0.3 * noise)).abs().max())
        for steps in (50, 100)
    ]  # fmt: skip
    assert errors[0] < 0.01
    assert errors[0] / errors[1] > 3


@pytest.mark.parametrize(("steps", "percent"), [(25, 0.88), (50, 1.71), (100, 1.81)])
def test_the_clip_leaves_as_much_noise_as_published(steps: int, percent: float):
    noise = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    left = solve(Denoiser(0.0, 0.0), noise, SamplerConfig(sampler="heun", steps=steps))
    assert 100 * float(left.mean()) == pytest.approx(percent, abs=0.005)


def test_guidance_acts_inside_its_open_interval_at_each_evaluations_own_time():
    model, noise = Denoiser(0.0, 0.3), torch.zeros(1, 3, 1, 1)
    solve(model, noise, SamplerConfig(sampler="heun", steps=50, cfg_scale=2.9, guidance_high=0.9))
    assert len(model.calls) == 99
    times = [t for t, size in model.calls if size == 2]
    assert max(times) == 0.88
    assert all(size == (2 if t < 0.9 else 1) for t, size in model.calls)
    assert model.calls[9:12] == [(0.9, 1), (0.9, 1), (0.88, 2)]  # the step from 0.9 is guided at its end alone


# Whole runs


def jit_run(cache, *assignments):
    return make_run(cache, "jit-irepa", "alignment.encoder_depth=3", *assignments, model="JiT-Ti/2")


def test_a_step_is_the_equations_on_what_was_written(make_cache, small_jit):
    written = make_cache()
    run = jit_run(written.path, "label_dropout=0.5")
    generator = torch.Generator().manual_seed(1)
    for parameter in run.optimizer.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    draws = run.batches.spec.draw(8, step=0, micro=0, rank=0)
    rows, views = torch.from_numpy(GlobalOrder(23, seed=0).at(0, 8)), draws["views"]
    x = torch.from_numpy(written.arrays["latents/toy-ae/moments"])[rows, views].float()
    labels = torch.where(draws["dropped"], 3, torch.from_numpy(written.arrays["label"])[rows].long())
    t = draws["t"].view(-1, 1, 1, 1)
    z = (1 - t) * x + t * 8 / 256 * draws["noise"]
    tokens = torch.from_numpy(written.arrays["features/toy/patch_tokens"])[rows, views].float()
    with torch.no_grad():
        clean, (projected,) = run.model(z, draws["t"], labels, draws["dropout"], return_projections=True)
    target = (tokens - 0.8 * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)
    expected = [
        (((clean - x) / t.clamp(min=0.05)) ** 2).mean().item(),
        -torch.nn.functional.cosine_similarity(projected, target, dim=-1).mean().item(),
    ]
    with ReadAhead(run.batches, first=0, last=1, depth=1, device=torch.device("cpu")) as ahead:
        found = loop.train_step(run, ahead).values.numpy()[:2]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert [ema.decay for ema in (run.ema, *run.more_emas)] == [0.9999, 0.9996]


def test_a_run_resumes_to_the_bit_and_its_averages_are_sampled(make_cache, repa_train, small_jit, tmp_path):
    cache = make_cache(latents="sample").path
    flags = ("--recipe", "jit-irepa", "--model", "JiT-Ti/2", "--set", "optimizer.warmup_steps=3")
    whole = repa_train(cache, tmp_path / "whole", *flags, "--steps", "8")
    assert whole.code == 0, whole.error
    assert "JiT (arXiv 2511.13720)" in whole.output
    repa_train(cache, tmp_path / "parts", *flags, "--steps", "4")
    parts = repa_train(cache, tmp_path / "parts", *flags, "--steps", "8", "--resume", "auto")
    assert parts.losses() == whole.losses()
    trained, other = (open_model(tmp_path / "whole", weights=weights) for weights in ("ema", "ema:0.9996"))
    assert isinstance(trained.model, jit_models.JiT)
    weight, moved = (found.model.final_layer.linear.weight for found in (trained, other))
    assert not torch.equal(weight, moved)
    field = stored_field(trained.method, trained.interpolant)
    assert field.noise_scale(trained.model) == 8 / 256
    again = open_model(tmp_path / "parts")
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_step_compiles_whole_and_is_the_eager_one(make_cache, small_jit, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(  # Dynamo's full graph, without the time of a code generator
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options)
    )
    cache = make_cache().path
    values = []
    for compiled in ("false", "true"):
        run = jit_run(cache, f"compile={compiled}", "precision=fp32")
        for parameter in run.optimizer.parameters:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        with ReadAhead(run.batches, first=0, last=1, depth=1, device=torch.device("cpu")) as ahead:
            values.append(loop.train_step(run, ahead).values.numpy())
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    torch._dynamo.reset()


def test_pixels_as_uint8_are_mirrored_and_normalised_on_their_way_in(make_cache, small_jit):
    written = make_cache(latents="uint8")
    run = jit_run(written.path)
    assert run.config.autoencoder == "pixels-uint8"
    batch = run.batches.read(0, 0)
    views = batch.draws["views"].numpy()
    assert 0 < views.sum() < 8
    levels = written.arrays["latents/pixels-uint8/moments"][batch.data.rows, 0]
    levels = np.where(views[:, None, None, None], levels[..., ::-1], levels)
    x = run.objective.latents(batch)
    np.testing.assert_allclose(x.numpy(), levels / 127.5 - 1, rtol=0, atol=2e-7)
    assert x.dtype == torch.float32


def test_a_run_that_names_no_latents_takes_pixels_as_uint8_first(make_cache, repa_train, small_jit, tmp_path):
    """Beside other latents too; --autoencoder pixels is what the cache has of them, the float16 ones where both."""
    cache = tmp_path / "cache"
    shutil.copytree(make_cache(latents="uint8").path, cache)
    flags = ("--recipe", "jit-irepa", "--model", "JiT-Ti/2", "--set", "alignment.encoder_depth=3")
    stage = ("--stage", str(tmp_path / "scratch"), "--steps", "2", "--autoencoder", "pixels")
    trained = repa_train(cache, tmp_path / "run", *flags, *stage)
    assert trained.code == 0, trained.error
    assert [file.name for file in tmp_path.glob("scratch/*/latents/*-*")] == ["pixels-uint8"]
    whole = repa_train(cache, tmp_path / "whole", *flags, "--steps", "2")
    assert whole.losses() == trained.losses()
    shutil.copytree(cache / "latents/pixels-uint8", cache / "latents/pixels")  # of whatever kind: looked at by name
    shutil.copytree(cache / "latents/pixels-uint8", cache / "latents/other")
    dry = ("--dry-run", "--steps", "2")
    printed = repa_train(cache, tmp_path / "new", *flags, *dry).output
    assert "cache, pixels-uint8, aligned with toy" in " ".join(printed.split())
    named = repa_train(cache, tmp_path / "new", *flags, *dry, "--autoencoder", "pixels")
    assert "latents/pixels: its attributes are those of latents/pixels-uint8" in named.error
    sit = repa_train(cache, tmp_path / "new", *dry, "--recipe", "sit")
    assert "holds several: other, pixels, pixels-uint8. Choose with --autoencoder" in sit.error


def test_misfits_are_refused_in_one_line(make_cache, small_jit):
    cache = make_cache().path
    for assignments, words in (
        (("model=SiT-Ti/2",), "model is SiT-Ti/2; this recipe's method trains a JiT, such as JiT-Ti/2"),
        (("interpolant.path=cosine",), "JiT has a linear path"),
        (("jit.floor=0",), "jit.floor is 0"),
        (("jit.noise_scale=-1",), "jit.noise_scale is -1"),
        (("evaluation.every=2", "evaluation.sampler=sde"), "this model's method has euler, heun"),
        (("model=JiT-Ti/4",), "has 4 x 4 tokens; JiT-Ti/4 on latents of 8 x 8 has 2 x 2"),
    ):
        with pytest.raises(UsageError, match=words):
            jit_run(cache, *assignments)
    with pytest.raises(UsageError, match="JiT trains on pixels: --autoencoder pixels"):
        jit_run(make_cache(latents="mean_std").path)
