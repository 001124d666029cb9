"""A run that was killed and continued equals one that never was; anything else is refused by name."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from repa.trainer import checkpoint, loop
from repa.trainer.cli import train_command

# 21 valid rows, 8 samples a step in two micro-batches: an epoch ends inside every third step.
INVALID = {"features/toy": [4, 11]}
ARGUMENTS = ["--model", "SiT-Ti/4", "--recipe", "irepa-release", "--batch-size", "8", "--device", "cpu"]
ARGUMENTS += [f"--set={setting}" for setting in ("accumulation=2", "save_every=10", "log_every=1")]


def start(cache: Path, out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "repa.trainer.cli", "--cache", cache, "--out", out, *ARGUMENTS, *arguments]
    return subprocess.Popen(command, cwd=out.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_sigkill_and_resume_equal_an_uninterrupted_run(make_cache, tmp_path, run_outcome):
    cache = make_cache(invalid=INVALID, grid=2).path
    killed = tmp_path / "killed"
    process = start(cache, killed, "--steps", "1000")
    deadline = time.monotonic() + 60
    while len(run_outcome(killed).records) < 23:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    at_kill = len(run_outcome(killed).records)
    steps = str(10 * (at_kill // 10) + 20)  # 20 steps past the checkpoint that is resumed

    assert start(cache, killed, "--steps", steps, "--resume", "auto").wait() == 0

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = ["--cache", str(cache), "--out", str(tmp_path / "whole"), *ARGUMENTS, "--steps", steps]
    train_command.main(whole, standalone_mode=False)
    torch.set_num_threads(threads)
    assert [record["step"] for record in run_outcome(killed).records] == list(range(1, int(steps) + 1))
    assert run_outcome(killed).losses() == run_outcome(tmp_path / "whole").losses()
    ours, theirs = (checkpoint.load_checkpoint(checkpoint.latest_checkpoint(tmp_path / name)) for name in
                    ("killed", "whole"))  # fmt: skip
    assert all(torch.equal(ours["ema"][name], theirs["ema"][name]) for name in theirs["ema"])


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


def test_what_may_change_does_and_a_finished_run_stays(finished, repa_train, tmp_path):
    written, out = finished
    again = repa_train(written.path, out, "--resume", "auto", "--steps", "6")
    assert again.code == 0
    assert len(again.records) == 6
    moved = tmp_path / "moved"
    out.rename(moved)
    changes = ("--set", "save_every=100", "--set", "prefetch=1", "--set", "log_every=100")
    longer = repa_train(written.path, moved, "--resume", "auto", "--steps", "8", *changes)
    assert longer.code == 0
    assert longer.losses() == repa_train(written.path, tmp_path / "whole", "--steps", "8").losses()


def test_resume_auto_starts_where_there_is_nothing(make_cache, repa_train, tmp_path):
    cache, out = make_cache().path, tmp_path / "run"
    # A run that was killed before its first checkpoint left some metrics.
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "denoising_loss": 5.0}\n{"step": 2')
    assert repa_train(cache, out, "--steps", "2").code == 2
    outcome = repa_train(cache, out, "--steps", "2", "--resume", "auto")
    assert outcome.code == 0
    assert outcome.losses() == repa_train(cache, tmp_path / "other", "--steps", "2").losses()


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


@pytest.mark.parametrize("at", [1, 4, 5])
def test_an_exception_at_any_step_leaves_the_run_resumable(make_cache, repa_train, tmp_path, monkeypatch, at):
    cache, out = make_cache().path, tmp_path / "run"
    step = loop.train_step

    def failing(run, ahead, norm):
        if run.step == at:
            raise KeyboardInterrupt
        return step(run, ahead, norm)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", failing)
        with pytest.raises((KeyboardInterrupt, SystemExit, RuntimeError)):
            repa_train(cache, out, "--steps", "7", "--set", "save_every=2", "--set", "log_every=1")
    rest = repa_train(cache, out, "--steps", "7", "--resume", "auto")
    assert rest.code == 0
    assert rest.losses() == repa_train(cache, tmp_path / "whole", "--steps", "7").losses()
