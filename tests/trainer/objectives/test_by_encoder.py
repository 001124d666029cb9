"""A coefficient and a block for each encoder: the equations, the settings, the log, and the checkpoint."""

import json

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.models.pretrained import open_model
from repa.trainer.objectives.alignment import Alignment, AlignmentConfig
from repa.trainer.runs.run import Run
from repa.trainer.runs.settings import Layer, recipe_layer, resolve, set_layer

from ..diffusion.test_losses import expected_cosines, two_encoders
from ..training.test_loop import make_run, one_step, published_losses, stir

NEEDED = {"cache": "c", "out": "o", "model": "SiT-B/2", "encoders": ["a", "b"]}


def settings(*layers: dict) -> AlignmentConfig:
    words = [Layer(source="flags", values=values) for values in ({**NEEDED}, *layers)]
    return resolve([recipe_layer("irepa", "SiT-B/2"), *words]).alignment


def test_each_encoder_is_weighed_by_its_own_coefficient_in_the_mean():
    projections, targets = two_encoders()
    config = AlignmentConfig(projector="linear", gamma=0.6, proj_coeff=(0.5, 2.0))
    alignment = Alignment(config, names=["a", "b"], accumulation=4)
    one, two = expected_cosines(projections, targets, 0.6)
    grown = [z.clone().requires_grad_() for z in projections]
    value, logged, each = alignment.losses(grown, targets, step=0)
    assert value.item() == pytest.approx((0.5 * one + 2.0 * two) / 2 / 4, abs=1e-6)
    assert logged.item() == pytest.approx((one + two) / 2 / 4, abs=1e-6)
    assert {name: float(log) for name, log in each.items()} == pytest.approx({"a": one / 4, "b": two / 4}, abs=1e-6)

    equal = Alignment(AlignmentConfig(projector="linear", gamma=0.6, proj_coeff=1.0), names=["a", "b"], accumulation=4)
    plain = [z.clone().requires_grad_() for z in projections]
    value.backward()
    equal.losses(plain, targets, step=0)[0].backward()
    for z, other, coefficient in zip(grown, plain, (0.5, 2.0), strict=True):
        torch.testing.assert_close(z.grad, coefficient * other.grad)


def test_one_number_is_that_for_each_and_gives_the_same_bits(make_cache, small_sit):
    """Two micro-batches: a step by one coefficient, by two equal ones as a list, and by the published equations."""
    written = make_cache(
        encoders={"toy": "int8", "wide": "float16"}, latents="mean_std", invalid={"latents/toy-ae": [3]}
    )
    common = ("accumulation=2", "latent_norm=channel", "label_dropout=0.5", "encoders=[toy-int8,wide]")
    common += ("interpolant.path=cosine",)
    one = make_run(written.path, *common, "alignment.proj_coeff=0.7")
    stir(one)
    denoising, alignment = published_losses(one.model, written, 0)
    values = one_step(one)
    np.testing.assert_allclose(values[:2], [denoising.item(), alignment.item()], rtol=2e-5)
    assert values[1] == pytest.approx((values[2] + values[3]) / 2, rel=1e-6)  # each encoder's own

    several = make_run(written.path, *common, "alignment.proj_coeff=[0.7,0.7]", "alignment.encoder_depth=[1,1]")
    assert several.config == one.config
    stir(several)
    np.testing.assert_array_equal(one_step(several), values)


