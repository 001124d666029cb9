"""Mean and spread by place, and tokens without what latents predict of them, against numpy over all rows at once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from repa.cache_specs.derived import read_fit
from repa.cache_specs.storage import location
from repa.pipeline.checking.recompute import recompute
from repa.pipeline.deriving.source import patches
from repa.pipeline.images.manifest import FolderSource

from .conftest import SOURCE, stored

PURIFIED = f"{SOURCE}-purify-linear"
VALID = [row for row in range(14) if row != 5]


@pytest.fixture
def derive(repa_cache: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs `repa-cache derive`, which must end with `code`."""

    def run(cache: Path, method: str, *options: object, source: str = SOURCE, code: int = 0) -> Any:
        done = repa_cache("derive", cache, "--from", source, "--with", method, *options)
        assert done.code == code, done.err
        return done

    return run


def test_standardise_is_the_mean_and_std_of_every_place_and_channel(
    cache: Path, derive: Callable[..., Any], verified: Callable[[Path], list[str]], tree: Callable[[Path], Any]
) -> None:
    features = {name for name in tree(cache) if name.startswith("features/")}
    assert "fits/hog-grid4-standardise: standardise of 13 images" in derive(cache, "standardise").out
    tokens = stored(cache, "patch_tokens").astype(np.float64)[VALID].reshape(26, 16, 128)  # both views
    fit = read_fit(location(cache), "hog-grid4-standardise")
    assert fit is not None
    np.testing.assert_allclose(fit.arrays["mean"], tokens.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(fit.arrays["std"], tokens.std(axis=0), atol=1e-7)
    assert fit.sample == {"views": 2, "images": 13}
    np.testing.assert_array_equal(
        zarr.open_group(cache / "fits/hog-grid4-standardise", mode="r")["std"], fit.arrays["std"]
    )
    assert {name for name in tree(cache) if name.startswith("features/")} == features  # no component comes of it
    assert verified(cache) == []
    before = tree(cache)
    derive(cache, "standardise", "--dry-run")
    derive(cache, "standardise")
    assert tree(cache) == before
    derive(cache, "pca:6")
    derive(cache, "standardise", source=f"{SOURCE}-pca6")  # of what is derived too


def test_patches_lie_at_the_places_of_their_tokens() -> None:
    latents = torch.arange(2 * 3 * 8 * 4).reshape(2, 3, 8, 4).float()
    found = patches(latents, (4, 2))
    assert found.shape == (2, 8, 12)
    for place, (top, left) in enumerate((y, x) for y in range(4) for x in range(2)):
        patch = latents[1, :, 2 * top : 2 * top + 2, 2 * left : 2 * left + 2]
        assert found[1, place].tolist() == patch.reshape(-1).tolist()


def residuals(cache: Path) -> np.ndarray:
    """Return [N, V, T, E] float64: tokens less their least-squares prediction, fitted to all valid rows of view 0."""
    tokens = stored(cache, "patch_tokens").astype(np.float64)
    moments = stored(cache, "moments", "latents/pixels").astype(np.float64)
    cut = moments.reshape(14, 2, 3, 4, 4, 4, 4).transpose(0, 1, 3, 5, 2, 4, 6).reshape(14, 2, 16, 48)
    ones = np.ones((*cut.shape[:-1], 1))
    inputs = np.concatenate([cut, ones], axis=-1)
    solution, *_ = np.linalg.lstsq(
        inputs[VALID, 0].reshape(-1, 49), tokens[VALID, 0].reshape(-1, tokens.shape[-1]), rcond=None
    )
    return tokens - inputs @ solution


def test_purified_tokens_are_the_residuals_of_least_squares(
    cache: Path, sources: Path, derive: Callable[..., Any], verified: Callable[[Path], list[str]]
) -> None:
    derive(cache, "purify-linear")
    found = stored(cache, "patch_tokens", PURIFIED).astype(np.float64)
    expected = residuals(cache)
    np.testing.assert_allclose(found[VALID], expected[VALID], rtol=2**-10, atol=1e-4)
    before = stored(cache, "patch_tokens").astype(np.float64)
    assert expected[VALID, 0].var() < 0.95 * before[VALID, 0].var()  # the pixels say something of HOG
    np.testing.assert_allclose(found[VALID, 0].reshape(-1, 128).mean(axis=0), 0, atol=1e-4)
    attributes = zarr.open_group(cache / PURIFIED, mode="r").attrs
    assert attributes["spec"]["derived"]["from"] == [SOURCE, "latents/pixels"]
    assert verified(cache) == []
    images = FolderSource(sources / "images")
    again = {one.path: one for one in recompute(cache, images, num=9, weights={})}[PURIFIED]
    assert (again.done, again.num_samples) == ("derived", 9)
    assert again.min > 0.99999
    shutil.rmtree(cache / "latents/pixels")
    gone = {one.path: one for one in recompute(cache, images, num=9, weights={})}[PURIFIED]
    assert gone.left_out == "features/hog-grid4 and latents/pixels, of which it was made, is not there any more"


def test_purifying_killed_anywhere_is_the_same(
    sources: Path, tmp_path: Path, run_and_die: Callable[..., tuple[str, int]], tree: Callable[[Path], Any]
) -> None:
    clean, killed = (Path(shutil.copytree(sources / "c", tmp_path / name)) for name in ("clean", "killed"))
    arguments = ("--from", SOURCE, "--with", "purify-linear")
    ended, operations = run_and_die(0, "derive", clean, *arguments)
    assert ended == "exit 0"
    for point in (5, 17, operations // 2):
        assert run_and_die(point, "derive", killed, *arguments)[0] == "killed"
    assert run_and_die(0, "derive", killed, *arguments)[0] == "exit 0"
    assert tree(killed) == tree(clean)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("purify-linear:3", "", "expected purify-linear alone"),
        ("purify-linear", "--latents pixel", "holds no such latents; did you mean 'pixels'?"),
        ("pca:6", "--latents pixels", "pca:6 reads none; leave it out"),
        ("standardize", "", "did you mean 'standardise'?"),
    ],
)
def test_what_a_method_cannot_take_is_one_line(
    cache: Path, derive: Callable[..., Any], method: str, options: str, said: str
) -> None:
    done = derive(cache, method, *options.split(), code=2)
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_a_source_that_became_another_does_not_cost_the_old_component_its_fit(
    cache: Path, sources: Path, derive: Callable[..., Any], tree: Callable[[Path], Any], repa_cache: Callable[..., Any]
) -> None:
    derive(cache, "pca:6")
    shutil.rmtree(cache / SOURCE)
    options = "--encoder hog:grid=4 --precision bf16 --skip-bad --workers 0 --device cpu"
    assert repa_cache("build", "--data", sources / "images", "--cache", cache, *options.split()).code == 0
    before = tree(cache)
    assert "precision: found fp32, asked bf16" in derive(cache, "pca:6", code=1).err
    assert tree(cache) == before
    done = repa_cache("verify", cache)
    assert done.code == 0
    assert "fits/hog-grid4-pca6 is of another features/hog-grid4 than the one that is there by now" in done.err


def test_latents_must_be_of_the_same_images_and_whole_patches(
    cache: Path, sources: Path, tmp_path: Path, make_images: Any, derive: Callable[..., Any], repa_cache: Any
) -> None:
    images = Path(shutil.copytree(sources / "images", tmp_path / "images"))
    make_images(images, num=14, num_classes=3)  # the bad one, mended
    options = "--encoder hog:grid=2 --encoder hog:grid=3 --autoencoder none --workers 0"
    assert repa_cache("build", "--data", images, "--cache", cache, *options.split()).code == 0
    done = derive(cache, "purify-linear", source="hog:grid=2", code=2)
    assert "latents/pixels lack 1 images that features/hog-grid2 has (class 1/005.png)" in done.err
    done = derive(cache, "purify-linear", source="hog:grid=3", code=2)
    assert "latents/pixels are 16 x 16, no whole patches for 3 x 3 tokens of features/hog-grid3" in done.err
