"""REG's published checkpoints and its sampler, against the model and the recursion written out again in float64."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repa.cache_specs.errors import UsageError
from repa.trainer.commands.sample import sample_command
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.models.checkpoint import CheckpointError
from repa.trainer.models.pretrained import load_model, open_model
from repa.trainer.models.sit import SIZES
from repa.trainer.objectives.choose import stored_field
from repa.trainer.objectives.reg import REGField
from repa.trainer.sampling.sample import ImageNoise
from repa.trainer.sampling.samplers import SamplerConfig, check_sampler, sample_latents, score

DEPTH, WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES, E = 2, 32, 2, 2, 8, 3, 3, 5


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """REG's state dict of noise, its published names and shapes written out."""
    tokens = (SIDE // PATCH) ** 2
    shapes = {
        "pos_embed": (1, 1 + tokens, WIDTH),
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "cls_projectors2.weight": (WIDTH, E),
        "cls_projectors2.bias": (WIDTH,),
        "wg_norm.weight": (WIDTH,),
        "wg_norm.bias": (WIDTH,),
        "final_layer.linear.weight": (PATCH * PATCH * CHANNELS, WIDTH),
        "final_layer.linear.bias": (PATCH * PATCH * CHANNELS,),
        "final_layer.linear_cls.weight": (E, WIDTH),
        "final_layer.linear_cls.bias": (E,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
        "projectors.0.0.weight": (7, WIDTH),
        "projectors.0.0.bias": (7,),
        "projectors.0.2.weight": (7, 7),
        "projectors.0.2.bias": (7,),
        "projectors.0.4.weight": (E, 7),
        "projectors.0.4.bias": (E,),
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


def answers_of_reg(
    state: Mapping[str, torch.Tensor], x: torch.Tensor, c: torch.Tensor, t: float, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both velocities and the projector's tokens (after block 1), in float64, from the paper's equations."""
    w = {name: value.double() for name, value in state.items()}

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(values: torch.Tensor) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    angles = t * 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    cond = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))))
    cond = F.silu(cond + w["y_embedder.embedding_table.weight"][y])
    patches = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    first = norm(linear("cls_projectors2", c.double())) * w["wg_norm.weight"] + w["wg_norm.bias"]
    tokens = torch.cat([first[:, None], patches.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    projected = tokens
    for block in range(DEPTH):
        name = f"blocks.{block}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", cond)[:, None].chunk(6, -1)
        q, k, v = linear(f"{name}.attn.qkv", norm(tokens) * (1 + scale1) + shift1).chunk(3, -1)
        parts = [slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS) for head in range(HEADS)]
        heads = [
            (q[..., p] @ k[..., p].transpose(1, 2) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v[..., p] for p in parts
        ]
        tokens = tokens + gate1 * linear(f"{name}.attn.proj", torch.cat(heads, -1))
        inner = F.gelu(linear(f"{name}.mlp.fc1", norm(tokens) * (1 + scale2) + shift2), approximate="tanh")
        tokens = tokens + gate2 * linear(f"{name}.mlp.fc2", inner)
        if block == 0:
            hidden = F.silu(linear("projectors.0.0", tokens))
            projected = linear("projectors.0.4", F.silu(linear("projectors.0.2", hidden)))
    shift, scale = linear("final_layer.adaLN_modulation.1", cond)[:, None].chunk(2, -1)
    tokens = norm(tokens) * (1 + scale) + shift
    images = linear("final_layer.linear", tokens[:, 1:]).reshape(len(x), SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, -1)
    velocity = images.permute(0, 5, 1, 3, 2, 4).reshape(len(x), CHANNELS, SIDE, SIDE)
    return velocity, linear("final_layer.linear_cls", tokens[:, 0]), projected


@pytest.fixture
def published(tmp_path: Path, small_sit, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as REG's code writes it."""
    monkeypatch.setitem(SIZES, "Ti", (DEPTH, WIDTH, HEADS))
    args = {"model": "SiT-Ti/2", "num_classes": CLASSES, "path_type": "linear", "prediction": "v", "encoder_depth": 1}
    file = tmp_path / "reg.pt"
    torch.save({"model": weights(1), "ema": weights(), "opt": {}, "args": args, "steps": 3}, file)
    return file


def test_a_published_checkpoint_answers_as_its_equations(published: Path):
    model, state = load_model(published), weights()
    generator = torch.Generator().manual_seed(2)
    x, c = torch.randn(3, CHANNELS, SIDE, SIDE, generator=generator), torch.randn(3, E, generator=generator)
    y = torch.tensor([0, 2, 3])
    expected = answers_of_reg(state, x, c, 0.3, y)
    (velocity, cls), (projected,) = model(x, torch.full((3,), 0.3), y, cls_token=c, return_projections=True)
    for found, wanted in zip((velocity, cls, projected), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x, torch.full((3,), 0.3), y, cls_token=c)
    torch.testing.assert_close(compiled, (velocity, cls))

    # The class token's place is row 0 of pos_embed: with rows 0 and 1 exchanged the answers are others.
    swapped = state | {"pos_embed": state["pos_embed"][:, [1, 0, *range(2, 17)]]}
    assert (answers_of_reg(swapped, x, c, 0.3, y)[1] - expected[1]).abs().max() > 1e-3
    for name in ("cls_projectors2.bias", "wg_norm.weight", "final_layer.linear_cls.bias"):
        rest = {key: value for key, value in state.items() if key != name}
        torch.save({"ema": rest, "args": {"encoder_depth": 1}}, published)
        with pytest.raises(CheckpointError, match=rf"{name} is absent"):
            load_model(published)
    for name, value, words in (
        ("final_layer.linear_cls.weight", torch.zeros(()), "a weight has another number of dimensions"),
        ("final_layer.linear_cls.weight", torch.zeros(0, WIDTH), "cls_width is 0"),
        ("pos_embed", torch.zeros(1, 0, WIDTH), "input_size is 0"),
        ("pos_embed", torch.zeros(1, 16, WIDTH), r"names differ"),
    ):
        torch.save({"ema": state | {name: value}, "args": {"encoder_depth": 1}}, published)
        with pytest.raises((CheckpointError, UsageError), match=words):
            load_model(published)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_repa_sample_follows_the_published_recursion(published: Path, capsys, sampler: str):
    """Both parts move together, guided by scales of their own within the interval, by the conditional drift outside."""
    steps, scale, cls_scale, low, high, state = 5, 2.0, 1.5, 0.1, 0.8, weights()
    flags = ["--sampler", sampler, "--steps", str(steps), "--cfg-scale", str(scale), "--cls-cfg-scale", str(cls_scale)]
    flags += ["--guidance-low", str(low), "--guidance-high", str(high), "--labels", "2,0,1", "--num-samples", "3"]
    out = published.with_name("a.npz")
    arguments = [str(published), "--autoencoder", "pixels", "--device", "cpu", "--out", str(out), *flags]
    sample_command.main(arguments, standalone_mode=False)
    assert "t = 0 is data, as in REPA's" in capsys.readouterr().err

    noise, y = ImageNoise(range(3), 0), torch.tensor([2, 0, 1])
    x, c = noise.next((CHANNELS, SIDE, SIDE)).double(), noise.next((E,)).double()

    def drift(x: torch.Tensor, c: torch.Tensor, t: float, at: float) -> list[torch.Tensor]:
        asked = [answers_of_reg(state, x, c, t, labels)[:2] for labels in (y, torch.full_like(y, CLASSES))]
        if sampler == "sde":  # v - t score is (2 - t) v + x on the linear path
            asked = [tuple((2 - t) * v + part for v, part in zip(pair, (x, c), strict=True)) for pair in asked]
        with_label, without = asked
        if not low <= at <= high:
            return list(with_label)
        scales = (scale, cls_scale)
        return [u + s * (v - u) for v, u, s in zip(with_label, without, scales, strict=True)]

    times = np.append(np.linspace(1, 0.04, steps), 0) if sampler == "sde" else np.linspace(1, 0, steps + 1)
    for k, (t, t_next) in enumerate(pairwise(times)):
        dt = t_next - t
        d_x, d_c = drift(x, c, t, t)
        if sampler == "heun" and k < steps - 1:
            ahead = drift(x + dt * d_x, c + dt * d_c, t_next, t)
            d_x, d_c = (d_x + ahead[0]) / 2, (d_c + ahead[1]) / 2
        x, c = x + dt * d_x, c + dt * d_c
        if sampler == "sde" and k < steps - 1:
            spread = (2 * t * -dt) ** 0.5
            x = x + spread * noise.next((CHANNELS, SIDE, SIDE)).double()
            c = c + spread * noise.next((E,)).double()
    pictures = ((x.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.load(out)["arr_0"] - pictures).max() <= 1
    assert np.mean((pictures > 0) & (pictures < 255)) > 0.2


class Noted:
    """Velocities that are the label, 10 for the null one, and the batch sizes that were asked for."""

    null_label = 3

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x, t, y, cls_token):
        self.sizes.append(len(x))
        value = torch.where(y == 3, 10.0, y.double())
        return value.view(-1, 1, 1, 1).expand_as(x), value.view(-1, 1).expand_as(cls_token)


@pytest.mark.parametrize(
    ("cls_scale", "expected"), [(None, -(0.5 * 1 + 0.5 * (10 + 3 * -9))), (1.0, -1.0), (2.0, -(0.5 + 0.5 * (10 - 18)))]
)
def test_outside_the_interval_the_class_token_is_conditional(cls_scale: float | None, expected: float):
    config = SamplerConfig(steps=4, cfg_scale=3.0, guidance_low=0.4, guidance_high=0.8, cls_cfg_scale=cls_scale)
    field, model = REGField(interpolant=Interpolant()), Noted()
    state = torch.zeros(2, 1, 2, 2), torch.zeros(2, 5)
    x, c = sample_latents(model, state, torch.ones(2, dtype=torch.int64), config, field=field)
    assert model.sizes == [2, 4, 4, 2]
    torch.testing.assert_close(c, torch.full((2, 5), expected))
    torch.testing.assert_close(x, torch.full((2, 1, 2, 2), -(0.5 + 0.5 * (10 - 27))))


def test_guidance_that_no_class_token_takes_is_refused(published: Path):
    with pytest.raises(UsageError, match=r"cls_cfg_scale is 0\.0; expected 1 \(no guidance of the class token, 0 in"):
        SamplerConfig(cfg_scale=2.0, cls_cfg_scale=0.0)
    with pytest.raises(UsageError, match=r"cls_cfg_scale is 2\.0 and cfg_scale 1: .* Give both, or neither"):
        SamplerConfig(cls_cfg_scale=2.0)
    config = SamplerConfig(cfg_scale=2.0, cls_cfg_scale=2.0)
    with pytest.raises(UsageError, match="no class token to guide, as only REG's has"):
        check_sampler(config, stored_field({}, Interpolant()))
    check_sampler(config, stored_field(open_model(published).method, Interpolant()))


def test_score_and_drift_of_a_class_token():
    x, v, t = torch.tensor([[0.5]]).double(), torch.tensor([[-1.0]]).double(), 0.64
    found = score(v, x, t, Interpolant())
    assert float(found) == pytest.approx(-0.21875)
    assert float(v - t * found) == pytest.approx(-0.86)
