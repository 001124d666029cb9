"""Internal guidance: a head after a middle block answers the velocity too, and samples lead away from it (2512.24176).

    v, m = theta(x_t, t, y)      v after the last block; m after block `depth`, through a final layer of its own
    L    = mean |v - v*|^2 + weight mean |m - v*|^2 [+ alignment]          v* the velocity of the path
    u    = m + scale (v - m)                                               sampled; scale 1 is v

The head knows less and errs alike, so that leading away from it corrects v without a second pass or model. It begins as
zero, as the last layer does. Where classifier-free guidance acts too, u is taken of both its halves first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from ...cache_specs.errors import UsageError, at_least
from ..diffusion.interpolant import Interpolant
from ..diffusion.losses import denoising_loss
from ..models.projector import ProjectorConfig
from ..models.sit import SiTConfig
from ..reading.batches import MicroBatch
from ..reading.specs import FeatureSpec
from .alignment import AlignmentConfig
from .objective import Posed, Term
from .velocity import Velocity, VelocityField


@dataclass(frozen=True, kw_only=True)
class InternalConfig:
    """Where the second head stands, and how much its loss weighs."""

    depth: int = 8  # block after which it reads, from 1
    weight: float = 0.5  # of its loss

    def __post_init__(self) -> None:
        at_least("internal.depth", self.depth, 1)
        if not 0 < self.weight < float("inf"):
            raise UsageError(f"internal.weight is {self.weight}; expected a number above 0")


class Internal(Velocity):
    """The model answers two velocities at x_t, [B,C,H,W] both: that of its last layer, and its middle head's."""

    papers = "Internal Guidance (arXiv 2512.24176), SiT (2401.08740)"
    section = "internal"
    Settings = InternalConfig

    @classmethod
    def model_extras(cls, features: Sequence[FeatureSpec], settings: InternalConfig) -> dict[str, Any]:
        """Return the block of the second head."""
        return {"middle_head": settings.depth}

    @classmethod
    def projectors(
        cls, alignment: AlignmentConfig, features: Sequence[FeatureSpec], shape: SiTConfig, settings: InternalConfig
    ) -> list[ProjectorConfig]:
        """Return SiT's; refuse a head that is no middle one."""
        if settings.depth >= shape.depth:
            raise UsageError(
                f"internal.depth is {settings.depth}; {shape.name} has {shape.depth} blocks. Choose one before the last"
            )
        return super().projectors(alignment, features, shape, settings)

    @classmethod
    def choices(cls, alignment: AlignmentConfig, settings: InternalConfig) -> Sequence[str]:
        """Return how it goes with classifier-free guidance, and with an alignment."""
        chosen = ["both halves of classifier-free guidance are guided from inside, within one interval of times"]
        if alignment.projector != "none":
            chosen.append("internal guidance of an aligned model: published by nobody")
        return chosen

    def terms(
        self, prediction: Any, projections: Sequence[Tensor], posed: Posed, batch: MicroBatch, step: int
    ) -> list[Term]:
        """Return SiT's terms for the last layer, and the middle head's loss, without its weight in the log."""
        velocity, middle = prediction  # [B,C,H,W] both
        denoising, *alignment = super().terms(velocity, projections, posed, batch, step)
        loss = denoising_loss(middle, posed.target) / self.given.accumulation
        return [denoising, Term(name="middle_loss", value=self.settings.weight * loss, logged=loss), *alignment]

    @classmethod
    def field(cls, interpolant: Interpolant, settings: InternalConfig) -> "InternalField":
        """Return the last layer's velocity, which `led` leads away from the middle head's."""
        return InternalField(interpolant=interpolant)


@dataclass(frozen=True, kw_only=True)
class InternalField(VelocityField):
    """dx/dt = m + scale (v - m)."""

    internal: bool = True
    scale: float = 1.0

    def led(self, scale: float) -> Self:
        """Return the field that leads away from the middle head by `scale`; 1 does not."""
        return replace(self, scale=scale)

    def velocities(
        self, model: Any, state: tuple[Tensor, ...], t: Tensor, t_next: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the velocity at x."""
        velocity, middle = model(state[0], t, labels)
        return (velocity if self.scale == 1 else middle + self.scale * (velocity - middle),)

    def identity(self) -> dict[str, Any]:
        """Return the path, and that the model has two heads."""
        return super().identity() | {"method": "internal"}
