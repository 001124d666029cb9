"""Many components in one cache: adding one changes none, builds beside each other, what the commands say of it."""

import contextlib
import fcntl
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm


@pytest.fixture
def images(make_images: Callable[..., list[Path]], tmp_path: Path) -> Path:
    make_images(tmp_path / "images", num=6)
    return tmp_path / "images"


def stamps(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_adding_a_component_or_asking_again_touches_no_file(
    images: Path, tmp_path: Path, build: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    build(images, cache)
    before = stamps(cache)
    again = build(images, cache)
    assert (again.code, again.out) == (0, f"{cache}: everything asked for is there and complete\n")
    assert stamps(cache) == before
    assert build(images, cache, "--encoder", "hog:grid=3", "--compressor", "none").code == 0
    assert build(images, cache, "--dtype", "int8").code == 0
    after = stamps(cache)
    assert {file: after[file] for file in before} == before
    groups = {str(file.parent.relative_to(cache)) for file in after if file.name == "zarr.json"}
    assert {"features/hog-grid3", "features/hog-grid4-int8"} <= groups


def test_the_models_get_the_threads_that_are_asked_for(
    images: Path, tmp_path: Path, repa_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    command = ("build", "--data", images, "--encoder", "hog:grid=4", "--autoencoder", "pixels", "--resolution", 16)
    command = (*command, "--workers", 0, "--cache")
    assert repa_cache(*command, tmp_path / "one", "--threads", 3).code == 0
    assert repa_cache(*command, tmp_path / "two").code == 0
    assert asked == [3, os.cpu_count()]


def test_a_build_that_names_no_autoencoder_finishes_the_latents_that_were_begun(
    images: Path, tmp_path: Path, build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    build(images, cache, "--compressor", "zstd")
    (cache / "latents/pixels/valid/c.1").unlink()
    command = ("build", "--data", images, "--cache", cache, "--workers", 0)
    # As they were begun, whatever the encoder of this build is stored like.
    again = repa_cache(*command, "--encoder", "hog:grid=3")
    assert again.code == 0, again.err
    assert (cache / "latents/pixels/valid/c.1").exists()
    assert not (cache / "latents/sd-vae-ft-mse").exists()
    assert repa_cache("verify", cache).code == 0
    # Nothing is left to do, and that is no mistake of the one who asks; a weights file may be repeated as well.
    done = repa_cache(*command, "--weights", "pixels=none.pth")
    assert (done.code, done.out) == (0, f"{cache}: everything asked for is there and complete\n")


def test_ranges_that_were_there_have_no_part_in_the_bar_s_rate(
    images: Path, tmp_path: Path, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(images, tmp_path / "cache")
    (tmp_path / "cache/features/hog-grid4/valid/c.1").unlink()
    bars: list[tqdm.tqdm] = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    assert build(images, tmp_path / "cache").code == 0
    (bar,) = bars
    assert (bar.initial, bar.n, bar.total) == (4, 6, 6)


def test_the_order_in_which_components_are_added_leaves_no_trace(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    build(images, tmp_path / "together", "--encoder", "hog:grid=3")
    build(images, tmp_path / "apart", "--autoencoder", "none")
    build(images, tmp_path / "apart", "--encoder", "hog:grid=3")
    assert tree(tmp_path / "apart") == tree(tmp_path / "together")


# A build as others see it: it holds the lock of a component until its input ends.
HOLD = """
import sys
from repa.pipeline.store.store import CacheStore
store = CacheStore.open(sys.argv[1])
with store.lock(sys.argv[2]):
    store.partial_folder(sys.argv[2]).mkdir()
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def lock_held(cache: Path, path: str) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock of a component in a process of its own, which is yielded."""
    command = [sys.executable, "-c", HOLD, str(cache), path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder


def test_one_component_is_built_by_one_build_and_others_go_on(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    cache = tmp_path / "cache"
    build(images, cache)
    with lock_held(cache, "features/hog-grid3"):
        second = build(images, cache, "--encoder", "hog:grid=3")
        assert second.code == 1
        assert second.err == (
            f"repa-cache: {cache}: another build of features/hog-grid3 is running; wait for it, then run this again if "
            "needed\n"
        )
        assert build(images, cache, "--encoder", "hog:grid=5", "--autoencoder", "none").code == 0
        assert (cache / ".partial/features.hog-grid3").exists()  # the other build's half-written shards are its own
    assert build(images, cache, "--encoder", "hog:grid=3").code == 0
    assert not [name for name in tree(cache) if "partial" in name]


def test_a_lock_dies_with_its_process(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    cache = tmp_path / "cache"
    build(images, cache)
    with lock_held(cache, "features/hog-grid3") as other:
        other.kill()
    lock = cache / ".partial/features.hog-grid3.lock"
    with lock.open() as file:  # it is there, and nobody holds it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert build(images, cache, "--encoder", "hog:grid=3").code == 0
    assert not (cache / ".partial").exists()


def test_info_names_what_is_missing_and_the_command_that_finishes_it(
    images: Path, tmp_path: Path, build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    build(images, cache, "--dtype", "int8")
    told = repa_cache("info", cache)
    said = told.out
    assert said.count(": complete") == 2
    assert "6 samples, 2 classes, 16 px, views identity + flip, 2 shards of 4" in told.unfolded
    assert "patch_tokens  int8 [6, 2, 16, 128]" in said
    (cache / "features/hog-grid4-int8/valid/c.1").unlink()
    said = repa_cache("info", cache).out
    assert "features/hog-grid4-int8: INCOMPLETE" in said
    assert "1 of 2 ranges missing: samples 4-5" in said
    command = said.partition("if any):\n    repa-cache ")[2].replace("\\\n", "").splitlines()[0]
    assert repa_cache(*command.replace("PATH", str(images)).split(), "--workers", 0).code == 0
    assert repa_cache("info", cache).out.count(": complete") == 2
