"""verify --recompute: images that give what is stored, and every way in which they no longer do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa.pipeline.checking.recompute import recompute
from repa.pipeline.images.manifest import FolderSource


@pytest.fixture
def built(tmp_path: Path, make_images: Callable[..., Any], build: Callable[..., Any]) -> tuple[Path, list[Path]]:
    files = make_images(tmp_path / "images", num=9)
    for dtype in ("float16", "int8", "uint8"):
        done = build(tmp_path / "images", tmp_path / "c", "--dtype", dtype)
        assert done.code == 0, done.err
    return tmp_path / "c", files


def test_unchanged_images_give_what_is_stored(built: tuple[Path, list[Path]], repa_cache: Callable[..., Any]) -> None:
    cache, _ = built
    images = cache.parent / "images"
    done = repa_cache("verify", cache, "--recompute", 100, "--data", images, "--device", "cpu")
    assert done.code == 0, done.err
    for path, least in (
        ("latents/pixels", 0.99999),
        ("latents/pixels-uint8", 0.99999),
        ("features/hog-grid4", 0.99999),
        ("features/hog-grid4-int8", 0.999),
    ):
        (found,) = (a for a in recompute(cache, FolderSource(images), num=100, weights={}) if a.path == path)
        assert found.num_samples == 9
        views = 1 if path.endswith("-uint8") else 2
        assert sum(map(len, found.cosines)) <= 9 * views * (256 if path.startswith("latents") else 16)
        assert least < found.min <= found.mean <= 1 + 1e-9
        assert f"{path}: 9 samples encoded again" in done.unfolded
    assert recompute(cache, FolderSource(images), num=4, weights={})[0].num_samples == 4


def test_another_picture_of_the_same_size_in_bytes_is_found(
    built: tuple[Path, list[Path]], repa_cache: Callable[..., Any]
) -> None:
    cache, files = built
    with Image.open(files[2]) as picture:
        shape = (picture.height, picture.width, 3)
    noise = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    size = files[2].stat().st_size
    for quality in range(1, 96):  # a JPEG under this name, filled up to the same length
        Image.fromarray(noise).save(files[2], format="JPEG", quality=quality)
        if files[2].stat().st_size > size:
            Image.fromarray(noise).save(files[2], format="JPEG", quality=quality - 1)
            break
    with files[2].open("ab") as file:
        file.write(bytes(size - files[2].stat().st_size))
    assert files[2].stat().st_size == size
    assert repa_cache("verify", cache).code == 0  # the bytes of the cache are whole
    done = repa_cache("verify", cache, "--recompute", 9, "--data", cache.parent / "images", "--device", "cpu")
    assert done.code == 1
    for path in ("latents/pixels", "features/hog-grid4", "features/hog-grid4-int8"):
        for view in ("identity", "flip"):
            assert f"{path}: sample 2 (class 0/002.png), view {view}: the image's values have cosine" in done.err
    assert "latents/pixels-uint8: sample 2 (class 0/002.png), view identity" in done.err
    assert "latents/pixels-uint8: sample 2 (class 0/002.png), view flip" not in done.err
    assert "sample 3" not in done.err


def test_a_file_that_is_gone_or_of_another_size_is_named(
    built: tuple[Path, list[Path]], repa_cache: Callable[..., Any]
) -> None:
    cache, files = built
    files[0].unlink()
    Image.new("RGB", (40, 40)).save(files[1])
    done = repa_cache("verify", cache, "--recompute", 9, "--data", cache.parent / "images", "--device", "cpu")
    assert done.code == 1
    assert "sample 0 (class 0/000.png): cannot be read (No such file or directory)" in done.err
    assert "sample 1 (class 0/001.png): the file has" in done.err
    assert "mean 0.99" in done.unfolded or "mean 1.0" in done.unfolded


def test_what_recompute_needs_is_said(built: tuple[Path, list[Path]], repa_cache: Callable[..., Any]) -> None:
    cache, _ = built
    assert "needs --data PATH" in repa_cache("verify", cache, "--recompute", 3).err
    assert "--data is for it alone" in repa_cache("verify", cache, "--data", "x").err
    done = repa_cache("verify", cache, "--recompute", 0, "--data", cache.parent / "images", "--device", "cpu")
    assert (done.code, "expected 1 or more" in done.err) == (2, True)
