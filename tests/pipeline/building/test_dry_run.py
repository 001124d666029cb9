"""A dry run says what the real build would, and ends as it does; a build that encoded nothing binds no later one."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Tree = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize(
    "options",
    [
        ["--resolution", "32"],
        ["--no-flip"],
        ["--shard-samples", "5"],
        ["--precision", "bf16"],
        ["--compressor", "zstd"],
        ["--weights", "hog=x.pth"],
        ["--encoder", "dinov2:grid=2", "--weights", "dinov2=gone.pth"],
        ["--encoder", "none.yaml:grid=2"],
        ["--autoencoder", "pixel"],
        ["--device", "cuda"],
        [],
    ],
)
def test_a_dry_run_ends_as_the_build_does_and_writes_nothing(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Tree, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cache = tmp_path / "cache"
    assert build(images, cache).code == 0
    before = tree(cache)
    dry = build(images, cache, *options, "--dry-run")
    assert tree(cache) == before
    real = build(images, cache, *options)
    assert (dry.code, dry.err) == (real.code, real.err)
    assert (dry.code == 0) == (not options)


def test_a_dry_run_knows_places_and_data_that_the_build_refuses(
    images: Path, tmp_path: Path, make_images: Callable[..., Any], build: Callable[..., Any]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    build(images, tmp_path / "cache")
    make_images(tmp_path / "more", num=7)
    cases = ((images, "file"), (images, "file/below"), (images, "full"), (tmp_path / "more", "cache"))
    for data, cache in cases:
        dry = build(data, tmp_path / cache, "--dry-run")
        real = build(data, tmp_path / cache)
        assert (dry.code, real.code) in ((1, 1), (2, 2)), (cache, dry, real)
        assert dry.err.partition("(")[0] == real.err.partition("(")[0]


def spoil_all(images: Path) -> dict[Path, bytes]:
    good = {file: file.read_bytes() for file in images.rglob("*.png")}
    for file in good:
        file.write_text("not a picture")
    return good


@pytest.mark.parametrize(
    "options",
    [
        ["--resolution", "32"],
        ["--no-flip"],
        ["--shard-samples", "5"],
        ["--precision", "bf16"],
        ["--compressor", "zstd"],
    ],
)
def test_a_build_that_encoded_nothing_does_not_bind_the_next(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Tree, options: list[str]
) -> None:
    cache = tmp_path / "cache"
    good = spoil_all(images)
    assert build(images, cache).code == 1
    assert (cache / "features/hog-grid4/zarr.json").exists()
    for file, data in good.items():
        file.write_bytes(data)
    assert build(images, cache, *options, "--dry-run").code == 0
    assert build(images, cache, *options).code == 0
    assert build(images, tmp_path / "clean", *options).code == 0
    assert tree(cache) == tree(tmp_path / "clean")


def test_without_weights_other_images_may_follow(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Tree
) -> None:
    cache = tmp_path / "cache"
    assert build(images, cache, "--encoder", "dinov2-vit-s:grid=2").code == 2  # of the hub, which is out of reach here
    Image.new("RGB", (20, 20), (9, 9, 9)).save(images / "class 1/more.png")
    assert build(images, cache).code == 0
    assert build(images, tmp_path / "clean").code == 0
    assert tree(cache) == tree(tmp_path / "clean")


def test_a_component_that_is_being_built_is_no_leftover(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Tree
) -> None:
    cache = tmp_path / "cache"
    spoil_all(images)
    assert build(images, cache).code == 1
    (cache / ".partial").mkdir(exist_ok=True)
    with (cache / ".partial/features.hog-grid4.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = tree(cache)
        refused = build(images, cache, "--resolution", "32")
        assert (refused.code, "resolution: found 16, asked 32" in refused.err) == (1, True)
        assert tree(cache) == before


def test_a_component_whose_record_alone_is_gone_was_begun(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Tree
) -> None:
    cache = tmp_path / "cache"
    build(images, cache)
    for record in cache.glob("*/*/zarr.json"):
        if record.parent.parent.name in ("latents", "features"):
            record.unlink()
    before = tree(cache)
    assert build(images, cache, "--resolution", "32").code == 1
    assert tree(cache) == before
