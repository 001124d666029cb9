"""Components derived straight from an encoder: what deriving from the stored tokens gives, without storing them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa.cache_specs.derived import read_fit
from repa.cache_specs.storage import location
from repa.pipeline.analysis.features import open_encoders
from repa.pipeline.checking.recompute import recompute
from repa.pipeline.images.manifest import FolderSource

from .conftest import principal, stored

OWN = """
loader: timm
model: vit_tiny_patch16_224.augreg_in21k
options: {depth: 3, embed_dim: 64, num_heads: 2}
width: 64
patch: 16
depth: 3
prefix_tokens: 1
cls_token: true
tensor: after_norm
interpolation: bicubic
antialias: false
licence: apache-2.0
"""
OPTIONS = "--autoencoder none --resolution 16 --flip --shard-samples 4 --batch-size 3 --workers 0"
PCA = "hog:grid=4:pca=6"
DERIVED = "features/hog-grid4-pca6"


@pytest.fixture(scope="module")
def images(make_images: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "images"
    make_images(folder, num=10, num_classes=3)
    return folder


def part(tree: dict[str, bytes], *begins: str) -> dict[str, bytes]:
    return {name: data for name, data in tree.items() if name.startswith(begins)}


@pytest.fixture
def built(repa_cache: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that builds encoders of `images` into a cache."""

    def run(images: Path, cache: Path, *encoders: str, more: str = "", code: int = 0) -> Any:
        asked = [word for encoder in encoders for word in ("--encoder", encoder)]
        done = repa_cache("build", "--data", images, "--cache", cache, *OPTIONS.split(), *asked, *more.split())
        assert done.code == code, done.err
        return done

    return run


def test_it_is_byte_for_byte_what_derive_makes_of_the_stored_tokens(
    images: Path, tmp_path: Path, built: Callable[..., Any], repa_cache: Callable[..., Any], tree: Callable[[Path], Any]
) -> None:
    built(images, tmp_path / "stored", "hog:grid=4")
    assert repa_cache("derive", tmp_path / "stored", "--from", "hog:grid=4", "--with", "pca:6").code == 0
    done = built(images, tmp_path / "straight", PCA)
    assert "features/hog-grid4-pca6: complete" in done.out
    assert not (tmp_path / "straight/features/hog-grid4").exists()
    wanted = part(tree(tmp_path / "stored"), DERIVED, "fits")
    assert len(wanted) > 30
    found = part(tree(tmp_path / "straight"), DERIVED, "fits")
    record = "fits/hog-grid4-pca6/zarr.json"  # says besides which stored values were read, where they were stored
    straight, derived = (json.loads(files.pop(record))["attributes"] for files in (found, wanted))
    assert found == wanted
    assert len(derived["sources"]["features/hog-grid4"].pop("shards_digest")) == 64
    assert straight.pop("attributes_digest") != derived.pop("attributes_digest")
    assert straight == derived
    built(images, tmp_path / "both", PCA, "hog:grid=4")
    both, stored = (
        {name: data for name, data in tree(tmp_path / cache).items() if name != record} for cache in ("both", "stored")
    )
    assert both == stored
    assert "everything asked for is there and complete" in built(images, tmp_path / "stored", PCA).out
    (encoder,) = open_encoders(tmp_path / "straight", [PCA])[1]  # a reader may ask as the build was asked
    assert encoder.name == "hog-grid4-pca6"


def test_without_its_source_it_is_recomputed_from_the_images(
    images: Path, tmp_path: Path, built: Callable[..., Any]
) -> None:
    built(images, tmp_path / "c", PCA, "hog:grid=2")
    found = {one.path: one for one in recompute(tmp_path / "c", FolderSource(images), num=9, weights={})}
    assert (found[DERIVED].num_samples, found[DERIVED].done) == (9, "encoded")
    assert found[DERIVED].min > 0.99999
    other = tmp_path / "images"
    shutil.copytree(images, other)
    names = sorted(other.rglob("*.png"))
    swapped = {names[0]: names[1].read_bytes(), names[1]: names[0].read_bytes()}
    for file, data in swapped.items():
        file.write_bytes(data)
    (changed,) = (
        one for one in recompute(tmp_path / "c", FolderSource(other), num=10, weights={}) if one.path == DERIVED
    )
    assert changed.problems


