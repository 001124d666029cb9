"""A run that was killed and continued equals one that never was; anything else is refused by name."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from repa.trainer.commands.train import train_command
from repa.trainer.models import checkpoint
from repa.trainer.models.sit import SIZES
from repa.trainer.runs.settings import known_recipes
from repa.trainer.training import loop

SCRIPT = Path(__file__).parents[1] / "small_train.py"


def test_sigkill_and_resume_equal_an_uninterrupted_run(make_cache, repa_train, run_outcome, tmp_path):
    """Across epochs' ends (21 valid rows, 8 a step) and with two micro-batches a step."""
    cache = make_cache(invalid={"features/toy": [4, 11]}).path
    settings = ("--set", "accumulation=2", "--set", "save_every=10", "--set", "log_every=1")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["--cache", cache, "--out", killed, "--model", "SiT-Ti/2", "--recipe", "irepa", "--batch-size", "8"]
    arguments += ["--steps", "100000", "--device", "cpu", "--set", "alignment.encoder_depth=1", *settings]
    process = subprocess.Popen([sys.executable, SCRIPT, "alone", *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(run_outcome(killed).records) < 20 or not any(killed.glob("checkpoints/*.pt")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    saved = int(checkpoint.latest_checkpoint(killed).stem)
    assert saved >= 10
    steps = ("--steps", str(saved + 20))
    assert repa_train(cache, killed, *steps, "--resume", "auto", *settings).code == 0
    resumed, uninterrupted = run_outcome(killed), repa_train(cache, whole, *steps, *settings)
    assert [record["step"] for record in resumed.records] == list(range(1, saved + 21))
    assert resumed.losses() == uninterrupted.losses()
    ours, theirs = (checkpoint.load_checkpoint(checkpoint.latest_checkpoint(run)) for run in (killed, whole))
    assert ours["steps"] == saved + 20
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; torch finds none")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_resume_on_a_gpu_is_exact_with_math_attention(make_cache, repa_train, tmp_path, precision):
    cache, settings = make_cache().path, ("--device", "cuda", "--set", f"precision={precision}", "--no-compile")
    with sdpa_kernel(SDPBackend.MATH):  # the others add up a gradient in any order
        whole = repa_train(cache, tmp_path / "whole", "--steps", "12", *settings)
        assert repa_train(cache, tmp_path / "run", "--steps", "5", *settings).code == 0
        resumed = repa_train(cache, tmp_path / "run", "--steps", "12", "--resume", "auto", *settings)
    assert len(whole.records) == 12
    assert resumed.losses() == whole.losses()


@pytest.fixture
def finished(make_cache, repa_train, tmp_path):
    """A cache and a run of 6 steps from it, with a checkpoint every 3."""
    written = make_cache()
    out = tmp_path / "run"
    assert repa_train(written.path, out, "--steps", "6", "--set", "save_every=3").code == 0
    return written, out


def test_without_resume_a_run_is_never_overwritten(finished, repa_train):
    written, out = finished
    before = (out / "metrics.jsonl").read_bytes()
    outcome = repa_train(written.path, out, "--steps", "6")
    assert outcome.code == 2
    assert "already holds a run at 0000006.pt. Continue it with --resume auto" in outcome.error
    assert (out / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_done_are_refused(finished, repa_train):
    written, out = finished
    outcome = repa_train(written.path, out, "--resume", "auto", "--steps", "4")
    assert outcome.code == 2
    assert "0000006.pt has done 6 steps, and --steps asks for 4 in all" in outcome.error
    assert len(outcome.records) == 6


def test_a_dry_run_checks_the_folder_as_a_run_does(finished, repa_train):
    written, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for arguments, message in (
        ((), "already holds a run at 0000006.pt"),
        (("--resume", "auto", "--set", "seed=3"), "seed: stored 0, asked 3"),
    ):
        outcome = repa_train(written.path, out, "--steps", "9", "--dry-run", *arguments)
        assert outcome.code == 2
        assert message in outcome.error
    assert "start: step 6" in repa_train(written.path, out, "--steps", "9", "--dry-run", "--resume", "auto").output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_configuration_is_refused_by_name(finished, repa_train):
    written, out = finished
    outcome = repa_train(
        written.path, out, "--resume", "auto", "--steps", "9", "--set", "optimizer.learning_rate=0.5", "--set", "seed=3"
    )
    assert outcome.code == 2
    assert "optimizer.learning_rate: stored 0.0001, asked 0.5; seed: stored 0, asked 3" in outcome.error
    assert "save_every" not in outcome.error
    assert len(outcome.records) == 6


def test_other_data_is_refused_by_name(finished, make_cache, repa_train):
    _, out = finished
    other = make_cache(seed=1)
    outcome = repa_train(other.path, out, "--resume", "auto", "--steps", "9", "--set", "save_every=3")
    assert outcome.code == 2
    assert "was trained on other data: dataset, features/toy, latents/toy-ae" in outcome.error


def test_other_valid_rows_are_other_data(finished, make_cache, repa_train):
    """Same images, same components, but two images failed to decode: every epoch has another order."""
    _, out = finished
    other = make_cache(invalid={"features/toy": [4, 11]})
    outcome = repa_train(other.path, out, "--resume", "auto", "--steps", "9", "--set", "save_every=3")
    assert outcome.code == 2
    assert "was trained on other data: valid_rows in" in outcome.error


def test_what_may_change_does_and_a_finished_run_stays(finished, repa_train, tmp_path):
    written, out = finished
    again = repa_train(written.path, out, "--resume", "auto", "--steps", "6")
    assert again.code == 0
    assert len(again.records) == 6
    moved = tmp_path / "moved"
    out.rename(moved)
    changes = ("--set", "save_every=100", "--set", "prefetch_bytes=1", "--set", "log_every=100")
    longer = repa_train(written.path, moved, "--resume", "auto", "--steps", "8", *changes)
    assert longer.code == 0
    assert longer.losses() == repa_train(written.path, tmp_path / "whole", "--steps", "8").losses()


def test_a_run_that_lost_its_metrics_goes_on(finished, repa_train, tmp_path):
    written, out = finished
    (out / "metrics.jsonl").unlink()
    outcome = repa_train(written.path, out, "--resume", "auto", "--steps", "8", "--set", "save_every=3")
    assert outcome.code == 0
    assert outcome.error.count("metrics.jsonl begins at step 7: the steps before it were lost") == 1
    assert outcome.losses() == repa_train(written.path, tmp_path / "whole", "--steps", "8").losses()[6:]


def test_resume_auto_starts_where_there_is_nothing(make_cache, repa_train, tmp_path):
    cache, out = make_cache().path, tmp_path / "run"
    # A run that was killed before its first checkpoint left some metrics.
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "denoising_loss": 5.0}\n{"step": 2')
    assert repa_train(cache, out, "--steps", "2").code == 2
    outcome = repa_train(cache, out, "--steps", "2", "--resume", "auto")
    assert outcome.code == 0
    assert outcome.losses() == repa_train(cache, tmp_path / "other", "--steps", "2").losses()


def test_a_second_process_is_refused_while_the_first_one_trains(make_cache, repa_train, tmp_path, monkeypatch):
    cache, out, step = make_cache().path, tmp_path / "run", loop.train_step
    refused = []

    def beside_another(run, ahead):
        if run.step == 3:
            before = {file: file.read_bytes() for file in out.glob("*.json*")}
            refused.append(repa_train(cache, out, "--steps", "9", "--resume", "auto", "--set", "seed=1"))
            assert {file: file.read_bytes() for file in out.glob("*.json*")} == before
        return step(run, ahead)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", beside_another)
        outcome = repa_train(cache, out, "--steps", "5")
    assert [other.code for other in refused] == [1]
    assert refused[0].error == (
        f"repa-train: {out}: another process trains there. Wait for its end, or choose another --out\n"
    )
    assert outcome.losses() == repa_train(cache, tmp_path / "whole", "--steps", "5").losses()
    assert repa_train(cache, out, "--steps", "7", "--resume", "auto").code == 0
    assert not list(out.glob(".*"))


def test_a_cut_checkpoint_is_refused_until_it_is_deleted(finished, repa_train, tmp_path):
    written, out = finished
    newest = out / "checkpoints/0000006.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    resume = (written.path, out, "--resume", "auto", "--steps", "8", "--set", "save_every=3")
    outcome = repa_train(*resume)
    assert outcome.code == 1
    assert "0000006.pt" in outcome.error
    assert "Delete it to resume from 0000003.pt" in outcome.error
    assert outcome.error.count("\n") == 1
    newest.unlink()
    assert repa_train(*resume).losses() == repa_train(written.path, tmp_path / "whole", "--steps", "8").losses()


def test_a_full_disk_while_saving_leaves_the_run_resumable(finished, repa_train, tmp_path, monkeypatch):
    written, out = finished

    def full(_descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_all", full)
        outcome = repa_train(written.path, out, "--resume", "auto", "--steps", "9", "--set", "save_every=3")
    assert outcome.code == 1
    assert "step 9 could not be written: No space left on device; 0000006.pt stays in force" in outcome.error
    rest = repa_train(written.path, out, "--resume", "auto", "--steps", "9")
    assert rest.losses() == repa_train(written.path, tmp_path / "whole", "--steps", "9").losses()


def test_weights_of_another_shape_are_one_line(finished, repa_train):
    """PyTorch's own error lists every name."""
    written, out = finished
    newest = out / "checkpoints" / "0000006.pt"
    stored = torch.load(newest, weights_only=True)
    for part, value in (("model", {name: torch.zeros(1) for name in stored["model"]}), ("opt", {"state": {}})):
        torch.save(stored | {part: value}, newest)
        outcome = repa_train(written.path, out, "--resume", "auto", "--steps", "9", "--set", "save_every=3")
        assert outcome.code == 1
        assert "0000006.pt: the checkpoint is damaged: its weights or its optimizer's state are not" in outcome.error
        assert outcome.error.count("\n") == 1
        assert len(outcome.records) == 6


def test_config_json_goes_through_no_link(make_cache, repa_train, tmp_path):
    others, out = tmp_path / "others", tmp_path / "run"
    others.write_text("of somebody else")
    out.mkdir()
    (out / ".config.json.partial").symlink_to(others)
    assert repa_train(make_cache().path, out, "--steps", "1").code == 0
    assert json.loads((out / "config.json").read_text())["steps"] == 1
    assert others.read_text() == "of somebody else"
    assert not list(out.glob(".*partial"))


@pytest.mark.parametrize("at", [1, 4, 5])
def test_an_exception_at_any_step_leaves_the_run_resumable(make_cache, repa_train, tmp_path, monkeypatch, at):
    cache, out = make_cache().path, tmp_path / "run"
    step = loop.train_step

    def failing(run, ahead):
        if run.step == at:
            raise KeyboardInterrupt
        return step(run, ahead)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", failing)
        with pytest.raises((KeyboardInterrupt, SystemExit, RuntimeError)):
            repa_train(cache, out, "--steps", "7", "--set", "save_every=2", "--set", "log_every=1")
    rest = repa_train(cache, out, "--steps", "7", "--resume", "auto")
    assert rest.code == 0
    assert rest.losses() == repa_train(cache, tmp_path / "whole", "--steps", "7").losses()


def test_a_run_that_an_earlier_version_left_goes_on_with_its_own_settings(
    make_cache, small_sit, tmp_path, monkeypatch, run_outcome
):
    """Three steps of repa made before there were objectives; the next three as that version went on (torch 2.14.1).

    Its block depth, 1, is its own: the recipe says another. Nothing is repeated on the command line but the place.
    """
    monkeypatch.setitem(SIZES, "Ti", (1, 8, 2))
    out = tmp_path / "run"
    shutil.copytree(Path(__file__).with_name("run_of_before"), out)
    before = json.loads((out / "config.json").read_text())
    command = ["--cache", str(make_cache(num_samples=9, width=4).path), "--out", str(out), "--device", "cpu"]
    train_command.main([*command, "--resume", "auto", "--steps", "6"], standalone_mode=False)
    expected = [(2.008532, 0.114164, 0.545130), (2.127349, 0.103919, 0.491426), (1.941141, 0.038673, 0.527670)]
    losses = run_outcome(out).losses()
    assert [step for step, *_ in losses] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([numbers for _, *numbers in losses[3:]], expected, rtol=1e-4, atol=1e-6)
    now = json.loads((out / "config.json").read_text())
    assert now["alignment"]["encoder_depth"] == before["alignment"]["encoder_depth"] == 1
    assert known_recipes()["repa"]["alignment.encoder_depth"]["Ti"] != 1
    assert (now["ema_decay"], now["objective"], now["alignment"]["stop_step"]) == ([0.9], "velocity", None)

    with pytest.raises(SystemExit):
        train_command.main([*command, "--resume", "auto", "--steps", "9", "--set", "alignment.encoder_depth=2"])


@pytest.mark.parametrize("lost", ["", "not JSON"])
def test_a_lost_config_file_is_made_up_from_the_checkpoint(finished, repa_train, lost):
    written, out = finished
    file = out / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(lost)
    outcome = repa_train(written.path, out, "--resume", "auto", "--steps", "6")
    assert outcome.code == 0
    found = json.loads(file.read_text())
    assert [entry["step"] for entry in found.pop("history")] == [6]  # what came before is lost with the file
    del stored["history"]
    assert found == stored
