"""Models come back from our checkpoints and from files as REPA and iREPA publish them, made here by hand."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.models.checkpoint import CheckpointError, save_checkpoint
from repa.trainer.models.ema import EMA
from repa.trainer.models.pretrained import _weights, load_model, open_model
from repa.trainer.models.projector import ProjectorConfig
from repa.trainer.models.published import short
from repa.trainer.models.sit import SIZES, SiT, sit_config

MLP = ProjectorConfig(kind="mlp", out_dim=5, hidden_dim=7)
CONV = ProjectorConfig(kind="conv", out_dim=5, kernel_size=3)
LINEAR = ProjectorConfig(kind="linear", out_dim=6)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the two sizes their names' depths and little width."""
    for name, width in (("Ti", 32), ("S", 48)):
        monkeypatch.setitem(SIZES, name, (SIZES[name][0], width, 2))


def trained(*projectors: ProjectorConfig, seed: int = 0, depth: int = 4, name: str = "SiT-Ti/8") -> SiT:
    """A small SiT whose every parameter is noise."""
    config = sit_config(name, input_size=16, in_channels=3, num_classes=3)
    model = SiT(config, projectors, encoder_depth=depth if projectors else None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def published(path: Path, model: SiT, ema: SiT, *, nested_mlp: bool = False, **args) -> Path:
    """Write a file as REPA's train.py does; `nested_mlp` as iREPA's, whose MLP lies in `projection_layer`."""

    def named(state):
        if not nested_mlp:
            return dict(state)
        return {
            ".".join([*p[:2], "projection_layer", *p[2:]]) if (p := name.split("."))[0] == "projectors" else name: value
            for name, value in state.items()
        }

    stored = {
        "model": named(model.state_dict()),
        "ema": named(ema.state_dict()),
        "opt": torch.optim.AdamW(model.parameters()).state_dict(),
        "args": argparse.Namespace(model="SiT-Ti/8", num_classes=3, encoder_depth=4, qk_norm=False, **args),
        "steps": 400_000,
    }
    torch.save(stored, path)
    return path


def assert_same(found: SiT, expected: SiT) -> None:
    assert not found.training
    assert found.config == expected.config
    assert found.projector_configs == expected.projector_configs
    assert found.encoder_depth == expected.encoder_depth
    generator = torch.Generator().manual_seed(9)
    x, t = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0.1, 0.5, 1.0])
    y = torch.tensor([0, 2, 3])
    with torch.no_grad():
        assert torch.equal(found(x, t, y), expected(x, t, y))
        tokens = (model(x, t, y, return_projections=True)[1] for model in (found, expected))
        for a, b in zip(*tokens, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("projectors", [(), (MLP,), (CONV, LINEAR)])
def test_ours(tmp_path: Path, projectors):
    model, ema = trained(*projectors, seed=1), trained(*projectors, seed=2)
    path = save_checkpoint(
        tmp_path,
        steps=7,
        model=model,
        ema=EMA(ema, 0.5).model,
        opt={},
        args={},
        config={"interpolant": {"path": "cosine"}},
        fingerprints={},
        keep_last=1,
    )
    assert_same(load_model(path), ema)
    assert_same(load_model(path, weights="model"), model)
    opened = open_model(tmp_path)  # the run's folder
    assert (opened.path, opened.steps, opened.interpolant.path) == (path, 7, "cosine")
    assert opened.config == {"interpolant": {"path": "cosine"}}


def test_repa(tmp_path: Path):
    model, ema = trained(MLP, MLP, seed=1), trained(MLP, MLP, seed=2)
    path = published(tmp_path / "0400000.pt", model, ema, path_type="cosine", enc_type="dinov2-vit-b")
    assert_same(load_model(path), ema)
    assert_same(load_model(str(path), weights="model"), model)
    opened = open_model(path)
    assert (opened.steps, opened.interpolant.path, opened.config) == (400_000, "cosine", None)


def test_repas_download_is_a_bare_state_dict(tmp_path: Path):
    ema = trained(MLP, seed=2, depth=8, name="SiT-S/8")
    torch.save(ema.state_dict(), tmp_path / "last.pt")
    assert_same(load_model(tmp_path / "last.pt"), ema)
    with pytest.raises(CheckpointError, match="one set of weights"):
        load_model(tmp_path / "last.pt", weights="model")


@pytest.mark.parametrize("projector", [MLP, CONV, LINEAR])
def test_irepa(tmp_path: Path, projector: ProjectorConfig):
    model, ema = trained(projector, seed=1), trained(projector, seed=2)
    path = published(
        tmp_path / "0100000.pt",
        model,
        ema,
        nested_mlp=projector.kind == "mlp",
        path_type="linear",
        projection_layer_type=projector.kind,
    )
    names = torch.load(path, weights_only=False)["ema"]
    assert any(name.startswith("projectors.0.projection_layer.") for name in names)
    assert_same(load_model(path), ema)


def test_irepa_without_alignment(tmp_path: Path):
    model, ema = trained(seed=1), trained(seed=2)
    assert_same(load_model(published(tmp_path / "sit.pt", model, ema)), ema)


def test_ours_with_an_mlp_loads_strictly_where_repa_expects_its_names(tmp_path: Path):
    """REPA's generate.py: `model.load_state_dict(torch.load(path)["ema"])`, whose projector is a bare Sequential."""
    model = trained(MLP)
    path = save_checkpoint(
        tmp_path, steps=1, model=model, ema=model, opt={}, args={}, config={}, fingerprints={}, keep_last=1
    )
    stored = torch.load(path, weights_only=True)["ema"]
    assert [name for name in stored if name.startswith("projectors")] == [
        f"projectors.0.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")
    ]


