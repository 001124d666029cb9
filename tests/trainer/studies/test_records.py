"""What load gives of runs that were trained, unfinished, damaged, in progress or of something else."""

import fcntl
import json

import numpy as np
import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer.studies import load


def test_a_trained_study_is_read_whole(trained_study):
    study = load(trained_study)
    assert [run.name for run in study] == ["irepa-seed0", "irepa-seed1", "irepa-seed2", "sit-seed0", "sit-seed1"]
    assert [run.status for run in study] == ["finished", "finished", "stopped", "finished", "finished"]
    run = study[0]
    written = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("denoising_loss", "alignment_loss", "grad_norm"):
        assert run.metrics[name].dtype == np.float64
        assert run.metrics[name].tolist() == [line[name] for line in written]
    assert np.isfinite(run.metrics["samples_per_s"]).tolist() == ["samples_per_s" in line for line in written]
    assert "alignment_loss" not in study[3].metrics
    assert [record["step"] for record in run.evaluations] == [3, 6]
    assert [samples.step for samples in run.samples] == [3, 6]
    np.testing.assert_array_equal(run.samples[1].first(5), np.load(run.samples[1].path)["arr_0"][:5])
    assert run.settings["alignment.gamma"] == 0.6
    assert run.class_names == ("<b>two<b>", "class one")
    assert not study.notes
    assert not any(run.notes for run in study)


def test_runs_may_be_named_one_by_one_and_twice(trained_study):
    study = load(trained_study / "sit-seed1", trained_study / "sit-seed0", trained_study / "sit-seed1")
    assert [run.name for run in study] == ["sit-seed1", "sit-seed0"]


def test_what_is_damaged_is_noted_and_costs_no_other_run(make_run, tmp_path):
    make_run(tmp_path / "whole")
    cut = make_run(tmp_path / "cut")
    (cut / "metrics.jsonl").write_bytes((cut / "metrics.jsonl").read_bytes()[:-5])
    damaged = make_run(tmp_path / "damaged", evaluations=[{"step": 10, "num": 5, "fid": 3.0}])
    lines = (damaged / "metrics.jsonl").read_text().splitlines()
    (damaged / "metrics.jsonl").write_text("\n".join([*lines[:4], "{oops", *lines[5:]]) + "\n")
    (damaged / "evaluation.jsonl").write_text('{"step": 10, "num": 5, "fid": 3.0}\n[1]\n')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architectures": ["GPT"]}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"recipe":')

    study = load(tmp_path)
    runs = {run.name: run for run in study}
    assert set(runs) == {"whole", "cut", "damaged"}
    assert runs["whole"].steps == 10
    assert runs["cut"].steps == 9  # a line that is being written is no damage
    assert runs["cut"].notes == []
    assert runs["damaged"].steps == 4
    assert [record["fid"] for record in runs["damaged"].evaluations] == [3.0]
    assert [note.partition(": ")[2] for note in runs["damaged"].notes] == [
        "line 5 is damaged; it and what follows are left out",
        "line 2 is damaged; it and what follows are left out",
    ]
    assert len(study.notes) == 2
    assert any("broken" in note and "cannot be read" in note for note in study.notes)
    assert any("not of a run of repa-train: it has no batch_size, model, recipe" in note for note in study.notes)


def test_status_says_how_far_a_run_is(make_run, tmp_path):
    half = make_run(tmp_path / "half", done=5)
    failed = make_run(tmp_path / "failed", done=5)
    (failed / "outcome.json").write_text('{"status": "failed", "reason": "step 6 is not finite"}')
    stopped = make_run(tmp_path / "stopped", done=5)
    (stopped / "outcome.json").write_text('{"status": "stopped", "reason": "worst half at step 5"}')
    never = tmp_path / "never"
    never.mkdir()
    (never / "outcome.json").write_text('{"status": "failed", "reason": "no such encoder"}')
    runs = {run.name: run for run in load(tmp_path)}
    assert {name: (run.status, run.reason) for name, run in runs.items()} == {
        "half": ("stopped", ""),
        "failed": ("failed", "step 6 is not finite"),
        "stopped": ("stopped", "worst half at step 5"),
        "never": ("failed", "no such encoder"),
    }
    (half / ".training").mkdir()
    with (half / ".training" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = sorted(path.name for path in half.rglob("*"))
        assert load(half)[0].status == "running"
        assert sorted(path.name for path in half.rglob("*")) == before


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        load(tmp_path / "missing")
