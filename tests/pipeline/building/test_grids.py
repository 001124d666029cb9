"""The default grid follows from the latents, and what it fits is said: by the arithmetic of patches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from repa.pipeline.building.grids import default_grid


@pytest.mark.parametrize(
    ("resolution", "side", "grid"),
    [
        (256, 32, 16),  # the study: patch 2
        (512, 64, 32),
        (256, 16, 16),  # 16-fold: patch 1
        (256, 256, 16),  # pixels: patch 16
        (256, 8, 8),  # 32-fold: 16 would fit no model
        (256, 4, 4),
        (72, 9, 9),  # resolution / 16 is not whole
        (40, 40, 5),
        (32, 32, 2),
    ],
)
def test_the_grid_is_one_that_a_model_has(resolution: int, side: int, grid: int) -> None:
    assert default_grid(resolution, [side]) == grid
    assert side % grid == 0


def test_without_latents_or_with_two_kinds_the_grid_is_left_open() -> None:
    assert default_grid(256, []) is None
    assert default_grid(256, [32, 16]) is None
    assert default_grid(256, [32, 32]) == 16
    assert default_grid(256, [1]) is None


def test_a_build_takes_the_grid_of_its_latents_and_says_what_fits(
    images: Path, tmp_path: Path, build: Callable[..., Any]
) -> None:
    dry = build(images, tmp_path / "cache", "--resolution", "40", "--encoder", "hog", "--dry-run")
    done = build(images, tmp_path / "cache", "--resolution", "40", "--encoder", "hog")
    for said in (dry.unfolded, done.unfolded):
        assert "features/hog: 5 x 5 tokens fit models with patch 8 (SiT-B/8) on latents/pixels" in said
        assert "features/hog-grid4: 4 x 4 tokens fit models with patch 10 (SiT-B/10) on latents/pixels" in said
        assert "6 images of 2 classes: class 0, class 1" in said
    assert zarr.open_group(tmp_path / "cache", mode="r")["features/hog/patch_tokens"].shape[2] == 25
    odd = build(images, tmp_path / "cache", "--resolution", "40", "--encoder", "hog:grid=3")
    assert (
        "features/hog-grid3: 3 x 3 tokens fit no model on latents/pixels of 40 x 40; grids that do: 40, 20, 10, 5"
        in odd.unfolded
    )


def test_a_component_that_was_begun_with_another_default_keeps_its_grid(
    images: Path, tmp_path: Path, repa_cache: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    common = ("build", "--data", images, "--cache", cache, "--encoder", "hog", "--workers", "0")
    assert repa_cache(*common, "--autoencoder", "none", "--resolution", "48").code == 0  # 48 / 16 = 3
    assert repa_cache(*common, "--autoencoder", "pixels").code == 0
    assert zarr.open_group(cache, mode="r")["features/hog/patch_tokens"].shape[2] == 9


def test_names_of_any_case_are_understood_and_numbered_folders_are_told(
    make_images: Callable[..., list[Path]], tmp_path: Path, build: Callable[..., Any]
) -> None:
    for year in ("2023", "2024"):
        make_images(tmp_path / "images" / year, num=2)
    dry = build(
        tmp_path / "images", tmp_path / "cache", "--encoder", "HOG:grid=4", "--autoencoder", "Pixels", "--dry-run"
    )
    assert dry.code == 0, dry.err
    assert "4 images of 2 classes: 2023, 2024" in dry.out
    assert "the class of 2023/class 0/000.png is 2023, its first folder, not class 0" in dry.unfolded
