"""A study's folder: every run once, whatever ended it before; and its runs as processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repa.cache_specs.errors import UsageError
from repa.cache_specs.files.locks import locked
from repa.trainer.commands import ablate
from repa.trainer.commands.train import train_command
from repa.trainer.studies import ablation
from repa.trainer.studies.ablation import Machine, machine_for, plan
from repa.trainer.studies.probe import Cost
from repa.trainer.studies.study_file import read_study
from repa.trainer.studies.trial import STOPPED, Trial, run_trial


def test_a_run_is_never_done_twice_and_a_study_that_grew_adds_runs(study, repa_ablate, tmp_path):
    out = tmp_path / "study"
    code, said, trained = repa_ablate(study(), out)
    assert (code, len(trained)) == (0, 3)
    assert "3 of 3 runs done" in said
    before = {folder.name for folder in out.iterdir() if folder.is_dir()}
    assert {name.rsplit("-", 1)[0] for name in before} == {"sit-s0", "irepa-gamma0-s0", "irepa-gamma0.6-s0"}
    assert json.loads((out / "study.json").read_text())["threads"] == len(os.sched_getaffinity(0))

    assert repa_ablate(study(), out)[2] == []
    code, said, trained = repa_ablate(study(gammas="[0, 0.3, 0.6]"), out)
    assert (code, [name.rsplit("-", 1)[0] for name in trained]) == (0, ["irepa-gamma0.3-s0"])
    assert before < {folder.name for folder in out.iterdir() if folder.is_dir()}
    # More steps are the same runs, gone on with.
    code, said, trained = repa_ablate(study(steps=6), out)
    assert {*trained} == before
    assert all((out / name / "checkpoints/0000006.pt").exists() for name in before)


def test_a_failed_run_stops_no_other_and_is_tried_again(study, repa_ablate, tmp_path, monkeypatch):
    out, original = tmp_path / "study", train_command.callback

    def failing(**arguments):
        if "gamma0-s0" in str(arguments["out"]):
            raise SystemExit(1)
        return original(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_command, "callback", failing)
        code, said, trained = repa_ablate(study(), out)
    assert (code, len(trained)) == (1, 3)
    assert "1 of 3 runs failed, irepa-gamma0-s0" in said
    (failed,) = out.glob("irepa-gamma0-s0-*")
    assert json.loads((failed / "outcome.json").read_text()) == {
        "status": "failed", "code": 1, "reason": "the last line",
    }  # fmt: skip
    code, said, trained = repa_ablate(study(), out)
    assert (code, trained) == (0, [failed.name])
    assert not (failed / "outcome.json").exists()


def test_a_dry_run_shows_costs_and_writes_nothing(study, repa_ablate, tmp_path):
    code, said, trained = repa_ablate(study(steps=7), tmp_path / "study", "--dry-run")
    assert (code, trained) == (0, [])
    assert "3 runs to do: 10 s of this machine" in said  # 3 runs x 7 steps x 0.5 s
    assert "16.8 kB read from the cache" in said  # 3 x 7 x 8 x 100 bytes
    assert not (tmp_path / "study").exists()


def test_what_a_cache_lacks_is_said_with_the_command_that_adds_it(study, repa_ablate, make_cache, tmp_path):
    bare = make_cache(encoders={}).path
    code, said, trained = repa_ablate(study(cache=bare), tmp_path / "study", "--dry-run")
    assert code == 1
    assert f"holds no encoder. Add one with repa-cache build --cache {bare}" in said
    code, said, trained = repa_ablate(study(cache=bare), tmp_path / "study")
    assert (code, trained) == (2, [])
    assert not (tmp_path / "study").exists()


def test_two_at_one_study_is_one_line(study, repa_ablate, tmp_path):
    out = tmp_path / "study"
    with locked(out / ".ablating" / "lock", wait=False):
        code, said, trained = repa_ablate(study(), out)
    assert (code, trained, said.count("\n")) == (1, [], 1)
    assert "another repa-ablate works there" in said


def test_a_run_is_no_study(study, repa_ablate, repa_train, make_cache, tmp_path):
    repa_train(make_cache().path, tmp_path / "run", "--steps", "1")
    code, said, _ = repa_ablate(study(), tmp_path / "run")
    assert code == 2
    assert "is a run, not a study" in said


def test_a_digest_covers_what_numbers_depend_on_and_nothing_else(study, make_cache, upload, tmp_path):
    file = study()

    def digests(path: Path = file, **options) -> set[str]:
        given = {"device": "cpu", "ranks": 1} | options
        return {run.folder.name.rsplit("-", 1)[1] for run in plan(read_study(path), tmp_path / "study", **given).runs}

    first = digests()
    assert len(first) == 3
    moved = tmp_path / "moved"
    moved.mkdir()
    cache = Path(read_study(file).base["cache"])
    shutil.copytree(cache, moved / "cache")
    text = file.read_text()
    file.write_text(text.replace(str(cache), str(moved / "cache")))
    assert digests() == first  # where the cache lies
    file.write_text(text.replace("log_every: 2", "log_every: 5, save_every: 3, stage: null, optimizer.beta1: 0.9"))
    assert digests() == first  # what may change at a resume, and a default that is spelled out
    for changed in ("batch_size: 4", "batch_size: 8, optimizer.beta2: 0.95", "batch_size: 8, label_dropout: 0.2"):
        file.write_text(text.replace("batch_size: 8", changed))
        assert not digests() & first
    file.write_text(text)
    assert not digests(ranks=2) & first
    file.write_text(text.replace(str(cache), str(make_cache(seed=5).path)))
    assert not digests() & first  # other data


def test_runs_at_once_fit_into_cores_and_free_memory(study, tmp_path, monkeypatch):
    runs = plan(read_study(study()), tmp_path / "study", device="cpu", ranks=1).runs
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(ablation, "free_memory", lambda: 10 * 2**30)
    for gigabytes, parallel, threads in ((1, 3, 2), (4, 2, 4), (100, 1, 8)):
        cost = Cost(step_s=1, peak_bytes=gigabytes * 2**30, row_bytes=1)
        machine = machine_for(runs, cost, device="cpu", ranks=1, per_gpu=1)
        assert (machine.parallel, machine.threads) == (parallel, threads)
    monkeypatch.setattr(ablation.torch.cuda, "device_count", lambda: 2)
    assert machine_for(runs, None, device="cuda", ranks=1, per_gpu=0.5).parallel == 3
    assert machine_for(runs, None, device="cuda", ranks=2, per_gpu=2).parallel == 1


def test_more_gpus_than_the_machine_has_are_started_by_hand(monkeypatch):
    with pytest.raises(UsageError, match=r"this machine has 0\. .* torchrun --nnodes N .* --no-python -- repa-train"):
        ablate._ranks(8.0, "cuda", on_cluster=False)
    assert ablate._ranks(8.0, "cuda", on_cluster=True) == 8
    assert ablate._ranks(0.25, "cuda", on_cluster=False) == 1
    with pytest.raises(UsageError, match="expected a part of a GPU"):
        ablate._ranks(1.5, "cuda", on_cluster=False)


class Pretended(Trial):
    """A trial that is a small program instead of a training."""

    program = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.program]


def pretended(folder: Path, program: str) -> Trial:
    folder.mkdir(exist_ok=True)
    found = Pretended(folder=str(folder), device="cpu", threads=3)
    object.__setattr__(found, "program", program)
    return found


def test_a_trial_logs_and_notes_why_it_failed(tmp_path):
    program = "import os, sys; print('threads', os.environ['OMP_NUM_THREADS']); sys.exit('it broke')"
    assert run_trial(pretended(tmp_path / "run", program)) == 1
    assert "threads 3" in (tmp_path / "run/log.txt").read_text()
    assert json.loads((tmp_path / "run/outcome.json").read_text())["reason"] == "it broke"
    assert run_trial(pretended(tmp_path / "run", "pass")) == 0
    assert not (tmp_path / "run/outcome.json").exists()


def test_a_trial_that_is_asked_to_stop_gets_sigterm_and_time(tmp_path):
    program = (
        "import pathlib, signal, sys, time\n"
        f"there = pathlib.Path({str(tmp_path / 'there')!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "there.touch()\n"
        "time.sleep(60)\n"
    )
    assert run_trial(pretended(tmp_path / "run", program), lambda: (tmp_path / "there").exists()) == STOPPED
    assert (tmp_path / "run/log.txt").read_text().endswith("saved\n")


def test_a_trial_dies_with_whoever_schedules_it(tmp_path):
    """As an actor or a raylet is killed: the run must not go on beside the one that is started in its stead."""
    there = tmp_path / "there"
    child = f"import os, pathlib, time; pathlib.Path({str(there)!r}).write_text(str(os.getpid())); time.sleep(60)"
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from repa.trainer.studies.trial import Trial, run_trial\n"
        "class Sleeping(Trial):\n"
        f"    def command(self): return [sys.executable, '-c', {child!r}]\n"
        f"run_trial(Sleeping(folder={str(tmp_path)!r}, device='cpu', threads=1))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as scheduler:
        while not (there.exists() and there.read_text()):
            assert scheduler.poll() is None
            time.sleep(0.02)
        number = int(there.read_text())
        scheduler.send_signal(signal.SIGKILL)
        scheduler.wait()
    while Path(f"/proc/{number}").exists():  # a zombie, at most, until init has seen it
        if Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.02)


def test_a_machine_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UsageError, match=r"study\.json is damaged"):
        ablation.stored_machine(tmp_path)
    machine = Machine(device="cpu", threads=2, precision="fp32", parallel=1)
    ablation.store_machine(tmp_path, machine)
    assert ablation.stored_machine(tmp_path) == machine
