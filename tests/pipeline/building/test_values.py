"""Every array of a cache against an independent computation, read by bare zarr."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from PIL import Image
from skimage.feature import hog

from repa.pipeline.store.rows import ComponentRows
from repa.pipeline.store.store import CacheStore
from repa.trainer.diffusion.latents import draw_latents
from repa.trainer.reading.reader import CacheReader

RESOLUTION, GRID = 16, 4


def adm_crop(file: Path, resolution: int) -> np.ndarray:
    """Decode and crop as guided-diffusion's image_datasets does, written from its definition."""
    image = Image.open(file).convert("RGB")
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (image.size[0] - resolution) // 2, (image.size[1] - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def study_hog(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Return tokens [T, 128] float64 by skimage, the map of unit blocks resized by torch; luma by Rec. 709."""
    blocks = hog(
        pixels @ [0.2126, 0.7152, 0.0722] / 255,
        orientations=8,
        pixels_per_cell=(2, 2),
        cells_per_block=(4, 4),
        block_norm="L2-Hys",
        feature_vector=False,
    )
    rows = torch.from_numpy(blocks.reshape(*blocks.shape[:2], 128).astype(np.float64))
    rows = F.normalize(rows, dim=-1)
    resized = F.interpolate(rows.permute(2, 0, 1)[None], (grid, grid), mode="bilinear", align_corners=False)
    return resized[0].flatten(1).T.numpy()


@pytest.fixture
def images(make_images: Callable[..., list[Path]], tmp_path: Path) -> list[Path]:
    files = make_images(tmp_path / "images", num=11)
    Image.new("RGB", (40, 30)).save(files[5])  # black: zeros everywhere
    for file in files[8:]:  # and a whole shard of zeros
        Image.new("RGB", (20, 20)).save(file)
    return files


