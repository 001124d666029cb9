"""Successive halving: the worst settings go no further, whatever ends the study between, and no table ranks them."""

import json
from pathlib import Path

import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer.commands import borrowed
from repa.trainer.evaluating.evaluation import FILE, read_records, write_record
from repa.trainer.studies import halving
from repa.trainer.studies.compare import compare
from repa.trainer.studies.halving import Rung, read_rungs
from repa.trainer.studies.records import load

STUDY = """
base: {{cache: {cache}, model: SiT-Ti/2, steps: 4, batch_size: 8, latent_norm: channel, alignment.encoder_depth: 1}}
grid: {{recipe: [sit, irepa], alignment.gamma: {gammas}}}
seeds: {seeds}
evaluation: {{every: 2, num: 20, encoders: {judge}}}
"""
FIGURE = "frechet_other-net_mean"


class Killed(BaseException):
    """Nothing catches it."""


class Judge:
    """What stands for evaluation: a distance that the settings say, 9 for sit and 5 + gamma, less with every step."""

    figures = (FIGURE,)

    def missing(self, run) -> bool:
        done = [record["step"] for record in read_records(run.folder / FILE)]
        return run.step > 0 and run.step % 2 == 0 and run.step not in done

    def at(self, run, stop) -> dict[str, float]:
        value = 9.0 if run.config.recipe == "sit" else 5 + run.config.alignment.gamma
        record = {"step": run.step, "num": 20, FIGURE: value + 0.1 * run.config.seed - 0.01 * run.step}
        write_record(run.folder / FILE, record)
        return record


@pytest.fixture
def study(make_cache, tmp_path, monkeypatch):
    """Return a function that writes the file of a study of a baseline and some gammas, two seeds each."""
    monkeypatch.setattr(borrowed, "load_evaluation", lambda run: Judge())
    cache = make_cache().path

    def write(*, gammas: str = "[0, 0.3, 0.6]", seeds: str = "[0, 1]", judge: str = "other-net") -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(STUDY.format(cache=cache, gammas=gammas, seeds=seeds, judge=judge))
        return file

    return write


def steps(out: Path) -> dict[str, int]:
    """Return how far each run is by its name without its digest."""
    return {run.name.rsplit("-", 1)[0]: run.steps for run in load(out)}


HALVED = {
    "sit-s0": 2, "sit-s1": 2, "irepa-gamma0.6-s0": 2, "irepa-gamma0.6-s1": 2,
    "irepa-gamma0-s0": 4, "irepa-gamma0-s1": 4, "irepa-gamma0.3-s0": 4, "irepa-gamma0.3-s1": 4,
}  # fmt: skip


