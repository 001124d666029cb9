"""Weights of encoders: published files load strictly from either format, and wrong ones are refused by their names."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import encoder_table, resolve_encoder
from repa.pipeline.models.encoders import load_encoder
from repa.pipeline.models.mocov3 import mocov3_state_dict
from repa.pipeline.models.weights import check_weights_file

from .small_encoders import FAMILIES, small_spec

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CARDS = {family: name for family, name in FAMILIES.items() if "@" not in family}


def published_state(spec: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return random weights by the names and shapes of the published file: its own size, its own classifier."""
    if spec["loader"] == "transformers":
        return load_encoder(spec).model.state_dict()
    import timm

    return timm.create_model(spec["model"], **spec["options"]).state_dict()


@pytest.mark.parametrize("family", CARDS)
def test_a_published_file_loads_strictly_and_a_cut_one_is_refused(family: str, tmp_path: Path) -> None:
    name = CARDS[family]
    if encoder_table()[name].loader == "transformers":
        pytest.importorskip("transformers")
    spec = small_spec(name)
    state = published_state(spec)
    if family == "mocov3":
        state = {f"module.base_encoder.{key}": tensor for key, tensor in state.items()}
    spec["random_weights"] = False
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": state} if family == "mocov3" else state, file)
    loaded = load_encoder(spec, weights=file).model.state_dict()
    for key, tensor in state.items():
        ours = key.removeprefix("module.base_encoder.").removeprefix("features." * (family == "vgg"))
        if ours in loaded and loaded[ours].shape == tensor.shape:
            torch.testing.assert_close(loaded[ours], tensor, rtol=0, atol=0, msg=key)
    # Nothing is left at random: what has another name or shape are position embeddings alone.
    known = {key.removeprefix("module.base_encoder.").removeprefix("features." * (family == "vgg")) for key in state}
    assert set(loaded) <= known
    assert {key for key in loaded if loaded[key].shape != dict(_renamed(state, family))[key].shape} <= {"pos_embed"}

    gone = next(key for key in state if key.endswith(("norm1.weight", "0.weight")))
    del state[gone]
    torch.save({"state_dict": state} if family == "mocov3" else state, file)
    with pytest.raises(UsageError) as refused:
        load_encoder(spec, weights=file)
    assert str(refused.value).startswith(f"--weights {name}={file}: does not fit {name}: ")
    assert gone.removeprefix("module.base_encoder.") in str(refused.value)


def _renamed(state: dict[str, torch.Tensor], family: str) -> list[tuple[str, torch.Tensor]]:
    prefix = {"mocov3": "module.base_encoder.", "vgg": "features."}.get(family, "")
    return [(key.removeprefix(prefix), tensor) for key, tensor in state.items()]


