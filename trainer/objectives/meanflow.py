"""MeanFlow: the mean velocity between two times, so that one step of the model is a sample (arXiv 2505.13447).

    u(z_t, r, t) = 1 / (t - r) * integral of v(z_s, s) ds from r to t                        eq. 3
    u(z_t, r, t) = v(z_t, t) - (t - r) du/dt                                                 eq. 6
    du/dt        = v . d_z u + d_t u, the derivative along (v, 0, 1) of (z, r, t)            eq. 8
    L            = |u_theta - sg(u_tgt)|^2, u_tgt = v - (t - r) du_theta/dt                  eqs. 9, 10
    v            = eps - x, or with guidance omega (eps - x) + kappa u(z_t, t, t | y)
                   + (1 - omega - kappa) u(z_t, t, t)                                        section 4.2, appendix
    weight       = 1 / sg(|u_theta - u_tgt|^2 + c)^p                                         section 4.3

Times are those of this house, 0 data and 1 noise, as the paper's. Where r = t the target is v itself and u is flow
matching's velocity: du/dt is taken of the other samples alone, a quarter of the batch, where the published code pays
for all of it. It is a forward derivative (JVP) of the plain module without gradient; u is the one forward pass that
ranks share. (A JVP with gradient on the module inside DistributedDataParallel lets ranks drift apart in silence.)

With a projector REPA's or iREPA's alignment taps that one forward pass: no code of that combination is public.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...cache_specs.errors import UsageError
from ..diffusion.interpolant import Interpolant
from ..models.sit import SiT
from ..reading.batches import MicroBatch
from ..reading.draws import Draw
from ..reading.specs import FeatureSpec
from .alignment import AlignmentConfig
from .objective import Field, Given, Objective, Posed, Term
from .velocity import VelocityField

# r differs from t in every fourth sample, the published share (25 %): by its place, so that shapes depend on no draw,
# any number of ranks agrees, and a dropped label is as likely there as elsewhere.
EVERY = 4
APART = slice(EVERY - 1, None, EVERY)

MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # z [B,C,H,W], r [B], t [B] -> u [B,C,H,W]


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig:
    """Times, guidance in the target and weight of the loss; by default as the paper has them without guidance.

    Guidance acts where guidance_low <= t <= guidance_high; its effective scale there is omega / (1 - kappa).
    """

    time_mean: float = -0.4  # of the normal number whose sigmoid is a time of training
    time_std: float = 1.0  # its deviation
    omega: float = 1.0  # weight of the data's velocity in the target
    kappa: float = 0.0  # weight of the model's own in it; the guidance scale is omega / (1 - kappa)
    guidance_low: float = 0.0  # guidance in the target acts where t is at least this
    guidance_high: float = 1.0  # and at most this
    power: float = 1.0  # p of the loss's weight
    floor: float = 0.01  # c of the loss's weight

    def __post_init__(self) -> None:
        if not 0 < self.time_std < float("inf"):
            raise UsageError(f"meanflow.time_std is {self.time_std}; expected a number above 0")
        if not abs(self.time_mean) < float("inf"):
            raise UsageError(f"meanflow.time_mean is {self.time_mean}; expected a number")
        if not (0 < self.omega < float("inf") and 0 <= self.kappa < 1):
            raise UsageError(
                f"meanflow.omega is {self.omega} and meanflow.kappa {self.kappa}; expected omega above 0 and "
                f"0 <= kappa < 1 (the guidance scale is omega / (1 - kappa))"
            )
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise UsageError(
                f"meanflow's guidance interval is {self.guidance_low} to {self.guidance_high}; expected "
                f"0 <= low <= high <= 1"
            )
        if not (0 <= self.power <= 2 and 0 < self.floor < float("inf")):
            raise UsageError(
                f"meanflow.power is {self.power} and meanflow.floor {self.floor}; expected 0 to 2, and a number above 0"
            )


class MeanFlow(Objective):
    """The model answers the mean velocity from t - h to t at z_t, [B,C,H,W]; h is the fourth of its inputs."""

    papers = "MeanFlow (arXiv 2505.13447)"
    section = "meanflow"
    Settings = MeanFlowConfig

    derived = APART  # the samples whose du/dt is taken

    def __init__(self, given: Given, settings: MeanFlowConfig) -> None:
        super().__init__(given, settings)
        if given.micro_batch % EVERY:
            raise UsageError(
                f"micro-batches of {given.micro_batch} samples: MeanFlow has r != t in every {EVERY}th sample of one; "
                f"choose a batch_size that is a multiple of {EVERY} x accumulation x ranks"
            )
        if given.interpolant.time_distribution != "uniform":
            raise UsageError(
                f"interpolant.time_distribution is {given.interpolant.time_distribution}, and MeanFlow draws its times "
                f"otherwise; leave it out, and set meanflow.time_mean and meanflow.time_std"
            )
        with warnings.catch_warnings():  # of PyTorch about its own rules for forward derivatives, loaded at the first
            warnings.simplefilter("ignore", FutureWarning)
            torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))
        self._derivative = torch.compile(_model_derivative, fullgraph=True) if given.compile else _model_derivative

    @classmethod
    def model_extras(cls, features: Sequence[FeatureSpec], settings: MeanFlowConfig) -> dict[str, Any]:
        """Return the second time embedder."""
        return {"second_time": True}

    @classmethod
    def choices(cls, alignment: AlignmentConfig, settings: MeanFlowConfig) -> Sequence[str]:
        """Return where r != t, and how the alignment is attached."""
        chosen = [f"r != t in every {EVERY}th sample by its place in the stream, the published share"]
        if alignment.projector != "none":
            chosen.append(
                "MeanFlow with alignment (arXiv 2512.10794, table 3b, has no public code): on u's forward pass, every "
                "sample, labels as dropped, weighted as beside SiT's loss"
            )
        return chosen

    def draws(self) -> list[Draw]:
        """Return SiT's, and a second time."""
        return [*super().draws(), Draw(name="other_t", fill=self._draw_t)]

    def pose(self, batch: MicroBatch, model: SiT, ema: SiT) -> Posed:
        """Return (z_t, t, labels, t - r) and u_tgt."""
        draws = batch.draws
        # Sorted before r becomes t: where they are equal they are the larger of the two draws, as in the paper's code.
        t, r = torch.maximum(draws["t"], draws["other_t"]), torch.minimum(draws["t"], draws["other_t"])
        apart = torch.zeros_like(t, dtype=torch.bool)
        apart[APART] = True
        r = torch.where(apart, r, t)

        z, v = self.given.interpolant.x_t_and_velocity(self.latents(batch), draws["noise"], t)
        labels = self.labels(batch)
        v = self._guided(model, z, v, t, batch)

        rows = self.derived
        with self.autocast(), sdpa_kernel(SDPBackend.MATH):  # no other attention has a forward derivative
            du_dt = self._derivative(model, *(part[rows].clone() for part in (z, r, t, v, labels)))
        target = v.clone()
        target[rows] -= _as_images((t - r)[rows]) * du_dt.float()  # eq. 10; exactly v where r = t
        return Posed(inputs=(z, t, labels, t - r), target=target)

    def _guided(self, model: SiT, z: Tensor, v: Tensor, t: Tensor, batch: MicroBatch) -> Tensor:
        """Return the guided velocity (section 4.2) of the true labels; v where they are dropped or t is outside."""
        settings: MeanFlowConfig = self.settings
        labels, none = batch.data.labels, torch.full_like(batch.data.labels, self.given.null_label)
        parts = [(settings.kappa, labels), (1 - settings.omega - settings.kappa, none)]
        if all(weight == 0 for weight, _ in parts):
            return v
        guided = settings.omega * v
        with self.autocast():
            for weight, asked in parts:
                if weight != 0:
                    guided = guided + weight * model(z, t, asked, torch.zeros_like(t)).float()
        acts = (t >= settings.guidance_low) & (t <= settings.guidance_high) & ~batch.draws["dropped"]
        return torch.where(_as_images(acts), guided, v)

    def terms(
        self, prediction: Tensor, projections: Sequence[Tensor], posed: Posed, batch: MicroBatch, step: int
    ) -> list[Term]:
        """Return the weighted loss, the mean squared error behind it, and the alignment loss while there is one.

        With p = 1 the weighted loss is about 1 whatever the error; its gradient is then that of the logarithm of each
        sample's mean squared error, so that proj_coeff weighs as beside SiT's loss when the error is about 1.
        """
        settings: MeanFlowConfig = self.settings
        squares = (prediction.float() - posed.target).square().flatten(1)
        error = squares.sum(1)
        weighted = (error / (error.detach() + settings.floor) ** settings.power).mean() / self.given.accumulation
        return [
            Term(name="denoising_loss", value=None, logged=squares.mean() / self.given.accumulation),
            Term(name="weighted_loss", value=weighted, logged=weighted),
            *self.alignment_terms(projections, batch.data.features, step),
        ]

    def dummy_inputs(self, num: int) -> tuple[Tensor, ...]:
        """Return zeros for z, t, labels and t - r."""
        x, t, labels = super().dummy_inputs(num)
        return x, t, labels, t

    def rehearse(self, model: SiT) -> None:
        """Derive the model once."""
        z, t, labels, _ = (part[self.derived] for part in self.dummy_inputs(self.given.micro_batch))
        with torch.no_grad(), self.autocast(), sdpa_kernel(SDPBackend.MATH):
            self._derivative(model, z.clone(), t.clone(), t.clone(), z.clone(), labels.clone())

    @classmethod
    def field(cls, interpolant: Interpolant, settings: MeanFlowConfig) -> Field:
        """Return the mean velocity over each step."""
        return MeanFlowField(interpolant=interpolant)

    def _draw_t(self, out: Tensor, generator: torch.Generator) -> None:
        settings: MeanFlowConfig = self.settings
        normal = torch.randn(out.shape, generator=generator)
        torch.sigmoid(settings.time_mean + settings.time_std * normal, out=out)


