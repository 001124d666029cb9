"""`repa-cache encoders --check` and `build --dry-run`: what is wrong with an entry of one's own, at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..models.own_networks import write_own
from ..models.test_own_autoencoders import write as write_autoencoder
from ..models.test_stages import entry


def test_an_entry_that_is_right_says_what_it_gives(tmp_path: Path, repa_cache: Callable[..., Any]) -> None:
    done = repa_cache("encoders", "--check", write_own(tmp_path / "own"))
    assert done.code == 0, done.err
    assert "encoder mine, python own.py:make" in done.unfolded
    assert "stage early: 4 x 4 of 8, seeing 16 x 16 pixels" in done.unfolded
    done = repa_cache("encoders", "--check", entry(tmp_path))
    assert "stage 2: 8 x 8 of 12, seeing 64 x 64 pixels" in done.unfolded
    done = repa_cache("encoders", "--check", entry(tmp_path, stages=None))
    assert "no stages declared; the model has stages: [[64, 2], [8, 4], [12, 8], [16, 16], [20, 32]]" in done.unfolded
    done = repa_cache("encoders", "--check", write_autoencoder(tmp_path / "ae"))
    assert "sample, 12 channels, 2 pixels a latent pixel; scale 0.5, bias 0.25" in done.unfolded


def test_every_field_that_is_wrong_is_a_line(tmp_path: Path, repa_cache: Callable[..., Any]) -> None:
    done = repa_cache("encoders", "--check", entry(tmp_path, pach=16, width=None, antialias="no", mean=[1, 2]))
    assert done.code == 2
    for line in (
        "unknown key 'pach'; did you mean 'patch'? Known: antialias, cls_token",
        "width is missing, expected a whole number from 1",
        "antialias is 'no', expected true or false",
        "mean is [1, 2], expected three numbers",
        "4 fields are not as expected",
    ):
        assert line in done.err
    assert len(done.err.splitlines()) == 5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output": None, "stages": None}, "a convolutional network gives a map: set output: map"),
        ({"width": 21, "stages": None}, "a map of shape [1, 20, 2, 2], expected [1, 21, h, w]"),
        ({"patch": 16, "stages": None}, "its map has 2 x 2 places for 64 x 64 pixels, its entry says 4 x 4"),
    ],
)
def test_a_dry_run_makes_the_shapes(
    tmp_path: Path, fields: dict[str, Any], said: str, make_images: Callable[..., Any], build: Callable[..., Any]
) -> None:
    make_images(tmp_path / "images", num=2)
    file = entry(tmp_path, **fields)
    grid = 64 // fields.get("patch", 32)
    done = build(tmp_path / "images", tmp_path / "c", "--encoder", f"{file}:grid={grid}", "--dry-run")
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_a_dry_run_imports_a_target_and_runs_nothing(
    tmp_path: Path, make_images: Callable[..., Any], build: Callable[..., Any]
) -> None:
    make_images(tmp_path / "images", num=2)
    file = write_own(tmp_path / "own", source="def make(width):\n    raise RuntimeError")
    asked = ["--encoder", f"{file}:grid=2:stage=late", "--dry-run"]
    done = build(tmp_path / "images", tmp_path / "c", *asked)
    assert "features/mine-grid2-stagelate: 1 of 1 ranges to encode" in done.unfolded
    write_own(tmp_path / "own", source="import absent")
    done = build(tmp_path / "images", tmp_path / "c", *asked)
    assert "cannot be imported (ModuleNotFoundError" in done.err