@pytest.mark.parametrize("compressor", ["none", "zstd", "blosc"])
def test_every_array_holds_what_the_pictures_give(
    images: list[Path], tmp_path: Path, build: Callable[..., Any], compressor: str
) -> None:
    outcome = build(tmp_path / "images", tmp_path / "cache", "--compressor", compressor)
    assert outcome.code == 0, outcome.err

    root = zarr.open_group(tmp_path / "cache", mode="r")
    assert root["sample_id"][:].tolist() == [str(file.relative_to(tmp_path / "images")) for file in images]
    assert root["label"][:].tolist() == [0] * 6 + [1] * 5
    moments = root["latents/pixels/moments"][:]
    tokens = root["features/hog-grid4/patch_tokens"][:]
    mean = root["features/hog-grid4/channel_mean"][:]
    std = root["features/hog-grid4/channel_std"][:]
    assert (moments.shape, moments.dtype) == ((11, 2, 3, RESOLUTION, RESOLUTION), np.float16)
    assert (tokens.shape, tokens.dtype) == ((11, 2, GRID * GRID, 128), np.float16)
    assert (mean.shape, std.shape, mean.dtype, std.dtype) == ((11, 2, 128), (11, 2, 128), np.float32, np.float32)

    for row, file in enumerate(images):
        crop = adm_crop(file, RESOLUTION)
        for view, pixels in enumerate((crop, crop[:, ::-1])):
            exact = pixels.transpose(2, 0, 1) / 127.5 - 1
            # Half a unit in the last place of float16 below 1, and the float32 arithmetic before it.
            np.testing.assert_allclose(moments[row, view], exact, rtol=0, atol=2**-12 + 1e-6)
            expected = study_hog(pixels, GRID)
            # Between 2^-14 and 1, float16 keeps 11 bits.
            np.testing.assert_allclose(tokens[row, view], expected, rtol=2**-11 + 1e-5, atol=1e-6)
            np.testing.assert_allclose(mean[row, view], expected.mean(0), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(std[row, view], expected.std(0, ddof=1), rtol=1e-4, atol=1e-6)
    assert tokens[:5].std() > 0.03  # the pictures have edges: zeros would pass nothing above
    assert (tokens[5] == 0).all()
    for component in ("latents/pixels", "features/hog-grid4"):
        assert root[f"{component}/valid"][:].all()
        assert root[f"{component}/source_bytes"][:].tolist() == [file.stat().st_size for file in images]
        assert root[component].attrs["complete"] is True


def test_the_two_views_differ_and_mirror_each_other(
    images: list[Path], tmp_path: Path, build: Callable[..., Any]
) -> None:
    build(tmp_path / "images", tmp_path / "cache")
    moments = zarr.open_group(tmp_path / "cache", mode="r")["latents/pixels/moments"][:]
    np.testing.assert_array_equal(moments[:, 1], moments[:, 0, :, :, ::-1])
    assert (moments[0, 0] != moments[0, 1]).any()


def test_latent_statistics_are_those_of_all_pixels(
    images: list[Path], tmp_path: Path, build: Callable[..., Any]
) -> None:
    build(tmp_path / "images", tmp_path / "cache")
    group = zarr.open_group(tmp_path / "cache", mode="r")["latents/pixels"]
    moments = group["moments"][:].astype(np.float64)
    np.testing.assert_allclose(group.attrs["latent_mean"], moments.mean((0, 1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(group.attrs["latent_std"], moments.std((0, 1, 3, 4)), rtol=1e-12)


def test_pixels_as_uint8_are_the_crops_and_give_what_float16_holds(
    images: list[Path], tmp_path: Path, build: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    assert build(tmp_path / "images", cache).code == 0
    assert build(tmp_path / "images", cache, "--dtype", "uint8").code == 0  # beside the float16 ones
    group = zarr.open_group(cache, mode="r")["latents/pixels-uint8"]
    moments = group["moments"][:]
    assert (moments.shape, moments.dtype) == ((11, 1, 3, RESOLUTION, RESOLUTION), np.uint8)
    for row, file in enumerate(images):
        np.testing.assert_array_equal(moments[row, 0], adm_crop(file, RESOLUTION).transpose(2, 0, 1))
    exact = moments / 127.5 - 1
    np.testing.assert_allclose(group.attrs["latent_mean"], exact.mean((0, 1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(group.attrs["latent_std"], exact.std((0, 1, 3, 4)), rtol=1e-12)
    assert group.attrs["spec"]["views"] == ["identity"]

    store = CacheStore.open(cache)
    stored = ComponentRows(store, store.component("latents/pixels-uint8")).read("moments", np.arange(11), 1)
    np.testing.assert_array_equal(stored, moments[:, 0, :, :, ::-1])
    rows, views = np.tile(np.arange(11), 2), np.repeat([0, 1], 11)
    as_float16, as_uint8 = (CacheReader(cache, autoencoder=name, encoder=()) for name in ("pixels", "pixels-uint8"))
    drawn = draw_latents(as_uint8.rows(rows, views).moments, None, "sample")
    assert torch.equal(drawn.half(), as_float16.rows(rows, views).moments)  # to the bit, of the mirror too


def test_int8_tokens_follow_the_equation(images: list[Path], tmp_path: Path, build: Callable[..., Any]) -> None:
    assert build(tmp_path / "images", tmp_path / "cache").code == 0
    assert build(tmp_path / "images", tmp_path / "cache", "--dtype", "int8").code == 0  # beside the float16 ones
    root = zarr.open_group(tmp_path / "cache", mode="r")
    group = root["features/hog-grid4-int8"]
    codes, scale = group["patch_tokens"][:], group["token_scale"][:]
    assert (codes.dtype, scale.dtype, scale.shape) == (np.int8, np.float16, (11, 2, GRID * GRID))
    mean, std = group["channel_mean"][:].astype(np.float64), group["channel_std"][:].astype(np.float64)
    np.testing.assert_array_equal(mean, root["features/hog-grid4/channel_mean"][:])
    np.testing.assert_array_equal(std, root["features/hog-grid4/channel_std"][:])

    decoded = codes * scale[..., None].astype(np.float64) * std[:, :, None] + mean[:, :, None]
    original = np.stack(
        [
            [study_hog(view, GRID) for view in (crop, crop[:, ::-1])]
            for crop in (adm_crop(file, RESOLUTION) for file in images)
        ]
    )
    # Half a step of the code, in units of the channel's std; float16's rounding of the scale lets |x| / s exceed 127
    # by 2^-11 of itself, which the clamp then takes off.
    step = scale[..., None].astype(np.float64) * std[:, :, None]
    error = np.abs(decoded - original)
    assert (error <= step * (0.5 + 127 * 2**-11) + 2e-6).all()
    assert np.abs(codes.astype(int)).max() == 127
    assert (codes[5] == 0).all()
    assert (scale[5] == 0).all()


def test_metadata_says_nothing_of_when_where_and_who(
    images: list[Path], tmp_path: Path, build: Callable[..., Any]
) -> None:
    build(tmp_path / "images", tmp_path / "cache")
    for file in (tmp_path / "cache").rglob("zarr.json"):
        text = file.read_text()
        assert str(tmp_path) not in text
        keys = json.dumps(json.loads(text)).lower()
        assert not any(word in keys for word in ('"time', '"date"', '"host', '"user', '"path"', "pid")), file


def test_every_inner_chunk_is_there_zero_or_not(images: list[Path], tmp_path: Path, build: Callable[..., Any]) -> None:
    build(tmp_path / "images", tmp_path / "cache")
    # 11 samples in shards of 4: the last shard has room for a twelfth, whose two views are absent.
    for shard, present in enumerate([8, 8, 6]):
        data = (tmp_path / f"cache/features/hog-grid4/patch_tokens/c.{shard}.0.0.0").read_bytes()
        index = np.frombuffer(data[-(8 * 16 + 4) : -4], dtype="<u8").reshape(8, 2)
        assert (index != 2**64 - 1).all(axis=1).tolist() == [True] * present + [False] * (8 - present)
