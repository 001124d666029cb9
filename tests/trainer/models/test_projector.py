"""Projectors against computations written out by hand, and the layout that the alignment op wants."""

import math

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.models.projector import ProjectorConfig, make_projector

GRID = (4, 4)
WIDTH = 6


def make(kind: str, seed: int = 0, **settings):
    projector = make_projector(WIDTH, ProjectorConfig(kind=kind, out_dim=5, **settings), GRID)
    projector.initialize(torch.Generator().manual_seed(seed))
    return projector


def hidden_states(num: int = 3) -> torch.Tensor:
    return torch.randn(num, 16, WIDTH, generator=torch.Generator().manual_seed(1))


def weights_of(projector) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in projector.state_dict().items()}


def test_mlp():
    projector, tokens = make("mlp", hidden_dim=7), hidden_states()
    w, h = weights_of(projector), tokens.double().numpy()
    for layer in (0, 2, 4):
        h = h @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
        if layer < 4:
            h = h / (1 + np.exp(-h))
    np.testing.assert_allclose(projector(tokens).detach().numpy(), h, atol=1e-6)


def test_linear():
    projector, tokens = make("linear"), hidden_states()
    w = weights_of(projector)
    expected = tokens.double().numpy() @ w["projection_layer.weight"].T + w["projection_layer.bias"]
    np.testing.assert_allclose(projector(tokens).detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_conv_sums_over_the_zero_padded_neighbourhood_of_each_token(k: int):
    projector, tokens = make("conv", kernel_size=k), hidden_states()
    w, h = weights_of(projector), tokens.double().numpy()
    expected = np.zeros((3, 16, 5)) + w["projection_layer.bias"]
    for token in range(16):
        for other in range(16):
            down, right = other // 4 - token // 4 + k // 2, other % 4 - token % 4 + k // 2
            if 0 <= down < k and 0 <= right < k:
                expected[:, token] += h[:, other] @ w["projection_layer.weight"][:, :, down, right].T
    found = projector(tokens)
    assert found.shape == (3, 16, 5)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-6)


def test_conv_with_a_kernel_of_one_is_the_linear_projector():
    conv, linear, tokens = make("conv", kernel_size=1), make("linear"), hidden_states()
    with torch.no_grad():
        linear.projection_layer.weight.copy_(conv.projection_layer.weight[:, :, 0, 0])
        linear.projection_layer.bias.copy_(conv.projection_layer.bias)
    torch.testing.assert_close(conv(tokens), linear(tokens))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_conv_copies_neither_its_input_nor_its_output(k: int, autocast: bool):
    """The convolution reads the very memory of the tokens, and the result is a contiguous view of what it wrote."""
    projector, tokens, seen = make("conv", kernel_size=k), hidden_states(), {}

    def watch(module, inputs, output):
        seen.update(read=inputs[0].data_ptr(), wrote=output.data_ptr())

    projector.projection_layer.register_forward_hook(watch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = projector(tokens)
    assert seen == {"read": tokens.data_ptr(), "wrote": z.data_ptr()}
    assert z.is_contiguous()
    assert z.grad_fn is not None
    assert "View" in type(z.grad_fn).__name__  # not Clone


def test_initial_values_follow_the_published_code():
    mlp = make_projector(96, ProjectorConfig(kind="mlp", out_dim=80, hidden_dim=128), GRID)
    linear = make_projector(96, ProjectorConfig(kind="linear", out_dim=80), GRID)
    conv = make_projector(96, ProjectorConfig(kind="conv", out_dim=80), GRID)
    for projector in (mlp, linear, conv):
        projector.initialize(torch.Generator().manual_seed(0))
    for layer in (mlp[0], mlp[2], mlp[4], linear.projection_layer):
        bound = math.sqrt(6 / sum(layer.weight.shape))  # xavier-uniform
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    bound = 1 / math.sqrt(96 * 9)  # PyTorch's default for a convolution, weight and bias alike
    assert 0.99 * bound < conv.projection_layer.weight.abs().max() <= bound
    assert 0.9 * bound < conv.projection_layer.bias.abs().max() <= bound


def test_misfits_are_refused():
    with pytest.raises(UsageError, match="kernel_size is 4; expected an odd number"):
        ProjectorConfig(kind="conv", out_dim=5, kernel_size=4)
    with pytest.raises(UsageError, match="did you mean 'conv'"):
        ProjectorConfig(kind="convolution", out_dim=5)
    with pytest.raises(UsageError, match="out_dim 0"):
        ProjectorConfig(kind="mlp", out_dim=0)
