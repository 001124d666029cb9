"""GatedAdamW against torch's AdamW, to the bit; and what a gradient that is not finite leaves of it."""

import copy

import pytest
import torch
from torch import nn

from repa.cache_specs.errors import UsageError
from repa.trainer.runs.optimizer import GatedAdamW, OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=3e-2, beta1=0.8, beta2=0.97, eps=1e-6, weight_decay=0.1, clip=0.5)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 5), (7,), (2, 2, 2), (4,))
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    made[2].requires_grad_(False)
    return made


def set_gradients(made: list[nn.Parameter], seed: int, *, without: int | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for index, parameter in enumerate(made):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if parameter.requires_grad and index != without else None


def torchs(made: list[nn.Parameter]) -> torch.optim.AdamW:
    trained = [parameter for parameter in made if parameter.requires_grad]
    settings = {"lr": 3e-2, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}
    return torch.optim.AdamW(trained, fused=True, **settings)


def torchs_step(made: list[nn.Parameter], optimizer: torch.optim.AdamW) -> torch.Tensor:
    norm = nn.utils.clip_grad_norm_([p for p in made if p.requires_grad], CONFIG.clip)
    optimizer.step()
    return norm


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_steps_are_those_of_torchs_adamw():
    ours, theirs = parameters(), parameters()
    optimizer, reference = GatedAdamW(ours, CONFIG), torchs(theirs)
    for step in range(4):
        without = 1 if step == 2 else None  # a parameter that no gradient reached keeps its moments and its count
        set_gradients(ours, step, without=without)
        set_gradients(theirs, step, without=without)
        assert torch.equal(optimizer.step(0), torchs_step(theirs, reference))
        assert all(parameter.grad is None for parameter in ours)
        assert_same(ours, theirs)
    assert not torch.equal(ours[0], parameters()[0])
    assert torch.equal(ours[2], parameters()[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_from_then_on(bad):
    ours = parameters()
    optimizer = GatedAdamW(ours, CONFIG)
    set_gradients(ours, 0)
    assert optimizer.step(0).isfinite()
    assert optimizer.halted == 0
    before = [parameter.detach().clone() for parameter in ours]
    state = copy.deepcopy(optimizer.state_dict())
    for step in (1, 2):
        set_gradients(ours, step)
        if step == 1:
            ours[1].grad[3] = bad
        optimizer.step(0)
        assert optimizer.halted == 1
        assert_same(ours, before)
        for index, kept in state["state"].items():
            now = optimizer.state_dict()["state"][index]
            assert now.keys() == kept.keys()
            assert all(torch.equal(now[name], kept[name]) for name in kept)


def test_a_state_goes_on_here_and_in_torchs_adamw(tmp_path):
    ours = parameters()
    optimizer = GatedAdamW(ours, CONFIG)
    set_gradients(ours, 0)
    optimizer.step(0)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)

    resumed, theirs = ([nn.Parameter(p.detach().clone(), p.requires_grad) for p in ours] for _ in range(2))
    again, reference = GatedAdamW(resumed, CONFIG), torchs(theirs)
    again.load_state_dict(stored)
    reference.load_state_dict(stored)
    for made, step in (
        (ours, lambda: optimizer.step(1)),
        (resumed, lambda: again.step(1)),
        (theirs, lambda: torchs_step(theirs, reference)),
    ):
        set_gradients(made, 1)
        step()
    assert_same(resumed, ours)
    assert_same(theirs, ours)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1.0, 9: 1.0, 10**6: 1.0}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 10**6: 1.0}),
        ({"schedule": "linear", "decay_steps": 10}, {0: 1.0, 5: 0.5, 10: 0.0, 99: 0.0}),
        (
            {"schedule": "linear", "decay_steps": 12, "warmup_steps": 2, "final_fraction": 0.2},
            {1: 1.0, 7: 0.6, 12: 0.2},
        ),
        ({"schedule": "cosine", "decay_steps": 12}, {0: 1.0, 3: 0.5 + 0.5 * 2**-0.5, 6: 0.5, 12: 0.0, 13: 0.0}),
    ],
)
def test_the_learning_rate_is_a_function_of_the_step(settings, expected):
    config = OptimizerConfig(learning_rate=2e-3, **settings)
    assert {step: config.rate(step) / 2e-3 for step in expected} == pytest.approx(expected, abs=1e-12)


def test_each_step_is_taken_at_its_rate_and_without_a_clip_gradients_stay():
    settings = {"learning_rate": 3e-2, "warmup_steps": 3, "beta1": 0.8, "beta2": 0.97, "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = parameters(), parameters()
    optimizer, reference = GatedAdamW(ours, OptimizerConfig(clip=None, **settings)), torchs(theirs)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(step)
        reference.param_groups[0]["lr"] = 3e-2 * min(1.0, (step + 1) / 3)
        reference.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_steps": 9}, "a constant schedule does not decay"),
        ({"schedule": "cosine"}, "optimizer.decay_steps does not say until when"),
        (
            {"schedule": "linear", "decay_steps": 5, "warmup_steps": 5},
            "expected more than the 5 of optimizer.warmup_steps",
        ),
        ({"final_fraction": 2.0}, "optimizer.final_fraction is 2.0; expected 0 to 1"),
        ({"clip": 0.0}, "optimizer.clip is 0.0"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps is -1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        OptimizerConfig(**settings)
