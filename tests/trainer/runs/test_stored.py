"""What a run's folder says of its settings, whatever lies in the place of config.json."""

import json
import os
from typing import Any

import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer.runs import resume, stored
from repa.trainer.runs.settings import resolve

CONFIG = {"steps": 7, "seed": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run whose checkpoint holds CONFIG."""
    monkeypatch.setattr(stored, "latest_checkpoint", lambda _: tmp_path / "0000007.pt")
    monkeypatch.setattr(stored, "load_checkpoint", lambda *_, **__: {"config": CONFIG})
    return tmp_path


def test_the_file_is_read(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"steps": 8}))
    assert stored.stored_layer(folder).values["steps"] == 8


@pytest.mark.parametrize("what", ["fifo", "device", "sparse", "nested", "digits", "list", "lost"])
def test_where_it_is_none_the_checkpoint_says_it(folder, what):
    path = folder / "config.json"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif what != "lost":
        path.write_text({"nested": "[" * 10**6, "digits": '{"steps": ' + "9" * 6000 + "}", "list": "[1]"}[what])
    assert stored.stored_layer(folder).values["steps"] == 7
    assert resume._history(path) == []


@pytest.mark.parametrize("value", [10**5000, [10**5000], object()], ids=["digits", "nested", "object"])
def test_settings_that_cannot_be_written_are_refused(value: Any):
    with pytest.raises(UsageError, match=r"here: its settings cannot be written out \(.*\); it is damaged"):
        stored.layer_of({"steps": value}, source="here")


@pytest.mark.parametrize(("before", "today"), [("judge", ("judge",)), (None, ())])
def test_the_one_judge_of_before_is_a_list_today(before, today):
    values = {"recipe": "sit", "cache": "c", "out": "o", "model": "SiT-Ti/2", "evaluation": {"encoder": before}}
    assert resolve([stored.layer_of(values, source="run")]).evaluation.encoders == today
