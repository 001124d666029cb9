"""The loss on held-out samples: the equations again, the same whatever the run does, and nothing in the run changes."""

import json

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import CacheError
from repa.trainer.distributed import World
from repa.trainer.evaluating import validation
from repa.trainer.evaluating.validation import Validation
from repa.trainer.models.checkpoint import load_checkpoint

from ..conftest import sit_draws
from ..training.test_loop import make_run, stir

VALUES = ("val_denoising_loss", "val_ema_denoising_loss", "val_alignment_loss", "val_ema_alignment_loss")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(validation, "BLOCK", 4)


def of(run) -> Validation:
    assert run.validation is not None
    return Validation(run, run.validation)


def test_it_is_the_runs_loss_on_the_held_out_rows(make_cache, small_sit, small_blocks):
    """Four samples a generator, posterior latents, dropped labels, both views; weights and average apart."""
    written = make_cache(num_samples=40, latents="mean_std")
    run = make_run(written.path, "validation.fraction=0.3", "label_dropout=0.25", "split_seed=3", recipe="sit")
    stir(run)
    for parameter in run.ema.model.parameters():
        parameter.data *= 0.9
    found = of(run).at(run)

    rows = run.validation.rows
    assert len(rows) % 4
    words = np.random.SeedSequence(3, spawn_key=(7,)).generate_state(2, np.uint64)
    spec = sit_draws(seed=int(words[0]) * 2**64 + int(words[1]))
    arrays = {name: torch.from_numpy(array) for name, array in written.arrays.items()}
    scale, bias = run.norm.tensors("cpu")
    for name, model in (("val_denoising_loss", run.model), ("val_ema_denoising_loss", run.ema.model)):
        errors = []
        for block in range(0, len(rows), 4):
            part = torch.from_numpy(rows[block : block + 4])
            draws = spec.draw(len(part), step=block // 4, micro=0, rank=0)
            moments = arrays["latents/toy-ae/moments"][part, draws["views"]].float()
            x = (moments[:, :3] + moments[:, 3:] * draws["posterior_noise"] - bias) * scale
            t = draws["t"].view(-1, 1, 1, 1)
            labels = torch.where(draws["dropped"], 3, arrays["label"][part].long())
            with torch.no_grad():
                answer = model((1 - t) * x + t * draws["noise"], draws["t"], labels)
            errors += ((answer - (draws["noise"] - x)) ** 2).mean((1, 2, 3)).tolist()
        assert found[name] == pytest.approx(np.mean(errors), rel=1e-6)
    assert found["val_denoising_loss"] != found["val_ema_denoising_loss"]


def test_neither_batches_nor_steps_nor_ranks_change_it(make_cache, small_sit, small_blocks, monkeypatch):
    cache = make_cache(num_samples=40).path
    run = make_run(cache, "validation.fraction=0.3")
    other = make_run(cache, "validation.fraction=0.3", "batch_size=12", "accumulation=3", "validation.every=7")
    stir(run)
    stir(other)
    found = of(run).at(run)
    assert tuple(sorted(found)) == tuple(sorted(VALUES))
    other.step = 5
    judge = of(other)
    assert judge.at(other) == found == judge.at(other)

    monkeypatch.setattr(World, "mean", lambda world, values: values / world.size)  # of one rank alone: they are added
    num_blocks = -(-len(run.validation.rows) // 4)
    for size in (2, num_blocks + 1):
        parts = []
        for rank in range(size):
            run.world = World(rank=rank, size=size, device=torch.device("cpu"))
            parts.append(of(run).at(run))
        for name in VALUES:
            assert sum(part[name] for part in parts) == pytest.approx(found[name], rel=1e-12)


def test_a_run_is_the_same_with_it_and_says_it_at_its_steps(make_cache, repa_train, tmp_path):
    """Judged by another cache, every second step and at the end; interrupted and resumed, too."""
    cache, other = make_cache().path, make_cache(seed=1).path
    judged = ("--val-data", str(other), "--set", "validation.every=2")
    plain = repa_train(cache, tmp_path / "plain", "--steps", "5")
    whole = repa_train(cache, tmp_path / "whole", "--steps", "5", *judged)
    assert whole.losses() == plain.losses()
    assert f"validation: 23 of 23 samples of {other}, every 2 steps" in " ".join(whole.output.split())
    assert "validation at step 4  denoising " in whole.output
    steps = [record["step"] for record in whole.records if "val_denoising_loss" in record]
    assert steps == [2, 4, 5]
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoints/0000005.pt") for name in ("whole", "plain"))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])

    repa_train(cache, tmp_path / "parts", "--steps", "3", *judged)
    parts = repa_train(cache, tmp_path / "parts", "--steps", "5", "--resume", "auto", *judged)
    for one, two in zip(whole.records, parts.records, strict=True):
        assert [one.get(name) for name in VALUES] == [two.get(name) for name in VALUES] or one["step"] == 3

    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["resolved"]["validation"]["dataset"] != config["fingerprints"]["dataset"]
    changed = repa_train(
        cache, tmp_path / "whole", "--steps", "6", "--resume", "auto", "--val-data", str(make_cache(seed=2).path)
    )
    assert changed.code == 2
    assert "resolved.validation.dataset: stored" in changed.error


def test_what_is_not_finite_there_costs_the_run_nothing(make_cache, repa_train, tmp_path):
    other = make_cache(seed=1, nan_rows=(2,)).path
    outcome = repa_train(make_cache().path, tmp_path / "run", "--steps", "2", "--val-data", str(other))
    assert outcome.code == 0
    assert "validation at step 2  denoising nan, of the average nan" in outcome.output
    assert "val_denoising_loss" not in outcome.records[-1]


def test_a_validation_that_fails_costs_no_step(make_cache, repa_train, tmp_path, monkeypatch):
    cache, words = make_cache().path, ("--val-fraction", "0.2", "--set", "validation.every=3")
    whole = repa_train(cache, tmp_path / "whole", "--steps", "5", *words)

    def fail(*_):
        raise CacheError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "at", fail)
        failed = repa_train(cache, tmp_path / "run", "--steps", "5", *words)
    assert (failed.code, failed.error) == (1, "repa-train: gone\n")
    assert [record["step"] for record in failed.records] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["0000003.pt"]
    rest = repa_train(cache, tmp_path / "run", "--steps", "5", "--resume", "auto", *words)
    assert rest.losses() == whole.losses()


@pytest.mark.parametrize("recipe", ["reg", "sra", "meanflow-irepa"])
def test_every_method_is_judged_by_its_own_losses(make_cache, repa_train, tmp_path, recipe):
    words: tuple[str, ...] = ("--recipe", recipe, "--steps", "2", "--val-fraction", "0.2")
    words += ("--set", "sra.teacher_depth=2") if recipe == "sra" else ()
    outcome = repa_train(make_cache().path, tmp_path / "run", *words)
    assert outcome.code == 0, outcome.error
    last = outcome.records[-1]
    trained = {name for name in last if name.endswith("_loss") and not name.startswith("val_")}
    assert {name for name in last if name.startswith("val_")} == {f"val_{w}{n}" for n in trained for w in ("", "ema_")}
