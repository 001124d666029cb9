"""The list of settings: every one with its meaning, the same on the command line and on the page."""

from pathlib import Path

import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer.commands.train import train_command
from repa.trainer.runs.catalogue import as_text, catalogue
from repa.trainer.runs.config import MAY_CHANGE
from repa.trainer.runs.settings import SYNONYMS, Layer, recipe_layer, resolve, set_layer

PAGE = Path(__file__).parents[3] / "trainer/SETTINGS.md"
FLAGS = Layer(source="flags", values={"cache": "c", "out": "o", "model": "SiT-B/2"})


def test_every_setting_has_a_meaning_a_default_and_what_is_allowed():
    rows = {row.key: row for row in catalogue()}
    assert not [key for key, row in rows.items() if not (row.meaning and row.default and row.allowed)]
    assert {key for key, row in rows.items() if row.may_change} == MAY_CHANGE
    assert (rows["alignment.gamma"].default, rows["alignment.gamma"].allowed) == ("null", "number | null")
    assert rows["alignment.projector"].allowed == "none | mlp | conv | linear | mlp2"
    assert rows["ema_decay"].default == "[0.9999]"
    assert rows["recipe"].default == "(required)"
    assert set(SYNONYMS.values()) <= rows.keys()


def test_the_page_is_what_the_command_prints(capsys):
    """After a change: repa-train --settings, between the page's fences."""
    train_command.main(["--settings"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed == as_text() + "\n"
    assert all(len(line) <= 130 for line in printed.splitlines())
    assert f"```\n{printed}```\n" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "'optimizer.learning_rate'"),
        ("gamma", "'alignment.gamma'"),
        ("coeff", "'alignment.proj_coeff'"),
        ("learning-rate", "'optimizer.learning_rate'"),
        ("every", "'validation.every' or 'grid.every' or 'evaluation.every'"),
        ("alignment.gama", "'alignment.gamma'"),
        ("Seed", "'seed'"),
    ],
)
def test_an_unknown_key_is_told_which_one_is_meant(key, meant):
    with pytest.raises(UsageError) as caught:
        resolve([recipe_layer("irepa", "SiT-B/2"), FLAGS, set_layer([f"{key}=1"])])
    assert f"unknown key {key!r}; did you mean {meant}?" in str(caught.value)
    assert "repa-train --settings shows all" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("steps=1e5", "steps", 100_000),
        ("steps=2.5e3", "steps", 2500),
        ("alignment.gamma=none", "alignment.gamma", None),
        ("alignment.gamma=None", "alignment.gamma", None),
        ("alignment.projector=Conv", "alignment.projector", "conv"),
        ("optimizer.clip=null", "optimizer.clip", None),
        ("ema_decay=0.5", "ema_decay", (0.5,)),
        ("ema_decay=[0.9999,0.9996]", "ema_decay", (0.9999, 0.9996)),
    ],
)
def test_values_are_taken_as_people_write_them(text, key, value):
    found = resolve([recipe_layer("irepa", "SiT-B/2"), FLAGS, set_layer([text])])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
