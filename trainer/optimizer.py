"""AdamW whose update is gated on the device: a step that is not finite changes nothing, and no host sync asks.

The fused AdamW skips its update, moments and step count included, where its `found_inf` tensor is 1. Gradient
scalers use that door; here it is driven by the norm of the reduced gradient, so that float32 and bfloat16 runs get
the same protection. The gate is sticky: after the first bad step nothing moves any more, and the state that the next
log finds is the one from just before it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cache_specs.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as SiT and REPA run it: a constant learning rate, no weight decay."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of all gradients together

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"optimizer.{name} is {value}; expected a number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"optimizer.{name} is {getattr(self, name)}; expected 0 <= {name} < 1")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise UsageError(f"optimizer.weight_decay is {self.weight_decay}; expected 0 or more")


class GatedAdamW:
    """Clip, judge and update, without asking the host.

    `halted` is a float32 scalar on the device, 0 until the first gradient norm that is not finite and 1 for ever
    after.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.config = config
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.halted = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)

    def step(self) -> Tensor:
        """Apply the gradients, clear them, and return their norm before clipping (float32 scalar on the device)."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        self.halted = torch.maximum(self.halted, (~torch.isfinite(norm)).float())
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm, foreach=True)
        # Where halted is 1 the fused kernel leaves parameters and moments alone and takes its step count back.
        self.adamw.found_inf = self.halted  # type: ignore[attr-defined]  # read by torch's fused step, undeclared
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm
