"""JiT against its published parameter counts and against the same network written out in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.models.architectures import config_record, make_model, model_config, recorded_config
from repa.trainer.models.jit import JiT, JiTConfig, dropped, jit_config, mixed, rope_tables, rotated
from repa.trainer.models.projector import ProjectorConfig

from .test_sit import randomized

SMALL = JiTConfig(
    name="small/2", input_size=6, patch_size=2, in_channels=3, hidden_size=16, depth=4, num_heads=2, num_classes=5,
    bottleneck=4, class_tokens_at=2, dropout=0.2,
)  # fmt: skip
PROJECTOR = ProjectorConfig(kind="linear", out_dim=7)


@pytest.mark.parametrize(
    ("name", "side", "millions"),
    [
        ("JiT-B/16", 256, 131.12), ("JiT-B/32", 512, 133.19), ("JiT-L/16", 256, 458.88), ("JiT-L/32", 512, 461.53),
        ("JiT-H/16", 256, 952.51), ("JiT-H/32", 512, 956.06),
    ],
)  # fmt: skip
def test_trained_parameters_are_as_many_as_published(name: str, side: int, millions: float):
    with torch.device("meta"):
        model = make_model(model_config(name, architecture="JiT", input_size=side, in_channels=3, num_classes=1000))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained / 1e6 == pytest.approx(millions, abs=0.005)


def test_names_are_the_published_ones():
    expected = {
        "pos_embed", "in_context_posemb", "x_embedder.proj1.weight", "x_embedder.proj2.weight",
        "x_embedder.proj2.bias", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight", "final_layer.norm_final.weight",
        "final_layer.linear.weight", "final_layer.linear.bias", "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    }  # fmt: skip
    block = {
        "norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight", "attn.qkv.weight", "attn.qkv.bias",
        "attn.proj.weight", "attn.proj.bias", "mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias",
        "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
    }  # fmt: skip
    expected |= {f"blocks.{index}.{name}" for index in range(4) for name in block}
    assert set(JiT(SMALL).state_dict()) == expected


def written_out(model: JiT, x: np.ndarray, t: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The network in float64: loops over samples, heads, queries; places as rotations of complex numbers."""
    w = {name: value.double().numpy() for name, value in model.state_dict().items()}
    config = model.config
    p, (rows, columns), width = config.patch_size, config.grid, config.hidden_size
    head = width // config.num_heads

    def silu(a):
        return a / (1 + np.exp(-a))

    def rms(a, weight):
        return a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * weight

    def linear(a, name):
        return a @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def turned(a, place):
        turns = np.array([place[k] * 10_000 ** (-2 * i / (head / 2)) for k in (0, 1) for i in range(head // 4)])
        pairs = (a[0::2] + 1j * a[1::2]) * np.exp(1j * turns)
        return np.stack([pairs.real, pairs.imag], axis=1).ravel()

    answers = []
    for image, time, label in zip(x, t, y, strict=True):
        angles = (1 - time) * np.exp(-math.log(10_000) * np.arange(128) / 128)
        embedded = linear(np.concatenate([np.cos(angles), np.sin(angles)]), "t_embedder.mlp.0")
        label_vector = w["y_embedder.embedding_table.weight"][label]
        c = silu(linear(silu(embedded), "t_embedder.mlp.2") + label_vector)
        tokens, places = [], []
        for i in range(rows):
            for j in range(columns):
                patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
                few = np.einsum("bchw,chw->b", w["x_embedder.proj1.weight"], patch)
                tokens.append(w["x_embedder.proj2.weight"][:, :, 0, 0] @ few + w["x_embedder.proj2.bias"])
                places.append((i, j))
        h = np.array(tokens) + w["pos_embed"][0]
        for index in range(config.depth):
            if index == config.class_tokens_at:
                h = np.concatenate([label_vector + w["in_context_posemb"][0], h])
                places = [(0, 0)] * 32 + places
            name = f"blocks.{index}"
            modulation = linear(c, f"{name}.adaLN_modulation.1").reshape(6, width)
            normed = rms(h, w[f"{name}.norm1.weight"]) * (1 + modulation[1]) + modulation[0]
            qkv = linear(normed, f"{name}.attn.qkv").reshape(len(h), 3, config.num_heads, head)
            mixture = np.zeros((len(h), config.num_heads, head))
            for k in range(config.num_heads):
                q, key = (
                    np.array([turned(v, place) for v, place in zip(rms(qkv[:, n, k], weight), places, strict=True)])
                    for n, weight in ((0, w[f"{name}.attn.q_norm.weight"]), (1, w[f"{name}.attn.k_norm.weight"]))
                )
                scores = np.exp(q @ key.T / math.sqrt(head))
                mixture[:, k] = scores / scores.sum(1, keepdims=True) @ qkv[:, 2, k]
            h = h + modulation[2] * linear(mixture.reshape(len(h), width), f"{name}.attn.proj")
            normed = rms(h, w[f"{name}.norm2.weight"]) * (1 + modulation[4]) + modulation[3]
            gate, value = np.split(linear(normed, f"{name}.mlp.w12"), 2, axis=1)
            h = h + modulation[5] * linear(silu(gate) * value, f"{name}.mlp.w3")
        shift, scale = linear(c, "final_layer.adaLN_modulation.1").reshape(2, width)
        out = linear(rms(h[32:], w["final_layer.norm_final.weight"]) * (1 + scale) + shift, "final_layer.linear")
        clean = np.zeros(image.shape)
        for token, (i, j) in zip(out, places[32:], strict=True):
            clean[:, i * p : (i + 1) * p, j * p : (j + 1) * p] = token.reshape(p, p, 3).transpose(2, 0, 1)
        answers.append(clean)
    return np.array(answers)


def inputs(num: int = 3, side: int = 6):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num, 3, side, side, generator=generator)
    return x, torch.rand(num, generator=generator), torch.tensor([0, 3, 5])[:num]


def test_the_forward_pass_is_the_published_network():
    model, (x, t, y) = randomized(JiT(SMALL), 0), inputs()
    expected = written_out(model, x.double().numpy(), t.double().numpy(), y.numpy())
    np.testing.assert_allclose(model(x, t, y).detach(), expected, rtol=2e-4, atol=2e-5)
    assert np.abs(expected).mean() > 0.1


@pytest.mark.parametrize("depth", [2, 3])
def test_projectors_read_the_patches_alone_before_and_among_class_tokens(depth: int):
    model, (x, t, y) = randomized(JiT(SMALL, [PROJECTOR], encoder_depth=depth), 0).eval(), inputs()
    seen = []
    model.blocks[depth - 1].register_forward_hook(lambda _module, _inputs, tokens: seen.append(tokens))
    clean, (projected,) = model(x, t, y, return_projections=True)
    assert torch.equal(clean, model(x, t, y))
    assert seen[0].shape[1] == (9 if depth == 2 else 41)
    assert torch.equal(projected, model.projectors[0](seen[0][:, -9:]))


def test_a_new_model_answers_zero_and_projectors_change_none_of_its_weights():
    state = torch.random.get_rng_state()
    one, other = JiT(SMALL, seed=4), JiT(SMALL, [PROJECTOR], encoder_depth=2, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not one(*inputs()).any()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    embedding, norm = one.in_context_posemb, one.blocks[0].attn.q_norm.weight
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(norm, torch.ones_like(norm))
    assert not torch.equal(embedding, JiT(SMALL, seed=5).in_context_posemb)


def test_rotations_turn_a_product_by_the_distance_of_places_alone():
    cos, sin = rope_tables((4, 5), 16, num_before=3)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    products = rotated(q.expand(23, 16), cos, sin) @ rotated(k.expand(23, 16), cos, sin).T
    grid = products[3:, 3:].view(4, 5, 4, 5)
    torch.testing.assert_close(grid[0, 1, 2, 3], grid[1, 2, 3, 4])
    assert not torch.isclose(grid[0, 1, 2, 3], grid[0, 1, 3, 2])
    torch.testing.assert_close(products[:3, :3], (q @ k).expand(3, 3))


def test_dropout_keeps_its_share_by_seed_and_place_alone():
    x, seeds = torch.ones(64, 30, 40), torch.arange(64)
    kept = dropped(x, 0.2, seeds)
    assert set(kept.unique().tolist()) == {0.0, 1.25}
    assert float((kept == 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    assert torch.equal(kept[5:6], dropped(x[:1], 0.2, seeds[5:6]))
    bits = (kept != 0).double().flatten(1)
    correlations = torch.corrcoef(bits)[~torch.eye(64, dtype=torch.bool)]  # of samples, whose seeds are neighbours
    assert float(correlations.abs().max()) < 5 / math.sqrt(1200)
    beside = torch.corrcoef(torch.stack([bits[:, :-1].flatten(), bits[:, 1:].flatten()]))[0, 1]
    assert abs(float(beside)) < 5 / math.sqrt(64 * 1199)
    assert torch.equal(dropped(x, 0.0, seeds), x)
    assert len(mixed(torch.arange(100_000)).unique()) > 99_990  # hardly any meet


def test_dropout_acts_in_training_in_the_middle_half_alone():
    model, (x, t, y) = randomized(JiT(SMALL), 0), inputs()
    seeds = torch.tensor([1, 2, 3])
    plain = model(x, t, y)
    assert [block.dropout for block in model.blocks] == [0.0, 0.2, 0.2, 0.0]
    assert torch.equal(model(x, t, y, seeds), model(x, t, y, seeds))
    assert not torch.allclose(model(x, t, y, seeds), plain)
    assert not torch.allclose(model(x, t, y, seeds), model(x, t, y, seeds + 1))
    assert torch.equal(model.eval()(x, t, y, seeds), plain)


def test_bf16_reaches_every_parameter_with_a_gradient():
    model, (x, t, y) = randomized(JiT(SMALL, [PROJECTOR], encoder_depth=2), 0), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        clean, (projected,) = model(x, t, y, torch.arange(3), return_projections=True)
    (clean.float().square().mean() + projected.float().square().mean()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    expected = model(x, t, y, torch.arange(3)).detach()
    assert float((clean.detach().float() - expected).norm() / expected.norm()) < 0.05


def test_records_and_names_give_the_same_model_again():
    config = jit_config("JiT-B/16", input_size=32, in_channels=3, num_classes=7)
    assert recorded_config(config_record(config)) == config
    assert config_record(config).keys() == {"jit"}
    sit = model_config("SiT-B/2", architecture="SiT", input_size=32, in_channels=3, num_classes=7)
    assert recorded_config(config_record(sit)) == sit
    assert type(make_model(sit)) is not JiT


def test_misfits_are_refused():
    shape = {"input_size": 32, "in_channels": 3, "num_classes": 7}
    with pytest.raises(UsageError, match=r"unknown model 'JiT-S/16'; did you mean"):
        jit_config("JiT-S/16", **shape)
    with pytest.raises(UsageError, match=r"model is SiT-B/2; this recipe's method trains a JiT, such as JiT-B/2"):
        model_config("SiT-B/2", architecture="JiT", **shape)
    with pytest.raises(UsageError, match=r"patches of 5 do not divide"):
        jit_config("JiT-B/5", **shape)
    for changes, words in (
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"class_tokens_at": 4}, "a block from 0 to 3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            replace(SMALL, **changes)
