"""JiT: the clean image from a noised one, in pixels, weighed as a velocity (arXiv 2511.13720).

    z_t  = (1 - t) x + t s eps                                              section 3, with the noise's scale s
    x^   = net(z_t, t, y)                                                   the network answers x, no velocity
    v    = (z_t - x^) / max(t, floor)                                       eq. 6, the division clipped
    L    = mean |v - (z_t - x) / max(t, floor)|^2 = mean |x^ - x|^2 / max(t, floor)^2
    logit t ~ N(0.8, 0.8^2)

Times are those of this house, 0 data and 1 noise; the paper's run the other way, which turns its mean of -0.8 around.
The target is clipped as the prediction is: against the plain velocity the minimiser would not be x below the floor. The
floor stays in the samplers, where it leaves 1.7 % of the noise after 50 steps, as in published figures.

The noise grows with the image's side, s = side / 256, since neighbouring pixels say the same: 1 at 256, 2 at 512. With
a projector iREPA's alignment taps the patches' tokens (arXiv 2512.10794, its code in pixel space).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from ..diffusion.interpolant import Interpolant
from ..models.sit import SiT
from ..reading.batches import MicroBatch
from ..reading.draws import Draw
from .alignment import AlignmentConfig
from .objective import Field, Given, Objective, Posed, Reads, Term
from .velocity import VelocityField

PUBLISHED_SIDE = 256  # of the images whose noise has deviation 1


@dataclass(frozen=True, kw_only=True)
class JiTMethodConfig:
    """Times, noise and weight of the loss, by default as published."""

    time_mean: float = 0.8  # of the normal number whose sigmoid is a time of training; the paper's -0.8 at time 1 - t
    time_std: float = 0.8  # its deviation
    noise_scale: float | None = None  # deviation of the noise; null: the image's side / 256
    floor: float = 0.05  # the least time that a velocity is divided by, in the loss and in samplers

    def __post_init__(self) -> None:
        if not abs(self.time_mean) < float("inf"):
            raise UsageError(f"jit.time_mean is {self.time_mean}; expected a number")
        if not 0 < self.time_std < float("inf"):
            raise UsageError(f"jit.time_std is {self.time_std}; expected a number above 0")
        if self.noise_scale is not None and not 0 < self.noise_scale < float("inf"):
            raise UsageError(f"jit.noise_scale is {self.noise_scale}; expected a number above 0, or null")
        if not 0 < self.floor < 1:
            raise UsageError(f"jit.floor is {self.floor}; expected a time above 0 and below 1")

    def scale_at(self, side: int) -> float:
        """Return the deviation of the noise on images of `side` pixels."""
        return side / PUBLISHED_SIDE if self.noise_scale is None else self.noise_scale


class JiT(Objective):
    """The model answers the clean image [B,C,H,W]; its fourth input says what is dropped inside it."""

    papers = "JiT (arXiv 2511.13720), iREPA (2512.10794)"
    section = "jit"
    Settings = JiTMethodConfig
    architecture = "JiT"

    def __init__(self, given: Given, settings: JiTMethodConfig) -> None:
        super().__init__(given, settings)
        if given.latent_shape[0] != 3 or given.latent_kind != "sample":
            raise UsageError(
                f"the cache's latents have {given.latent_shape[0]} channels ({given.latent_kind}), and JiT trains on "
                f"pixels: --autoencoder pixels, which repa-cache build --autoencoder pixels --dtype uint8 adds"
            )
        if given.interpolant != Interpolant():
            raise UsageError(
                f"interpolant.path is {given.interpolant.path} and interpolant.time_distribution "
                f"{given.interpolant.time_distribution}; JiT has a linear path and draws its times by jit.time_mean "
                f"and jit.time_std. Leave both out"
            )
        self._noise_scale = settings.scale_at(given.latent_shape[1])

    @classmethod
    def reads(cls, alignment: AlignmentConfig) -> Reads:
        """Return that pixels are denoised, as uint8 where the cache has them so."""
        return replace(super().reads(alignment), latents=("pixels-uint8", "pixels"))

    @classmethod
    def choices(cls, alignment: AlignmentConfig, settings: JiTMethodConfig) -> Sequence[str]:
        """Return what is ours: the noise of sides that the paper has not, and depths of alignment."""
        chosen = []
        if settings.noise_scale is None:
            chosen.append("noise of deviation side / 256, published at 256 and 512, at every side")
        if alignment.projector != "none":
            chosen.append("alignment before the class tokens come in, published for B/16 after block 4")
        return chosen

    def draws(self) -> list[Draw]:
        """Return SiT's, and a seed of dropout a sample."""

        def draw_seeds(out: Tensor, generator: torch.Generator) -> None:
            torch.randint(2**31, out.shape, generator=generator, out=out)

        return [*super().draws(), Draw(name="dropout", dtype=torch.int64, fill=draw_seeds)]

    def pose(self, batch: MicroBatch, model: SiT, ema: SiT) -> Posed:
        """Return (z_t, t, labels, seeds of dropout) and x; `extra` is max(t, floor) [B,1,1,1]."""
        draws, x = batch.draws, self.latents(batch)
        t = draws["t"].view(-1, 1, 1, 1)
        z = (1 - t) * x + t * (self._noise_scale * draws["noise"])
        divisor = t.clamp(min=self.settings.floor)
        return Posed(inputs=(z, draws["t"], self.labels(batch), draws["dropout"]), target=x, extra=divisor)

    def terms(
        self, prediction: Tensor, projections: Sequence[Tensor], posed: Posed, batch: MicroBatch, step: int
    ) -> list[Term]:
        """Return the error of the clipped velocity, and the alignment loss while there is one."""
        denoising = ((prediction.float() - posed.target) / posed.extra).square().mean() / self.given.accumulation
        first = Term(name="denoising_loss", value=denoising, logged=denoising)
        return [first, *self.alignment_terms(projections, batch.data.features, step)]

    def dummy_inputs(self, num: int) -> tuple[Tensor, ...]:
        """Return zeros for z, t, labels and seeds."""
        x, t, labels = super().dummy_inputs(num)
        return x, t, labels, labels

    @classmethod
    def field(cls, interpolant: Interpolant, settings: JiTMethodConfig) -> Field:
        """Return the clipped velocity towards the model's image."""
        return JiTField(interpolant=interpolant, settings=settings)

    def _draw_t(self, out: Tensor, generator: torch.Generator) -> None:
        settings: JiTMethodConfig = self.settings
        normal = torch.randn(out.shape, generator=generator)
        torch.sigmoid(settings.time_mean + settings.time_std * normal, out=out)


@dataclass(frozen=True, kw_only=True)
class JiTField(VelocityField):
    """dx/dt = (x - the model's image) / max(t, floor); guiding it is guiding the image."""

    settings: JiTMethodConfig
    samplers: tuple[str, ...] = ("euler", "heun")
    own_times: bool = True

    def noise_scale(self, model: SiT) -> float:
        """Return that of the model's resolution."""
        return self.settings.scale_at(model.config.input_size)

    def velocities(
        self, model: Any, state: tuple[Tensor, ...], t: Tensor, t_next: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the clipped velocity at x."""
        x = state[0]
        return ((x - model(x, t, labels).to(x)) / t.clamp(min=self.settings.floor).view(-1, 1, 1, 1),)

    def identity(self) -> dict[str, Any]:
        """Return the path, the noise and the floor."""
        return super().identity() | {
            "method": "jit",
            "noise_scale": self.settings.noise_scale,
            "floor": self.settings.floor,
        }