def test_layers_are_put_side_by_side_and_fitted_together(
    images: Path, tmp_path: Path, built: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    (tmp_path / "mine.yaml").write_text(OWN)
    own = f"{tmp_path}/mine.yaml:grid=2:layers=0,2"
    built(images, tmp_path / "c", own, f"{own}:pca=5", more="--random-weights")
    source = "features/mine-grid2-layers0-2-random"
    tokens = np.concatenate(
        [stored(tmp_path / "c", f"patch_tokens_layer{layer}", source).astype(np.float64) for layer in (0, 2)], axis=-1
    )
    mean, axes, _ = principal(tokens[:, 0].reshape(-1, 128), 5)
    found = stored(tmp_path / "c", "patch_tokens", f"{source}-pca5")
    np.testing.assert_allclose(found, (tokens - mean) @ axes.T, rtol=2**-10, atol=1e-4)
    assert not (tmp_path / f"c/{source}-pca5/cls_token").exists()
    done = repa_cache("derive", tmp_path / "c", "--from", source, "--with", "pca:5")
    assert (done.code, "is there and complete" in done.out) == (0, True), done.err


def test_an_image_of_the_sample_that_is_bad_stops_the_fit_and_mending_it_gives_a_clean_build(
    images: Path, tmp_path: Path, built: Callable[..., Any], tree: Callable[[Path], Any]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    file = sorted((tmp_path / "images").rglob("*.png"))[4]
    whole = file.read_bytes()
    file.write_bytes(b"no picture")
    done = built(tmp_path / "images", tmp_path / "c", PCA, code=1)
    assert "an image of the sample that is fitted to cannot be used: " in done.err
    assert "or add --skip-bad to leave them out" in done.err
    assert not list((tmp_path / "c").glob("fits/*"))
    built(tmp_path / "images", tmp_path / "skipped", PCA, more="--skip-bad")
    fit = read_fit(location(tmp_path / "skipped"), "hog-grid4-pca6")
    assert fit is not None
    assert fit.sample["images"] == 9
    file.write_bytes(whole)
    built(tmp_path / "images", tmp_path / "c", PCA)
    built(images, tmp_path / "clean", PCA)
    assert tree(tmp_path / "c") == tree(tmp_path / "clean")


@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_and_run_again_it_is_the_same(
    images: Path, tmp_path: Path, run_and_die: Callable[..., tuple[str, int]], tree: Callable[[Path], Any], seed: int
) -> None:
    def build(point: int, cache: str) -> tuple[str, int]:
        options = ("--data", images, "--cache", tmp_path / cache, *OPTIONS.split(), "--encoder", PCA)
        return run_and_die(point, "build", *options, "--encoder", "hog:grid=2")

    ended, operations = build(0, "clean")
    assert ended == "exit 0"
    rng = random.Random(seed)
    points = [rng.randint(1, 45 if seed == 0 else operations), rng.randint(1, operations // 2), rng.randint(1, 60)]
    ends = [build(point, "c")[0] for point in points]
    assert ends[0] == "killed"
    assert build(0, "c")[0] == "exit 0"
    assert tree(tmp_path / "c") == tree(tmp_path / "clean"), points


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ("hog:grid=4:pca=129", "pca:129: features/hog-grid4 has 128 channels; ask for at most 128"),
        ("hog:grid=4:pca=0", "pca is '0', expected a number of principal components, as in pca=16"),
        ("hog:grid=4:pac=6", "unknown option 'pac'; did you mean 'pca'?"),
    ],
)
def test_what_cannot_be_asked_of_a_build_is_one_line(
    images: Path, tmp_path: Path, built: Callable[..., Any], encoder: str, said: str
) -> None:
    done = built(images, tmp_path / "c", encoder, more="--dry-run", code=2)
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_costs_are_those_of_the_network_and_bytes_those_of_what_is_stored(
    images: Path, tmp_path: Path, built: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    arguments = "--images 1000 --resolution 64 --autoencoder none --batch-size 1"
    done = repa_cache("estimate", "--encoder", "hog:grid=4:pca=6", *arguments.split(), "--no-probe")
    wide = repa_cache("estimate", "--encoder", "hog:grid=4", *arguments.split(), "--no-probe")
    assert done.code == wide.code == 0, done.err
    size, wide_size = (float(one.out.splitlines()[1].split()[1]) for one in (done, wide))
    assert size < wide_size / 4 or "kB" in done.out
    dry = built(images, tmp_path / "c", PCA, more="--dry-run")
    assert "features/hog-grid4-pca6: 3 of 3 ranges to encode" in dry.out
    assert "float16 [10, 2, 16, 6]" in dry.out
