"""REG against its equations: golden values, the model's own written out, a step's gradient, and its sampler."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repa.cache_specs.errors import UsageError
from repa.trainer.commands.cknna import cknna_command
from repa.trainer.commands.sample import sample_command
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.diffusion.latents import LatentNorm
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.models.pretrained import open_model
from repa.trainer.models.sit import SiT, sincos_pos_embed, sit_config
from repa.trainer.objectives.alignment import AlignmentConfig
from repa.trainer.objectives.choose import stored_field
from repa.trainer.objectives.objective import Given, Posed
from repa.trainer.objectives.reg import REG, REGConfig, REGField
from repa.trainer.reading.batches import MicroBatch
from repa.trainer.reading.reader import CacheReader
from repa.trainer.reading.specs import FeatureSpec
from repa.trainer.rows.row_batch import Batch, FeatureBatch

from .small_runs import golden, make_run

CPU = torch.device("cpu")
DEPTH, WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES, E = 2, 32, 2, 2, 8, 3, 3, 5


def make_reg(width: int, grid: tuple[int, int], latent_shape: tuple[int, int, int], **alignment: Any) -> REG:
    spec = FeatureSpec(name="toy", grid=grid, width=width, dtype="float16", group="toy", layer=None, cls_token=True)
    given = Given(
        latent_shape=latent_shape,
        latent_kind="sample",
        norm=LatentNorm(scale=(1.0,) * latent_shape[0], bias=(0.0,) * latent_shape[0]),
        num_views=1,
        features=[spec],
        null_label=3,
        label_dropout=0.1,
        interpolant=Interpolant(),
        alignment=AlignmentConfig(**alignment),
        micro_batch=2,
        accumulation=1,
        precision="fp32",
        compile=False,
        device=CPU,
    )
    return REG(given, REGConfig())


def batch_of(moments: torch.Tensor, tokens: torch.Tensor, cls: torch.Tensor, **draws: torch.Tensor) -> MicroBatch:
    num = len(moments)
    features = FeatureBatch(
        tokens=tokens.half(), channel_mean=tokens.mean(1), channel_std=tokens.std(1), cls_token=cls.half()
    )
    zeros = torch.zeros(num, dtype=torch.int64)
    data = Batch(rows=zeros, labels=zeros, moments=moments.half(), features=[features])
    return MicroBatch(data=data, draws={"dropped": torch.zeros(num, dtype=torch.bool), **draws})


def test_golden_values():
    """Numbers of the published loss code: the class token's, the alignment of [class token; patches], the sum."""
    c, n, t = golden((2, 3), 5, 4), golden((2, 3), 2, 9), torch.tensor([0.25, 0.75])
    reg = make_reg(3, (1, 2), (4, 2, 2))
    x, noise = golden((2, 4, 2, 2), 3, 2), golden((2, 4, 2, 2), 5, 7)
    posed = reg.pose(batch_of(x, torch.ones(2, 2, 3), c, t=t, noise=noise, cls_noise=n), None, None)
    torch.testing.assert_close(posed.inputs[4][0], torch.tensor([0.0625, 0.4375, -0.5625]))
    torch.testing.assert_close(posed.target[1], n - c)
    assert float(posed.target[1].square().mean()) == pytest.approx(1.4583333333, abs=1e-7)

    projected, target = golden((2, 3, 4), 4, 3), golden((2, 3, 4), 7, 5)
    reg = make_reg(4, (1, 2), (4, 2, 2))
    posed = Posed(inputs=(), target=(noise, n - c))
    batch = batch_of(x, target[:, 1:], target[:, 0])
    terms = reg.terms((x, torch.zeros(2, 3)), [projected], posed, batch, 0)
    values = {term.name: (float(term.value), float(term.logged)) for term in terms}
    assert values["denoising_loss"] == pytest.approx((1.1640625, 1.1640625))
    assert values["cls_loss"] == pytest.approx((0.03 * 1.4583333333, 1.4583333333))
    assert values["alignment_loss"] == pytest.approx((0.5 * 0.1182222134, 0.1182222134), abs=1e-7)
    assert sum(value for value, _ in values.values()) == pytest.approx(1.2669236067, abs=1e-7)
    patches = -F.cosine_similarity(projected[:, 1:], target[:, 1:], dim=-1).mean()
    assert float(patches) == pytest.approx(-0.215059143, abs=1e-7)  # what it would be without the class token


