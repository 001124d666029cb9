"""What keeps a component from being whole: it is said as it is found, nothing passes as done, and the way out works."""

import errno
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

import repa.pipeline.building.networks
from repa.cache_specs.errors import CacheError
from repa.cache_specs.schema import ComponentSpec
from repa.pipeline.images.manifest import FolderSource
from repa.pipeline.store.store import CacheStore

Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def images(make_images: Callable[..., list[Path]], tmp_path: Path) -> Path:
    make_images(tmp_path / "images", num=6)
    return tmp_path / "images"


def fail_to_read(monkeypatch: pytest.MonkeyPatch, sample_id: str, number: int) -> None:
    read = FolderSource.read

    def failing(self: FolderSource, asked: str) -> bytes:
        if asked == sample_id:
            raise OSError(number, os.strerror(number))
        return read(self, asked)

    monkeypatch.setattr(FolderSource, "read", failing)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM])
def test_an_error_that_passes_makes_no_sample_invalid(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Tree, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        fail_to_read(patch, "class 1/004.png", number)
        outcome = build(images, cache, "--skip-bad")
    assert outcome.code == 1
    assert f"bad image: class 1/004.png: cannot be read ({os.strerror(number)})\n" in outcome.err
    assert "repa-cache: 1 images could not be read (listed above) for a reason of the disk" in outcome.err
    assert (cache / "features/hog-grid4/valid/c.0").exists()
    assert not (cache / "features/hog-grid4/valid/c.1").exists()
    assert build(images, cache).code == 0
    assert build(images, tmp_path / "clean").code == 0
    assert tree(cache) == tree(tmp_path / "clean")


def test_an_error_of_the_file_itself_is_one_that_skip_bad_covers(
    images: Path, tmp_path: Path, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_read(monkeypatch, "class 1/004.png", errno.EACCES)
    assert build(images, tmp_path / "cache", "--skip-bad").code == 0
    attributes = zarr.open_group(tmp_path / "cache/features/hog-grid4", mode="r").attrs
    assert attributes["bad_files"] == {"class 1/004.png": "cannot be read (Permission denied)"}


def test_an_image_that_was_left_out_and_is_whole_again_is_encoded_before_completion(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, picture = tmp_path / "cache", images / "class 0/001.png"
    good = picture.read_bytes()
    picture.write_text("not a picture")

    def die(*_: object) -> None:
        raise CacheError("the end came here")

    with monkeypatch.context() as patch:
        patch.setattr(CacheStore, "complete_component", die)
        stopped = build(images, cache, "--skip-bad")
    # What is known of bad files is said also where an error ends the build.
    assert stopped.err.splitlines()[0] == "bad image: class 0/001.png: not an image"
    assert stopped.err.splitlines()[-1] == "repa-cache: the end came here"
    picture.write_bytes(good)
    first = build(images, cache, "--skip-bad")
    assert first.code == 1
    for path in ("latents/pixels", "features/hog-grid4"):
        assert f"{path}: class 0/001.png was left out, and can be used now" in first.err
    assert "Run the same command again" in first.err
    assert build(images, cache, "--skip-bad").code == 0
    assert build(images, tmp_path / "clean").code == 0
    assert tree(cache) == tree(tmp_path / "clean")


def test_a_component_that_was_asked_for_and_is_not_whole_is_an_error(
    images: Path, tmp_path: Path, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing_ranges = CacheStore.missing_ranges

    def stale(self: CacheStore, spec: ComponentSpec) -> list[int]:
        """What a listing says that a network's client has kept from before: one shard is not there yet."""
        found = missing_ranges(self, spec)
        return found or ([1] if spec.path == "features/hog-grid4" else [])

    monkeypatch.setattr(CacheStore, "missing_ranges", stale)
    outcome = build(images, tmp_path / "cache")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        f"repa-cache: {tmp_path / 'cache'}: not finished: features/hog-grid4: 1 ranges are missing, first samples 4 to "
        "5. Run the same command again"
    )
    attributes = zarr.open_group(tmp_path / "cache/latents/pixels", mode="r").attrs
    assert attributes["complete"] is True  # the others are not held up


def test_info_has_the_command_as_it_was_typed_until_it_has_done_its_work(
    images: Path,
    tmp_path: Path,
    repa_cache: Callable[..., Any],
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's mine").mkdir()
    labels = tmp_path / "it's mine/labels.csv"
    labels.write_text("".join(f"class {i // 3}/{i:03d}.png,{i % 2}\n" for i in range(6)))
    picture = images / "class 1/004.png"
    good = picture.read_bytes()
    picture.write_text("not a picture")
    common = ("--autoencoder", "pixels", "--resolution", 16, "--shard-samples", 4, "--labels", "it's mine/labels.csv")
    failed = repa_cache("build", "--data", "images", "--cache", "cache", "--encoder", "hog:grid=4", *common)
    assert failed.code == 1
    picture.write_bytes(good)
    commands = {one["finish"] for one in json.loads(repa_cache("info", "cache", "--json").out)["components"]}
    (command,) = commands
    assert command.startswith("repa-cache build --data images --cache cache --encoder hog:grid=4 --autoencoder pixels")
    assert "--labels 'it'\"'\"'s mine/labels.csv'" in command
    monkeypatch.chdir(images)
    elsewhere = repa_cache("info", "../cache")
    assert f"finish it: cd {tmp_path} && {command}" in elsewhere.unfolded
    monkeypatch.chdir(tmp_path)
    for component in ("latents/pixels", "features/hog-grid4"):
        assert (tmp_path / f"cache/.partial/{component.replace('/', '.')}.asked").exists()
    done = repa_cache(*shlex.split(command)[1:])
    assert done.code == 0, done.err
    assert not (tmp_path / "cache/.partial").exists()
    assert repa_cache("build", "--data", "images", "--cache", "clean", "--encoder", "hog:grid=4", *common).code == 0
    assert tree(tmp_path / "cache") == tree(tmp_path / "clean")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"cwd": 1, "words": ["build"]}', '{"cwd": "/", "words": [1]}'])
def test_what_lies_there_instead_is_no_command(
    images: Path, tmp_path: Path, build: Callable[..., Any], repa_cache: Callable[..., Any], text: str
) -> None:
    cache = tmp_path / "cache"
    assert build(images, cache, "--encoder", "hog:grid=3").code == 0
    (cache / "features/hog-grid3/valid/c.1").unlink()
    (cache / ".partial").mkdir()
    (cache / ".partial/features.hog-grid3.asked").write_text(text)
    assert f"repa-cache build --data PATH --cache {cache} --encoder hog:grid=3" in repa_cache("info", cache).unfolded


def spoil_values(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Make the encoder return `value` at one place of sample 3, which is a sub-batch by itself."""
    load_model = repa.pipeline.building.networks.load_encoder

    class Spoilt:
        def __init__(self, encoder: Any) -> None:
            self._encoder = encoder
            self.weights = encoder.weights

        def by_layer(self, images: torch.Tensor) -> Any:
            layers = [(tokens.clone(), cls_token) for tokens, cls_token in self._encoder.by_layer(images)]
            if len(images) == 1:  # sub-batches are of 3, ranges of 4 and 2
                layers[0][0][0, 2, 5] = value
            return layers

    monkeypatch.setattr(repa.pipeline.building.networks, "load_encoder", lambda *a, **k: Spoilt(load_model(*a, **k)))


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (float("nan"), "float16", "its channel_mean is not finite as float32"),
        (1e5, "float16", "its patch_tokens is not finite as float16; --dtype int8 can store it"),
        (float("nan"), "int8", "its channel_mean is not finite as float32"),
    ],
)
def test_values_that_are_not_finite_are_a_bad_sample_of_their_component(
    images: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    dtype: str,
    reason: str,
) -> None:
    spoil_values(monkeypatch, value)
    cache = tmp_path / "cache"
    path = "features/hog-grid4" + "-int8" * (dtype == "int8")
    outcome = build(images, cache, "--dtype", dtype)
    assert outcome.code == 1
    assert f"bad image: class 1/003.png: {path}: {reason}\n" in outcome.err
    root = zarr.open_group(cache, mode="r")
    assert root["latents/pixels"].attrs["complete"] is True  # the others go on
    assert "complete" not in root[path].attrs
    assert build(images, cache, "--dtype", dtype, "--skip-bad").code == 0
    group = zarr.open_group(cache, mode="r")[path]
    assert group["valid"][:].tolist() == [True, True, True, False, True, True]
    assert not group["patch_tokens"][3].any()
    assert group["source_bytes"][3] == 0
    assert group.attrs["bad_files"] == {"class 1/003.png": f"{path}: {reason}"}
    assert repa_cache("verify", cache).code == 0


def test_a_value_that_float16_cannot_hold_is_stored_as_int8(
    images: Path, tmp_path: Path, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_values(monkeypatch, 1e5)
    assert build(images, tmp_path / "cache", "--dtype", "int8").code == 0
