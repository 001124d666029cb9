"""Representation alignment: how block `encoder_depth` of the model is held to frozen encoders' tokens, until when.

REPA (arXiv 2410.06940, section 3.2) and iREPA (arXiv 2512.10794, section 4): proj_coeff times the mean over encoders,
images and tokens of -cos(projector(h), target), the target spatially normalised with strength gamma in iREPA. The
coefficient is a function of the step: constant as published, or warmed up and let fall to 0, where reading ends. Block
and coefficient may be each encoder's own; the mean is then of coefficient times -cos.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ...cache_specs.errors import UsageError, at_least
from ..diffusion.losses import AlignmentTarget, alignment_losses
from ..models.projector import ProjectorConfig, TokensOf


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How block `encoder_depth` of SiT is held to the encoders' tokens (REPA, arXiv 2410.06940; iREPA, 2512.10794)."""

    projector: Literal["none", "mlp", "conv", "linear", "mlp2"] = "mlp"  # none: no alignment; mlp2: SRA's two layers
    hidden_dim: int = 2048  # of the projector mlp
    kernel_size: int = 3  # of the projector conv
    encoder_depth: int | tuple[int, ...] = 8  # block after which the projectors read, from 1; or one an encoder
    gamma: float | None = None  # strength of the spatial normalisation of the target; null for none
    proj_coeff: float | tuple[float, ...] = 0.5  # weight of the loss, at its highest; or one an encoder, in their mean
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # how the weight falls to 0 at the horizon
    horizon: int | None = None  # step from which on a falling weight is 0: neither aligned nor read
    warmup_steps: int = 0  # in which the weight rises from 0, in equal steps
    stop_step: int | None = None  # from this step on neither aligned nor read; null: never stopped

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "kernel_size", "encoder_depth"):
            for value in _each(getattr(self, name)):
                at_least(f"alignment.{name}", value, 1)
        if self.kernel_size % 2 == 0:
            raise UsageError(f"alignment.kernel_size is {self.kernel_size}; expected an odd number")
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise UsageError(f"alignment.gamma is {self.gamma}; expected 0 to 1, or null for no normalisation")
        for coefficient in _each(self.proj_coeff):
            if not 0 < coefficient < float("inf"):
                raise UsageError(
                    f"alignment.proj_coeff is {coefficient}; expected a number above 0 (no alignment is "
                    f"alignment.projector=none, the recipe sit)"
                )
        at_least("alignment.warmup_steps", self.warmup_steps, 0)
        if self.stop_step is not None:
            at_least("alignment.stop_step", self.stop_step, 1)
            if self.projector == "none":
                raise UsageError("alignment.stop_step has nothing to stop: alignment.projector is none. Leave it out")
        if (self.schedule == "constant") != (self.horizon is None):
            raise UsageError(
                f"alignment.schedule is {self.schedule} and alignment.horizon {self.horizon}: a weight that falls "
                f"(linear, cosine) has a horizon at which it is 0, and a constant one has none"
            )
        if self.horizon is not None and self.horizon <= self.warmup_steps:
            raise UsageError(
                f"alignment.horizon is {self.horizon}; expected a step after the {self.warmup_steps} of "
                f"alignment.warmup_steps"
            )
        if self.projector == "none" and (self.horizon is not None or self.warmup_steps):
            raise UsageError("alignment.schedule has no weight to change: alignment.projector is none. Leave it out")

    @property
    def end(self) -> int | None:
        """The step from which on nothing is aligned, None where there is none."""
        return min((step for step in (self.stop_step, self.horizon) if step is not None), default=None)

    def coefficient(self, step: int, place: int = 0) -> float:
        """Return the weight of the alignment in `step` (from 0), of the encoder at `place` where each has its own.

        It rises to `proj_coeff` over `warmup_steps`, and falls from there, linearly or as half a cosine, to 0 at
        `horizon`.
        """
        weight: float = _each(self.proj_coeff)[place]
        if step < self.warmup_steps:
            return weight * (step + 1) / self.warmup_steps
        if self.horizon is None:
            return weight
        left = max(0.0, (self.horizon - step) / (self.horizon - self.warmup_steps))
        # sin^2 is (1 + cos(pi (1 - left))) / 2 that does not round to 0 before the horizon.
        return weight * (left if self.schedule == "linear" else math.sin(math.pi / 2 * left) ** 2)

    def projector_config(self, width: int, *, of: TokensOf = "all") -> ProjectorConfig:
        """Return one projector into an encoder's `width` channels; `of` says which of the model's tokens it takes."""
        assert self.projector != "none"
        return ProjectorConfig(
            kind=self.projector, out_dim=width, hidden_dim=self.hidden_dim, kernel_size=self.kernel_size, of=of
        )


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


class Alignment:
    """The alignment term of one run, for micro-batches of which `accumulation` make a step.

    `names` are of what is aligned with, one a projector's target.
    """

    def __init__(self, config: AlignmentConfig, *, names: Sequence[str], accumulation: int) -> None:
        self.config = config
        self.names = tuple(names)
        self._aligned = len(names) > 0 and config.projector != "none"
        self._accumulation = accumulation

    def acts(self, step: int) -> bool:
        """Whether `step` (from 0) is aligned; once it is not, no later one is."""
        end = self.config.end
        return self._aligned and (end is None or step < end)

    def coefficients(self, step: int) -> tuple[float, ...]:
        """Return the weight of each encoder in `step`."""
        places = range(len(_each(self.config.proj_coeff)))
        found = tuple(self.config.coefficient(step, place) for place in places)
        return found * len(self.names) if len(found) == 1 else found

    def losses(
        self, projections: Sequence[Tensor], targets: Sequence[AlignmentTarget], *, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the term as it is differentiated, as it is logged, and where there are several each encoder's log.

        What is logged is the mean of -cos, without coefficients. projections are [B,T,E_k], one an encoder, in the
        order of `targets`.
        """
        coefficients, num = self.coefficients(step), len(projections)
        weights = [coefficient / self._accumulation / num for coefficient in coefficients]
        losses = alignment_losses(projections, targets, gamma=self.config.gamma, weights=weights)
        loss = sum(losses[1:], start=losses[0])
        if num == 1 or len(set(coefficients)) == 1:
            logged = loss.detach() / coefficients[0]
        else:
            parts = [one.detach() / coefficient for one, coefficient in zip(losses, coefficients, strict=True)]
            logged = sum(parts[1:], start=parts[0])
        if num == 1:
            return loss, logged, {}
        each = zip(self.names, losses, coefficients, strict=True)
        return loss, logged, {name: one.detach() * (num / coefficient) for name, one, coefficient in each}