def test_at_first_the_class_loss_is_that_of_a_zero_answer(make_cache, small_sit):
    """mean (n - c)^2; row 0 of pos_embed is zero, and SiT's own weights are those of a run without a class token."""
    written = make_cache()
    run, plain = make_run(written.path, "reg"), make_run(written.path, "repa").model.state_dict()
    found = run.model.state_dict()
    added = {name for name in found if name not in plain}
    assert {name.rpartition(".")[0] for name in added} == {"cls_projectors2", "wg_norm", "final_layer.linear_cls"}
    assert all(torch.equal(found[name], plain[name]) for name in plain if name != "pos_embed")
    assert not found["pos_embed"][:, 0].any()
    np.testing.assert_array_equal(found["pos_embed"][0, 1:], sincos_pos_embed(32, (4, 4)).astype(np.float32))

    batch = run.batches.read(0, 0)
    posed = run.objective.pose(batch, run.model, run.ema.model)
    prediction, projections = run.forward(posed.inputs)
    terms = {term.name: term for term in run.objective.terms(prediction, projections, posed, batch, 0)}
    stored = torch.from_numpy(written.arrays["features/toy/cls_token"])[batch.data.rows, batch.draws["views"]]
    expected = (batch.draws["cls_noise"] - stored.float()).square().mean()
    torch.testing.assert_close(terms["cls_loss"].logged, expected)
    first = make_run(written.path, "repa").batches.read(0, 0).draws  # the draws that SiT has are as without REG
    assert all(torch.equal(batch.draws[name], first[name]) for name in first)


@pytest.mark.parametrize(("recipe", "dtype"), [("reg", "float16"), ("reg-irepa", "int8")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_and_gradients_are_the_equations(make_cache, small_sit, recipe: str, dtype: str, precision: str):
    written = make_cache(encoders={"toy": dtype})
    run = make_run(written.path, recipe, "reg.cls_coeff=0.3", "accumulation=2", f"precision={precision}")
    generator = torch.Generator().manual_seed(1)
    for parameter in run.optimizer.parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    batch, objective = run.batches.read(0, 1), run.objective
    posed = objective.pose(batch, run.model, run.ema.model)
    with run.autocast():
        (velocity, cls_velocity), projections = run.forward(posed.inputs)
    terms = objective.terms((velocity, cls_velocity), projections, posed, batch, 0)
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(sum(term.value for term in terms), trained, retain_graph=True)

    group = next(iter(run.reader.features)).name
    arrays = {
        name: torch.from_numpy(
            written.arrays[f"features/{group}/{name}"][batch.data.rows, batch.draws["views"]]
        ).float()
        for name in ("patch_tokens", "token_scale", "channel_mean", "channel_std", "cls_token")
        if f"features/{group}/{name}" in written.arrays
    }
    target, (mean, std) = arrays["patch_tokens"], (arrays[f"channel_{name}"].unsqueeze(1) for name in ("mean", "std"))
    if dtype == "int8":
        target = ((target * arrays["token_scale"].unsqueeze(-1)) * std + mean - 0.6 * mean) / (std + 1e-6)
        projected = torch.cat([projections[1], projections[0]], 1)
        assert len(projections) == 2
    else:
        (projected,) = projections
    target = torch.cat([arrays["cls_token"].unsqueeze(1), target], 1)
    assert projected.shape == target.shape == (4, 17, 16)
    align = -F.cosine_similarity(projected.float(), target, dim=-1).mean() / 2
    t, draws = batch.draws["t"], batch.draws
    c_t = (1 - t[:, None]) * arrays["cls_token"] + t[:, None] * draws["cls_noise"]
    torch.testing.assert_close(posed.inputs[4], c_t)
    denoising = (velocity.float() - posed.target[0]).square().mean() / 2
    cls = (cls_velocity.float() - (draws["cls_noise"] - arrays["cls_token"])).square().mean() / 2
    for term, value in zip(terms, (denoising, cls, align), strict=True):
        torch.testing.assert_close(term.logged, value.detach(), rtol=1e-5, atol=1e-6, msg=term.name)
    coefficient = 1.0 if recipe == "reg-irepa" else 0.5
    expected = torch.autograd.grad(denoising + 0.3 * cls + coefficient * align, trained)
    loose = {"rtol": 0.05, "atol": 2e-4} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-6}
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert ours.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, **loose, msg=name)


