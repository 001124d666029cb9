"""verify finds what is damaged, names the sample, and what it tells the user to do mends it."""

import dataclasses
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from repa.cache_specs.binding import SHARDS_DIGEST
from repa.cache_specs.errors import CacheError
from repa.cache_specs.layout import ArrayLayout
from repa.cache_specs.shard_index import pack_index, unpack_index
from repa.cache_specs.storage import LocalPath
from repa.pipeline.checking.verify import VerifyReport, all_finite, verify
from repa.pipeline.store.metadata import root_files
from repa.pipeline.store.store import CacheStore

SECOND = ("--autoencoder", "none", "--dtype", "int8", "--compressor", "zstd")
THIRD = ("--dtype", "uint8")


@pytest.fixture(scope="module")
def pristine(make_images: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 10 images, in which a test puts `cache` before it damages a copy."""
    folder = tmp_path_factory.mktemp("verify")
    make_images(folder / "images", num=10)
    return folder


@pytest.fixture
def cache(pristine: Path, build: Callable[..., Any]) -> Path:
    """Return a whole cache with float16 and int8 tokens; every test that damages it mends it or copies it."""
    if not (pristine / "cache").exists():
        assert build(pristine / "images", pristine / "cache").code == 0
        for more in (SECOND, THIRD):
            assert build(pristine / "images", pristine / "cache", *more).code == 0
    return pristine / "cache"


def problems_of(cache: Path) -> list[str]:
    """Return what verify says; a cache that cannot be opened at all is one problem."""
    try:
        report: VerifyReport = verify(cache, on_progress=lambda done, total: None)
    except CacheError as error:
        return [str(error)]
    return report.problems


def test_a_whole_cache_has_no_problems(cache: Path, repa_cache: Callable[..., Any]) -> None:
    outcome = repa_cache("verify", cache)
    assert outcome.code == 0, outcome.err
    # Ranges x arrays: moments twice; tokens, mean, std; codes, scale, mean, std; and valid, source_bytes of each.
    assert f"{3 * (2 + 3 + 4 + 4 * 2)} shards" in outcome.out


def test_a_flipped_bit_in_any_file_is_found(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy, ignore=shutil.ignore_patterns("pixels-uint8"))
    rng = random.Random(0)
    folders: dict[Path, list[Path]] = {}
    for file in sorted(file for file in copy.rglob("*") if file.is_file()):
        folders.setdefault(file.parent if file.name != "zarr.json" else file, []).append(file)
    assert len(folders) == 2 * (14 + 3 + 2) + 6  # arrays: data and metadata; groups
    for files in folders.values():
        file = rng.choice(files)  # one shard of each array, and every zarr.json
        data = file.read_bytes()
        for offset in (
            rng.randrange(len(data)),
            rng.randrange(len(data)),
            len(data) - 1 - rng.randrange(min(60, len(data))),
        ):
            file.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << rng.randrange(8)]) + data[offset + 1 :])
            assert problems_of(copy), (file, offset, data[offset], file.read_bytes()[offset])
        file.write_bytes(data)
    assert not problems_of(copy)


@pytest.mark.parametrize(
    ("name", "chunk_bytes", "where"),
    [  # chunk 3 of shard 1: samples 4 to 7, two views each, or one
        ("features/hog-grid4/patch_tokens/c.1.0.0.0", 16 * 128 * 2, "sample 5 (class 1/005.png), view flip"),
        ("latents/pixels-uint8/moments/c.1.0.0.0.0", 3 * 16 * 16, "sample 7 (class 1/007.png), view identity"),
    ],
)
def test_a_flipped_bit_in_data_is_named_by_sample_and_view(
    cache: Path, name: str, chunk_bytes: int, where: str
) -> None:
    file = cache / name
    data = file.read_bytes()
    # Behind a chunk its checksum, and zeros up to where the next may begin.
    file.write_bytes(flipped(data, 3 * (chunk_bytes + 64) + 100))
    (problem,) = problems_of(cache)
    file.write_bytes(data)
    assert problem == f"{name.rpartition('/')[0]}: {where}: its checksum does not hold"


def test_a_flipped_bit_between_chunks_is_named(cache: Path) -> None:
    file = cache / "features/hog-grid4/patch_tokens/c.1.0.0.0"
    data = file.read_bytes()
    file.write_bytes(flipped(data, 3 * (16 * 128 * 2 + 64) - 1))
    (problem,) = problems_of(cache)
    file.write_bytes(data)
    assert problem == (
        "features/hog-grid4/patch_tokens: sample 5 (class 1/005.png), view flip: the padding before it is not zero"
    )


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_shard_that_was_cut_is_named(cache: Path, keep: int) -> None:
    file = cache / "latents/pixels/moments/c.0.0.0.0.0"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    (problem,) = problems_of(cache)
    file.write_bytes(data)
    assert problem.startswith(f"latents/pixels/moments: samples 0 to 3: {file}: ")
    assert "cut" in problem


def test_values_that_are_not_finite_are_named(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    zarr.open_array(copy / "features/hog-grid4/channel_std", mode="r+")[9, 1, 3] = np.nan  # by zarr: checksums hold
    (problem,) = problems_of(copy)
    assert problem == "features/hog-grid4/channel_std: sample 9 (class 1/009.png), view flip: values are not finite"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_finite_values_are_told_from_the_others(dtype: str) -> None:
    limits = np.finfo(dtype)
    values = np.array([0, -0.0, limits.max, limits.min, limits.tiny, -limits.smallest_subnormal], dtype=dtype)
    assert all_finite(values)
    for other in (np.nan, -np.nan, np.inf, -np.inf):
        assert not all_finite(np.append(values, np.array(other, dtype=dtype)))
    assert all_finite(np.arange(-128, 128, dtype=np.int8))


def test_a_chunk_that_is_absent_is_named(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    # zarr leaves a chunk of zeros out by default: it reads as zeros, and was never encoded.
    zarr.open_array(copy / "latents/pixels/moments", mode="r+")[2, 0] = 0
    assert problems_of(copy)[0] == (
        "latents/pixels/moments: sample 2 (class 0/002.png), view identity: it is missing from its shard"
    )


DAMAGED = [
    "features/hog-grid4/patch_tokens/c.2.0.0.0",
    "features/hog-grid4-int8/valid/c.0",
    "features/hog-grid4-int8/token_scale/zarr.json",
    "features/hog-grid4-int8/shard_checksums/c.1.0",
    "latents/pixels/shard_checksums/zarr.json",
    "latents/pixels/zarr.json",
    "features/zarr.json",
    "sample_id/c/0",
    "label/zarr.json",
]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_deleting_what_verify_names_and_building_again_mends_it(
    cache: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
    tree: Callable[[Path], dict[str, bytes]],
    name: str,
    how: str,
) -> None:
    images, copy = cache.parent / "images", tmp_path / "cache"
    shutil.copytree(cache, copy)
    if how == "flip":
        (copy / name).write_bytes(flipped((copy / name).read_bytes(), 5))
    else:
        (copy / name).unlink()
    outcome = repa_cache("verify", copy)
    assert outcome.code == 1
    told = re.search(r"run the build again: rm (.*)", outcome.err)
    for file in shlex.split(told[1]) if told else []:
        Path(file).unlink()
    if how == "flip":
        assert told, outcome.err
    assert build(images, copy).code == 0
    assert build(images, copy, *SECOND).code == 0
    assert tree(copy) == tree(cache)


@pytest.mark.parametrize("asked", [(), ("--precision", "bf16"), ("--compressor", "zstd")])
def test_shards_without_their_component_s_record_are_kept_only_if_they_are_its_own(
    cache: Path, tmp_path: Path, build: Callable[..., Any], repa_cache: Callable[..., Any], asked: tuple[str, ...]
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    features = copy / "features/hog-grid4"
    shards = [features / "patch_tokens/c.0.0.0.0", features / "valid/c.2"]
    before = [file.stat().st_ino for file in shards]
    (features / "zarr.json").unlink()
    (features / "patch_tokens/c.1.0.0.0").unlink()
    outcome = build(cache.parent / "images", copy, "--autoencoder", "none", *asked)
    assert outcome.code == 0, outcome.err
    kept = [file.stat().st_ino for file in shards] == before
    assert kept == (not asked)
    assert f"encoded {10 if asked else 4} images" in outcome.out
    assert repa_cache("verify", copy).code == 0


def test_a_component_that_lost_a_range_is_completed_anew(
    cache: Path, tmp_path: Path, build: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    images, copy = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(cache.parent / "images", images)
    picture = images / "class 0/001.png"
    good = picture.read_bytes()
    picture.write_text("not a picture")
    assert build(images, copy, "--skip-bad").code == 0
    picture.write_bytes(good)
    for component in ("latents/pixels", "features/hog-grid4"):
        assert "bad_files" in zarr.open_group(copy / component, mode="r").attrs
        (copy / component / "valid/c.0").unlink()
    assert build(images, copy).code == 0
    whole = tree(cache)
    assert tree(copy) == {name: data for name, data in whole.items() if "int8" not in name}


def test_a_build_refuses_a_changed_attribute(cache: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    file = copy / "features/hog-grid4/zarr.json"
    file.write_text(file.read_text().replace('"bilinear"', '"bicubic"'))
    outcome = build(cache.parent / "images", copy)
    assert outcome.code == 1
    assert f"{file}: the attributes do not match their digest; the file was changed or is damaged" in outcome.err


def test_what_verify_and_info_say_can_be_typed_as_it_stands(
    cache: Path, tmp_path: Path, build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    copy = tmp_path / "it's a cache; (really)"
    shutil.copytree(cache, copy)
    shards = sorted(copy.glob("*/*/*/c.*"))
    for file in shards[:22]:
        file.write_bytes(flipped(file.read_bytes(), 5))
    outcome = repa_cache("verify", copy)
    said, _, files = outcome.err.splitlines()[-1].partition("run the build again: rm ")
    assert "delete the damaged files (and 2 more, which verify names then) and " in said
    assert set(map(Path, shlex.split(files))) < set(shards[:22])
    assert len(shlex.split(files)) == 20
    for file in shards[:22]:
        file.unlink()
    info = repa_cache("info", copy).out
    hint = "  finish it (with the first build's --labels and --weights, if any):\n"
    commands = [told.replace("\\\n", "").splitlines()[0] for told in info.split(hint)[1:]]
    assert commands
    for command in commands:
        images = str(cache.parent / "images")
        words = [images if word == "PATH" else word for word in shlex.split(command)]
        outcome = repa_cache(*words[1:], "--workers", 0)
        assert outcome.code == 0, outcome.err
    assert repa_cache("verify", copy).code == 0


def test_an_index_that_points_outside_its_file_is_refused() -> None:
    layout = ArrayLayout(name="x", shape=(4,), dtype="int8", inner=(1,), shard=(2,))
    for entries in ([[0, 5], [5, 2**63]], [[2**64 - 8, 16], [0, 5]], [[2**64 - 1, 5], [0, 5]]):
        tail = pack_index(np.array(entries, dtype=np.uint64))
        with pytest.raises(CacheError, match="outside the file"):
            unpack_index(tail, layout, file_bytes=10 + len(tail), where="shard")


def test_verify_of_no_cache_says_how_to_make_one(tmp_path: Path, repa_cache: Callable[..., Any]) -> None:
    outcome = repa_cache("verify", tmp_path)
    assert outcome.code == 1
    assert outcome.err == (
        f"repa-cache: {tmp_path}: no cache here; make one with repa-cache build --cache {tmp_path} --data FOLDER\n"
    )
    with pytest.raises(CacheError):
        CacheStore.open(tmp_path)


def test_shards_that_are_only_claimed_are_a_line_an_array_and_never_looked_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CacheStore.open(cache)
    claimed = CacheStore(tmp_path / "claimed", dataclasses.replace(store.layout, num_samples=200_000, shard_samples=5))
    for name, data in root_files(claimed.layout).items():
        (claimed.path / name).write(data)
    for path in store.components():
        component = store.component(path)
        assert component is not None
        claimed.create_component(component)
        claimed.complete_component(component, {SHARDS_DIGEST: "0" * 64})
    size, asked = LocalPath.size, []
    monkeypatch.setattr(LocalPath, "size", lambda file: asked.append(file) or size(file))
    report = verify(claimed.path, on_progress=lambda done, total: None)
    assert report.num_shards == 17 * 40_000
    assert len(asked) < 100
    assert len(report.problems) == 17 + 4 + 2 * 4  # arrays, the numbers of components; chunks of ids and of labels
    assert (
        "features/hog-grid4/patch_tokens: samples 0 to 199999: c.0.0.0.0 and 39999 more are missing" in report.problems
    )
