"""What SiT holds inside, against its own forward pass cut off after a block."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.diffusion.latents import LatentNorm
from repa.trainer.models.layers import _noise, pooled_layers
from repa.trainer.models.sit import SiT, sit_config
from repa.trainer.reading.reader import CacheReader

NORM = LatentNorm(scale=(2.0, 1.0, 0.5), bias=(0.1, 0.0, -0.3))


@pytest.fixture(params=["repa", "sit"])
def model(small_sit, request: pytest.FixtureRequest) -> SiT:
    config = sit_config("SiT-Ti/2", input_size=8, in_channels=3, num_classes=3)
    model = SiT(dataclasses.replace(config, convention=request.param))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_layers_are_the_blocks_outputs_pooled(make_cache, model):
    written = make_cache(latents="mean_std")
    reader = CacheReader(written.path, encoder=())
    rows = np.array([1, 4, 9, 17, 22])
    found = pooled_layers(model, reader, rows, t=0.3, depths=[2, 1], norm=NORM, interpolant=Interpolant(), batch_size=2)
    moments = torch.from_numpy(written.arrays["latents/toy-ae/moments"][rows, 0]).float()
    noise = torch.from_numpy(np.stack([_noise(0, int(row), (3, 8, 8), 0)[0] for row in rows]))
    z = moments[:, :3] + moments[:, 3:] * noise[:, 0]
    scale, bias = (torch.tensor(values).view(3, 1, 1) for values in (NORM.scale, NORM.bias))
    x_t = 0.7 * (z - bias) * scale + 0.3 * noise[:, 1]
    with torch.no_grad():
        tokens = model.x_embedder(x_t) + model.pos_embed
        t = 0.3 if model.config.convention == "repa" else 0.7
        null = torch.full((5,), 3)  # of three classes: a true label would be in the tokens
        conditioning = model.t_embedder(torch.full((5,), t)) + model.y_embedder(null)
        for depth, block in enumerate(model.blocks, start=1):
            tokens = block(tokens, conditioning)
            torch.testing.assert_close(found[depth], tokens.mean(1), rtol=1e-5, atol=1e-5)
    assert list(found) == [2, 1]
    assert model.training
    assert not model.blocks[0]._forward_hooks


def test_what_does_not_fit_is_refused(make_cache, model):
    reader = CacheReader(make_cache().path, encoder=())
    arguments = {"norm": NORM, "interpolant": Interpolant()}
    with pytest.raises(UsageError, match="depth 3: SiT-Ti/2 has blocks 1 to 2"):
        pooled_layers(model, reader, np.arange(4), t=0.5, depths=[1, 3], **arguments)
    with pytest.raises(UsageError, match=r"t is 1.5; expected 0 \(data\) to 1 \(noise\)"):
        pooled_layers(model, reader, np.arange(4), t=1.5, depths=[1], **arguments)
    other = CacheReader(make_cache(size=4).path, encoder=())
    with pytest.raises(UsageError, match=r"has latents \[3, 4, 4\]; the model takes \[3, 8, 8\]"):
        pooled_layers(model, other, np.arange(4), t=0.5, depths=[1], **arguments)


def test_labels_are_not_in_the_layers(make_cache, model):
    reader = CacheReader(make_cache().path, encoder=())
    arguments = {"t": 0.5, "depths": [1, 2], "norm": NORM, "interpolant": Interpolant()}
    found = pooled_layers(model, reader, np.arange(6), **arguments)
    reader.labels = (reader.labels + 1) % 3
    again = pooled_layers(model, reader, np.arange(6), **arguments)
    for depth, tokens in found.items():
        torch.testing.assert_close(again[depth], tokens, rtol=0, atol=0)


def test_the_command_prints_a_figure_a_depth_and_time(make_cache, repa_train, tmp_path: Path, capsys):
    from repa.trainer.commands.cknna import cknna_command

    cache = make_cache().path
    assert repa_train(cache, tmp_path / "run", "--steps", "3").code == 0
    options = ["--cache", str(cache), "--k", "5", "--t", "0.2", "--t", "0.8", "--device", "cpu"]
    cknna_command.main([str(tmp_path / "run"), *options], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert "CKNNA with toy, k = 5, 23 images" in lines[0]
    assert [line.split()[:5] for line in lines[1:]] == [
        ["t", t, "after", "block", depth] for t in ("0.2", "0.8") for depth in ("1", "2")
    ]
    assert all(abs(float(line.split()[-1])) <= 1 for line in lines[1:])
