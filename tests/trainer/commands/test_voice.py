"""One voice: what click refuses reads as what we refuse, in a line with the way out; lines fit 80 columns."""

import sys
from collections.abc import Callable

import pytest

from repa.trainer.commands import ablate, cknna, report, sample, train
from repa.trainer.runs.metrics import Progress, folded

ENTRIES = {
    "repa-train": train.train,
    "repa-sample": sample.sample,
    "repa-cknna": cknna.cknna,
    "repa-ablate": ablate.ablate,
    "repa-report": report.report,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_option_that_is_not_there_is_one_line_of_ours(name, monkeypatch, capsys):
    entry: Callable[[], None] = ENTRIES[name]
    monkeypatch.setattr(sys, "argv", [name, "x", "--ouut", "y"])
    with pytest.raises(SystemExit) as ended:
        entry()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: ")
    assert error.endswith(f"; see {name} --help\n")
    assert error.count("\n") == 1


def test_help_ends_well_and_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["repa-train", "--help"])
    train.train()
    assert "Usage: repa-train" in capsys.readouterr().out

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "resolve_flags", interrupted)
    monkeypatch.setattr(sys, "argv", ["repa-train", "--steps", "5"])
    with pytest.raises(SystemExit) as ended:
        train.train()
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("repa-train: aborted; --resume RUN goes on from its last checkpoint\n")


def test_lines_fit_80_columns(capsys):
    now = [0.0]
    record = {"step": 399_999, "samples_per_s": 1234.5678}
    record |= dict.fromkeys(("denoising_loss", "weighted_loss", "alignment_loss", "val_denoising_loss"), -0.123456)
    with Progress(done=0, total=400_000, clock=lambda: now[0]) as progress:
        now[0] = 1e6
        progress.log(record)
        progress.say("bound by data: 50 % of the time waits for it; stage the cache on a local disk " + "x" * 90)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 399999/400000  denoising -0.1235  weighted -0.1235  alignment -0.1235  1235",
        "  samples/s  3 s left",
        "bound by data: 50 % of the time waits for it; stage the cache on a local disk",
        "  " + "x" * 90,
    ]
    assert folded("a  b") == "a  b"
