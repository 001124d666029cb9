"""An exponential moving average of the parameters, the weights that samples are drawn from.

    ema <- ema + (1 - decay) (parameter - ema)        every step from the first, float32, every parameter

The published code computes decay * ema + (1 - decay) * parameter. The two are equal on paper; in float32 the rounded
factors 0.9999 and 0.0001 add up to 1 - 1.7e-8, which over many steps shrinks the average by 1.7e-4 of itself. The
form above keeps a parameter that never moves, such as pos_embed, bit for bit.
"""

import copy

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from .sit import SiT


class EMA:
    """The average of one SiT and its projectors.

    `model` is a SiT of its own, in eval mode, without gradients, ready to sample from and to store. Make the EMA
    before the trained model is compiled or wrapped.
    """

    def __init__(self, model: SiT, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"EMA decay is {decay}; expected 0 <= decay < 1")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: SiT, halted: Tensor | None = None) -> None:
        """Move the average towards `model`'s parameters.

        `halted` is a float32 scalar on their device, 0 to update and 1 to leave the average as it is, so that a step
        judged on the device needs no synchronisation. The parameters must be finite either way: the same scalar has to
        have kept the optimizer from moving them.
        """
        ours: list[Tensor] = list(self.model.parameters())
        theirs: list[Tensor] = list(model.parameters())
        if ours[0].device.type == "cuda":
            move_fused(ours, theirs, 1 - self.decay, halted)
            return
        weight = torch.full((), 1 - self.decay, device=ours[0].device)
        if halted is not None:
            weight = weight * (1 - halted)
        torch._foreach_lerp_(ours, theirs, [weight] * len(ours))


def move_fused(ours: list[Tensor], theirs: list[Tensor], weight: float, halted: Tensor | None) -> None:
    """Move `ours` by `weight` of the way to `theirs`, in one launch for all of them instead of one a parameter.

    A lerp whose weight lies on the device has no such kernel; SGD's has, and a door for the gate. Its step at the rate
    `weight`, with a decay of 1 and minus `theirs` for the gradient, is ours <- ours - weight (ours - theirs).
    """
    torch._fused_sgd_(
        ours,
        theirs,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=weight,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=halted,
    )
