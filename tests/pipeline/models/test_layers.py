"""Several layers of one encoder: each with its own arrays in one group, and read by picking one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import pick_layer, resolve_encoder
from repa.pipeline.analysis.features import open_encoders
from repa.pipeline.models.encoders import load_encoder
from repa.trainer import CacheReader

OWN = """
loader: timm
model: vit_tiny_patch16_224.augreg_in21k
options: {depth: 3, embed_dim: 64, num_heads: 2}
width: 64
patch: 16
depth: 3
prefix_tokens: 1
cls_token: true
tensor: after_norm
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
interpolation: bicubic
antialias: false
licence: apache-2.0
"""
GROUP = "mine-grid2-layers0-2-random"

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture
def cache(tmp_path: Path, make_images: Callable[..., Any], build: Callable[..., Any]) -> Path:
    make_images(tmp_path / "images", num=5)
    (tmp_path / "mine.yaml").write_text(OWN)
    for dtype in ("float16", "int8"):
        request = f"{tmp_path}/mine.yaml:grid=2:layers=0,2"
        done = build(tmp_path / "images", tmp_path / "c", "--encoder", request, "--random-weights", "--dtype", dtype)
        assert done.code == 0, done.err
    return tmp_path / "c"


def test_each_layer_has_its_own_arrays_and_is_picked_by_name(cache: Path, repa_cache: Callable[..., Any]) -> None:
    group = zarr.open_group(cache / f"features/{GROUP}", mode="r")
    assert group["patch_tokens_layer0"].shape == (5, 2, 4, 64)
    names = {"patch_tokens", "channel_mean", "channel_std", "cls_token"}
    arrays = {f"{name}_layer{layer}" for name in names for layer in (0, 2)}
    assert set(group.array_keys()) == arrays | {"valid", "source_bytes", "shard_checksums"}
    reader = CacheReader(cache, encoder=[f"{GROUP}:layer=0", f"{GROUP}:layer=2", f"{GROUP}-int8:layer=2"])
    assert [spec.name for spec in reader.features][1] == f"{GROUP}:layer=2"
    first, last, small = reader.rows([3, 1], [1, 0]).features
    for layer, batch in ((0, first), (2, last)):
        stored = group[f"patch_tokens_layer{layer}"]
        np.testing.assert_array_equal(batch.tokens.numpy(), np.stack([stored[3, 1], stored[1, 0]]))
        np.testing.assert_array_equal(batch.channel_mean.numpy()[0], group[f"channel_mean_layer{layer}"][3, 1])
        assert batch.cls_token is not None
        np.testing.assert_array_equal(batch.cls_token.numpy()[1], group[f"cls_token_layer{layer}"][1, 0])
    assert small.token_scale is not None
    decoded = small.tokens * small.token_scale[..., None].float() * small.channel_std[:, None]
    torch.testing.assert_close(decoded + small.channel_mean[:, None], last.tokens.float(), rtol=0, atol=0.05)
    assert (first.tokens.float() - last.tokens.float()).abs().max() > 0.1
    assert repa_cache("verify", cache).code == 0


def test_the_tokens_are_those_of_the_named_blocks(cache: Path) -> None:
    spec = resolve_encoder(f"{cache.parent}/mine.yaml:grid=2:layers=0,2", resolution=16, random_weights=True).spec
    encoder = load_encoder(spec)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = encoder.model
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images.float() / 127.5 - 1))
        after = []
        for block in model.blocks:
            x = block(x)
            after.append(model.norm(x))
    for (tokens, cls_token), expected in zip(encoder.by_layer(images), (after[0], after[2]), strict=True):
        torch.testing.assert_close(tokens, expected[:, 1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cls_token, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_every_layer_is_measured_where_none_is_named(cache: Path) -> None:
    _, encoders = open_encoders(cache, [])
    assert [encoder.name for encoder in encoders if encoder.name.startswith(f"{GROUP}:")] == [
        f"{GROUP}:layer=0",
        f"{GROUP}:layer=2",
    ]
    first, last = (encoder.pooled(np.arange(5)) for encoder in encoders if encoder.name.startswith(f"{GROUP}:"))
    assert np.abs(first - last).max() > 0.01


def test_what_is_not_stored_is_refused_and_the_command_names_the_file(cache: Path) -> None:
    with pytest.raises(UsageError, match=f"holds layers 0, 2; pick one, as in encoder=.{GROUP}:layer=2"):
        CacheReader(cache, encoder=GROUP)
    with pytest.raises(UsageError, match="holds layers 0, 2"):
        CacheReader(cache, encoder=f"{GROUP}:layer=1")
    with pytest.raises(UsageError, match="the last layer's tokens alone; leave out :layer=3"):
        CacheReader(cache, encoder="hog-grid4:layer=3")
    with pytest.raises(UsageError, match="layer is 'last'"):
        CacheReader(cache, encoder=f"{GROUP}:layer=last")
    with pytest.raises(UsageError, match="blocks 0 to 11 in ascending order"):
        resolve_encoder("dinov2:layers=11,12", resolution=256)
    with pytest.raises(UsageError, match="not tokens of one grid"):
        resolve_encoder("sam2:layers=1", resolution=256)
    assert pick_layer("features/x", [7], None) == 7
    component = open_encoders(cache, [f"{GROUP}:layer=2"])[1][0].component
    asked = "--encoder mine.yaml:grid=2:layers=0,2 --autoencoder none --precision fp32 --random-weights"
    assert asked in component.build_command(cache)