def test_other_models_are_refused_in_words(tmp_path: Path):
    model = trained()
    path = tmp_path / "other.pt"

    def refuse(match: str, state: dict, **args) -> None:
        torch.save({"ema": state, "args": argparse.Namespace(**args), "steps": 1}, path)
        with pytest.raises(CheckpointError, match=match):
            load_model(path)

    state = dict(model.state_dict())
    normed = state | {"blocks.0.attn.q_norm.weight": torch.zeros(64)}
    refuse(r"blocks\.0\.attn\.q_norm\.weight is \[64\], expected absent \(1 names differ\)", normed, qk_norm=True)
    refuse("depth 5 and width 32 are none of the sizes", {k: v for k, v in state.items() if "blocks.5" not in k})
    refuse("without label dropout", state, num_classes=4)
    refuse("holds no SiT under 'ema'", {"weight": torch.zeros(1)})
    refuse("not a SiT: it has no x_embedder", {"pos_embed": torch.zeros(1, 4, 8)})
    missing = {k: v for k, v in state.items() if k != "blocks.3.mlp.fc1.bias"}
    refuse(r"blocks\.3\.mlp\.fc1\.bias is absent, expected \[128\]", missing)
    with pytest.raises(CheckpointError, match="no checkpoint in this run yet"):
        load_model(tmp_path)


@pytest.mark.parametrize("emas", [[1], 7, "x", None])
def test_averages_that_are_no_mapping_are_damage(emas: Any):
    with pytest.raises(CheckpointError, match=r"a\.pt: .*its emas are a"):
        _weights({"ema": {}, "emas": emas, "config": {"ema_decay": [0.9]}}, "ema:0.5", Path("a.pt"))


@pytest.mark.parametrize("decays", [[], [10**5000], None, "\x1b[31m"])
def test_averages_are_listed_whatever_their_names(decays: Any):
    stored = {"ema": {}, "emas": {7: {}, "0.5": {"w": 1}}, "config": {"ema_decay": decays}}
    assert _weights(stored, "ema:0.5", Path("a.pt")) == {"w": 1}
    with pytest.raises(
        UsageError, match=r"holds averages of decay .*, 7, 0\.5; weights=.ema:0\.1. names none"
    ) as error:
        _weights(stored, "ema:0.1", Path("a.pt"))
    assert str(error.value).isprintable()


def test_a_value_too_large_to_be_written_is_named():
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert short(10**5000) == "a int too large to be shown"
    assert short(deep) == "a list too large to be shown"
    assert short([10**5000]) == "a list too large to be shown"
    assert short(0.9999) == "0.9999"
