"""Activation checkpointing: every block runs twice, and every bit is that of a model that keeps its activations."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from repa.trainer.models.architectures import make_model
from repa.trainer.models.projector import ProjectorConfig
from repa.trainer.models.recomputing import checkpoint_activations
from repa.trainer.models.sit import SiT, SiTConfig

from .test_jit import SMALL
from .test_sit import randomized

CONFIGS = {
    "sit": SiTConfig(
        name="tiny/2", input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=5
    ),
    "jit": SMALL,
}


def gradients(model: SiT, *, compiled: bool = False) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss of all that the model answers to fixed inputs, its value, and what it answers."""
    config, generator = model.config, torch.Generator().manual_seed(3)
    x = torch.randn(4, config.in_channels, config.input_size, config.input_size, generator=generator)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    velocity, (tokens,) = forward(x, torch.linspace(0.1, 0.9, 4), torch.arange(4), return_projections=True)
    loss = velocity.square().mean() + tokens.square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {"loss": loss.detach(), "velocity": velocity.detach()}


def made(name: str) -> SiT:
    projectors = [ProjectorConfig(kind="linear", out_dim=7)]
    return randomized(make_model(CONFIGS[name], projectors, encoder_depth=2), seed=0).train()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sit", "jit"])
def test_gradients_are_the_same_to_the_bit_and_blocks_run_twice(name: str, precision: torch.dtype):
    kept, recomputed = made(name), made(name)
    runs: list[int] = []
    for block in recomputed.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
        block.norm2.register_forward_pre_hook(lambda *_: runs.append(2))
    checkpoint_activations(recomputed)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        expected, found = gradients(kept), gradients(recomputed)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    depth = len(recomputed.blocks)
    assert (runs.count(1), runs.count(2)) == (depth, 2 * depth)
    assert list(kept.state_dict()) == list(recomputed.state_dict())
    with torch.no_grad():
        runs.clear()
        recomputed(
            torch.zeros(1, 3, *2 * (CONFIGS[name].input_size,)), torch.ones(1), torch.zeros(1, dtype=torch.int64)
        )
    assert runs.count(2) == depth


def test_it_compiles_whole():
    model, plain = made("sit"), made("sit")
    checkpoint_activations(model)
    with sdpa_kernel(SDPBackend.MATH):
        found, expected = gradients(model, compiled=True), gradients(plain)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7, msg=key)
    torch._dynamo.reset()
