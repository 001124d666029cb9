"""What happens to a run from outside changes nothing in it: each equals, to the bit, the one that nobody disturbed.

Ranks that die are in ../test_distributed.py.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from repa.trainer.models.checkpoint import load_checkpoint

SCRIPT = Path(__file__).parents[1] / "small_faults.py"
STEPS, SAVE_EVERY = 12, 4


@pytest.fixture(scope="module")
def faults(make_images, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of small_faults.py after it has run, and the exit codes."""
    folder = tmp_path_factory.mktemp("faults")
    make_images(folder / "images", num=10)
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, folder], env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def printed(folder: Path, name: str) -> str:
    return (folder / f"{name}.txt").read_text()


@pytest.fixture
def same_as_undisturbed(faults, run_outcome):
    """Return a function that asserts that a run has every step, loss and final weight of the undisturbed one."""
    folder, codes = faults
    assert codes["build"] == codes["whole"] == 0, printed(folder, "build") + printed(folder, "whole")
    whole, last = run_outcome(folder / "whole"), f"checkpoints/{STEPS:07d}.pt"
    assert [record["step"] for record in whole.records] == list(range(1, STEPS + 1))

    def check(name: str) -> None:
        assert run_outcome(folder / name).losses() == whole.losses()
        ours, expected = (load_checkpoint(folder / run / last) for run in (name, "whole"))
        for part in ("model", "ema"):
            assert all(torch.equal(ours[part][key], expected[part][key]) for key in expected[part])

    return check


def test_a_checkpoint_killed_while_being_written_leaves_the_one_before_in_force(faults, same_as_undisturbed):
    folder, codes = faults
    assert codes["cut"] == -signal.SIGKILL, printed(folder, "cut")
    first, second = (f"{steps:07d}.pt" for steps in (SAVE_EVERY, 2 * SAVE_EVERY))
    assert codes["left"] == [f".{second}.partial", first]
    assert codes["continued"] == 0, printed(folder, "continued")
    assert not list((folder / "cut/checkpoints").glob(".*"))
    same_as_undisturbed("cut")


def test_two_runs_read_a_cache_while_a_third_process_adds_an_encoder(faults, same_as_undisturbed):
    folder, codes = faults
    assert codes["third"] == 0, printed(folder, "third")
    assert codes["beside"] == [0, 0], printed(folder, "first") + printed(folder, "second")
    assert len(list((folder / "cache/features").glob("hog*"))) == 2
    same_as_undisturbed("first")
    same_as_undisturbed("second")


def test_a_cache_that_cannot_be_written_trains_and_refuses_a_build_in_one_line(faults, same_as_undisturbed):
    folder, codes = faults
    assert codes["readonly"] == 0, printed(folder, "readonly")
    same_as_undisturbed("readonly")
    assert codes["refused"] == 1
    assert printed(folder, "refused").count("\n") == 1, printed(folder, "refused")
    assert printed(folder, "refused").startswith(f"repa-cache: {folder / 'cache'}")
    assert "Permission denied" in printed(folder, "refused")