def test_coefficients_and_blocks_are_named_by_encoder_or_listed(tmp_path):
    file = {"alignment": {"proj_coeff": {"b": 0.25}, "encoder_depth": [4, 8]}}
    found = settings(file)
    assert (found.proj_coeff, found.encoder_depth) == ((1.0, 0.25), (4, 8))
    assert settings(file, {"alignment.proj_coeff": 0.5}).proj_coeff == 0.5  # what comes later is said of all
    by_name = set_layer(["alignment.proj_coeff.a=2", "alignment.encoder_depth={a: 6}"]).values
    found = settings({"alignment.proj_coeff": 0.5}, by_name)
    assert (found.proj_coeff, found.encoder_depth) == ((2.0, 0.5), (6, 4))
    assert settings({"alignment.proj_coeff": [0.5, 0.5]}).proj_coeff == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"alignment.proj_coeff": [1, 2, 3]},
            "alignment.proj_coeff has 3 values, one an encoder, and --encoder names a",
        ),
        ({"alignment.proj_coeff.bb": 1}, "alignment.proj_coeff.bb: --encoder names no such encoder; did you mean 'b'"),
        ({"alignment.encoder_depth.a": 1.5}, "alignment.encoder_depth.a is 1.5; expected int"),
        ({"alignment.encoder_depth.a": [1, 2]}, "expected one number an encoder"),
        ({"alignment.proj_coeff": [1, 0]}, "alignment.proj_coeff is 0.0; expected a number above 0"),
        ({"alignment.proj_coeff": [1, 2], "encoders": []}, "--encoder names none"),
        ({"alignment.proj_coeff": None}, "alignment.proj_coeff is None; expected float"),
    ],
)
def test_what_fits_no_encoder_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        settings(values)


def test_a_run_logs_stores_resumes_and_says_them(make_cache, repa_train, tmp_path):
    cache, out = make_cache(encoders={"toy": "float16", "wide": "float16"}).path, tmp_path / "run"
    words = ("--encoder", "toy", "--encoder", "wide", "--set", "alignment.proj_coeff.wide=0.25")
    words += ("--set", "alignment.encoder_depth.wide=2")
    dry = repa_train(cache, out, *words, "--dry-run")
    said = " ".join(dry.output.split())
    assert "aligned with toy (proj_coeff 1.0, encoder_depth 1), wide (proj_coeff 0.25, encoder_depth 2)" in said
    whole = repa_train(cache, tmp_path / "whole", *words, "--steps", "4")
    repa_train(cache, out, *words, "--steps", "2")
    parts = repa_train(cache, out, *words, "--steps", "4", "--resume", "auto")
    assert parts.losses() == whole.losses()
    for record in parts.records:
        mean = (record["alignment_loss_toy"] + record["alignment_loss_wide"]) / 2
        assert record["alignment_loss"] == pytest.approx(mean, rel=1e-5)

    stored = json.loads((out / "config.json").read_text())["alignment"]
    assert (stored["proj_coeff"], stored["encoder_depth"]) == ([1.0, 0.25], [1, 2])
    changed = repa_train(cache, out, "--steps", "5", "--resume", "auto", "--set", "alignment.proj_coeff.wide=0.5")
    assert changed.code == 2
    file = out / "checkpoints/0000004.pt"
    assert tuple(load_checkpoint(file)["architecture"]["encoder_depth"]) == (1, 2)
    model = open_model(file).model
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    tokens = [model.tokens_after(depth, x, t, y) for depth in (1, 2)]
    _, projections = model(x, t, y, return_projections=True)
    for found, hidden, projector in zip(projections, tokens, model.projectors, strict=True):
        torch.testing.assert_close(found, projector(hidden))


def test_ranks_and_methods_know_them(make_cache, small_sit):
    """The projector of the first encoder may read after the later block."""
    cache = make_cache(encoders={"toy": "float16", "wide": "float16"}).path
    run: Run = make_run(cache, "encoders=[toy,wide]", "alignment.encoder_depth=[2,1]")
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    stir(run)
    _, projections = run.model(x, t, y, return_projections=True)
    for found, depth, projector in zip(projections, (2, 1), run.model.projectors, strict=True):
        torch.testing.assert_close(found, projector(run.model.tokens_after(depth, x, t, y)))
    with pytest.raises(UsageError, match="SiT-Ti/2 has 2 blocks; encoder_depth is 3"):
        make_run(cache, "encoders=[toy,wide]", "alignment.encoder_depth=[2,3]")
