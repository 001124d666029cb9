"""repa-cache metrics: every figure against zarr, numpy and float64; every gap in a table has its reason."""

import csv
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

from repa.cache_specs.group import DIGEST, with_digest
from repa.pipeline.analysis.features import choose_rows, open_encoders
from repa.pipeline.analysis.intervals import FEWEST, mean_estimate
from repa.pipeline.analysis.masks import MaskFolder
from repa.pipeline.store.shards import ShardWriter, read_shard
from repa.pipeline.store.store import CacheStore

GRID = (8, 8)
APART = np.array(
    [
        [abs(a[0] - b[0]) + abs(a[1] - b[1]) for b in itertools.product(range(8), repeat=2)]
        for a in itertools.product(range(8), repeat=2)
    ]
)
OPTIONS = "--autoencoder pixels --resolution 32 --flip --shard-samples 8 --batch-size 5 --workers 0"


@pytest.fixture(scope="module")
def images(make_images: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pictures of two classes, one that is black, and one in a class of its own."""
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, num=22)
    Image.new("RGB", (40, 40)).save(folder / "class 0" / "black.png")
    (folder / "lonely").mkdir()
    shutil.copy(folder / "class 1" / "015.png", folder / "lonely" / "one.png")
    return folder


@pytest.fixture(scope="module")
def built(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of `images` with one encoder as float16, compressed, and as int8."""
    from click.testing import CliRunner

    from repa.pipeline.commands.cache import cli

    cache = tmp_path_factory.mktemp("cache") / "cache"
    for more in (["--compressor", "zstd"], ["--dtype", "int8", "--autoencoder", "none"]):
        command = ["build", "--data", str(images), "--cache", str(cache), "--encoder", "hog:grid=8", *OPTIONS.split()]
        assert CliRunner().invoke(cli, [*command, *more], catch_exceptions=False).exit_code == 0
    return cache


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    """A copy of the cache, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def tokens_of(cache: Path, encoder: str, gamma: float | None) -> np.ndarray:
    """Tokens [N, T, E] float64 of view 0 by bare zarr, dequantised and normalised by the equations of the cache."""
    group: Any = zarr.open_group(cache / "features" / encoder, mode="r")
    mean, std = (group[f"channel_{name}"][:, 0].astype(np.float64)[:, None] for name in ("mean", "std"))
    tokens = group["patch_tokens"][:, 0].astype(np.float64)
    if "token_scale" in group:
        tokens = std * group["token_scale"][:, 0].astype(np.float64)[..., None] * tokens + mean
    return tokens if gamma is None else (tokens - gamma * mean) / (std + 1e-6)


def by_definition(tokens: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """LDS, CDS, RMSC and SRSS of one image [T, E] from the whole Gram matrix in float64."""
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    decay = [cosine[d == APART].mean() for d in range(1, 9)]
    found = {
        "lds": decay[0] - cosine[APART >= 6].mean(),
        "cds": -np.polyfit(np.arange(1, 9), decay, 1)[0],
        "rmsc": math.sqrt(np.sum((unit - unit.mean(0)) ** 2, axis=1).mean()),
    }
    if mask is not None:
        anchors = []
        for i in np.flatnonzero(mask):
            like, unlike = mask & (APART[i] == 1), ~mask & (APART[i] >= 6)
            if like.any() and unlike.any():
                anchors.append(cosine[i, like].mean() - cosine[i, unlike].mean())
        found["srss"] = float(np.mean(anchors))
    return found


def figures(file: Path) -> dict[tuple[str, str, str, str], dict[str, str]]:
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert not any("nan" in value.lower() for row in rows for value in row.values())
    assert all(row["low"] or row["reason"] for row in rows)
    return {(row["encoder"], row["gamma"], row["class"], row["metric"]): row for row in rows}


def test_every_mean_is_the_definitions(built: Path, repa_cache: Callable[..., Any], tmp_path: Path) -> None:
    outcome = repa_cache("metrics", built, "--gamma", 0.8, "--csv", tmp_path / "all.csv")
    assert outcome.code == 0, outcome.err
    assert "1 image has the same token everywhere" in outcome.out
    assert "srss  left out: no --masks" in outcome.out
    assert "nan" not in outcome.out.lower()
    found = figures(tmp_path / "all.csv")
    root: Any = zarr.open_group(built, mode="r")
    labels, ids = root["label"][:], root["sample_id"][:]
    black = list(ids).index("class 0/black.png")
    for encoder, gamma in itertools.product(("hog-grid8", "hog-grid8-int8"), (None, 0.8)):
        tokens = tokens_of(built, encoder, gamma)
        values = {row: by_definition(tokens[row]) for row in range(len(ids)) if row != black}
        for metric in ("lds", "cds", "rmsc"):
            for label, name in [(None, "all"), *enumerate(root.attrs["class_names"])]:
                chosen = [one[metric] for row, one in values.items() if label in (None, labels[row])]
                row = found[encoder, "" if gamma is None else "0.8", name, metric]
                assert float(row["mean"]) == pytest.approx(np.mean(chosen), abs=1e-5), (encoder, gamma, name, metric)
                assert int(row["num"]) == len(chosen)
    whole = found["hog-grid8", "", "all", "lds"]
    assert float(whole["low"]) < float(whole["mean"]) < float(whole["high"])
    lonely = found["hog-grid8", "", "lonely", "lds"]
    assert (lonely["low"], lonely["reason"]) == ("", "1 image, too few for an interval")


def write_masks(folder: Path, ids: list[str], side: int = 32) -> dict[str, np.ndarray]:
    """Left halves as foreground, for all but the first sample; the second has no background."""
    grids = {}
    for i, sample_id in enumerate(ids[1:]):
        pixels = np.zeros((side, side), dtype=np.uint8)
        pixels[:, : side if i == 0 else side // 2 + 1] = 200
        file = folder / Path(sample_id).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        grid = np.zeros((8, 8), dtype=bool)
        grid[:, :5] = True  # one column of pixels reaches into the fifth cell: max-pooling takes it
        if i > 0:
            grids[sample_id] = grid.ravel()
    return grids


def test_srss_takes_masks_by_sample_id(built: Path, repa_cache: Callable[..., Any], tmp_path: Path) -> None:
    ids = list(zarr.open_array(built / "sample_id", mode="r")[:])
    masks = write_masks(tmp_path / "masks", ids)
    command = ["--encoder", "hog:grid=8", "--masks", tmp_path / "masks", "--csv", tmp_path / "all.csv"]
    outcome = repa_cache("metrics", built, *command)
    assert outcome.code == 0, outcome.err
    row = figures(tmp_path / "all.csv")["hog-grid8", "0.6", "all", "srss"]
    tokens = tokens_of(built, "hog-grid8", 0.6)
    chosen = [sample_id for sample_id in masks if "black" not in sample_id]
    expected = [by_definition(tokens[ids.index(sample_id)], masks[sample_id])["srss"] for sample_id in chosen]
    assert float(row["mean"]) == pytest.approx(np.mean(expected), abs=1e-5)
    assert int(row["num"]) == len(chosen)


def test_bad_masks_are_named(built: Path, repa_cache: Callable[..., Any], tmp_path: Path) -> None:
    ids = list(zarr.open_array(built / "sample_id", mode="r")[:])
    folder = tmp_path / "masks"
    assert "no such folder" in repa_cache("metrics", built, "--masks", folder).err
    write_masks(folder, ids[:3], side=30)
    outcome = repa_cache("metrics", built, "--encoder", "hog-grid8", "--masks", folder)
    assert outcome.code == 2
    assert "has shape 30 x 30; expected one channel of 32 x 32" in outcome.err
    Image.new("RGB", (32, 32)).save(folder / Path(ids[1]).with_suffix(".png"))
    assert "has shape 32 x 32 x 3" in repa_cache("metrics", built, "--masks", folder).err
    (folder / Path(ids[1]).with_suffix(".png")).write_bytes(b"no picture")
    assert "cannot be read" in repa_cache("metrics", built, "--masks", folder).err
    Image.new("L", (32, 32)).save(folder / "stranger.png")
    assert (
        "1 of 3 masks match no sample id, the first is stranger.png"
        in repa_cache("metrics", built, "--masks", folder).err
    )


def test_masks_without_enough_of_either_kind_leave_srss_out(
    built: Path, repa_cache: Callable[..., Any], tmp_path: Path
) -> None:
    ids = list(zarr.open_array(built / "sample_id", mode="r")[:])
    write_masks(tmp_path, ids[:2])  # one mask, all foreground
    outcome = repa_cache("metrics", built, "--encoder", "hog-grid8", "--masks", tmp_path)
    assert outcome.code == 0
    assert "srss  left out: no image has a mask with 25% of its tokens on either side" in outcome.out
    assert MaskFolder(tmp_path, ids, 32).read(ids[0], GRID) is None


def test_num_draws_the_same_images_for_every_encoder(built: Path) -> None:
    _, both = open_encoders(built, [])
    rows = choose_rows(both, 9)
    assert len(rows) == 9
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() != list(range(9))  # a manifest is ordered by class
    np.testing.assert_array_equal(rows, choose_rows(both[:1], 9))
    np.testing.assert_array_equal(choose_rows(both, 1000), np.arange(24))


def test_few_images_have_means_and_no_interval(built: Path, repa_cache: Callable[..., Any]) -> None:
    outcome = repa_cache("metrics", built, "--encoder", "hog-grid8", "--num", 4)
    assert "(4 images, too few for an interval)" in outcome.out or "(3 images, too few for an interval)" in outcome.out
    assert "left out" in outcome.out  # classes of which no image was drawn, and srss


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--encoder", "hog-grid9"], "has no encoder|holds no encoder 'hog-grid9'; did you mean 'hog-grid8'"),
        (["--gamma", "1.5"], "--gamma 1.5: expected 0 to 1"),
        (["--num", "0"], "--num 0: expected 1 or more images"),
        (["--csv", "/"], "cannot be written"),
    ],
)
def test_bad_requests_are_one_line(built: Path, repa_cache: Callable[..., Any], options: list[str], words: str) -> None:
    outcome = repa_cache("metrics", built, *options)
    assert outcome.code != 0
    assert any(word in outcome.err for word in words.split("|"))
    assert outcome.err.count("\n") == 1


def test_a_damaged_row_is_named_and_nothing_computed_from_it(cache: Path, repa_cache: Callable[..., Any]) -> None:
    shard = cache / "features" / "hog-grid8-int8" / "patch_tokens" / "c.1.0.0.0"
    damaged = bytearray(shard.read_bytes())
    damaged[10] ^= 1
    shard.write_bytes(damaged)
    outcome = repa_cache("metrics", cache)
    assert outcome.code == 1
    assert "c.1.0.0.0: sample 8: its checksum does not hold; repa-cache verify" in outcome.err
    shard.unlink()
    assert "c.1.0.0.0: cannot be read" in repa_cache("metrics", cache).err


def test_a_value_that_is_not_finite_is_named_by_sample(cache: Path, repa_cache: Callable[..., Any]) -> None:
    store = CacheStore.open(cache)
    component = store.component("features/hog-grid8")
    assert component is not None
    layout = next(one for one in component.arrays(store.layout) if one.name == "patch_tokens")
    file = cache / component.path / "patch_tokens" / layout.shard_file(0)
    chunks, _ = read_shard(file, layout, "zstd", num_chunks=16)
    chunks[6, 3, 3] = np.nan  # sample 3, identity
    writer = ShardWriter(file, layout, "zstd")
    writer.append(chunks)
    writer.close()
    outcome = repa_cache("metrics", cache, "--encoder", "hog-grid8")
    assert outcome.code == 1
    assert "features/hog-grid8/patch_tokens of sample 3 (class 0/003.png) is not finite" in outcome.err


def test_an_unfinished_encoder_is_not_measured(cache: Path, repa_cache: Callable[..., Any]) -> None:
    file = cache / "features" / "hog-grid8" / "zarr.json"
    metadata = json.loads(file.read_text())
    attributes = {key: value for key, value in metadata["attributes"].items() if key not in ("complete", DIGEST)}
    file.write_text(json.dumps({**metadata, "attributes": with_digest(attributes)}))
    outcome = repa_cache("metrics", cache, "--encoder", "hog-grid8")
    assert outcome.code == 1
    assert "features/hog-grid8 is not complete; finish it with repa-cache build" in outcome.err
    assert "features/hog-grid8," not in repa_cache("metrics", cache).out  # the others still are


def test_intervals_are_those_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(2.0, 3.0, 4000)
    found = mean_estimate(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean_estimate(values) == found
    assert mean_estimate(values[: FEWEST - 1]).low is None
    assert mean_estimate(values[:0]).value is None
