"""SiT's own checkpoints count t backwards and answer twice the channels: against SiT written out here its own way."""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repa.cache_specs.errors import UsageError
from repa.trainer.commands.sample import sample_command
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from repa.trainer.models.pretrained import load_model, open_model
from repa.trainer.models.sit import SIZES, SiT, SiTConfig
from repa.trainer.sampling.sample import ImageNoise
from repa.trainer.sampling.samplers import score

DEPTH, WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 6, 32, 2, 4, 8, 3, 3
SIT_ARGS = {"model": "SiT-Ti/4", "num_classes": CLASSES, "path_type": "Linear", "prediction": "velocity"}
REPA_ARGS = {"model": "SiT-Ti/4", "num_classes": CLASSES, "path_type": "linear", "prediction": "v"}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "Ti", (DEPTH, WIDTH, HEADS))


def weights(*, outputs: int = 2 * CHANNELS, seed: int = 0) -> dict[str, torch.Tensor]:
    """A SiT's state dict of noise, its shapes written out: `outputs` channels from the last layer."""
    shapes = {
        "pos_embed": (1, (SIDE // PATCH) ** 2, WIDTH),
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (PATCH * PATCH * outputs, WIDTH),
        "final_layer.linear.bias": (PATCH * PATCH * outputs,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    for block in range(DEPTH):
        layers = {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
            "adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }
        for name, shape in layers.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def velocity_of_sit(state: Mapping[str, torch.Tensor], x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
    """dx/dt as SiT's own code has it, t = 1 data, in float64; x [B,C,H,W], y [B]."""
    w = {name: value.double() for name, value in state.items()}

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(values: torch.Tensor) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    angles = t * 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])  # [B,D]; every modulation begins with it
    tokens = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2) + w["pos_embed"]
    for block in range(DEPTH):
        name = f"blocks.{block}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        q, k, v = linear(f"{name}.attn.qkv", norm(tokens) * (1 + scale1) + shift1).chunk(3, -1)
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            mixing = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
            heads.append(mixing @ v[..., part])
        tokens = tokens + gate1 * linear(f"{name}.attn.proj", torch.cat(heads, -1))
        inner = F.gelu(linear(f"{name}.mlp.fc1", norm(tokens) * (1 + scale2) + shift2), approximate="tanh")
        tokens = tokens + gate2 * linear(f"{name}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    patches = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    out = torch.empty(len(x), CHANNELS, SIDE, SIDE, dtype=torch.float64)
    for row in range(SIDE):
        for column in range(SIDE):
            token = row // PATCH * (SIDE // PATCH) + column // PATCH
            pixel = (row % PATCH * PATCH + column % PATCH) * (patches.shape[-1] // PATCH**2)
            out[:, :, row, column] = patches[:, token, pixel : pixel + CHANNELS]  # the first half of the channels
    return out


def euler_of_sit(state: Mapping[str, torch.Tensor], noise: torch.Tensor, y: torch.Tensor, steps: int) -> torch.Tensor:
    """From noise at t = 0 to data at t = 1."""
    x = noise.double()
    for step in range(steps):
        x = x + velocity_of_sit(state, x, step / steps, y) / steps
    return x


def sit_file(path: Path, state: Mapping[str, torch.Tensor], **args: object) -> Path:
    """Write what SiT's train.py does: no `steps`."""
    torch.save({"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(**(SIT_ARGS | args))}, path)
    return path


@pytest.mark.parametrize("kind", ["its training's file", "its download", "wrapped, as asked", "4 channels, as asked"])
def test_repa_sample_follows_sits_own_euler(tmp_path: Path, capsys, kind: str):
    state = weights(outputs=CHANNELS if kind.startswith("4") else 2 * CHANNELS)
    file, flags = tmp_path / "sit.pt", []
    if kind == "its training's file":
        sit_file(file, state)
    elif kind.startswith("wrapped"):
        torch.save({"ema": {f"module._orig_mod.{name}": value for name, value in state.items()}}, file)
    else:
        torch.save(state, file)
    if kind.endswith("as asked"):
        flags = ["--checkpoint-convention", "sit"]
    arguments = [
        "--autoencoder",
        "pixels",
        "--num-samples",
        "6",
        "--steps",
        "7",
        "--labels",
        "2,0,1",
        "--device",
        "cpu",
    ]
    sample_command.main(
        [str(file), *arguments, "--out", str(tmp_path / "a.npz"), "--seed", "4", *flags], standalone_mode=False
    )
    noise = ImageNoise(range(6), 4).next((CHANNELS, SIDE, SIDE))
    expected = euler_of_sit(state, noise, torch.tensor([2, 0, 1, 2, 0, 1]), 7)
    assert expected.std() > 1.2 * noise.std()  # the velocities count
    pictures = ((expected.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.load(tmp_path / "a.npz")["arr_0"] - pictures).max() <= 1
    printed = capsys.readouterr().err
    assert "sit.pt: t = 1 is data, as in SiT's own code" in printed
    told = {
        "its training's file": "told by args.path_type Linear; where that is wrong, give --checkpoint-convention repa",
        "its download": "told by its 6 output channels, the first half of them the velocity",
        "wrapped, as asked": "sit.pt: its names without 'module._orig_mod.'",
        "4 channels, as asked": "as --checkpoint-convention says",
    }
    assert told[kind] in printed


def test_the_velocity_is_the_negative_at_the_other_time(tmp_path: Path):
    state, generator = weights(), torch.Generator().manual_seed(1)
    model = load_model(sit_file(tmp_path / "sit.pt", state))
    x, y = torch.randn(4, CHANNELS, SIDE, SIDE, generator=generator), torch.tensor([0, 1, 2, 3])
    for t in (0.0, 0.1, 0.5, 1.0):
        with torch.no_grad():
            found = model(x, torch.full((4,), t), y)
        torch.testing.assert_close(found, -velocity_of_sit(state, x, 1 - t, y).float(), rtol=1e-3, atol=1e-4)


def test_gvp_is_the_cosine_path_run_backwards(tmp_path: Path):
    """Of data N(0, 1) apart from the noise, GVP keeps N(0, 1) at all times: sin^2 + cos^2 is 1, so the score is -x."""
    opened = open_model(sit_file(tmp_path / "sit.pt", weights(), path_type="GVP"))
    assert (opened.interpolant, opened.config, opened.steps) == (Interpolant(path="cosine"), None, None)
    x, eps, t = torch.randn(2, 3, 1, 1), torch.randn(2, 3, 1, 1), torch.tensor([0.2, 0.9])
    x_t, velocity = opened.interpolant.x_t_and_velocity(x, eps, t)
    angle = (1 - t.view(2, 1, 1, 1)) * math.pi / 2  # SiT: sin(pi t / 2) data + cos(pi t / 2) noise
    torch.testing.assert_close(x_t, angle.sin() * x + angle.cos() * eps)
    torch.testing.assert_close(velocity, -(math.pi / 2) * (angle.cos() * x - angle.sin() * eps))
    assert torch.allclose(score(torch.zeros(1), torch.ones(1), 0.3, opened.interpolant), -torch.ones(1))


def test_a_convention_stays_with_the_model_that_is_saved(tmp_path: Path):
    model = load_model(sit_file(tmp_path / "sit.pt", weights()))
    path = save_checkpoint(
        tmp_path / "run", steps=1, model=model, ema=model, opt={}, args={}, config={}, fingerprints={}, keep_last=1
    )
    stored = load_checkpoint(path)
    assert stored["architecture"]["sit"]["convention"] == "sit"
    assert stored["args"]["prediction"] == "velocity"
    again = load_model(path)
    assert again.config == model.config
    x, t, y = torch.ones(1, CHANNELS, SIDE, SIDE), torch.tensor([0.3]), torch.tensor([1])
    assert torch.equal(again(x, t, y), model(x, t, y))
    with pytest.raises(UsageError, match=r"0000001\.pt: it says itself which way its t runs"):
        load_model(path, convention="repa")


@pytest.mark.parametrize(
    ("args", "outputs", "asked", "found", "words"),
    [
        (SIT_ARGS, 6, None, "sit", "told by args.path_type Linear"),
        (REPA_ARGS, 3, None, "repa", "told by args.path_type linear"),
        ({"prediction": "velocity"}, 3, None, "sit", "told by args.prediction velocity.*of which nothing is said"),
        (None, 6, None, "sit", "told by its 6 output channels"),
        (None, 3, None, "repa", "t = 0 is data.*assumed, for nothing in it says.*convention=.sit."),
        (None, 3, "sit", "sit", "as convention= says"),
        (SIT_ARGS, 6, "repa", "repa", "as convention= says, against args.path_type Linear"),
    ],
)
def test_what_is_told_is_taken_and_the_rest_assumed_aloud(tmp_path: Path, args, outputs, asked, found, words):
    stored = {"ema": weights(outputs=outputs)} | ({} if args is None else {"args": dict(args)})
    torch.save(stored, tmp_path / "a.pt")
    opened = open_model(tmp_path / "a.pt", convention=asked)
    assert (opened.model.config.convention, opened.model.config.learn_sigma) == (found, outputs == 6)
    (line,) = opened.assumed
    assert torch.is_tensor(opened.model.pos_embed)
    assert re.search(words, line), line


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("bare", [False, True])
def test_the_prefixes_of_wrappers_are_taken_off_with_a_word(tmp_path: Path, prefix: str, bare: bool):
    state = weights()
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    torch.save({"state_dict": wrapped} if bare else {"model": wrapped, "ema": wrapped}, tmp_path / "a.pt")
    opened = open_model(tmp_path / "a.pt")
    assert opened.assumed[0] == f"its names without {prefix!r}"
    for name, value in opened.model.state_dict().items():
        assert torch.equal(value, state[name])


def test_compiled_blocks_and_names_that_become_one(tmp_path: Path):
    state = weights()
    within = {name.replace("blocks.3.", "blocks.3._orig_mod."): value for name, value in state.items()}
    torch.save(within, tmp_path / "a.pt")
    assert "its names without '_orig_mod.'" in open_model(tmp_path / "a.pt").assumed
    torch.save(within | {"blocks.3.attn.proj.bias": state["pos_embed"]}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="two of its names are one"):
        load_model(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prediction": "noise"}, r"args\.prediction is noise; samplers here integrate a velocity"),
        ({"prediction": "score"}, r"args\.prediction is score"),
        ({"prediction": ["v"]}, r"args\.prediction is \['v'\]"),
        ({"path_type": "VP"}, r"args\.path_type is VP; known are linear and cosine \(SiT's Linear and GVP\)"),
        ({"path_type": 3}, r"args\.path_type is 3"),
        ({"model": "DiT-XL/2", "prediction": "velocity"}, r"args\.model is DiT-XL/2: DiT predicts noise"),
        (["Linear", "velocity"], "its args are a list; expected settings by name"),
        ("Linear", "its args are a str"),
        (7, "its args are a int"),
    ],
)
def test_settings_that_answer_no_velocity_are_refused_by_name(tmp_path: Path, args, message: str):
    args = SIT_ARGS | args if isinstance(args, dict) else args
    torch.save({"ema": weights(), "args": args}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: {message}") as caught:
        load_model(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"transformer_blocks.{i}.attn1.to_q.weight" for i in range(999)], "it looks like a transformer of diffusers"),
        (["cls_token", *(f"blocks.{i}.norm1.weight" for i in range(999))], "it looks like LightningDiT or another DiT"),
        ([f"down_blocks.{i}.conv.weight" for i in range(999)], "it looks like a U-Net"),
        ([f"layer{i}" * 99 for i in range(999)], r"layer0layer0.{10,60}\.\.\., "),
    ],
)
def test_other_models_are_counted_and_not_listed(tmp_path: Path, names: list[str], words: str):
    torch.save(dict.fromkeys(names, torch.zeros(1)), tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=rf"holds no SiT under 'ema' \(found [91],?\d* ?0?0?0? ?names.*{words}"
    ) as caught:
        load_model(tmp_path / "a.pt")
    assert len(str(caught.value)) < 600 + len(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_thousand_names_that_differ_are_three_and_a_count(tmp_path: Path):
    state = weights() | {f"blocks.{i % DEPTH}.attn.q_norm.{i}": torch.zeros(2) for i in range(1000)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"\(1000 names differ\)\. It looks like a model with normalised"
    ) as caught:
        load_model(tmp_path / "a.pt")
    assert str(caught.value).count("q_norm.") == 3


def ours(**changes: object) -> dict[str, object]:
    """A checkpoint of ours with another record of the model."""
    config = {"name": "SiT-Ti/4", "input_size": SIDE, "patch_size": PATCH, "in_channels": CHANNELS, "depth": DEPTH}
    config |= {"hidden_size": WIDTH, "num_heads": HEADS, "num_classes": CLASSES, "learn_sigma": True}
    record = {"sit": config | changes, "projectors": [], "encoder_depth": None}
    return {"ema": weights(), "architecture": record, "config": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 10**6}, r"SiT-Ti/4 is said to have 1000000 blocks; the file holds 6"),
        ({"depth": "6"}, "its record of the model cannot be read"),
        ({"hidden_size": 2**62}, "no SiT-Ti/4 can be of the sizes in its record"),
        ({"num_classes": 10**12}, r"y_embedder.embedding_table.weight is \[4, 32\], expected \[1000000000001, 32\]"),
        ({"depth": 6.5}, "6.5 blocks"),
        ({"wings": 2}, "its record of the model cannot be read"),
        ({"convention": "other"}, "convention is 'other'"),
    ],
)
def test_a_record_that_claims_too_much_is_one_line_at_once(tmp_path: Path, changes, message: str):
    torch.save(ours(**changes), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{message}") as caught:
        load_model(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    torch.save(ours(), tmp_path / "a.pt")
    assert isinstance(load_model(tmp_path / "a.pt"), SiT)


@pytest.mark.parametrize(
    "part",
    [{"architecture": []}, {"architecture": {"sit": 3}}, {"config": 3}, {"config": {"interpolant": {"path": "x"}}}],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, part):
    torch.save(ours() | part, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: the checkpoint is damaged: its record of the model") as caught:
        load_model(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    torch.save(ours() | {"config": {"resolved": {"latents": {"scale": "all"}}}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="its record of whose latents it draws cannot be read"):
        open_model(tmp_path / "a.pt").latents(None)


def test_weights_that_are_no_weights_are_named(tmp_path: Path):
    state = weights()
    claimed = torch.zeros(1).expand(10**6, 10**9)  # 4 petabytes of four
    for value, words in (
        (3, "a int; expected a tensor"),
        (claimed, "not a plain tensor"),
        (torch.zeros(2).int(), "int32"),
    ):
        torch.save(state | {"blocks.1.attn.proj.bias": value}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=rf"a\.pt: blocks\.1\.attn\.proj\.bias is .*?{words}"):
            load_model(tmp_path / "a.pt")
    assert SiTConfig.__dataclass_fields__["convention"].default == "repa"  # of all records before there was one