def total_derivative(u: MeanVelocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Return du/dt [B,C,H,W] along the path, the derivative along (v, 0, 1) (eq. 8)."""
    tangents = (v, torch.zeros_like(r), torch.ones_like(t))
    return cast(Tensor, torch.func.jvp(u, (z, r, t), tangents)[1])


def _model_derivative(model: SiT, z: Tensor, r: Tensor, t: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """Return du/dt of a model. It is its own unit to compile: the model, once compiled, cannot be derived forward."""
    return total_derivative(lambda z, r, t: cast(Tensor, model.forward(z, t, labels, t - r)), z, r, t, v)


def _as_images(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class MeanFlowField(VelocityField):
    """A step from t to t_next goes along the mean velocity between them: exact in one step, in few ones as well.

    Guidance is in the weights; of other samplers' slopes within a step the model knows nothing.
    """

    samplers: tuple[str, ...] = ("euler",)
    guided: bool = False

    def velocities(
        self, model: Any, state: tuple[Tensor, ...], t: Tensor, t_next: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the mean velocity from t_next to t."""
        return (model(state[0], t, labels, t - t_next),)

    def identity(self) -> dict[str, Any]:
        """Return the path, and that a step's length is the model's input."""
        return super().identity() | {"method": "meanflow"}
