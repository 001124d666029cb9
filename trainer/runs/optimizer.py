"""AdamW at a rate that the step alone decides. Its update is gated on the device: a step that is not finite changes
nothing, and no host sync asks.

The fused AdamW skips its update, moments and step count included, where its `found_inf` tensor is 1. Gradient
scalers use that door; here it is driven by the norm of the reduced gradient, so that float32 and bfloat16 runs get
the same protection. The gate is sticky: after the first bad step nothing moves any more, and the state that the next
log finds is the one from just before it.

torch's function is called and not its class, which has no argument for `found_inf`, and which imports torch's compiler
when it is made: 1.8 s and 150 MB at every start.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ...cache_specs.errors import UsageError, at_least


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as SiT and REPA run it: a constant learning rate, no weight decay.

    The rate rises linearly over `warmup_steps`, then stays, or falls to `final_fraction` of itself by `decay_steps`,
    counted from the run's first step, and stays there: a horizon of its own, since `steps` may grow.
    """

    learning_rate: float = 1e-4  # of AdamW
    warmup_steps: int = 0  # steps over which it rises from 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # what it does after them
    decay_steps: int | None = None  # step at which a linear or cosine schedule ends
    final_fraction: float = 0.0  # of the rate that a linear or cosine schedule leaves
    beta1: float = 0.9  # of AdamW's first moment
    beta2: float = 0.999  # of its second
    eps: float = 1e-8  # of AdamW's denominator
    weight_decay: float = 0.0  # decoupled, of AdamW
    clip: float | None = 1.0  # largest norm of all gradients together; null: not clipped

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip"):
            value = getattr(self, name)
            if name == "clip" and value is None:
                continue
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"optimizer.{name} is {value}; expected a number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"optimizer.{name} is {getattr(self, name)}; expected 0 <= {name} < 1")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise UsageError(f"optimizer.weight_decay is {self.weight_decay}; expected 0 or more")
        at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        if not 0 <= self.final_fraction <= 1:
            raise UsageError(f"optimizer.final_fraction is {self.final_fraction}; expected 0 to 1")
        if self.schedule == "constant":
            if self.decay_steps is not None:
                raise UsageError(
                    "optimizer.decay_steps is set, and a constant schedule does not decay; choose "
                    "optimizer.schedule=linear or cosine, or leave it out"
                )
        elif self.decay_steps is None:
            raise UsageError(
                f"optimizer.schedule is {self.schedule}, and optimizer.decay_steps does not say until when; set it, "
                f"usually to the run's steps"
            )
        elif self.decay_steps <= self.warmup_steps:
            raise UsageError(
                f"optimizer.decay_steps is {self.decay_steps}; expected more than the {self.warmup_steps} of "
                f"optimizer.warmup_steps"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of `step` (from 0)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay_steps is None:
            return self.learning_rate
        done = min(1.0, (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * left)


class GatedAdamW:
    """Clip, judge and update, without asking the host.

    `halted` is a float32 scalar on the device, 0 until the first gradient norm that is not finite and 1 for ever
    after. Memory: two moments of each parameter's shape.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.config = config
        self._state = [
            {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # the fused kernel's
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
            for parameter in self.parameters
        ]
        self.halted = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)

    @torch.no_grad()
    def step(self, step: int) -> Tensor:
        """Apply the gradients at the rate of `step` (from 0), and clear them.

        Return their norm before clipping, a float32 scalar on the device.
        """
        moved = [
            (p, p.grad, state) for p, state in zip(self.parameters, self._state, strict=True) if p.grad is not None
        ]
        gradients = [gradient for _, gradient, _ in moved if gradient is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        self.halted = torch.maximum(self.halted, (~torch.isfinite(norm)).float())
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm, foreach=True)
        # Where halted is 1 the fused kernel leaves parameters and moments alone and takes its step count back.
        adamw(
            [parameter for parameter, _, _ in moved],
            gradients,
            [state["exp_avg"] for _, _, state in moved],
            [state["exp_avg_sq"] for _, _, state in moved],
            [],
            [state["step"] for _, _, state in moved],
            fused=True,
            found_inf=self.halted,
            amsgrad=False,
            maximize=False,
            lr=self.config.rate(step),
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return step counts and moments in the layout of `torch.optim.AdamW.state_dict`, which also loads it."""
        group = {
            "lr": self.config.learning_rate,
            "betas": (self.config.beta1, self.config.beta2),
            "eps": self.config.eps,
            "weight_decay": self.config.weight_decay,
            "params": list(range(len(self.parameters))),
        }
        return {"state": dict(enumerate(self._state)), "param_groups": [group]}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, of the same parameters; the settings are this object's own."""
        for index, state in enumerate(self._state):
            for name, tensor in state.items():
                tensor.copy_(stored["state"][index][name])
