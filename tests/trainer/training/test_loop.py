"""The training step against the equations written out again, and what a run does when something goes wrong."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repa.cache_specs.errors import JobError
from repa.trainer.distributed import World
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.models.sit import SiT
from repa.trainer.objectives import velocity
from repa.trainer.reading.order import GlobalOrder
from repa.trainer.reading.prefetch import ReadAhead
from repa.trainer.runs.parts import settle_convolutions
from repa.trainer.runs.run import Run, prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve, set_layer
from repa.trainer.training import loop
from repa.trainer.training.reporter import StepResult

from ..conftest import sit_draws

CPU = torch.device("cpu")


def make_run(cache, *assignments: str, recipe: str = "irepa") -> Run:
    flags = {"cache": str(cache), "out": "unused", "model": "SiT-Ti/2", "batch_size": 8, "alignment.encoder_depth": 1}
    layers = [recipe_layer(recipe, "SiT-Ti/2"), Layer(source="flags", values=flags), set_layer(assignments)]
    return prepare(resolve(layers), World(rank=0, size=1, device=CPU))


def stir(run: Run) -> None:
    """Move every trained weight off its initial value: SiT starts with zero gates, which hide most of it."""
    generator = torch.Generator().manual_seed(1)
    for parameter in run.optimizer.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    run.ema.model.load_state_dict(run.model.state_dict())


def one_step(run: Run) -> np.ndarray:
    with ReadAhead(run.batches, first=run.step, last=run.step + 1, depth=1, device=CPU) as ahead:
        return loop.train_step(run, ahead).values.numpy()


def published_losses(model: SiT, written, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two losses of a step of two micro-batches of 4, from the arrays that were written and the equations."""
    spec = sit_draws(seed=0, label_dropout=0.5)
    arrays = {name: torch.from_numpy(array) for name, array in written.arrays.items()}
    valid, order = np.array([row for row in range(23) if row != 3]), GlobalOrder(22, seed=0)
    denoising, alignment = torch.zeros(()), torch.zeros(())
    for micro in range(2):
        draws = spec.draw(4, step=step, micro=micro, rank=0)
        rows, views = torch.from_numpy(valid[order.at(8 * step + 4 * micro, 4)]), draws["views"]
        moments = arrays["latents/toy-ae/moments"][rows, views].float()
        z = moments[:, :3] + moments[:, 3:] * draws["posterior_noise"]
        x = (z - torch.tensor([0.1, -0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)
        angle = (torch.pi / 2 * draws["t"]).view(-1, 1, 1, 1)
        x_t = torch.cos(angle) * x + torch.sin(angle) * draws["noise"]
        velocity = torch.pi / 2 * (torch.cos(angle) * draws["noise"] - torch.sin(angle) * x)
        labels = arrays["label"][rows].long()
        labels[draws["dropped"]] = 3
        predicted, projections = model(x_t, draws["t"], labels, return_projections=True)
        denoising = denoising + ((predicted - velocity) ** 2).mean() / 2
        for name, tokens in zip(("toy-int8", "wide"), projections, strict=True):
            group = f"features/{name}"
            stored = arrays[f"{group}/patch_tokens"][rows, views].float()
            mean, std = (arrays[f"{group}/channel_{which}"][rows, views].unsqueeze(1) for which in ("mean", "std"))
            if name.endswith("int8"):
                stored = stored * arrays[f"{group}/token_scale"][rows, views].float().unsqueeze(-1) * std + mean
            target = (stored - 0.6 * mean) / (std + 1e-6)
            alignment = alignment - F.cosine_similarity(tokens, target, dim=-1, eps=1e-12).mean() / 2 / 2
    return denoising, alignment


def test_steps_are_the_published_equations(make_cache, small_sit):
    """Two micro-batches, posterior latents, channel normalisation, int8 tokens of two encoders, dropped labels.

    Three steps: AdamW's first, from moments of zero, is the same whatever its betas.
    """
    written = make_cache(
        encoders={"toy": "int8", "wide": "float16"}, latents="mean_std", invalid={"latents/toy-ae": [3]}
    )
    run = make_run(
        written.path, "accumulation=2", "latent_norm=channel", "label_dropout=0.5", "encoders=[toy-int8,wide]",
        "interpolant.path=cosine", "alignment.proj_coeff=0.7", "optimizer.weight_decay=0.1", "optimizer.clip=0.2",
        "optimizer.beta1=0.6", "optimizer.beta2=0.8", "ema_decay=0.9",
    )  # fmt: skip
    stir(run)
    twin, averages = (make_run(written.path, "encoders=[toy-int8,wide]").model for _ in range(2))
    twin.load_state_dict(run.model.state_dict())
    averages.load_state_dict(run.model.state_dict())
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    first, second = ([torch.zeros_like(parameter) for parameter in trained] for _ in range(2))

    for step in range(3):
        denoising, alignment = published_losses(twin, written, step)
        gradients = torch.autograd.grad(denoising + 0.7 * alignment, trained)
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        values = one_step(run)[[0, 1, -1]]  # between them each encoder's own
        np.testing.assert_allclose(values, [denoising.item(), alignment.item(), norm.item()], rtol=2e-5)
        assert norm.item() > 0.2  # so that it is clipped
        with torch.no_grad():
            for parameter, gradient, m, v in zip(trained, gradients, first, second, strict=True):
                gradient = gradient * 0.2 / (norm + 1e-6)
                m.copy_(0.6 * m + 0.4 * gradient)
                v.copy_(0.8 * v + 0.2 * gradient**2)
                m_hat, v_hat = m / (1 - 0.6 ** (step + 1)), v / (1 - 0.8 ** (step + 1))
                parameter.mul_(1 - 1e-4 * 0.1).sub_(1e-4 * m_hat / (v_hat.sqrt() + 1e-8))
            for average, parameter in zip(averages.parameters(), twin.parameters(), strict=True):
                average.copy_(0.9 * average + 0.1 * parameter)
        for ours, expected in ((run.model, twin), (run.ema.model, averages)):
            for parameter, other in zip(ours.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(parameter, other, rtol=0, atol=2e-6)
        assert run.step == step + 1


def test_without_alignment_no_tokens_are_read(make_cache, small_sit):
    run = make_run(make_cache().path, recipe="sit")
    assert run.reader.features == ()
    assert len(run.model.projectors) == 0
    assert len(one_step(run)) == 2  # denoising loss and gradient norm


def test_recipes_start_from_the_same_weights_data_and_noise(make_cache, small_sit):
    cache = make_cache().path
    aligned, plain = make_run(cache), make_run(cache, recipe="sit")
    for name, parameter in plain.model.state_dict().items():
        assert torch.equal(parameter, aligned.model.state_dict()[name]), name
    assert one_step(aligned)[0] == one_step(plain)[0]


def test_bf16_trains_float32_parameters(make_cache, small_sit):
    cache = make_cache().path
    low, full = make_run(cache, "precision=bf16"), make_run(cache)
    stir(low)
    stir(full)
    ours, reference = one_step(low), one_step(full)
    np.testing.assert_allclose(ours, reference, rtol=0.01, atol=0.003)
    assert not np.array_equal(ours, reference)
    assert all(parameter.dtype == torch.float32 for parameter in low.model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_convolutions_are_deterministic_and_in_fp32_without_tf32(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "fp32")
    settle_convolutions(precision)
    assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.allow_tf32 == (precision == "bf16")


def test_a_run_learns(make_cache, repa_train, tmp_path):
    learning = ("--set", "optimizer.learning_rate=3e-3", "--steps", "60")
    outcome = repa_train(make_cache().path, tmp_path / "run", *learning)
    early, late = (np.mean([record["alignment_loss"] for record in part]) for part in
                   (outcome.records[:10], outcome.records[-10:]))  # fmt: skip
    assert late < early - 0.08
    assert [record["step"] for record in outcome.records] == list(range(1, 61))
    timed = [record for record in outcome.records if "samples_per_s" in record]
    assert [record["step"] for record in timed] == list(range(3, 61, 3))
    assert all(0 <= record["data_wait"] <= 1 for record in timed)
    assert all(record["read_gb_per_s"] > 0 for record in timed)
    assert outcome.output.count("bound by ") == 1


def first_step_with(row: int, num_samples: int, batch_size: int) -> int:
    stream = GlobalOrder(num_samples, seed=0).at(0, 10 * num_samples)
    return int(np.flatnonzero(stream == row)[0]) // batch_size + 1


def test_a_step_that_is_not_finite_stops_the_run_at_the_state_before(make_cache, repa_train, tmp_path):
    bad_row = int(GlobalOrder(23, seed=0).at(0, 23)[-1])
    bad = first_step_with(bad_row, 23, batch_size=4)
    assert bad == 6
    cache = make_cache(nan_rows=(bad_row,)).path
    outcome = repa_train(cache, tmp_path / "run", "--batch-size", "4", "--steps", "20", "--set", "log_every=10")
    assert outcome.code == 1
    assert "step 6 is not finite (denoising_loss nan" in outcome.error
    assert outcome.error.count("\n") == 1
    assert [record["step"] for record in outcome.records] == [1, 2, 3, 4, 5]
    clean = repa_train(cache, tmp_path / "clean", "--batch-size", "4", "--steps", "5")
    assert outcome.losses() == clean.losses()
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoints/0000005.pt") for name in ("run", "clean"))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    for index, state in theirs["opt"]["state"].items():
        assert all(torch.equal(state[name], ours["opt"]["state"][index][name]) for name in state)


def test_ranks_that_stop_at_such_a_step_wait_for_the_one_that_saves(make_cache, small_sit, tmp_path, monkeypatch):
    """torchrun ends all ranks when the first has failed, and soon kills them: a checkpoint must be whole by then."""
    done: list[str] = []
    monkeypatch.setattr(loop, "save_state", lambda run: done.append(f"saved {run.step}"))
    monkeypatch.setattr(World, "wait", lambda world: done.append("waited"))
    run = make_run(make_cache().path, f"out={tmp_path}", "steps=5", "log_every=5")
    losses = iter([0.0, 0.0, float("nan"), 0.0, 0.0])
    monkeypatch.setattr(
        loop.Reporter,
        "add",
        lambda self, result: self._steps.append(StepResult(names=result.names, values=torch.full((3,), next(losses)))),
    )
    with pytest.raises(JobError, match="step 3 is not finite"):
        loop.train(run)
    assert done == ["saved 2", "waited"]


def test_an_evaluation_that_fails_costs_no_steps(make_cache, small_sit, tmp_path):
    class Failing:
        figures = ()

        def missing(self, run):
            return False

        def at(self, run, stop):
            raise RuntimeError("out of memory")

    run = make_run(make_cache().path, f"out={tmp_path}", "steps=5", "evaluation.every=3")
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.train(run, evaluation=Failing())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000003.pt"]


def test_a_loss_that_overflows_updates_nothing_though_its_gradient_is_finite(
    make_cache, repa_train, tmp_path, monkeypatch
):
    cache, out, calls = make_cache().path, tmp_path / "run", iter(range(1, 100))
    real = velocity.denoising_loss

    def overflowing(*tensors):
        return real(*tensors) + (torch.inf if next(calls) == 3 else 0)

    with monkeypatch.context() as patch:
        patch.setattr(velocity, "denoising_loss", overflowing)
        outcome = repa_train(cache, out, "--steps", "9", "--set", "log_every=9")
    assert "step 3 is not finite (denoising_loss inf" in outcome.error
    assert "the state of step 2 is saved" in outcome.error
    clean = repa_train(cache, tmp_path / "clean", "--steps", "2")
    assert outcome.losses() == clean.losses()
    ours, theirs = (load_checkpoint(run / "checkpoints/0000002.pt")["model"] for run in (out, tmp_path / "clean"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_first_step_that_is_not_finite_promises_nothing(make_cache, repa_train, tmp_path, precision):
    cache = make_cache(nan_rows=tuple(range(23))).path
    outcome = repa_train(cache, tmp_path / "run", "--steps", "5", "--set", f"precision={precision}")
    assert outcome.code == 1
    assert "step 1 is not finite" in outcome.error
    assert "saved" not in outcome.error
    assert not (tmp_path / "run/checkpoints").exists()
    assert ("precision=fp32" in outcome.error) == (precision == "bf16")


def test_sigterm_saves_at_the_next_step_and_ends_well(make_cache, repa_train, tmp_path, monkeypatch):
    step = loop.train_step

    def interrupted(run, ahead):
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, ahead)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        outcome = repa_train(make_cache().path, tmp_path / "run", "--steps", "9")
    assert outcome.code == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["0000005.pt"]
    rest = repa_train(make_cache().path, tmp_path / "run", "--steps", "9", "--resume", "auto")
    whole = repa_train(make_cache().path, tmp_path / "whole", "--steps", "9")
    assert rest.losses() == whole.losses()


def test_a_compiled_model_keeps_its_names(make_cache, repa_train, tmp_path, monkeypatch):
    compile_module = torch.nn.Module.compile

    def traced(self: torch.nn.Module, **options: bool) -> None:
        compile_module(self, backend="eager", **options)  # Dynamo's full graph, without the time of a code generator

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    compiled = repa_train(make_cache().path, tmp_path / "compiled", "--steps", "2", "--compile")
    plain = repa_train(make_cache().path, tmp_path / "plain", "--steps", "2")
    assert compiled.losses() == plain.losses()
    state = load_checkpoint(tmp_path / "compiled/checkpoints/0000002.pt")
    assert list(state["model"]) == list(load_checkpoint(tmp_path / "plain/checkpoints/0000002.pt")["model"])
    torch._dynamo.reset()


@pytest.mark.parametrize("every", [0, 2])
def test_keep_last_and_save_every(make_cache, repa_train, tmp_path, every):
    saving = ("--set", f"save_every={every or 100}", "--set", "keep_last=2")
    repa_train(make_cache().path, tmp_path / "run", "--steps", "7", *saving)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == (["0000006.pt", "0000007.pt"] if every else ["0000007.pt"])
