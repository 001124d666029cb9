"""SiT against an independent computation, the published parameter counts, names and initial values."""

import math

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.models.projector import ProjectorConfig
from repa.trainer.models.sit import SiT, SiTConfig, sincos_pos_embed, sit_config

SMALL = SiTConfig(
    name="small/2", input_size=6, patch_size=2, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=5
)
PROJECTORS = [ProjectorConfig(kind="linear", out_dim=7), ProjectorConfig(kind="mlp", out_dim=4, hidden_dim=9)]


def randomized(model: SiT, seed: int) -> SiT:
    """Fill every parameter with noise, zero-initialised gates and outputs too, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def reference_velocity(weights: dict, config: SiTConfig, x: np.ndarray, t: np.ndarray, y: np.ndarray):
    """SiT's forward pass in float64 numpy, one image and one head at a time, from the papers' equations.

    Returns the velocity and the hidden states after each block.
    """

    def linear(h, name):
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def normalise(h):
        centred = h - h.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    def gelu(h):
        return 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    p, side, width = config.patch_size, config.input_size // config.patch_size, config.hidden_size
    velocities, hidden = [], []
    for image, time, label in zip(x, t, y, strict=True):
        kernel = weights["x_embedder.proj.weight"]
        tokens = np.stack(
            [
                np.array([(kernel[d] * image[:, r * p : r * p + p, c * p : c * p + p]).sum() for d in range(width)])
                for r in range(side)
                for c in range(side)
            ]
        )
        tokens = tokens + weights["x_embedder.proj.bias"] + weights["pos_embed"][0]
        angles = time * np.array([10_000.0 ** (-k / 128) for k in range(128)])
        embedded = np.concatenate([np.cos(angles), np.sin(angles)])
        condition = linear(silu(linear(embedded, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        condition = condition + weights["y_embedder.embedding_table.weight"][label]
        after = []
        for depth in range(config.depth):
            block = f"blocks.{depth}"
            six = linear(silu(condition), f"{block}.adaLN_modulation.1").reshape(6, width)
            h = normalise(tokens) * (1 + six[1]) + six[0]
            query, key, value = np.split(linear(h, f"{block}.attn.qkv"), 3, axis=1)
            heads = []
            for head in range(config.num_heads):
                part = slice(head * width // config.num_heads, (head + 1) * width // config.num_heads)
                scores = query[:, part] @ key[:, part].T / math.sqrt(width / config.num_heads)
                scores = np.exp(scores - scores.max(1, keepdims=True))
                heads.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
            tokens = tokens + six[2] * linear(np.concatenate(heads, 1), f"{block}.attn.proj")
            h = normalise(tokens) * (1 + six[4]) + six[3]
            tokens = tokens + six[5] * linear(gelu(linear(h, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
            after.append(tokens)
        shift, scale = linear(silu(condition), "final_layer.adaLN_modulation.1").reshape(2, width)
        patches = linear(normalise(tokens) * (1 + scale) + shift, "final_layer.linear")
        velocity = np.empty(image.shape)
        for token, patch in enumerate(patches):
            r, c = divmod(token, side)
            velocity[:, r * p : r * p + p, c * p : c * p + p] = patch.reshape(p, p, -1).transpose(2, 0, 1)
        velocities.append(velocity)
        hidden.append(after)
    return np.stack(velocities), np.array(hidden)


def inputs(config: SiTConfig, num: int):
    generator = torch.Generator().manual_seed(5)
    side = config.input_size
    x = torch.randn(num, config.in_channels, side, side, generator=generator)
    t = torch.rand(num, generator=generator)
    y = torch.arange(num) % (config.num_classes + 1)  # the null class too
    return x, t, y


def test_forward_equals_an_independent_computation_in_float64():
    model = randomized(SiT(SMALL, PROJECTORS, encoder_depth=2), seed=1)
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    x, t, y = inputs(SMALL, 6)
    velocity, hidden = reference_velocity(weights, SMALL, x.double().numpy(), t.double().numpy(), y.numpy())

    found, projections = model(x, t, y, return_projections=True)
    scale = np.abs(velocity).max()
    assert found.shape == x.shape
    np.testing.assert_allclose(found.detach().numpy(), velocity, atol=2e-5 * scale)
    tapped = hidden[:, 1]  # after block 2
    linear = tapped @ weights["projectors.0.projection_layer.weight"].T + weights["projectors.0.projection_layer.bias"]
    assert projections[0].shape == (6, 9, 7)
    assert model.x_embedder(x).is_contiguous()
    np.testing.assert_allclose(projections[0].detach().numpy(), linear, atol=2e-5 * np.abs(linear).max())
    assert projections[1].shape == (6, 9, 4)
    assert torch.equal(model(x, t, y), found)


@pytest.mark.parametrize(("name", "millions"), [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)])
def test_parameter_counts_are_the_published_ones(name: str, millions: int):
    """For 256-px latents (32x32x4) and 1,000 classes: the label table has 1,001 rows, pos_embed counts, the head
    answers 4 channels (the published SiT learns a variance that it drops: 0.02 M more), projectors do not count."""
    with torch.device("meta"):
        model = SiT(sit_config(name, input_size=32, in_channels=4, num_classes=1000))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.51)  # B has 130.50


def test_state_dict_has_the_published_names_and_shapes():
    config = sit_config("SiT-B/2", input_size=32, in_channels=4, num_classes=1000)
    with torch.device("meta"):
        model = SiT(config, [ProjectorConfig(kind="mlp", out_dim=768)], encoder_depth=8)
    expected = {
        "pos_embed": (1, 256, 768),
        "x_embedder.proj.weight": (768, 4, 2, 2),
        "x_embedder.proj.bias": (768,),
        "t_embedder.mlp.0.weight": (768, 256),
        "t_embedder.mlp.0.bias": (768,),
        "t_embedder.mlp.2.weight": (768, 768),
        "t_embedder.mlp.2.bias": (768,),
        "y_embedder.embedding_table.weight": (1001, 768),
        "final_layer.linear.weight": (16, 768),
        "final_layer.linear.bias": (16,),
        "final_layer.adaLN_modulation.1.weight": (1536, 768),
        "final_layer.adaLN_modulation.1.bias": (1536,),
        "projectors.0.0.weight": (2048, 768),
        "projectors.0.0.bias": (2048,),
        "projectors.0.2.weight": (2048, 2048),
        "projectors.0.2.bias": (2048,),
        "projectors.0.4.weight": (768, 2048),
        "projectors.0.4.bias": (768,),
    }
    for block in range(12):
        expected |= {
            f"blocks.{block}.attn.qkv.weight": (2304, 768),
            f"blocks.{block}.attn.qkv.bias": (2304,),
            f"blocks.{block}.attn.proj.weight": (768, 768),
            f"blocks.{block}.attn.proj.bias": (768,),
            f"blocks.{block}.mlp.fc1.weight": (3072, 768),
            f"blocks.{block}.mlp.fc1.bias": (3072,),
            f"blocks.{block}.mlp.fc2.weight": (768, 3072),
            f"blocks.{block}.mlp.fc2.bias": (768,),
            f"blocks.{block}.adaLN_modulation.1.weight": (4608, 768),
            f"blocks.{block}.adaLN_modulation.1.bias": (4608,),
        }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert {name for name, _ in model.named_parameters()} == set(expected)  # no buffers: the EMA holds everything


def test_pos_embed_is_the_sine_cosine_of_column_then_row():
    embedded = sincos_pos_embed(8, (3, 3))
    for token in range(9):
        row, column = divmod(token, 3)
        expected = [
            f(position * frequency)
            for position in (column, row)
            for f in (math.sin, math.cos)
            for frequency in (1.0, 0.01)
        ]
        np.testing.assert_allclose(embedded[token], expected, rtol=1e-14)
    model = SiT(SMALL)
    assert not model.pos_embed.requires_grad
    np.testing.assert_array_equal(model.pos_embed[0].numpy(), sincos_pos_embed(16, (3, 3)).astype(np.float32))


def test_an_untrained_model_answers_zero_and_its_blocks_are_the_identity():
    model = SiT(SMALL, [ProjectorConfig(kind="linear", out_dim=16)], encoder_depth=3)
    x, t, y = inputs(SMALL, 4)
    velocity, (projected,) = model(x, t, y, return_projections=True)
    assert torch.equal(velocity, torch.zeros_like(x))
    embedded = model.x_embedder(x) + model.pos_embed
    assert torch.equal(projected, model.projectors[0](embedded))


def test_initial_weights_have_the_published_distributions():
    model = SiT(sit_config("SiT-Ti/4", input_size=32, in_channels=3, num_classes=1000), seed=3)
    state = model.state_dict()
    for name in ("blocks.4.attn.qkv", "blocks.5.mlp.fc2", "blocks.0.mlp.fc1", "x_embedder.proj"):
        weight = state[f"{name}.weight"].flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))  # xavier-uniform; the patch embedding's weight taken as a Linear's
        assert 0.99 * bound < weight.abs().max() <= bound, name
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
        assert not state[f"{name}.bias"].any(), name
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert state[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.02), name
    for name in ("blocks.3.adaLN_modulation.1", "final_layer.adaLN_modulation.1", "final_layer.linear"):
        assert not state[f"{name}.weight"].any(), name


def test_projectors_change_no_initial_weight_and_nothing_touches_the_global_generator():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    plain = SiT(SMALL, seed=4)
    one = SiT(SMALL, [ProjectorConfig(kind="conv", out_dim=6)], encoder_depth=1, seed=4)
    two = SiT(SMALL, [ProjectorConfig(kind="conv", out_dim=6)] * 2, encoder_depth=2, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, one.state_dict()[name]), name
        assert torch.equal(value, two.state_dict()[name]), name
    assert not torch.equal(two.projectors[0].projection_layer.weight, two.projectors[1].projection_layer.weight)
    assert torch.equal(one.projectors[0].projection_layer.weight, two.projectors[0].projection_layer.weight)
    other = SiT(SMALL, seed=5)
    assert not torch.equal(plain.x_embedder.proj.weight, other.x_embedder.proj.weight)


def test_compiles_without_a_graph_break_and_follows_autocast():
    model = randomized(SiT(SMALL, PROJECTORS, encoder_depth=2), seed=1)
    x, t, y = inputs(SMALL, 3)
    eager = model(x, t, y, return_projections=True)
    traced = torch.compile(model, fullgraph=True, backend="eager")(x, t, y, return_projections=True)
    torch.testing.assert_close(traced, eager)
    with torch.autocast("cpu", torch.bfloat16):
        velocity, projections = model(x, t, y, return_projections=True)
    assert velocity.dtype == projections[0].dtype == torch.bfloat16
    error = (velocity.float() - eager[0]).norm() / eager[0].norm()
    assert 0 < error < 0.05  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("name", ["SiT-B/2", "SiT-Ti/4", "SiT-XL/8", "SiT-S/16"])
def test_any_patch_size_is_a_model_name(name: str):
    config = sit_config(name, input_size=32, in_channels=4, num_classes=10)
    assert config.patch_size == int(name.split("/")[1])
    assert config.grid == (32 // config.patch_size, 32 // config.patch_size)


@pytest.mark.parametrize("name", ["SiT-H/2", "SiT-B", "SiT-B/", "SiT-B/0", "SiT-B/x", "DiT-B/2", "B/2", ""])
def test_an_unknown_model_is_refused_with_the_known_ones(name: str):
    with pytest.raises(UsageError, match=r"unknown model .*Known: .*SiT-XL/"):
        sit_config(name, input_size=32, in_channels=4, num_classes=10)


def test_misfits_are_refused_in_words():
    with pytest.raises(UsageError, match="did you mean 'SiT-XL/2'"):
        sit_config("SiT-XXL/2", input_size=32, in_channels=4, num_classes=10)
    with pytest.raises(UsageError, match="patches of 5 do not divide latents of 32x32"):
        sit_config("SiT-B/5", input_size=32, in_channels=4, num_classes=10)
    for depth in (None, 0, 4):
        with pytest.raises(UsageError, match=f"small/2 has 3 blocks; encoder_depth is {depth}"):
            SiT(SMALL, PROJECTORS, encoder_depth=depth)
