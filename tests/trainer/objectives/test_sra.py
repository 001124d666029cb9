"""SRA against its equations: golden values, the teacher's tokens, gradients, an exact resume without any encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repa.trainer.commands.sample import sample_command
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.models.pretrained import open_model
from repa.trainer.models.sit import SiT
from repa.trainer.objectives.choose import stored_field
from repa.trainer.objectives.sra import TeacherTarget
from repa.trainer.objectives.velocity import VelocityField
from repa.trainer.runs.run import Run

from .small_runs import golden, make_run


def stir(model: SiT, seed: int) -> None:
    """Move every weight but pos_embed off its initial value, which zero gates hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def blocks_out(model: SiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Return the tokens after every block of a whole forward pass."""
    kept: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _module, _inputs, out: kept.append(out)) for block in model.blocks]
    model(x, t, y)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.fixture
def run(make_cache, small_sit) -> Run:
    """A run on a cache without features, its student and its average far from each other."""
    run = make_run(make_cache(encoders={}, latents="mean_std").path, "sra", "sra.teacher_depth=2", "label_dropout=0.5")
    stir(run.model, 1)
    stir(run.ema.model, 2)
    return run


def test_the_cosine_is_over_features(run: Run):
    """Golden values: .2318699954 over a token's features; over tokens, as the published code has it, .0589282687."""
    ours, theirs = golden((1, 2, 3), 4, 1), golden((1, 2, 3), 6, 2)
    value, logged, each = run.objective.alignment.losses([ours], [TeacherTarget(tokens=theirs)], step=0)
    assert each == {}
    assert float(logged) == pytest.approx(-0.2318699954, abs=1e-7)
    assert float(value) == pytest.approx(-0.5 * 0.2318699954, abs=1e-7)
    assert float(F.cosine_similarity(ours, theirs).mean()) == pytest.approx(0.0589282687, abs=1e-7)


def test_the_teacher_sees_the_same_noise_a_little_earlier(run: Run, make_cache):
    batch, objective = run.batches.read(0, 0), run.objective
    draws = batch.draws
    before = make_run(run.reader.path.path, "sit", "label_dropout=0.5").batches.read(0, 0).draws
    assert all(torch.equal(draws[name], before[name]) for name in before)
    assert set(draws) - set(before) == {"gap"}
    many = run.batches.spec.draw(4000, step=0, micro=0, rank=0)["gap"]
    assert 0 <= float(many.min()) < 0.001
    assert 0.199 < float(many.max()) <= 0.2
    assert float(many.mean()) == pytest.approx(0.1, abs=0.004)

    draws["t"][0] = 0.5 * draws["gap"][0]  # earlier than 0 is 0: the data itself
    posed = objective.pose(batch, run.model, run.ema.model)
    x = objective.latents(batch)
    earlier = (draws["t"] - draws["gap"]).clamp(min=0)
    assert earlier[0] == 0
    ratio = earlier.view(-1, 1, 1, 1)
    labels = torch.where(draws["dropped"], 3, batch.data.labels)
    assert 0 < int(draws["dropped"].sum()) < 8
    expected = blocks_out(run.ema.model, (1 - ratio) * x + ratio * draws["noise"], earlier, labels)[1]
    torch.testing.assert_close(posed.extra.tokens, expected, rtol=1e-5, atol=1e-5)
    ratio = draws["t"].view(-1, 1, 1, 1)
    torch.testing.assert_close(posed.inputs[0], (1 - ratio) * x + ratio * draws["noise"])
    torch.testing.assert_close(posed.target, draws["noise"] - x)
    assert torch.equal(posed.inputs[2], labels)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_the_equations_and_reach_the_student_alone(run: Run, precision: str):
    run = make_run(run.reader.path.path, "sra", "sra.teacher_depth=2", f"precision={precision}", "accumulation=2")
    stir(run.model, 1)
    stir(run.ema.model, 2)
    batch, objective = run.batches.read(0, 1), run.objective
    with torch.no_grad():
        posed = objective.pose(batch, run.model, run.ema.model)
    with run.autocast():
        prediction, projections = run.forward(posed.inputs)
    terms = objective.terms(prediction, projections, posed, batch, 0)
    trained = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(sum(term.value for term in terms), trained.values(), retain_graph=True)

    weights = run.model.projectors[0]
    assert [tuple(layer.weight.shape) for layer in weights if hasattr(layer, "weight")] == [(64, 32), (32, 64)]
    with run.autocast():
        hidden = blocks_out(run.model, *posed.inputs)[0]
        projected = weights[2](F.silu(weights[0](hidden)))
    aligned = F.cosine_similarity(projected.float(), posed.extra.tokens.float(), dim=-1).mean() / 2
    denoising = (prediction.float() - posed.target).square().mean() / 2
    logged = [float(term.logged.detach()) for term in terms]
    assert logged == pytest.approx([float(denoising.detach()), -float(aligned.detach())], rel=1e-4)
    loose = {"rtol": 0.05, "atol": 2e-4} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-6}
    for name, ours, theirs in zip(
        trained, found, torch.autograd.grad(denoising - 0.5 * aligned, trained.values()), strict=True
    ):
        assert ours.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, **loose, msg=name)
    assert not any(parameter.requires_grad for parameter in run.ema.model.parameters())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert projections[0].dtype == dtype