def test_mocov3_keeps_the_base_encoder_and_mends_the_published_names() -> None:
    names = {
        "module.base_encoder.cls_token": "cls_token",
        "module.base_encoder.patch_embed.proj.weight": "patch_embed.proj.weight",
        "module.base_encoder.blocks.13.norm13.weight": "blocks.13.norm1.weight",
        "module.base_encoder.blocks.13.mlp.fc13.bias": "blocks.13.mlp.fc1.bias",
        "module.base_encoder.blocks.14.norm14.bias": "blocks.14.norm2.bias",
        "module.base_encoder.blocks.14.mlp.fc14.weight": "blocks.14.mlp.fc2.weight",
        "module.base_encoder.blocks.1.norm1.weight": "blocks.1.norm1.weight",
    }
    dropped = ["module.base_encoder.head.0.weight", "module.momentum_encoder.cls_token", "module.predictor.0.weight"]
    published = {name: torch.full((1,), float(i)) for i, name in enumerate([*names, *dropped])}
    converted = mocov3_state_dict({"epoch": 300, "state_dict": published})
    assert converted == {ours: published[theirs] for theirs, ours in names.items()}
    assert mocov3_state_dict(converted) == converted
    with pytest.raises(ValueError, match="the first are a, b"):
        mocov3_state_dict({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_mocov3_asks_the_hub_where_no_file_is_given() -> None:
    spec = resolve_encoder("mocov3-vit-b", resolution=32).spec
    with pytest.raises(UsageError, match=r"REPA-E/iREPA-collections/pretrained_models/mocov3_vitb\.pth could not be"):
        load_encoder(spec)


def test_the_study_s_vgg_is_torchvision_s_file_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.models._builder

    spec = small_spec("vgg16@irepa", random_weights=False)
    state = published_state(spec)
    # As in the file, but for classifier.3: the library knows it by its 4096 columns, which a small model has not.
    renamed = {"pre_logits.fc1": "classifier.0", "head.fc": "classifier.6"}
    published = {}
    for key, tensor in state.items():
        name = next((key.replace(ours, theirs) for ours, theirs in renamed.items() if ours in key), key)
        published[name] = torch.full_like(tensor, torch.nan) if name.startswith("classifier") else tensor
    fetched = []

    def fetch(url: str, **options: Any) -> dict[str, torch.Tensor]:
        fetched.append(url)
        return published

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_url", fetch)
    loaded = load_encoder(spec).model.state_dict()
    assert fetched == ["https://download.pytorch.org/models/vgg16_features-amdegroot-88682ab5.pth"]
    assert len(loaded) == 20  # ten convolutions
    assert all(torch.equal(tensor, state[f"features.{key}"]) for key, tensor in loaded.items())
    assert (spec["mean"], spec["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_published_positions_are_those_of_the_perception_encoders_own_code() -> None:
    """An independent forward of PE: bilinear position embedding, rotary positions in whole patches from 1."""
    spec = small_spec("pe-vit-t@irepa", grid=5)
    model = load_encoder(spec).model
    native = load_encoder({**spec, "positions": "library", "input_size": [384, 384], "grid": [24, 24]}).model
    plane = native.pos_embed[:, 1:].reshape(1, 24, 24, 64).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, (5, 5), mode="bilinear", align_corners=False).flatten(2).mT
    torch.testing.assert_close(model.pos_embed, torch.cat([native.pos_embed[:, :1], plane], dim=1))

    pixels = torch.randn(1, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches = F.conv2d(pixels, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=16)
        x = torch.cat([model.cls_token, patches.flatten(2).mT], dim=1) + model.pos_embed
        x = model.norm_pre(x)
        for block in model.blocks:
            x = x + _attention(block.attn, block.norm1(x), heads=2, side=5)
            x = x + block.mlp(block.norm2(x))
        found = load_encoder(spec).features(pixels)[0]  # type: ignore[misc]
    torch.testing.assert_close(found[0], x[:, 1:], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        other = load_encoder(small_spec("pe-vit-t", grid=5)).features(pixels)[0]  # type: ignore[misc]
    assert (other[0] - found[0]).abs().max() > 1e-2


def _attention(attn: Any, x: torch.Tensor, *, heads: int, side: int) -> torch.Tensor:
    num, width = x.shape[1:]
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).reshape(1, num, 3, heads, -1).permute(2, 0, 3, 1, 4)
    channels = width // heads
    frequencies = 10000.0 ** -(torch.arange(0, channels // 2, 2) / (channels // 2))
    rows, columns = torch.meshgrid(torch.arange(side) + 1, torch.arange(side) + 1, indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (columns, rows)]
    turn = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    turn = torch.cat([torch.zeros(1, channels), turn])  # the class token stays where it is

    def rotate(z: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack([-z[..., 1::2], z[..., ::2]], dim=-1).flatten(-2)
        return z * turn.cos() + pairs * turn.sin()

    weights = (rotate(q) @ rotate(k).mT / channels**0.5).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).reshape(1, num, width), attn.proj.weight, attn.proj.bias)


def tiny_spec(*, random_weights: bool = False) -> dict[str, Any]:
    return {**small_spec("mae-vit-b", grid=2, random_weights=random_weights), "entry": "tiny"}


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


def test_a_pointer_of_git_lfs_is_said_to_be_one(tmp_path):
    pointer = tmp_path / "weights.pth"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    with pytest.raises(
        UsageError, match=r"--weights dinov2=.*weights\.pth: it is a Git LFS pointer, not the file of 12"
    ):
        check_weights_file("dinov2", pointer)


def test_what_is_no_file_of_tensors_is_never_advised_to_be_unpickled(tmp_path: Path) -> None:
    spec = small_spec("mae-vit-b", grid=2, random_weights=False)
    (tmp_path / "w.pth").write_bytes(b"\x80\x02cos\nsystem\nq\0.")
    with pytest.raises(UsageError, match="it is no file of tensors alone, and nothing else is unpickled"):
        load_encoder(spec, weights=tmp_path / "w.pth")
    (tmp_path / "w.pth").unlink()
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(UsageError, match="a FIFO or a device, expected a file"):
        load_encoder(spec, weights=tmp_path / "w.pth")


QUIET = """
import logging
from repa.pipeline.models.weights import quiet_hub
with quiet_hub():
    import huggingface_hub.utils
    print(logging.getLogger("huggingface_hub").getEffectiveLevel())
"""


def test_the_hub_is_quiet_where_it_is_imported_only_then() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True)
    assert int(done.stdout) == logging.CRITICAL
