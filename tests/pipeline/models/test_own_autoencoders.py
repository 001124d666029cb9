"""Autoencoders of one's own: stored moments, decoded pictures, and who may run them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from PIL import Image

from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import resolve_autoencoder
from repa.pipeline.models.autoencoders import load_autoencoder
from repa.trainer import CacheReader
from repa.trainer.commands.borrowed import load_decoder
from repa.trainer.diffusion.latents import LatentNorm, LatentSource
from repa.trainer.reading.norm import reader_norm

# A picture's 2 x 2 pixels are the 12 channels of a latent: nothing is lost.
SOURCE = """
import torch.nn.functional as F

class Patches:
    def __init__(self, gain):
        self.gain = gain

    def encode(self, pixels):
        return F.pixel_unshuffle(pixels, 2) * self.gain

    def decode(self, latents):
        return F.pixel_shuffle(latents, 2) / self.gain
"""
ENTRY: dict[str, Any] = {
    "loader": "python",
    "target": "patches.py:Patches",
    "options": {"gain": 2.0},
    "latent_channels": 12,
    "factor": 2,
    "kind": "sample",
    "pixel_range": [0, 1],
    "scale": 0.5,
    "bias": 0.25,
    "licence": "mit",
}


def write(folder: Path, source: str = SOURCE, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "patches.py").write_text(source)
    entry = {key: value for key, value in {**ENTRY, **fields}.items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(entry))
    return folder / "mine.yaml"


def load(file: Path) -> Any:
    resolved = resolve_autoencoder(str(file), resolution=16)
    return load_autoencoder(resolved.spec, code=resolved.code)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "images/a").mkdir(parents=True)
    for index in range(5):
        picture = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"images/a/{index}.png")
    return tmp_path / "images"


def test_what_is_stored_is_what_it_encodes_and_decodes_to_the_picture(
    tmp_path: Path, images: Path, build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    file, cache = write(tmp_path / "own"), tmp_path / "cache"
    done = build(images, cache, "--autoencoder", file)
    assert done.code == 0, done.err
    moments = torch.from_numpy(zarr.open_group(cache / "latents/mine", mode="r")["moments"][:, 0]).float()
    with Image.open(images / "a/3.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for row in range(8):
        for column in range(8):
            block = pixels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].float() / 255
            torch.testing.assert_close(moments[3, :, row, column], 2 * block.flatten(), rtol=1e-3, atol=1e-3)
    decoded = load(file).decode(moments[3:4])[0].permute(2, 0, 1)
    assert (decoded.int() - pixels.int()).abs().max() <= 1
    recompute = ["verify", cache, "--recompute", 3, "--data", images, "--device", "cpu"]
    assert "latents/mine: not encoded again: is of a network of your own" in repa_cache(*recompute).unfolded
    assert "latents/mine: 3 samples encoded again" in repa_cache(*recompute, "--entry", file).unfolded
    out = ["--encoder", "hog:grid=4", "--samples", 2, "--out", tmp_path / "show.png"]
    done = repa_cache("show", cache, *out)
    assert (done.code, "give its file, --entry mine.yaml" in done.err) == (2, True)
    assert repa_cache("show", cache, *out, "--entry", file).code == 0


def test_a_run_takes_its_scale_from_the_file_and_decodes_with_it(
    tmp_path: Path, images: Path, build: Callable[..., Any]
) -> None:
    file, cache = write(tmp_path / "own"), tmp_path / "cache"
    assert build(images, cache, "--autoencoder", file).code == 0
    reader = CacheReader(cache, encoder="hog-grid4")
    norm = reader_norm(reader, "fixed")
    assert norm == LatentNorm(scale=(0.5,) * 12, bias=(0.25,) * 12)
    latents = reader.latents
    source = LatentSource(name=latents.name, spec=latents.spec, weights=latents.weights, norm=norm)
    with pytest.raises(UsageError, match=r"mine is of a network of your own; give its file, --entry mine\.yaml"):
        load_decoder(source, weights=None, device="cpu")
    decode, name = load_decoder(source, weights=None, device="cpu", entries=[file])
    assert decode is not None
    assert name == f"mine {latents.weights}"
    assert decode(torch.full((1, 12, 8, 8), 1.0)).unique().tolist() == [128]  # 0.5 of 255, rounded half to even
    write(tmp_path / "own", SOURCE + "# changed\n")
    with pytest.raises(UsageError, match=r"patches\.py of .* is not the one that it was built with"):
        load_decoder(source, weights=None, device="cpu", entries=[file])


def test_latents_that_were_begun_are_finished_with_the_file(
    tmp_path: Path, images: Path, build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    file, cache = write(tmp_path / "own"), tmp_path / "cache"
    assert build(images, cache, "--autoencoder", file).code == 0
    next((cache / "latents/mine/valid").glob("c.0*")).unlink()
    done = repa_cache("build", "--data", images, "--cache", cache, "--encoder", "hog:grid=2", "--workers", 0)
    assert (done.code, "of an autoencoder of your own; finish it with" in done.err) == (2, True)
    assert "--autoencoder mine.yaml" in done.err
    assert build(images, cache, "--autoencoder", file).code == 0
    assert "INCOMPLETE" not in repa_cache("info", cache).out


@pytest.mark.parametrize(
    ("source", "fields", "said"),
    [
        ("def Patches(gain):\n    return lambda x: x\n", {}, "a function without encode; expected both methods"),
        (SOURCE.replace("(pixels, 2)", "(pixels, 4)"), {}, r"encode returns .*\[3, 48, 4, 4\], expected"),
        (SOURCE.replace("(latents, 2)", "(latents[:, :4], 2)"), {}, r"decode returns .*\[3, 1, 16, 16\], expected"),
        (SOURCE, {"kind": "mean_std"}, r"encode returns .*\[3, 12, 8, 8\], expected float32 \[3, 24, 8, 8\]"),
        (SOURCE.replace("(pixels, 2)", "(pixels.repeat(1, 2, 1, 1) - 1, 2)"), {"kind": "mean_std"}, "values below 0"),
        (SOURCE.replace("* self.gain", "* float('nan')"), {}, "values are not finite"),
        (SOURCE, {"kind": "mean"}, "kind is 'mean', expected one of"),
        (SOURCE, {"pixel_range": [1, 0]}, r"pixel_range is \[1, 0\], expected two numbers"),
        (SOURCE, {"bias": None}, "scale 0.5, bias None: expected both or neither"),
        (SOURCE, {"factor": 3}, "needs a resolution that is a multiple of 3"),
        (SOURCE, {"loader": "diffusers", "model": "x", "target": None, "options": None}, "library_class is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path: Path, source: str, fields: dict[str, Any], said: str) -> None:
    file = write(tmp_path, source, **fields)
    with pytest.raises(UsageError, match=said) as error:
        load(file)
    assert "\n" not in str(error.value)