def test_a_resume_is_exact_and_samples_are_a_sits(make_cache, repa_train, tmp_path: Path):
    """The average is the teacher: it comes back to the bit with the checkpoint, or step 4 would differ."""
    cache = make_cache(encoders={}).path
    flags = ("--recipe", "sra", "--set", "sra.teacher_depth=2", "--set", "ema_decay=[0.5,0.9]", "--set", "grid.every=6")
    flags += ("--set", "grid.num=2", "--set", "grid.steps=2")
    whole = repa_train(cache, tmp_path / "whole", *flags, "--steps", "6")
    assert whole.code == 0, whole.error
    assert "method: sra; SRA (arXiv 2505.02831)" in whole.output
    assert "our choice: SRA's cosine is over features" in whole.output
    repa_train(cache, tmp_path / "run", *flags, "--steps", "3")
    rest = repa_train(cache, tmp_path / "run", *flags, "--steps", "6", "--resume", "auto")
    assert rest.losses() == whole.losses()
    assert all(-1 <= record["alignment_loss"] <= 1 for record in whole.records)
    other = repa_train(cache, tmp_path / "other", *flags, "--steps", "6", "--set", "ema_decay=[0.9,0.5]")
    assert other.losses()[0] == whole.losses()[0]
    assert other.losses()[3] != whole.losses()[3]  # another average is another teacher
    ours, theirs = (load_checkpoint(tmp_path / run / "checkpoints/0000006.pt") for run in ("run", "whole"))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    trained = open_model(tmp_path / "run")
    assert type(stored_field(trained.method, trained.interpolant)) is VelocityField
    arguments = [
        str(tmp_path / "run"),
        "--num",
        "2",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "a.npz"),
    ]
    sample_command.main(arguments, standalone_mode=False)
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (2, 8, 8, 3)
    assert (tmp_path / "run/samples/0000006.png").exists()


def test_what_does_not_fit_is_refused_in_a_line(make_cache, repa_train, tmp_path: Path):
    cache = make_cache().path
    small = ("--set", "sra.teacher_depth=2")
    refused: tuple[tuple[tuple[str, ...], str], ...] = (
        ((), "sra.teacher_depth is 4; SiT-Ti/2 has 2 blocks. Choose one of them, later than alignment.encoder_depth"),
        ((*small, "--set", "alignment.projector=none"), "SRA without its alignment is the recipe sit"),
        ((*small, "--set", "alignment.stop_step=3"), "SRA's teacher has no stop. Leave it out"),
        ((*small, "--encoder", "toy"), "recipe sra reads no encoder"),
        ((*small, "--set", "sra.max_gap=1.5"), "sra.max_gap is 1.5; expected 0 to 1"),
        (("--set", "sra.teacher_depth=0"), "sra.teacher_depth is 0; expected 1 or more"),
        (("--recipe", "irepa", *small), "objective=velocity, which does not look at sra.*"),
    )
    for flags, words in refused:
        recipe: tuple[Any, ...] = () if "--recipe" in flags else ("--recipe", "sra")
        outcome = repa_train(cache, tmp_path / "run", *recipe, *flags, "--dry-run")
        assert words in outcome.error
        assert outcome.error.count("\n") == 1
