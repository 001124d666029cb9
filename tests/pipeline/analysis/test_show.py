"""The picture people look at first: components and cosines against numpy, and the file itself."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repa.pipeline.analysis.features import open_encoders
from repa.pipeline.analysis.pictures import images_of
from repa.pipeline.analysis.show import anchor_tokens, cosine_map, principal_components


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randn(35, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + 4


def test_colours_are_the_first_three_principal_components(tokens: torch.Tensor) -> None:
    colours = principal_components(tokens, (5, 7))
    assert colours.shape == (5, 7, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    centred = tokens.double().numpy() - tokens.double().numpy().mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    for k in range(3):
        component = centred @ vectors[:, -1 - k]
        assert abs(np.corrcoef(component, colours[..., k].ravel())[0, 1]) > 0.99, values
    np.testing.assert_allclose(principal_components(-tokens, (5, 7), like=colours), colours, atol=1e-9)
    np.testing.assert_allclose(principal_components(tokens, (5, 7), like=1 - colours), 1 - colours, atol=1e-9)


def test_components_without_variance_are_grey() -> None:
    assert (principal_components(torch.ones(16, 8), (4, 4)) == 0.5).all()
    line = torch.arange(16.0)[:, None] * torch.ones(8)
    colours = principal_components(line, (4, 4))
    assert np.ptp(colours[..., 0]) == 1
    assert (colours[..., 1:] == 0.5).all()


def test_cosine_maps_and_anchors(tokens: torch.Tensor) -> None:
    unit = tokens.numpy() / np.linalg.norm(tokens.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(cosine_map(tokens, 9, (5, 7)).ravel(), unit @ unit[9], atol=1e-6)
    first, second, third = anchor_tokens(tokens)
    assert first == int(np.argmax(unit @ unit.mean(0)))
    assert second == int(np.argmin(unit @ unit[first]))
    likeness = np.maximum(unit @ unit[first], unit @ unit[second])
    likeness[[first, second]] = 2
    assert third == int(np.argmin(likeness))
    assert len(set(anchor_tokens(torch.ones(16, 4)))) == 3


@pytest.fixture(scope="module")
def images(make_images: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, num=8)
    return folder


def test_the_picture_has_a_row_a_sample_and_the_images_themselves(
    images: Path, build: Callable[..., Any], repa_cache: Callable[..., Any], tmp_path: Path
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "show.png"
    build(images, cache)
    outcome = repa_cache("show", cache, "--encoder", "hog:grid=4", "--samples", 2, "--out", out)
    assert outcome.code == 0, outcome.err
    assert f"{out}: 2 samples" in outcome.out
    with Image.open(out) as picture:
        two = picture.size
    repa_cache("show", cache, "--encoder", "hog:grid=4", "--samples", 4, "--data", images, "--out", out)
    with Image.open(out) as picture:
        four = picture.size
    assert four[0] == two[0]
    assert four[1] - two[1] == pytest.approx(2 * 1.5 * 150, abs=2)  # panels of 1.5 inches at 150 dots
    rows = np.array([1, 5])
    store, (features,) = open_encoders(cache, [])
    from_latents, from_files = images_of(store, features, rows), images_of(store, features, rows, data=str(images))
    np.testing.assert_array_equal(from_latents, from_files)
    build(images, cache, "--dtype", "uint8")
    from_uint8 = images_of(store, features, rows, autoencoder="pixels-uint8")
    np.testing.assert_array_equal(from_uint8, from_files)


def test_pictures_that_have_changed_are_not_shown(
    images: Path, build: Callable[..., Any], repa_cache: Callable[..., Any], tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(images, tmp_path / "images"))
    build(changed, tmp_path / "cache")
    shutil.copy(changed / "class 0" / "003.png", changed / "class 0" / "002.png")
    show = ["show", tmp_path / "cache", "--encoder", "hog:grid=4", "--samples", 8, "--data", changed]
    assert "class 0/002.png: the file has" in repa_cache(*show, "--out", tmp_path / "show.png").err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--samples", "9"], "--samples 9: .* has 1 to 8 to show"),
        (["--samples", "0"], "--samples 0"),
        (["--autoencoder", "sd"], "no finished latents 'sd'; .*pixels"),
        (["--out", "x.nothing"], "--out x.nothing: .*name a .png"),
        (["--out", "/no/folder/x.png"], "cannot be written"),
        (["--data", "demo"], "000.png is not among its 2112 images; give the images"),
    ],
)
def test_bad_requests_are_one_line(
    images: Path,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
    tmp_path: Path,
    options: list[str],
    words: str,
) -> None:
    build(images, tmp_path / "cache")
    outcome = repa_cache("show", tmp_path / "cache", "--encoder", "hog:grid=4", *options)
    assert outcome.code != 0
    assert outcome.err.count("\n") == 1
    assert re.search(words, outcome.err), outcome.err


def test_without_latents_the_way_out_is_named(
    images: Path, build: Callable[..., Any], repa_cache: Callable[..., Any], tmp_path: Path
) -> None:
    build(images, tmp_path / "cache", "--autoencoder", "none")
    outcome = repa_cache("show", tmp_path / "cache", "--encoder", "hog:grid=4", "--samples", 1)
    assert "has no latents; name the images with --data PATH" in outcome.err
