"""Frozen encoders, a small one of each family, against an independent forward through the models' own parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import encoder_table, resolve_encoder
from repa.pipeline.images.preprocess import encoder_input
from repa.pipeline.models.encoders import Encoder, autocast, load_encoder

from .small_encoders import FAMILIES, small_spec

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def pictures(num: int = 2, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=generator)


def own_input(images: torch.Tensor, spec: dict[str, Any]) -> torch.Tensor:
    """Return what the model must see, in float64: resized in [0, 1] first, normalised after; the two commute."""
    size = tuple(spec["input_size"])
    pixels = images.double() / 255
    if size != pixels.shape[-2:]:
        pixels = F.interpolate(pixels, size, mode=spec["interpolation"], antialias=spec["antialias"])
    mean, std = (torch.tensor(spec[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    return ((pixels - mean) / std).float()


def own_forward(model: Any, pixels: torch.Tensor, spec: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all tokens (prefix first) before and after the final norm, from the model's own parts."""
    if spec["loader"] == "transformers":
        x = model.embeddings(pixels)
        for block in model.encoder.layer:
            x = x + block.layer_scale1(block.attention(block.norm1(x))[0])
            x = x + block.layer_scale2(block.mlp(block.norm2(x)))
        return x, model.layernorm(x)
    if spec["model"].startswith("vgg"):
        for layer in model:
            x = layer(pixels) if layer is model[0] else layer(x)
        return _as_tokens(x, spec), torch.empty(0)
    if spec["model"].startswith("samvit"):
        x = model.patch_embed(pixels) + model.pos_embed
        for block in model.blocks:
            x = block(x)
        return _as_tokens(model.neck(x.permute(0, 3, 1, 2)), spec), torch.empty(0)
    if spec["model"].startswith("sam2"):
        x = model._pos_embed(model.patch_embed(pixels))
        for block in model.blocks:
            x = block(x)
        return x.flatten(1, 2), torch.empty(0)
    x = model.patch_embed(pixels)
    if hasattr(model, "rope"):
        x, rope = model._pos_embed(x)
        x = model.norm_pre(x)
        for block in model.blocks:
            x = block(x, rope=rope)
    else:
        x = model.norm_pre(model._pos_embed(x))
        for block in model.blocks:
            x = block(x)
    return x, model.norm(x)


def _as_tokens(features: torch.Tensor, spec: dict[str, Any]) -> torch.Tensor:
    if features.shape[-2:] != tuple(spec["grid"]):
        features = F.interpolate(features, tuple(spec["grid"]), mode="bilinear")
    return features.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_declared_tensor_of_the_models_own_parts(family: str) -> None:
    name = FAMILIES[family]
    if encoder_table()[name].loader == "transformers":
        pytest.importorskip("transformers")
    spec = small_spec(name)
    encoder = load_encoder(spec)
    _rough(encoder)
    images = pictures()
    tokens, cls_token = encoder(images)
    with torch.no_grad():
        before, after = own_forward(encoder.model, own_input(images, spec), spec)
    chosen, other = (after, before) if spec["tensor"] == "after_norm" else (before, after)
    prefix = spec["prefix_tokens"]
    assert tokens.shape == (2, 9, spec["width"])
    assert tokens.dtype == torch.float32
    scale = chosen.std().item()  # rough convolutions make large numbers
    torch.testing.assert_close(tokens, chosen[:, prefix:], rtol=1e-3, atol=1e-4 * scale)
    assert (cls_token is not None) == spec["cls_token"]
    if cls_token is not None:
        torch.testing.assert_close(cls_token, chosen[:, 0], rtol=1e-3, atol=1e-4 * scale)
    if spec["tensor"] != "no_norm":  # the choice is not without effect
        assert (tokens - other[:, prefix:]).abs().max() > 1e-2


def _rough(encoder: Encoder) -> None:
    """Give every parameter some noise: fresh norms are the identity, fresh LayerScales nearly zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "name", ["dinov2-vit-s", "dinov3-vit-s16", "siglip2-vit-b", "pe-vit-t", "cradio-vit-b", "mae-vit-b"]
)
def test_the_model_sees_what_its_card_asks(name: str) -> None:
    for resolution in (64, 128):
        spec = resolve_encoder(name, resolution=resolution).spec
        images = pictures(side=resolution)
        found = encoder_input(images, spec)
        torch.testing.assert_close(found, own_input(images, spec), rtol=1e-4, atol=1e-4)


def test_at_twice_the_resolution_the_grid_is_twice_as_fine() -> None:
    for name in ("dinov2-vit-s", "dinov3-vit-s16", "pe-vit-t", "sam-vit-b"):
        small = small_spec(name)
        assert load_encoder({**small_spec(name, grid=6)})(pictures())[0].shape == (2, 36, small["width"])


def test_a_flipped_picture_has_other_tokens_than_the_flipped_map() -> None:
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = load_encoder(resolve_encoder("hog:grid=4", resolution=32).spec)(torch.cat([images, images.flip(-1)]))[0]
    assert (tokens[0] - tokens[1]).abs().max() > 0.05


def test_input_is_normalised_then_resized_in_float() -> None:
    spec = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "input_size": (8, 8), "interpolation": "bilinear"}
    images = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(1, 3, 16, 16)
    # Halving bilinearly without antialias is the mean of 2 x 2.
    mean = images.double().numpy().reshape(1, 3, 8, 2, 8, 2).mean((3, 5)) / 255
    expected = (mean - np.array(spec["mean"]).reshape(3, 1, 1)) / np.array(spec["std"]).reshape(3, 1, 1)
    found = encoder_input(images, {**spec, "antialias": False})
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert encoder_input(images, {**spec, "antialias": True}).sub(found).abs().max() > 1e-3
    plain = encoder_input(images, {**spec, "mean": None, "std": None, "input_size": (16, 16), "antialias": False})
    torch.testing.assert_close(plain, images / 255)


def test_hog_takes_no_weights_and_no_tiny_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hog has no weights"):
        load_encoder(resolve_encoder("hog", resolution=32).spec, weights=tmp_path / "x.pth")
    spec = {**resolve_encoder("hog:grid=2", resolution=8).spec, "input_size": [4, 4]}
    with pytest.raises(UsageError, match="at least 8 pixels"):
        load_encoder(spec)


@pytest.mark.parametrize("outer", [False, True])
def test_a_models_precision_is_its_own_under_a_callers_autocast(outer):
    linear, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        with autocast(torch.device("cpu"), "fp32"):
            assert linear(x).dtype == torch.float32
        with autocast(torch.device("cpu"), "bf16"):
            assert linear(x).dtype == torch.bfloat16


@pytest.mark.parametrize("before", [False, True])
def test_tf32_is_of_the_models_precision_and_the_callers_afterwards(before):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    usual = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = before
        for precision, expected in (("fp32", (False, False)), ("tf32", (True, True)), ("bf16", (True, False))):
            with autocast(torch.device("cpu"), precision):
                assert (cudnn.allow_tf32, matmul.allow_tf32) == expected
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (before, before)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = usual
