"""A shard or a component that is whole and belongs elsewhere is found, and named; old caches are bound when asked."""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from repa.cache_specs.errors import CacheError
from repa.trainer import CacheReader

Build = Callable[..., Any]
Tree = Callable[[Path], dict[str, bytes]]
Verified = Callable[[Path], list[str]]
SECOND = ("--autoencoder", "none", "--dtype", "int8", "--compressor", "zstd")
HOG, INT8, PIXELS = "features/hog-grid4", "features/hog-grid4-int8", "latents/pixels"


@pytest.fixture(scope="module")
def folder(make_images: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two sets of 10 images with the same names: `images`, `others`."""
    folder = tmp_path_factory.mktemp("binding")
    make_images(folder / "images", num=10)
    make_images(folder / "others", num=10, seed=1)
    return folder


@pytest.fixture
def pristine(folder: Path, build: Build) -> Path:
    """Return the cache of `images`: latents, float16 tokens, int8 tokens with zstd. Shards of 4, 4, and 2 samples."""
    if not (folder / "cache").exists():
        for images, cache in (("images", "cache"), ("others", "other cache")):
            assert build(folder / images, folder / cache).code == 0
            assert build(folder / images, folder / cache, *SECOND).code == 0
    return folder / "cache"


@pytest.fixture
def cache(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    shutil.copytree(pristine, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def other(folder: Path, pristine: Path) -> Path:
    """Return the cache of other images under the same names; its metadata says nothing else."""
    for path in (HOG, INT8, PIXELS):
        ours, theirs = (zarr.open_group(cache / path, mode="r").attrs for cache in (pristine, folder / "other cache"))
        assert ours["fingerprint"] == theirs["fingerprint"]
    return folder / "other cache"


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("path", [HOG, INT8, PIXELS])
def test_numbers_and_digests_are_what_the_contract_says(pristine: Path, path: str) -> None:
    group: Any = zarr.open_group(pristine / path, mode="r")
    names = group["shard_checksums"].attrs["arrays"]
    assert set(names) == set(group.array_keys()) - {"shard_checksums"}
    numbers = group["shard_checksums"][:]
    assert (numbers.shape, numbers.dtype) == ((3, len(names)), np.uint32)
    for k, a in np.ndindex(numbers.shape):
        array = group[names[a]]
        (file,) = [file for file in (pristine / path / names[a]).glob("c.*") if file.name.split(".")[1] == str(k)]
        data, chunks = file.read_bytes(), int(np.prod(np.array(array.shards) // array.chunks))
        index = np.frombuffer(data[-4 - 16 * chunks : -4], dtype="<u8").reshape(-1, 2)
        stored = b"".join(data[int(o + n) - 4 : int(o + n)] for o, n in index if o != 2**64 - 1)
        assert len(stored) == (4 if array.ndim == 1 else 4 * 2 * (4, 4, 2)[k])
        assert numbers[k, a] == google_crc32c.value(stored)
    assert group.attrs["shards_digest"] == hashlib.sha256(numbers.astype("<u4").tobytes()).hexdigest()
    sizes = group["source_bytes"][:].astype("<i8")
    assert group.attrs["source_bytes_digest"] == hashlib.sha256(sizes.tobytes()).hexdigest()
    assert list(group.attrs)[-4:] == ["source_bytes_digest", "shards_digest", "complete", "attributes_digest"]


@pytest.mark.parametrize("array", [f"{HOG}/patch_tokens", f"{INT8}/patch_tokens", f"{PIXELS}/moments"])
def test_two_shards_that_were_swapped_are_named_and_mended(
    cache: Path, folder: Path, array: str, repa_cache: Callable[..., Any], build: Build, tree: Tree
) -> None:
    tail = ".0.0.0.0" if array.endswith("moments") else ".0.0.0"
    swap(cache / array / f"c.0{tail}", cache / array / f"c.1{tail}")
    outcome = repa_cache("verify", cache)
    assert outcome.code == 1
    told = outcome.err.splitlines()
    assert told[:2] == [
        f"{array}: samples 0 to 3: c.0{tail} is not the shard that was written here, but that of samples 4 to 7",
        f"{array}: samples 4 to 7: c.1{tail} is not the shard that was written here, but that of samples 0 to 3",
    ]
    rm = re.search(r"run the build again: rm (.*)", told[2])
    assert rm
    for file in shlex.split(rm[1]):
        Path(file).unlink()
    assert build(folder / "images", cache).code == 0
    assert build(folder / "images", cache, *SECOND).code == 0
    assert tree(cache) == tree(folder / "cache")


def test_a_shard_copied_over_another_is_named(cache: Path, verified: Verified) -> None:
    tokens = cache / HOG / "channel_mean"
    shutil.copy(tokens / "c.1.0.0", tokens / "c.0.0.0")
    (problem,) = verified(cache)
    assert problem == (
        f"{HOG}/channel_mean: samples 0 to 3: c.0.0.0 is not the shard that was written here, but that of samples 4 "
        "to 7"
    )


@pytest.mark.parametrize("array", ["patch_tokens", "channel_std", "source_bytes"])
def test_a_shard_of_another_cache_is_named(cache: Path, other: Path, verified: Verified, array: str) -> None:
    file = next((cache / HOG / array).glob("c.1*"))
    shutil.copy(other / HOG / array / file.name, file)
    found = verified(cache)
    said = f"{HOG}/{array}: samples 4 to 7: {file.name} is not the shard that was written here, but another one"
    assert said in found


def test_shards_that_are_alike_may_change_places(cache: Path, verified: Verified) -> None:
    """Those of `valid`, where no file is bad: nothing is another than it was."""
    swap(cache / HOG / "valid/c.0", cache / HOG / "valid/c.1")
    assert verified(cache) == []


def test_ranges_replaced_with_their_numbers_are_found(cache: Path, other: Path, verified: Verified) -> None:
    for array in (cache / HOG).iterdir():
        if array.is_dir():
            file = next(array.glob("c.1*"))
            shutil.copy(other / HOG / array.name / file.name, file)
    problems = verified(cache)
    assert any("ranges were replaced together with their numbers" in problem for problem in problems)
    assert any(f"{HOG} and {PIXELS} were made from other images" in problem for problem in problems)
    assert any("first sample 4 (class 0/004.png)" in problem for problem in problems)


@pytest.mark.parametrize("how", ["flipped", "swapped"])
def test_numbers_that_are_wrong_are_told_from_shards_that_are(
    cache: Path, folder: Path, repa_cache: Callable[..., Any], build: Build, tree: Tree, how: str
) -> None:
    numbers = cache / HOG / "shard_checksums"
    if how == "flipped":
        data = (numbers / "c.0.0").read_bytes()
        (numbers / "c.0.0").write_bytes(data[:3] + bytes([data[3] ^ 4]) + data[4:])
    else:
        swap(numbers / "c.0.0", numbers / "c.1.0")
    outcome = repa_cache("verify", cache)
    assert outcome.code == 1
    assert all(line.startswith(f"{HOG}/shard_checksums: samples ") for line in outcome.err.splitlines()[:-1])
    rm = re.search(r"run the build again: rm (.*)", outcome.err)
    assert rm
    for file in shlex.split(rm[1]):
        Path(file).unlink()
    assert build(folder / "images", cache).code == 0
    assert tree(cache) == tree(folder / "cache")


def test_a_build_gives_no_numbers_to_shards_that_are_not_the_component_s(
    cache: Path, folder: Path, build: Build
) -> None:
    swap(cache / HOG / "patch_tokens/c.0.0.0.0", cache / HOG / "patch_tokens/c.1.0.0.0")
    (cache / HOG / "shard_checksums/c.0.0").unlink()
    outcome = build(folder / "images", cache)
    assert outcome.code == 1
    assert f"{HOG}: its shards are not those that it was completed with" in outcome.err
    assert not (cache / HOG / "shard_checksums/c.0.0").exists()


def test_a_component_of_another_cache_is_found_beside_ours(
    cache: Path, other: Path, verified: Verified, repa_cache: Callable[..., Any]
) -> None:
    shutil.rmtree(cache / HOG)
    shutil.copytree(other / HOG, cache / HOG)
    (problem,) = verified(cache)  # latents and int8 tokens agree with each other
    said = f"{HOG} and {PIXELS} were made from other images under the same names: the files of 10 samples had other"
    assert problem.startswith(said)
    with pytest.raises(CacheError, match=f"{PIXELS} and {HOG} were made from other images under the same names"):
        CacheReader(cache, encoder="hog-grid4")
    measured = repa_cache("metrics", cache)
    assert measured.code == 1
    assert f"{HOG} and {INT8} were made from other images" in measured.err


COPIES = {"copied": shutil.copytree, "renamed": os.rename}


@pytest.mark.parametrize("how", list(COPIES))
def test_a_component_that_was_copied_or_renamed_is_refused_everywhere(
    cache: Path, folder: Path, verified: Verified, repa_cache: Callable[..., Any], build: Build, how: str
) -> None:
    mine = cache / "features/mine"
    COPIES[how](cache / HOG, mine)
    said = f"{mine}: its attributes are those of {HOG}, so it was copied or renamed. Rename it to {cache / HOG}, or"
    (problem,) = verified(cache)
    assert problem.startswith(said)
    with pytest.raises(CacheError, match=re.escape(said)):
        CacheReader(cache, encoder="mine")
    for arguments in (("info", cache), ("metrics", cache, "--encoder", "mine"), ("bind", cache)):
        outcome = repa_cache(*arguments)
        assert outcome.code == 1
        assert said in outcome.err
    if how == "renamed":
        os.rename(mine, cache / HOG)
        assert verified(cache) == []


KEYS = {
    "a number in latent_std": (PIXELS, r'("latent_std": \[\s+0\.\d)(\d)', lambda digit: str(int(digit) ^ 1)),
    "the key bad_files": (HOG, r'("bad_)(f)(iles")', lambda letter: chr(ord(letter) ^ 2)),
    "complete": (HOG, '("complet)(e)"', lambda letter: chr(ord(letter) ^ 1)),
    "the digest's own key": (HOG, '("attributes_diges)(t)"', lambda letter: chr(ord(letter) ^ 1)),
}


@pytest.mark.parametrize("what", list(KEYS))
def test_a_flipped_bit_in_attributes_is_refused_by_whoever_opens_them(
    cache: Path, folder: Path, verified: Verified, repa_cache: Callable[..., Any], build: Build, what: str
) -> None:
    path, pattern, flip = KEYS[what]
    if what == "the key bad_files":
        shutil.rmtree(cache)
        images = cache.parent / "images"
        shutil.copytree(folder / "images", images)
        (images / "class 0/001.png").write_text("not a picture")
        assert build(images, cache, "--skip-bad").code == 0
    file = cache / path / "zarr.json"
    text = file.read_text()
    changed, count = re.subn(pattern, lambda m: m[1] + flip(m[2]) + m[0][len(m[1]) + 1 :], text, count=1)
    assert (count, len(changed)) == (1, len(text))
    file.write_text(changed)
    said = f"{file}: the attributes do not match their digest"
    assert any(problem.startswith(said) for problem in verified(cache))
    with pytest.raises(CacheError, match=re.escape(said)):
        CacheReader(cache, encoder="hog-grid4")
    for outcome in (repa_cache("info", cache), build(folder / "images", cache), repa_cache("bind", cache)):
        assert outcome.code == 1
        assert said in outcome.err
    file.write_text(text)
    assert verified(cache) == []


def test_the_root_s_attributes_are_compared_too(cache: Path, folder: Path, repa_cache: Any, build: Build) -> None:
    file = cache / "zarr.json"
    text = file.read_text()
    attributes = json.loads(text)["attributes"]
    for old, new in (("class 1", "class 3"), (attributes["dataset_fingerprint"], "0" * 64)):
        file.write_text(text.replace(old, new))
        with pytest.raises(CacheError, match="the attributes do not match their digest"):
            CacheReader(cache, encoder="hog-grid4")
        for outcome in (repa_cache("info", cache), build(folder / "images", cache), repa_cache("verify", cache)):
            assert (outcome.code, outcome.err.count("\n")) == (1, 1)
            assert "the attributes do not match their digest" in outcome.err


# Old caches


def test_an_old_cache_is_read_and_verified_left_alone_by_a_build_and_bound_when_asked(
    cache: Path,
    folder: Path,
    as_before: Callable[[Path], None],
    repa_cache: Callable[..., Any],
    build: Build,
    tree: Tree,
) -> None:
    as_before(cache)
    old = tree(cache)
    assert CacheReader(cache, encoder="hog-grid4").num_samples == 10
    checked = repa_cache("verify", cache)
    assert checked.code == 0
    bind = f"nothing ties its shards to their places: repa-cache bind {cache} adds that"
    assert checked.err.splitlines() == [f"{path}: {bind}" for path in (PIXELS, HOG, INT8)]
    assert repa_cache("info", cache).unfolded.count(bind) == 3
    assert build(folder / "images", cache).code == 0
    assert build(folder / "images", cache, *SECOND).code == 0
    assert tree(cache) == old

    bound = repa_cache("bind", cache)
    assert bound.code == 0, bound.err
    assert f"{HOG}: 15 shards are bound" in bound.out
    assert tree(cache) == tree(folder / "cache")
    again = repa_cache("bind", cache)
    assert (again.code, again.out.count("was bound")) == (0, 3)
    assert repa_cache("verify", cache).err == ""


def test_a_damaged_component_is_not_bound_and_the_others_are(
    cache: Path, as_before: Callable[[Path], None], repa_cache: Callable[..., Any]
) -> None:
    as_before(cache)
    file = cache / HOG / "patch_tokens/c.1.0.0.0"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    outcome = repa_cache("bind", cache)
    assert outcome.code == 1
    assert f"{file}: its checksum does not hold" in outcome.err
    assert "1 components were not bound; repa-cache verify names what is damaged" in outcome.err
    assert "shards_digest" not in zarr.open_group(cache / HOG, mode="r").attrs
    assert "shards_digest" in zarr.open_group(cache / INT8, mode="r").attrs


@pytest.mark.parametrize("lost", ["valid/c.1", "patch_tokens/c.2.0.0.0", "zarr.json"])
def test_a_build_goes_on_with_what_an_earlier_version_left(
    cache: Path, folder: Path, as_before: Callable[[Path], None], build: Build, tree: Tree, lost: str
) -> None:
    """Begun then and killed, or damaged: ranges that are there are kept, and bound as the component is completed."""
    as_before(cache)
    for path in (HOG, INT8):
        (cache / path / lost).unlink()
    kept = cache / HOG / "patch_tokens/c.0.0.0.0"
    inode = kept.stat().st_ino
    outcome = build(folder / "images", cache)
    assert outcome.code == 0, outcome.err
    assert build(folder / "images", cache, *SECOND).code == 0
    assert kept.stat().st_ino == inode
    whole, found = tree(folder / "cache"), tree(cache)
    features = {name: data for name, data in whole.items() if name.startswith("features/")}
    assert {name: data for name, data in found.items() if name.startswith("features/")} == features