def test_the_worst_half_of_the_settings_is_stopped_with_all_seeds_and_stays_out_of_tables(study, repa_ablate, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "study"
    repa_ablate(study(), plain)
    code, said, trained = repa_ablate(study(), out, "--stop-worst", "0.5@2")
    assert code == 0, said
    assert len(trained) == 8 + 4
    assert steps(out) == HALVED
    assert "step 2: 2 of 4 settings stopped (4 runs), by Fréchet distance, other-net (mean tokens); best is" in said
    assert "4 of 8 runs done, 4 stopped by --stop-worst; without it the same command finishes them" in said
    for name in ("metrics.jsonl", FILE):  # the others are what they are without it
        for run in out.glob("irepa-gamma0-s*"):
            ours, theirs = ((folder / run.name / name).read_text().splitlines() for folder in (out, plain))
            assert [json.loads(line).get("denoising_loss") for line in ours] == [
                json.loads(line).get("denoising_loss") for line in theirs
            ]
            assert len(ours) == len(theirs)

    found = compare(load(out))
    assert sorted(one.differing["alignment.gamma"] for one in found.settings) == [0, 0.3]
    assert len(found.left_out) == 4
    reasons = {reason for run, reason in found.left_out if run.name.startswith("sit")}
    assert reasons == {
        "stopped at step 2 of 4: among the worst 2 of 4 settings at step 2 (--stop-worst 0.5@2): "
        "Fréchet distance, other-net (mean tokens) 9.03"
    }
    at_rung = compare(load(out), step=2)  # where the stopped ones have figures, too
    assert len(at_rung.settings) == 2

    code, said, trained = repa_ablate(study(), out, "--stop-worst", "0.5@2")
    assert (code, trained) == (0, [])
    assert "sit-s0" in said
    assert "step 2, stopped there of 4" in said
    # A study that grew is judged anew: what was stopped stays so, what went on is not stopped behind the rung.
    code, said, trained = repa_ablate(study(gammas="[0, 0.1, 0.3, 0.6]"), out, "--stop-worst", "0.5@2")
    assert {name.rsplit("-", 1)[0] for name in trained} == {"irepa-gamma0.1-s0", "irepa-gamma0.1-s1"}
    assert steps(out) == HALVED | {"irepa-gamma0.1-s0": 4, "irepa-gamma0.1-s1": 4}
    code, said, trained = repa_ablate(study(), out)
    assert (code, len(trained)) == (0, 4)
    assert set(steps(out).values()) == {4}
    assert not list(out.glob("*/outcome.json"))


def test_several_rungs(study, repa_ablate, tmp_path):
    file = study(seeds="[0]")
    file.write_text(file.read_text().replace("steps: 4", "steps: 6"))
    code, said, _ = repa_ablate(file, tmp_path / "study", "--stop-worst", "0.3@4", "--stop-worst", "0.5@2")
    assert code == 0, said
    assert sorted(steps(tmp_path / "study").values()) == [2, 2, 6, 6]  # a third of the two left is none
    code, said, _ = repa_ablate(file, tmp_path / "other", "--stop-worst", "0.5@4", "--stop-worst", "0.5@2")
    assert sorted(steps(tmp_path / "other").values()) == [2, 2, 4, 6]


@pytest.mark.parametrize("dies", ["in a run before the rung", "while the worst are marked", "in a run after the rung"])
def test_after_a_kill_the_same_decision_is_made(study, repa_ablate, tmp_path, monkeypatch, dies):
    out = tmp_path / "study"
    with monkeypatch.context() as patch:
        if dies == "while the worst are marked":
            write, calls = halving.write_whole, []

            def write_once(path, data):
                calls.append(path)
                if len(calls) == 3:
                    raise Killed
                write(path, data)

            patch.setattr(halving, "write_whole", write_once)
        else:
            at, calls = Judge.at, []

            def evaluate_some(self, run, stop):
                calls.append(run)
                if len(calls) == (4 if "before" in dies else 10):
                    raise Killed
                return at(self, run, stop)

            patch.setattr(Judge, "at", evaluate_some)
        with pytest.raises(Killed):
            repa_ablate(study(), out, "--stop-worst", "0.5@2")
    code, said, _ = repa_ablate(study(), out, "--stop-worst", "0.5@2")
    assert code == 0, said
    assert steps(out) == HALVED
    assert len(list(out.glob("*/outcome.json"))) == 4


def test_a_setting_that_cannot_be_judged_is_neither_stopped_nor_ranked(study, repa_ablate, tmp_path, monkeypatch):
    out, at = tmp_path / "study", Judge.at

    def fails(self, run, stop):
        if run.config.recipe == "sit" and run.config.seed == 1:
            raise SystemExit(1)
        return at(self, run, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "at", fails)
        code, said, _ = repa_ablate(study(), out, "--stop-worst", "0.5@2")
    assert code == 1
    assert "not judged, and not stopped: recipe sit: not all of its seeds were evaluated there" in said
    assert "1 of 3 settings stopped (2 runs)" in said
    assert steps(out)["sit-s0"] == 4
    assert steps(out)["irepa-gamma0.6-s0"] == 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["0.5"], "--stop-worst 0.5: expected FRACTION@STEP, as 0.5@10000"),
        (["1@2"], "--stop-worst 1@2: expected FRACTION@STEP"),
        (["0.5@x"], "expected FRACTION@STEP"),
        (["nan@2"], "expected FRACTION@STEP"),
        (["0.5@2", "0.3@2"], "two shares at one step"),
    ],
)
def test_what_is_no_rung_is_refused(texts, message):
    with pytest.raises(UsageError, match=message):
        read_rungs(texts)


def test_runs_that_are_not_judged_alike_at_a_rung_are_refused_before_training(study, repa_ablate, tmp_path):
    assert read_rungs(["0.5@20", "0.3@1e1"]) == [Rung(fraction=0.3, step=10), Rung(fraction=0.5, step=20)]
    for step in (3, 4, 9):
        code, said, trained = repa_ablate(study(), tmp_path / "study", "--stop-worst", f"0.5@{step}")
        assert (code, trained) == (2, [])
        assert f"is not judged at step {step} of 4 (evaluation.every 2)" in said
    file = study()
    file.write_text(file.read_text() + "runs: [{recipe: repa, evaluation.num: 30}]\n")
    code, said, trained = repa_ablate(file, tmp_path / "study", "--stop-worst", "0.5@2")
    assert (code, trained) == (2, [])
    assert "the runs are not judged alike" in said
