"""A SiT's tokens as an encoder's, against its blocks called one after the other; what they depend on, and what not."""

import dataclasses

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.diffusion.latents import LatentNorm
from repa.trainer.models.jit import JiT, JiTConfig
from repa.trainer.models.layer_tokens import LayerTokens
from repa.trainer.models.sit import SiT, sit_config
from repa.trainer.reading.reader import CacheReader

from .test_sit import randomized

NORM = LatentNorm(scale=(2.0, 1.0, 0.5), bias=(0.1, 0.0, -0.3))
ROWS = np.array([1, 4, 9, 17, 22])


@pytest.fixture
def model(small_sit: None) -> SiT:
    return randomized(SiT(sit_config("SiT-Ti/2", input_size=8, in_channels=3, num_classes=3)), 0)


@pytest.fixture(scope="module")
def written(make_cache):
    return make_cache(latents="mean_std")


@pytest.fixture
def reader(written) -> CacheReader:
    return CacheReader(written.path, encoder=())


def noise_of(seed: int, row: int, view: int) -> np.ndarray:
    """Three channels of 8 x 8 from the stream (7, row, view) of a seed."""
    stream = np.random.SeedSequence(seed, spawn_key=(7, row, view))
    return np.random.Generator(np.random.PCG64(stream)).standard_normal((3, 8, 8), dtype=np.float32)


@pytest.mark.parametrize("view", [0, 1])
def test_tokens_are_those_of_the_noised_mean_under_the_null_label(written, reader, model, view: int):
    tokens = LayerTokens(model, reader, t=0.3, norm=NORM, interpolant=Interpolant(), seed=5)
    found = tokens.read(ROWS, view, [2, 0, 1])
    mean = torch.from_numpy(written.arrays["latents/toy-ae/moments"][ROWS, view, :3]).float()
    noise = torch.from_numpy(np.stack([noise_of(5, row, view) for row in ROWS.tolist()]))
    scale, bias = (torch.tensor(values).view(3, 1, 1) for values in (NORM.scale, NORM.bias))
    x_t = 0.7 * (mean - bias) * scale + 0.3 * noise
    with torch.no_grad():
        conditioning = model.t_embedder(torch.full((5,), 0.3)) + model.y_embedder(torch.full((5,), 3))
        expected = model.x_embedder(x_t) + model.pos_embed
        for depth, block in enumerate([None, *model.blocks]):
            expected = expected if block is None else block(expected, conditioning)
            torch.testing.assert_close(found[depth], expected, rtol=1e-4, atol=1e-4)
    assert list(found) == [2, 0, 1]
    assert tokens.every_view(ROWS, 2).shape == (5, 2, 16, 32)
    torch.testing.assert_close(tokens.every_view(ROWS, 2)[:, view], found[2], rtol=0, atol=0)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_the_input_is_a_function_of_seed_row_view_and_time_alone(reader, model):
    def noised(t: float, rows=ROWS, view: int = 0, **options) -> torch.Tensor:
        return LayerTokens(model, reader, t=t, norm=NORM, interpolant=Interpolant(), **options).noised(rows, view)

    together = noised(0.4)
    order = np.array([3, 0, 4, 1, 2])
    assert torch.equal(noised(0.4, ROWS[order]), together[order])
    assert torch.equal(torch.cat([noised(0.4, ROWS[i : i + 2]) for i in (0, 2, 4)]), together)
    assert torch.equal(noised(0.0, seed=1), noised(0.0))  # data: no noise of any seed
    assert torch.equal(noised(1.0, noise_scale=2.0), 2 * noised(1.0))
    for other in (noised(0.4, seed=1), noised(0.4, view=1), noised(0.5)):
        assert not torch.equal(other, together)


def test_labels_and_later_blocks_have_no_part(reader, model):
    tokens = LayerTokens(model, reader, t=0.2, norm=NORM, interpolant=Interpolant())
    found = tokens.read(ROWS, 0, [1])[1]
    reader.labels = (reader.labels + 1) % 3
    model.blocks[1] = torch.nn.Identity()  # which could not be called as a block is
    assert torch.equal(tokens.read(ROWS, 0, [1])[1], found)


def test_class_tokens_of_a_jit_are_cut_off(reader):
    config = JiTConfig(
        name="small/2", input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=3,
        bottleneck=4, class_tokens_at=1,
    )  # fmt: skip
    model = randomized(JiT(config), 0).eval()
    tokens = LayerTokens(model, reader, t=0.2, norm=NORM, interpolant=Interpolant(), noise_scale=0.03)
    found = tokens.read(ROWS, 0, [0, 1, 2, 3])
    assert {one.shape for one in found.values()} == {(5, 16, 16)}
    with torch.no_grad():
        conditioning = model.t_embedder(torch.full((5,), 0.8)) + model.y_embedder(torch.full((5,), 3))
        clean = model._unpatchify(model.final_layer(found[3], conditioning))
        expected = model(tokens.noised(ROWS, 0), torch.full((5,), 0.2), torch.full((5,), 3))
    torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_an_encoder_is_refused(reader, model):
    arguments = {"norm": NORM, "interpolant": Interpolant()}
    with pytest.raises(UsageError, match=r"t is -0.1; expected 0 \(data\) to 1 \(noise\)"):
        LayerTokens(model, reader, t=-0.1, **arguments)
    with pytest.raises(UsageError, match=r"has latents \[3, 8, 8\]; the model takes \[3, 4, 4\]"):
        LayerTokens(SiT(dataclasses.replace(model.config, input_size=4)), reader, t=0.2, **arguments)
    with pytest.raises(UsageError, match="takes an encoder's class token beside the latents"):
        LayerTokens(SiT(dataclasses.replace(model.config, cls_width=4)), reader, t=0.2, **arguments)
