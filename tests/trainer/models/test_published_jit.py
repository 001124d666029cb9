"""Checkpoints as JiT's own code leaves them: its names behind `net.`, two averages, args."""

import argparse
from pathlib import Path

import pytest
import torch

from repa.trainer.models import jit
from repa.trainer.models.checkpoint import CheckpointError
from repa.trainer.models.jit import JiT, jit_config
from repa.trainer.models.pretrained import open_model
from repa.trainer.objectives.choose import stored_field

from .test_sit import randomized


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return the file and its three sets of weights, of a small JiT."""
    monkeypatch.setitem(jit.SIZES, "Ti", (4, 32, 2, 8, 2, 0.2))
    config = jit_config("JiT-Ti/4", input_size=16, in_channels=3, num_classes=5)
    models = [randomized(JiT(config), seed).eval() for seed in range(3)]
    states = [{f"net.{name}": value for name, value in model.state_dict().items()} for model in models]
    args = argparse.Namespace(model="JiT-Ti/4", ema_decay1=0.9999, ema_decay2=0.9996, img_size=16)
    stored = dict(zip(("model", "model_ema1", "model_ema2"), states, strict=True)) | {"args": args, "epoch": 3}
    torch.save(stored, tmp_path / "checkpoint-last.pth")
    return tmp_path / "checkpoint-last.pth", models, stored


@pytest.mark.parametrize(("weights", "index"), [("model", 0), ("ema", 1), ("ema:0.9999", 1), ("ema:0.9996", 2)])
def test_all_weights_load_and_answer_the_same_images(published, weights: str, index: int):
    file, models, _ = published
    trained = open_model(file, weights=weights)
    assert trained.model.config == models[index].config
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.8]), torch.tensor([0, 5])
    assert torch.equal(trained.model(x, t, y), models[index](x, t, y))
    source, field = trained.latents(None), stored_field(trained.method, trained.interpolant)
    assert (source.name, source.norm.scale, source.norm.bias) == ("pixels", (1.0,) * 3, (0.0,) * 3)
    assert field.noise_scale(trained.model) == 16 / 256
    assert any("JiT-Ti/4 by its shapes" in line for line in trained.assumed)


def test_what_does_not_fit_is_one_line(published):
    file, _, stored = published
    with pytest.raises(CheckpointError, match=r"one convention; leave out convention="):
        open_model(file, convention="sit")
    with pytest.raises(Exception, match=r"holds averages of decay 0\.9999, 0\.9996; weights=.ema:0\.5. names none"):
        open_model(file, weights="ema:0.5")
    del stored["model_ema1"]["net.blocks.1.attn.q_norm.weight"]
    torch.save(stored, file)
    with pytest.raises(CheckpointError, match=r"not the weights of JiT-Ti/4 .*1\.attn\.q_norm\.weight is absent"):
        open_model(file)
    for name in list(stored["model_ema1"]):
        if ".blocks.3." in name:
            del stored["model_ema1"][name]
    torch.save(stored, file)
    with pytest.raises(CheckpointError, match=r"depth 3 and width 32 are none of the sizes Ti, B, L, H of JiT"):
        open_model(file)
