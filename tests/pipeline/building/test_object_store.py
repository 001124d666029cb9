"""A cache in a bucket: the objects are the files of a local build, whatever was killed or deleted on the way."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repa.cache_specs.storage import Location, location


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., list[Path]]) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_images(folder)
    return folder


@pytest.fixture(scope="module")
def local(
    images: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run_and_die: Callable[..., tuple[str, int]],
    small_options: list[str],
) -> Path:
    """Return the cache that a build makes of the images in a folder."""
    cache = tmp_path_factory.mktemp("local") / "cache"
    assert run_and_die(0, "build", "--data", images, "--cache", cache, *small_options)[0] == "exit 0"
    return cache


@pytest.fixture
def clean(local: Path) -> dict[str, bytes]:
    """Return what every build of the images in a bucket must come to: the files of the local one."""
    return files(local)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep half-written shards and locks of these builds in a folder of the test."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def copy_tree(source: Location, target: Location) -> None:
    """Copy every file below `source`: what a sync tool does."""
    for name in source.names():
        if (source / name).size() is None:
            copy_tree(source / name, target / name)
        else:
            (target / name).write((source / name).read() or b"")


def objects(cache: str, folder: Path) -> dict[str, bytes]:
    """Return the bytes of every object below `cache` by its relative name."""
    target = folder / secrets.token_hex(4)
    copy_tree(location(cache), location(target))
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_objects_are_the_files_of_a_local_build(
    images: Path,
    local: Path,
    tmp_path: Path,
    bucket: str,
    temporary: Path,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
) -> None:
    cache = f"{bucket}/caches/in1k"
    done = build(images, cache)
    assert done.code == 0, done.err
    assert objects(cache, tmp_path) == files(local)
    assert not [path for path in temporary.rglob("*") if path.is_file()]

    here, there = repa_cache("info", local), repa_cache("info", cache)
    assert there.unfolded == here.unfolded.replace(str(local), cache)
    checked = repa_cache("verify", cache)
    assert (checked.code, checked.out.partition(", ")[0]) == (0, f"{cache}: 24 shards")
    measured = [repa_cache("metrics", where, "--encoder", "hog-grid4").out for where in (local, cache)]
    assert measured[1] == measured[0].replace(str(local), cache)
    assert "everything asked for is there" in build(images, cache).out

    copy_tree(location(local), location(f"{bucket}/synced"))
    assert repa_cache("verify", f"{bucket}/synced").code == 0


def test_what_was_deleted_or_damaged_is_named_and_made_again(
    images: Path,
    clean: dict[str, bytes],
    tmp_path: Path,
    bucket: str,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
) -> None:
    cache = f"{bucket}/cache"
    assert build(images, cache).code == 0
    group = location(cache) / "features/hog-grid4"
    (group / "patch_tokens/c.1.0.0.0").delete()
    shard = bytearray((group / "channel_mean/c.0.0.0").read() or b"")
    shard[3] ^= 1
    (group / "channel_mean/c.0.0.0").write(bytes(shard))
    checked = repa_cache("verify", cache)
    assert checked.code == 1
    assert "patch_tokens: samples 4 to 7: c.1.0.0.0 is missing" in checked.err
    assert "channel_mean: sample 0 (class 0/000.png), view identity: its checksum does not hold" in checked.err
    assert f"aws s3 rm {group}/channel_mean/c.0.0.0" in checked.err
    (group / "channel_mean/c.0.0.0").delete()
    assert build(images, cache).code == 0
    assert objects(cache, tmp_path) == clean

    # Without its own record a component's shards are kept where `valid` says whose they are, and go where not.
    (group / "zarr.json").delete()
    assert build(images, cache, "--dtype", "float16").code == 0
    assert objects(cache, tmp_path) == clean


def test_a_killed_build_goes_on_to_the_same_objects(
    images: Path,
    clean: dict[str, bytes],
    tmp_path: Path,
    bucket: str,
    build: Callable[..., Any],
    run_and_die: Callable[..., tuple[str, int]],
    small_options: list[str],
) -> None:
    cache = f"{bucket}/killed"
    for point in (9, 60, 20):  # of more than 100: in the cache's metadata, among the shards twice
        ended, _ = run_and_die(point, "build", "--data", images, "--cache", cache, *small_options)
        assert ended == "killed"
    assert build(images, cache).code == 0
    assert objects(cache, tmp_path) == clean


def test_ray_workers_put_their_own_shards(
    images: Path,
    clean: dict[str, bytes],
    tmp_path: Path,
    bucket: str,
    build: Callable[..., Any],
    ray_head: tuple[str, int],
) -> None:
    done = build(images, f"{bucket}/cache", "--workers", 1, "--address", ray_head[0])
    assert done.code == 0, done.err
    assert objects(f"{bucket}/cache", tmp_path) == clean


def test_one_build_of_a_component_at_a_time_on_this_machine(
    images: Path, bucket: str, temporary: Path, build: Callable[..., Any]
) -> None:
    import fcntl

    scratch = location(f"{bucket}/cache").scratch()
    assert scratch.is_relative_to(temporary)
    scratch.mkdir(parents=True)
    with (scratch / "features.hog-grid4.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = build(images, f"{bucket}/cache")
        assert refused.code == 1
        assert refused.err.count("\n") == 1
        assert f"{bucket}/cache: another build of features/hog-grid4 is running" in refused.err


def test_what_is_asked_of_a_bucket_in_vain_is_one_line(
    images: Path,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
) -> None:
    location(f"{bucket}/other/file.txt").write(b"data")
    for outcome, code, text in (
        (build(images, f"{bucket}-gone/cache"), 1, "bucket does not exist"),
        (
            repa_cache("info", f"{bucket}/none"),
            1,
            f"no cache here; make one with repa-cache build --cache {bucket}/n",
        ),
        (build(images, f"{bucket}/other"), 2, f"--cache {bucket}/other: the folder holds other things (file.txt)"),
        (build(images, bucket), 2, "expected a folder, or one of s3://BUCKET/PREFIX"),
    ):
        assert (outcome.code, outcome.err.count("\n")) == (code, 1), outcome.err
        assert text in outcome.err
