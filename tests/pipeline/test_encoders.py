"""Frozen encoders against the models' own parts, the table against timm, weights from every kind of file."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import encoder_table, resolve_encoder
from repa.pipeline.encoders import load_encoder
from repa.pipeline.preprocess import encoder_input

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TIMM = [name for name, entry in encoder_table().items() if entry.loader == "timm"]


@pytest.mark.parametrize("name", TIMM)
def test_the_table_says_what_timm_says(name: str) -> None:
    import timm

    entry = encoder_table()[name]
    with torch.device("meta"):
        model: Any = timm.create_model(entry.model, img_size=2 * entry.patch, num_classes=0)
    assert model.embed_dim == entry.width
    assert model.patch_embed.patch_size == (entry.patch, entry.patch)
    assert model.num_prefix_tokens == entry.prefix_tokens
    assert entry.cls_token == (getattr(model, "cls_token", None) is not None)
    assert (entry.mean, entry.std) == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    assert entry.params_m == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.5)
    assert entry.model in timm.list_pretrained()


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make timm's models two blocks deep: the same wiring at a twelfth of the size."""
    import timm

    plain = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: plain(*args, depth=2, **options))


def by_its_parts(model: Any, pixels: torch.Tensor, *, after_norm: bool) -> torch.Tensor:
    """Return all tokens of a timm ViT from its blocks, prefix tokens included."""
    x = model._pos_embed(model.patch_embed(pixels))
    x = model.norm_pre(x)
    for block in model.blocks:
        x = block(x)
    return model.norm(x) if after_norm else x


@pytest.mark.parametrize("name", ["dinov2-vit-s", "clip-vit-L", "mae-vit-l", "siglip2-vit-b", "dino-vit-b"])
@pytest.mark.usefixtures("shallow")
def test_tokens_are_those_of_the_models_own_parts(name: str) -> None:
    spec = resolve_encoder(f"{name}:grid=3", resolution=32, random_weights=True).spec
    encoder = load_encoder(spec)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens, cls_token = encoder(images)

    side = spec["input_size"][0]
    pixels = (images.float() / 255 - torch.tensor(spec["mean"]).view(3, 1, 1)) / torch.tensor(spec["std"]).view(3, 1, 1)
    pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=False)
    with torch.no_grad():
        expected = by_its_parts(encoder.model, pixels, after_norm=spec["tensor"] == "after_norm")
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, expected[:, spec["prefix_tokens"] :], rtol=1e-4, atol=1e-5)
    if spec["cls_token"]:
        assert cls_token is not None
        torch.testing.assert_close(cls_token, expected[:, 0], rtol=1e-4, atol=1e-5)
    else:
        assert cls_token is None
    # The other tensor is another one: the choice is not without effect.
    with torch.no_grad():
        other = by_its_parts(encoder.model, pixels, after_norm=spec["tensor"] != "after_norm")
    assert (tokens - other[:, spec["prefix_tokens"] :]).abs().max() > 1e-2


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


# Weights, with timm's smallest ViT in the place of a real one.


def tiny_spec(*, random_weights: bool = False) -> dict[str, Any]:
    spec = resolve_encoder("mae-vit-l:grid=2", resolution=32, random_weights=random_weights).spec
    return {**spec, "entry": "tiny", "model": "test_vit.r160_in1k", "width": 64}


def test_the_same_weights_are_the_same_from_either_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    random = load_encoder(tiny_spec(random_weights=True))
    state = {name: tensor + 1 for name, tensor in random.model.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    loaded = [load_encoder(tiny_spec(), weights=tmp_path / name) for name in ("w.pth", "w.safetensors")]
    assert loaded[0].weights == loaded[1].weights != random.weights
    assert loaded[0].weights.startswith("sha256:")
    for name, tensor in loaded[0].model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert load_encoder(tiny_spec(random_weights=True)).weights == random.weights  # on every worker alike


class _Evil:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_a_file_that_does_not_fit_is_refused_by_names_and_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("these are no weights")
    (tmp_path / "text.safetensors").write_text("these are no weights")
    torch.save({"cls_token": torch.zeros(1, 1, 64), "somebody.else": torch.zeros(2)}, tmp_path / "names.pth")
    evil = _Evil(str(tmp_path / "ran"))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(evil))
    torch.save({"state_dict": evil}, tmp_path / "evil zip.pth")
    wide = load_encoder(tiny_spec(random_weights=True)).model.state_dict()
    torch.save({name: tensor[..., None] for name, tensor in wide.items()}, tmp_path / "shapes.pth")
    said = {}
    for file in sorted(tmp_path.glob("*.*")):
        try:
            load_encoder(tiny_spec(), weights=file)
        except UsageError as error:
            said[file.name] = str(error)
    files = ["evil zip.pth", "evil.pth", "names.pth", "shapes.pth", "text.pth", "text.safetensors"]
    assert sorted(said) == files
    for name, text in said.items():
        assert text.startswith(f"--weights tiny={tmp_path / name}: does not fit tiny: ")
    assert "blocks.0.norm1.weight" in said["names.pth"]
    assert not (tmp_path / "ran").exists(), "code of a weights file was run"


def test_hog_takes_no_weights_and_no_tiny_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hog has no weights"):
        load_encoder(resolve_encoder("hog", resolution=32).spec, weights=tmp_path / "x.pth")
    spec = {**resolve_encoder("hog:grid=2", resolution=8).spec, "input_size": [4, 4]}
    with pytest.raises(UsageError, match="at least 8 pixels"):
        load_encoder(spec)
