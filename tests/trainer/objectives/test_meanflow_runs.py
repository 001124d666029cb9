"""Runs of MeanFlow with alignment: two ranks, resuming, compiled, in bf16, what is printed, drawn and refused."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repa.trainer.commands.sample import sample_command
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.models.pretrained import load_model
from repa.trainer.objectives.meanflow import MeanFlow
from repa.trainer.reading.batches import Batches, Place
from repa.trainer.reading.prefetch import ReadAhead
from repa.trainer.runs.run import Run
from repa.trainer.training import loop

from ..test_distributed import ALONE, SCRIPT
from .small_runs import make_run

CPU = torch.device("cpu")
RECIPE = ("--recipe", "meanflow-irepa")
LOSSES = ("denoising_loss", "weighted_loss", "alignment_loss", "grad_norm")


def stir(run: Run) -> None:
    """Move every trained weight off its initial value: zero gates hide most of the model, and of its derivative."""
    generator = torch.Generator().manual_seed(1)
    for parameter in run.optimizer.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def step(run: Run) -> np.ndarray:
    with ReadAhead(run.batches, first=run.step, last=run.step + 1, depth=1, device=CPU) as ahead:
        return loop.train_step(run, ahead).values.numpy()


def losses(records) -> list[tuple[float, ...]]:
    return [tuple(record[name] for name in LOSSES) for record in records]


def test_a_run_learns_logs_its_squared_error_and_resumes_exactly(make_cache, repa_train, tmp_path):
    cache, whole = make_cache(latents="mean_std").path, tmp_path / "whole"
    outcome = repa_train(cache, whole, *RECIPE, "--steps", "9", "--set", "save_every=4", "--set", "keep_last=9")
    assert outcome.code == 0, outcome.error
    first = outcome.records[0]
    assert first["weighted_loss"] == pytest.approx(1, abs=1e-3)  # whatever the error is
    assert first["denoising_loss"] > 0.5
    part = tmp_path / "part"
    repa_train(cache, part, *RECIPE, "--steps", "4", "--set", "save_every=4")
    resumed = repa_train(cache, part, *RECIPE, "--steps", "9", "--set", "save_every=4", "--resume", "auto")
    assert losses(resumed.records) == losses(outcome.records)
    ours, theirs = (load_checkpoint(run / "checkpoints/0000009.pt") for run in (part, whole))
    for part_name in ("model", "ema"):
        assert all(torch.equal(ours[part_name][name], theirs[part_name][name]) for name in theirs[part_name])
    assert theirs["architecture"]["sit"]["second_time"] is True


def test_a_run_that_begins_from_a_sit_answers_as_it_did(make_cache, repa_train, tmp_path):
    cache, sit, out = make_cache().path, tmp_path / "sit", tmp_path / "mean"
    learn = ("--set", "optimizer.learning_rate=1e-2", "--set", "ema_decay=0")
    assert repa_train(cache, sit, "--steps", "3", *learn).code == 0
    begin = (*RECIPE, "--set", f"init={sit}", "--set", "optimizer.learning_rate=1e-9", "--steps")
    assert repa_train(cache, out, *begin, "1").code == 0
    before, after = load_model(sit), load_model(out)
    x, y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    t = torch.full((4,), 0.7)
    torch.testing.assert_close(after(x, t, y, torch.full((4,), 0.4)), before(x, t, y), rtol=0, atol=1e-6)
    assert before(x, t, y).abs().max() > 1e-3
    for name, value in before.projectors.state_dict().items():
        torch.testing.assert_close(after.projectors.state_dict()[name], value, rtol=0, atol=1e-6)
    (sit / "checkpoints/0000003.pt").unlink()
    assert repa_train(cache, out, *begin, "2", "--resume", "auto").code == 0  # which needs it no more
    other = repa_train(cache, tmp_path / "other", *RECIPE, "--set", f"init={out}", "--set", "latent_norm=channel")
    assert other.code == 2
    assert "are normalised otherwise" in other.error
    plain = ("--recipe", "meanflow", "--set", f"init={out}")
    other = repa_train(cache, tmp_path / "other", *plain, "--model", "SiT-Ti/4")
    assert "start from weights of the same model, latents and classes" in other.error


def test_what_is_chosen_by_us_is_printed(make_cache, repa_train, tmp_path):
    outcome = repa_train(make_cache().path, tmp_path / "run", *RECIPE, "--dry-run", "--verbose")
    assert "method: meanflow; MeanFlow (arXiv 2505.13447)" in outcome.output
    assert "our choice: r != t in every 4th sample" in outcome.output
    assert "our choice: MeanFlow with alignment" in outcome.output
    assert "omega: 1.0, kappa: 0.5" in outcome.output
    plain = repa_train(make_cache().path, tmp_path / "run", "--recipe", "sit", "--dry-run", "--verbose")
    assert "method: velocity; SiT (arXiv 2401.08740)" in plain.output
    assert "our choice" not in plain.output
    assert "kappa" not in plain.output


def test_samples_of_one_step_in_the_run_and_after_it(make_cache, repa_train, tmp_path, capsys):
    out = tmp_path / "run"
    grids = ("--set", "grid.every=2", "--set", "grid.num=3")
    outcome = repa_train(make_cache().path, out, "--recipe", "meanflow", "--steps", "2", *grids)
    assert outcome.code == 0, outcome.error
    assert (out / "samples/0000002.png").exists()
    arguments = [str(out), "--num", "4", "--device", "cpu", "--steps"]
    sample_command.main([*arguments, "1"], standalone_mode=False)
    assert "ema-fp32-euler1-cfg1-random-seed0-4.npz" in capsys.readouterr().out
    for more, words in (
        (("--cfg-scale", "2"), "cfg_scale is 2.0; this model's method learns its guidance while training"),
        (("--sampler", "heun"), "sampler is heun; this model's method has euler"),
    ):
        with pytest.raises(SystemExit) as refused:
            sample_command.main([*arguments, "2", *more], standalone_mode=False)
        assert refused.value.code == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch-size", "6"), "micro-batches of 6 samples: MeanFlow has r != t in every 4th"),
        (("--batch-size", "12", "--set", "accumulation=2"), "micro-batches of 6 samples"),
        (("--set", "interpolant.time_distribution=lognormal"), "set meanflow.time_mean and meanflow.time_std"),
        (
            ("--set", "grid.every=5", "--set", "grid.cfg_scale=1.5"),
            "grid: cfg_scale is 1.5; this model's method learns",
        ),
        (("--set", "evaluation.every=5", "--set", "evaluation.sampler=sde"), "evaluation: sampler is sde; this model"),
        (("--set", "meanflow.kappa=1"), "meanflow.omega is 1.0 and meanflow.kappa 1.0; expected"),
        (("--set", "meanflow.guidance_high=2"), "guidance interval is 0.0 to 2.0"),
        (("--set", "meanflow.floor=0"), "meanflow.floor 0.0; expected"),
        (("--set", "objective=velocity"), "does not look at meanflow.*; leave it out"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make_cache, repa_train, tmp_path, arguments, words):
    outcome = repa_train(make_cache().path, tmp_path / "run", *RECIPE, "--steps", "5", *arguments)
    assert outcome.code == 2
    assert words in outcome.error
    assert outcome.error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_under_bf16_every_parameter_gets_a_gradient(make_cache, small_sit):
    cache = make_cache().path
    run, full = make_run(cache, "meanflow-irepa", "precision=bf16"), make_run(cache, "meanflow-irepa")
    gradients: dict[str, torch.Tensor] = {}
    for made in (run, full):
        stir(made)
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name: gradients.update({name: parameter.grad.clone()})
            )
    low, exact = step(run), step(full)
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trained
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for gradient in gradients.values())
    np.testing.assert_allclose(low, exact, rtol=0.01, atol=0.003)
    assert not np.array_equal(low, exact)


class OnAll(MeanFlow):
    """As the published code: the derivative of every sample, also where it is multiplied by zero."""

    derived = slice(None)


def test_the_derivative_of_a_quarter_is_enough(make_cache, small_sit, monkeypatch):
    run, seen = make_run(make_cache().path, "meanflow-irepa", "meanflow.omega=1.5"), []
    stir(run)
    with ReadAhead(run.batches, first=0, last=1, depth=1, device=CPU) as ahead, torch.no_grad():
        batch = ahead.next()
        forward = run.model.forward
        monkeypatch.setattr(run.model, "forward", lambda *inputs: seen.append(len(inputs[0])) or forward(*inputs))
        targets = [
            kind(run.objective.given, run.objective.settings).pose(batch, run.model, run.ema.model).target
            for kind in (MeanFlow, OnAll)
        ]
    assert seen == [8, 8, 2, 8, 8, 8]  # guided twice each
    torch.testing.assert_close(*targets, rtol=1e-5, atol=1e-5)
    assert not torch.equal(run.objective.latents(batch), targets[0])


def test_a_compiled_run_equals_an_eager_one(make_cache, small_sit, monkeypatch):
    compile_function, compiled = torch.compile, []

    def traced(function, **options):  # Dynamo's full graphs, without the time of a code generator
        compiled.append(function)
        return compile_function(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    cache = make_cache().path
    fast, eager = make_run(cache, "meanflow-irepa", "compile=true"), make_run(cache, "meanflow-irepa")
    assert [function.__name__ for function in compiled] == ["_call_impl", "_model_derivative"]
    for run in (fast, eager):
        stir(run)
    for _ in range(2):
        np.testing.assert_allclose(step(fast), step(eager), rtol=1e-6)
    torch._dynamo.reset()


def test_two_ranks_equal_one_process_with_their_draws(make_cache, tmp_path, run_outcome, small_sit):
    cache = make_cache().path
    flags = ["--cache", cache, "--out", tmp_path / "two", "--model", "SiT-Ti/2", *RECIPE, "--batch-size", "16"]
    settings = ("alignment.encoder_depth=1", "log_every=1", "optimizer.learning_rate=1e-2")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, "alone", *flags]
    command += [*(f"--set={setting}" for setting in settings), "--steps", "3", "--device", "cpu"]
    done = subprocess.run([sys.executable, *command], env=ALONE, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

    run = make_run(cache, "meanflow-irepa", "batch_size=16", "accumulation=2", *settings)
    places = [Place(batch_size=16, rank=rank, world=2) for rank in range(2)]
    parts = [Batches(run.reader, run.batches.spec, place) for place in places]
    stream = iter([part.read(number, 0) for number in range(3) for part in parts])
    together = [loop.train_step(run, SimpleNamespace(next=lambda: next(stream))).values.numpy() for _ in range(3)]
    np.testing.assert_allclose(together, losses(run_outcome(tmp_path / "two").records), rtol=1e-4)
    state = load_checkpoint(tmp_path / "two/checkpoints/0000003.pt")["model"]
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=2e-4, msg=name)
