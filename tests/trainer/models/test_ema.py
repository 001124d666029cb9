"""The moving average against its closed form, its gate, and what it covers."""

import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.models.ema import EMA, move_fused
from repa.trainer.models.projector import ProjectorConfig
from repa.trainer.models.sit import SiT, SiTConfig

CONFIG = SiTConfig(
    name="tiny/2", input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=2
)


def make_model() -> SiT:
    return SiT(CONFIG, [ProjectorConfig(kind="conv", out_dim=3)], encoder_depth=1)


def walk(model: SiT, step: int) -> None:
    """Move every trained parameter, as an optimizer would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_it_is_the_weighted_sum_of_every_parameter_from_step_zero():
    model = make_model()
    decay, steps = 0.9, 12
    history = [{name: value.double().clone() for name, value in model.state_dict().items()}]
    ema = EMA(model, decay)
    for step in range(steps):
        walk(model, step)
        ema.update(model)
        history.append({name: value.double().clone() for name, value in model.state_dict().items()})
    for name, found in ema.model.state_dict().items():
        expected = decay**steps * history[0][name]
        for step in range(1, steps + 1):
            expected = expected + (1 - decay) * decay ** (steps - step) * history[step][name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6, msg=name)
        if name != "pos_embed":
            assert not torch.equal(found, history[0][name].float()), name


@torch.no_grad()
def test_one_launch_for_all_is_the_lerp_of_each_and_has_the_same_gate():
    generator = torch.Generator().manual_seed(0)
    shapes = ((1000,), (3, 5), ())
    ours, theirs = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    parameters = [torch.nn.Parameter(values.clone()) for values in theirs]
    for weight in (1 - 0.9999, 0.3, 1.0):
        moved = [values.clone() for values in ours]
        move_fused(moved, parameters, weight, torch.tensor(1.0))
        assert all(map(torch.equal, moved, ours))
        move_fused(moved, parameters, weight, torch.tensor(0.0))
        for found, before, target in zip(moved, ours, theirs, strict=True):
            expected = before.double() + weight * (target.double() - before.double())
            torch.testing.assert_close(found.double(), expected, atol=5e-7, rtol=0)
        assert all(map(torch.equal, parameters, theirs))
        still = [values.clone() for values in theirs]
        move_fused(still, parameters, weight, None)
        assert all(map(torch.equal, still, theirs))  # what never moves stays, bit for bit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; torch finds none")
def test_on_a_gpu_it_moves_as_on_a_cpu():
    model = make_model()
    here, there = EMA(model, 0.9), EMA(model.cuda(), 0.9)
    walk(model.cpu(), 0)
    for halted in (1.0, 0.0):
        here.update(model, torch.tensor(halted))
        there.update(model.cuda(), torch.tensor(halted, device="cuda"))
        model.cpu()
        for name, value in there.model.state_dict().items():
            torch.testing.assert_close(value.cpu(), here.model.state_dict()[name], atol=0, rtol=1e-6, msg=name)


def test_the_gate_leaves_the_average_as_it_is():
    model = make_model()
    ema, free = EMA(model, 0.5), EMA(model, 0.5)
    before = {name: value.clone() for name, value in ema.model.state_dict().items()}
    walk(model, 0)
    ema.update(model, torch.tensor(1.0))
    for name, value in ema.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    ema.update(model, torch.tensor(0.0))
    free.update(model)
    for name, value in ema.model.state_dict().items():
        assert torch.equal(value, free.model.state_dict()[name]), name


def test_a_parameter_that_never_moves_keeps_its_bits():
    model = make_model()
    ema = EMA(model, 0.9999)
    for _ in range(300):
        ema.update(model)
    for name, value in ema.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_its_model_is_apart_from_the_trained_one():
    model = make_model().train()
    ema = EMA(model, 0.9)
    assert not ema.model.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    walk(model, 0)
    assert not torch.equal(ema.model.x_embedder.proj.weight, model.x_embedder.proj.weight)


def test_a_decay_of_one_is_refused():
    with pytest.raises(UsageError, match=r"decay is 1\.0"):
        EMA(make_model(), 1.0)