def test_what_does_not_fit_is_refused_in_a_line(make_cache, repa_train, tmp_path: Path):
    bare, two = make_cache(cls_token=False).path, make_cache(encoders={"a": "float16", "b": "float16"}).path
    for cache, flags, words in (
        (bare, (), "features/toy has no class token, which objective reg denoises. Choose an encoder that has"),
        (two, ("--encoder", "a", "--encoder", "b"), "the class token of one encoder; a, b are 2. Name one"),
        (two, ("--encoder", "a", "--set", "reg.cls_coeff=0"), "reg.cls_coeff is 0.0; expected a number above 0"),
        (two, ("--recipe", "irepa", "--encoder", "a", "--set", "reg.cls_coeff=1"), "which does not look at reg.*"),
    ):
        recipe = () if "--recipe" in flags else ("--recipe", "reg")
        outcome = repa_train(cache, tmp_path / "run", *recipe, *flags, "--dry-run")
        assert words in outcome.error
        assert outcome.error.count("\n") == 1


@pytest.mark.parametrize("recipe", ["reg", "reg-irepa"])
def test_resume_grids_and_checkpoints(make_cache, repa_train, tmp_path: Path, capsys, recipe: str):
    """To the bit, over the step at which alignment stops: the class token is read and denoised on."""
    cache = make_cache().path
    flags = ("--recipe", recipe, "--set", "alignment.stop_step=4", "--set", "grid.every=6", "--set", "grid.num=3")
    flags += ("--set", "grid.steps=3", "--set", "grid.cfg_scale=2", "--set", "grid.sampler=sde")
    whole = repa_train(cache, tmp_path / "whole", *flags, "--steps", "6")
    assert whole.code == 0, whole.error
    assert ("our choice: REG with iREPA" in whole.output) == (recipe == "reg-irepa")
    assert "method: reg; REG (arXiv 2507.01467)" in whole.output
    repa_train(cache, tmp_path / "run", *flags, "--steps", "3")
    rest = repa_train(cache, tmp_path / "run", *flags, "--steps", "6", "--resume", "auto")
    assert rest.losses() == whole.losses()
    assert ["alignment_loss" in record for record in whole.records] == [True] * 4 + [False] * 2
    assert all("cls_loss" in record for record in whole.records)
    ours, theirs = (load_checkpoint(tmp_path / run / "checkpoints/0000006.pt") for run in ("run", "whole"))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    assert (tmp_path / "whole/samples/0000006.png").read_bytes() == (tmp_path / "run/samples/0000006.png").read_bytes()

    trained = open_model(tmp_path / "run")
    assert trained.model.config.cls_width == 16
    assert isinstance(stored_field(trained.method, trained.interpolant), REGField)
    sample = [str(tmp_path / "run"), "--num", "2", "--steps", "2", "--device", "cpu", "--cfg-scale", "2"]
    sample_command.main([*sample, "--cls-cfg-scale", "3"], standalone_mode=False)
    assert (tmp_path / "run/samples/0000006-ema-fp32-euler2-cfg2-t0to1-cls3-random-seed0-2.npz").exists()
    cknna_command.main(
        [str(tmp_path / "run"), "--cache", str(cache), "--k", "5", "--device", "cpu"], standalone_mode=False
    )
    assert capsys.readouterr().out.count("after block") == 2


def test_without_alignment_the_class_token_is_denoised_alone(make_cache, repa_train, tmp_path: Path):
    flags = ("--recipe", "reg", "--set", "alignment.projector=none", "--steps", "2")
    outcome = repa_train(make_cache().path, tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.error
    assert [set(record) & {"cls_loss", "alignment_loss"} for record in outcome.records] == [{"cls_loss"}] * 2


def test_a_layer_of_several_has_the_class_token_of_that_layer(make_cache):
    reader = CacheReader(make_cache().path)
    assert [features.cls_token for features in reader.features] == [True]
    assert [features.cls_token for features in CacheReader(make_cache(cls_token=False).path).features] == [False]


def test_a_model_needs_its_class_token_and_no_other_takes_one(small_sit):
    config = sit_config("SiT-Ti/2", input_size=8, in_channels=3, num_classes=3)
    inputs = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(AssertionError):
        SiT(replace(config, cls_width=5))(*inputs)
    with pytest.raises(AssertionError):
        SiT(config)(*inputs, cls_token=torch.zeros(1, 5))
    with pytest.raises(UsageError, match="cls_width is 0"):
        replace(config, cls_width=0)
