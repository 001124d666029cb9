"""Loggers beside metrics.jsonl: each record once a training of its step, the same run at a resume, never its end."""

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer.runs.loggers import find_logger

OWN = """
import json
from pathlib import Path

class Lines:
    def __init__(self, told):
        self.file = open(told.folder / "told.txt", "a")
        print(told.step, told.config["recipe"], told.digest, file=self.file)
    def __call__(self, records):
        for record in records:
            print(json.dumps(record), file=self.file)
    def close(self):
        print("closed", file=self.file)
        self.file.close()

def fails(told):
    def tell(records):
        raise RuntimeError("the server is gone")
    return tell

number = 3
"""


class StandIn(ModuleType):
    """What is used of wandb: runs by id, with their configuration, history and whether they were finished."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs: dict[str, dict] = {}
        self.inits: list[dict] = []

    def init(self, **asked):
        self.inits.append(asked)
        assert asked["resume"] == "allow"
        assert Path(asked["dir"]).is_dir()
        state = self.runs.setdefault(asked["id"], {"history": {}, "finished": 0})
        run = ModuleType("run")
        run.log = lambda values, step: state["history"].setdefault(step, values)  # a step of the past is dropped there
        run.finish = lambda: state.update(finished=state["finished"] + 1)
        return run


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_wandb_gets_every_step_once_and_a_resume_goes_on_with_its_run(make_cache, repa_train, tmp_path, wandb):
    cache, out = make_cache().path, tmp_path / "run"
    plain = repa_train(cache, tmp_path / "plain", "--steps", "5")
    assert repa_train(cache, out, "--steps", "3", "--set", "logger=wandb").code == 0
    again = repa_train(cache, out, "--steps", "5", "--resume", "auto")
    assert again.code == 0, again.error
    assert again.losses() == plain.losses()
    (state,) = wandb.runs.values()
    assert state["finished"] == 2
    assert [init["id"] for init in wandb.inits] == [json.loads((out / "wandb.json").read_text())["id"]] * 2
    assert sorted(state["history"]) == [1, 2, 3, 4, 5]
    for record in again.records:
        step = record["step"]
        assert state["history"][step] == {name: value for name, value in record.items() if name != "step"}
    config = wandb.inits[0]["config"]
    assert (config["recipe"], config["steps"], wandb.inits[0]["name"]) == ("irepa", 3, "run")
    assert len(config["run_digest"]) == 10
    assert wandb.inits[1]["config"]["run_digest"] == config["run_digest"]
    other = repa_train(cache, tmp_path / "other", "--steps", "1", "--set", "logger=wandb", "--set", "seed=1")
    assert other.code == 0
    assert len(wandb.runs) == 2
    assert wandb.inits[2]["config"]["run_digest"] != config["run_digest"]


def test_a_function_of_ones_own_is_told_the_records(make_cache, repa_train, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    outcome = repa_train(
        make_cache().path, tmp_path / "run", "--steps", "4", "--set", f"logger={tmp_path}/own.py:Lines"
    )
    assert outcome.code == 0, outcome.error
    first, *lines, last = (tmp_path / "run" / "told.txt").read_text().splitlines()
    assert first.startswith("0 irepa ")
    assert [json.loads(line) for line in lines] == outcome.records
    assert last == "closed"


def test_a_logger_that_fails_is_left_out_and_training_goes_on(make_cache, repa_train, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    outcome = repa_train(
        make_cache().path, tmp_path / "run", "--steps", "7", "--set", f"logger={tmp_path}/own.py:fails"
    )
    assert outcome.code == 0, outcome.error
    assert len(outcome.records) == 7
    assert outcome.output.count("failed (RuntimeError: the server is gone); it is left out from here on") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorboard", "expected wandb, FILE.py:function or package.module:function"),
        ("nowhere.py:open", "logger=nowhere.py:open: FileNotFoundError: No such file or directory"),
        ("no.such.module:open", "ModuleNotFoundError: No module named 'no'"),
        ("json:opens", "AttributeError: module 'json' has no attribute 'opens'"),
        ("sys:path", "a list; expected a function"),
    ],
)
def test_what_is_no_logger_is_refused_before_training(name, words):
    with pytest.raises(UsageError) as refused:
        find_logger(name)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_wandb_that_is_not_installed_is_said(make_cache, repa_train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = repa_train(make_cache().path, tmp_path / "run", "--set", "logger=wandb", "--dry-run")
    assert outcome.code == 2
    assert "wandb is not installed; pip install wandb" in outcome.error
    assert outcome.error.count("\n") == 1
