"""SiT, REPA and iREPA: the velocity of the path between data and noise, and a middle block aligned.

    x_t = alpha(t) x + sigma(t) eps                                    SiT, arXiv 2401.08740, eq. 1
    v   = alpha'(t) x + sigma'(t) eps                                  eq. 3
    L   = mean |v_theta(x_t, t, y) - v|^2                              eq. 5
        + proj_coeff * mean -cos(h_phi(block encoder_depth), target)   REPA, arXiv 2410.06940, eq. 8; iREPA, 2512.10794

With alignment.projector "none" the second line is absent and no encoder is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from ..diffusion.interpolant import Interpolant
from ..diffusion.losses import denoising_loss
from ..models.sit import SiT
from ..reading.batches import MicroBatch
from .objective import Field, Objective, Posed, Term


class Velocity(Objective):
    """The model answers the velocity at x_t, [B,C,H,W]."""

    papers = "SiT (arXiv 2401.08740), REPA (2410.06940), iREPA (2512.10794)"

    def pose(self, batch: MicroBatch, model: SiT, ema: SiT) -> Posed:
        """Return (x_t, t, labels) and the velocity."""
        draws = batch.draws
        x_t, velocity = self.given.interpolant.x_t_and_velocity(self.latents(batch), draws["noise"], draws["t"])
        return Posed(inputs=(x_t, draws["t"], self.labels(batch)), target=velocity)

    def terms(
        self, prediction: Tensor, projections: Sequence[Tensor], posed: Posed, batch: MicroBatch, step: int
    ) -> list[Term]:
        """Return the denoising loss, and the alignment loss while there is one."""
        denoising = denoising_loss(prediction, posed.target) / self.given.accumulation
        first = Term(name="denoising_loss", value=denoising, logged=denoising)
        return [first, *self.alignment_terms(projections, batch.data.features, step)]

    @classmethod
    def field(cls, interpolant: Interpolant, settings: Any) -> Field:
        """Return the velocity itself."""
        return VelocityField(interpolant=interpolant)


@dataclass(frozen=True, kw_only=True)
class VelocityField:
    """dx/dt is what the model answers; every sampler may follow it, guided or not."""

    interpolant: Interpolant
    samplers: tuple[str, ...] = ("euler", "heun", "sde")
    guided: bool = True
    own_times: bool = False
    cls_token: bool = False
    internal: bool = False

    def led(self, scale: float) -> Self:
        """Return the field itself: its model has no middle head to lead away from."""
        assert scale == 1, "check_sampler refuses others"
        return self

    def shapes(self, model: SiT) -> tuple[tuple[int, ...], ...]:
        """Return that of x, [C,H,W]."""
        shape = model.config
        return ((shape.in_channels, shape.input_size, shape.input_size),)

    def noise_scale(self, model: SiT) -> float:
        """Return 1."""
        return 1.0

    def velocities(
        self, model: Any, state: tuple[Tensor, ...], t: Tensor, t_next: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the velocity at x."""
        return (model(state[0], t, labels),)

    def scales(self, cfg_scale: float, cls_cfg_scale: float | None) -> tuple[float, ...]:
        """Return `cfg_scale` for x."""
        return (cfg_scale,)

    def identity(self) -> dict[str, Any]:
        """Return the path."""
        return {"path": self.interpolant.path}
