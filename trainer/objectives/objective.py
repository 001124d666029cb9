"""What a training method is to the rest of the house: the interface that the loop, the sampler and a checkpoint see.

A recipe is settings, an objective the method behind it. The training step goes through one in the order of this page:

    reads    which arrays of the cache a micro-batch holds
    draws    its random numbers, by name and shape
    pose     from both to what the model is given and what it should answer, without gradient
    terms    from the model's answer to named losses
    field    what an integrator follows from noise to data

A new method is one file here that reads like its paper, one row of recipes.yaml and one test file; a change of the
model only where the paper has one. Shapes: B batch, C channels, T tokens, E an encoder's width, D the model's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from ..diffusion.interpolant import Interpolant
from ..diffusion.latents import LatentNorm, draw_latents, to_model_input
from ..diffusion.losses import AlignmentTarget
from ..models.projector import ProjectorConfig
from ..models.sit import SiT, SiTConfig
from ..reading.batches import MicroBatch
from ..reading.draws import Draw, coin, gaussian, view_coin
from ..reading.specs import FeatureSpec
from .alignment import Alignment, AlignmentConfig


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What a method takes of each row of a cache, beside its latents and its label: the condition of the model."""

    patch_tokens: bool  # of the run's encoders, and the statistics that go with them
    cls_token: bool = False
    latents: tuple[str, ...] = ()  # those that it is made for: a run that names none takes the first that is there


@dataclass(frozen=True, kw_only=True)
class Posed:
    """A question for the model and the answer wanted: `model(*inputs)` should give `target`.

    `inputs` begin with x_t [B,C,H,W], t [B] and labels [B]; what follows is the method's own. `target` is like the
    model's prediction, and `extra` whatever else `terms` needs of this micro-batch.
    """

    inputs: tuple[Tensor | None, ...]
    target: Any
    extra: Any = None


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss of a micro-batch: `value` is differentiated, every weight folded in; `logged` is what a log shows.

    `value` None is only logged.
    """

    name: str
    value: Tensor | None
    logged: Tensor


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a run's settings, its cache and its model say to its method."""

    latent_shape: tuple[int, int, int]  # C, h, w
    latent_kind: Literal["mean_std", "sample"]
    norm: LatentNorm
    num_views: int
    features: Sequence[FeatureSpec]
    null_label: int
    label_dropout: float
    interpolant: Interpolant
    alignment: AlignmentConfig
    micro_batch: int  # samples that one rank sees at a time
    accumulation: int
    precision: str  # fp32 or bf16 of the model's passes
    compile: bool
    device: torch.device


class Field(Protocol):
    """What an integrator asks of a trained model: the velocity of each part of a state whose first part is x.

    `samplers` are those that may follow it, `guided` says whether classifier-free guidance may; `interpolant` gives the
    SDE's score; with `own_times` the guidance interval is judged at each evaluation's time, not at its step's start,
    and its ends are outside it; `cls_token` says that a class token, with a guidance scale of its own, is part of the
    state; `internal` that the model has a middle head, away from which samples can be led.
    """

    @property
    def samplers(self) -> tuple[str, ...]: ...
    @property
    def guided(self) -> bool: ...
    @property
    def own_times(self) -> bool: ...
    @property
    def cls_token(self) -> bool: ...
    @property
    def internal(self) -> bool: ...
    @property
    def interpolant(self) -> Interpolant: ...

    def led(self, scale: float) -> Self:
        """Return the field that leads away from the model's middle head by `scale`; 1 is the field itself."""
        ...

    def shapes(self, model: SiT) -> tuple[tuple[int, ...], ...]:
        """Return the shape of each part of a sample's state, x [C,H,W] first; all begin as normal noise."""
        ...

    def noise_scale(self, model: SiT) -> float:
        """Return the deviation of the noise that a sample's state begins as."""
        ...

    def velocities(
        self, model: Any, state: tuple[Tensor, ...], t: Tensor, t_next: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Return dx/dt of each part [B, *shape] at times t [B]; the step goes to t_next, which few methods look at."""
        ...

    def scales(self, cfg_scale: float, cls_cfg_scale: float | None) -> tuple[float, ...]:
        """Return the guidance scale of each part; None is the image's for a class token too."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what of the method samples depend on, as JSON values: part of a sample file's request."""
        ...


class Objective:
    """A training method of one run on one rank; subclasses give `pose`, `terms` and what else differs from SiT's.

    `version` is raised by hand whenever a method's numbers change: runs of two versions are two runs.
    """

    version: ClassVar[int] = 1
    papers: ClassVar[str]  # where the method is published, as it is printed with a run's settings
    section: ClassVar[str | None] = None  # of a run's configuration, where the method has settings of its own:
    Settings: ClassVar[Any] = None  # the dataclass of that section
    architecture: ClassVar[str] = "SiT"  # of the models that it trains, the first word of their names

    def __init__(self, given: Given, settings: Any = None) -> None:
        """`settings` is the method's own section of the configuration, a `Settings`, where it has one.

        Raises UsageError where they, the cache's numbers and the method do not fit.
        """
        self.given = given
        self.settings = settings
        names = [spec.name for spec in given.features]
        self.alignment = Alignment(given.alignment, names=names, accumulation=given.accumulation)
        self._norm = given.norm.tensors(given.device)

    # Before there is a model

    @classmethod
    def reads(cls, alignment: AlignmentConfig) -> Reads:
        """Return what is read of each row."""
        return Reads(patch_tokens=alignment.projector != "none")

    @classmethod
    def model_extras(cls, features: Sequence[FeatureSpec], settings: Any) -> dict[str, Any]:
        """Return the fields of `SiTConfig` that this method sets; raise UsageError where an encoder does not fit."""
        return {}

    @classmethod
    def projectors(
        cls, alignment: AlignmentConfig, features: Sequence[FeatureSpec], shape: SiTConfig, settings: Any
    ) -> list[ProjectorConfig]:
        """Return what maps the hidden states of a model of `shape` to the alignment's targets, one an encoder.

        Raises UsageError where the method cannot be aligned like this.
        """
        return [alignment.projector_config(spec.width) for spec in features]

    @classmethod
    def choices(cls, alignment: AlignmentConfig, settings: Any) -> Sequence[str]:
        """Return what in these settings no paper says and this house chose, a line each: printed with them."""
        return ()

    # A step

    def draws(self) -> list[Draw]:
        """Return what is random in a micro-batch, in the order in which it is drawn."""
        given = self.given
        posterior = [gaussian("posterior_noise", given.latent_shape)] if given.latent_kind == "mean_std" else []
        return [
            view_coin(given.num_views),
            *posterior,
            Draw(name="t", fill=self._draw_t),
            gaussian("noise", given.latent_shape),
            coin("dropped", given.label_dropout),
        ]

    def pose(self, batch: MicroBatch, model: SiT, ema: SiT) -> Posed:
        """Return what the model is given and what it should answer; `model` and `ema` are the plain modules."""
        raise NotImplementedError

    def terms(
        self, prediction: Any, projections: Sequence[Tensor], posed: Posed, batch: MicroBatch, step: int
    ) -> list[Term]:
        """Return the losses of the model's answer in `step` (from 0); `projections` are empty after the stop step."""
        raise NotImplementedError

    def dummy_inputs(self, num: int) -> tuple[Any, ...]:
        """Return zeros of the shapes of `Posed.inputs` for `num` samples."""
        device = self.given.device
        x = torch.zeros(num, *self.given.latent_shape, device=device)
        return x, torch.zeros(num, device=device), torch.zeros(num, dtype=torch.int64, device=device)

    def rehearse(self, model: SiT) -> None:
        """Run once, on made-up input, what the method compiles beside the model's forward pass."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint must hold of the method beside model, EMA and optimizer; most have nothing."""
        return {}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    # Samples

    @classmethod
    def field(cls, interpolant: Interpolant, settings: Any) -> Field:
        """Return what samples of a model of this method follow."""
        raise NotImplementedError

    # For subclasses

    def autocast(self) -> torch.autocast:
        """Return the context of the model's passes in `pose`: one of its own, entered for each kind of pass.

        In older PyTorch, weights that were cast without gradient stay so until the context ends (pytorch #112583).
        """
        bf16 = self.given.precision == "bf16"
        return torch.autocast(self.given.device.type, torch.bfloat16, enabled=bf16)

    def latents(self, batch: MicroBatch) -> Tensor:
        """Return the model's clean input x [B,C,h,w] float32: drawn from the posterior, normalised."""
        z = draw_latents(batch.data.moments, batch.draws.get("posterior_noise"), self.given.latent_kind)
        return to_model_input(z, *self._norm)

    def labels(self, batch: MicroBatch) -> Tensor:
        """Return the labels [B] int64 with the dropped ones replaced by the null label."""
        return torch.where(batch.draws["dropped"], self.given.null_label, batch.data.labels)

    def alignment_terms(
        self, projections: Sequence[Tensor], targets: Sequence[AlignmentTarget], step: int
    ) -> list[Term]:
        """Return the alignment loss while there is one, and for the log each encoder's where there are several."""
        if not projections:
            return []
        value, logged, each = self.alignment.losses(projections, targets, step=step)
        parts = [Term(name=f"alignment_loss_{name}", value=None, logged=one) for name, one in each.items()]
        return [Term(name="alignment_loss", value=value, logged=logged), *parts]

    def _draw_t(self, out: Tensor, generator: torch.Generator) -> None:
        out.copy_(self.given.interpolant.sample_t(len(out), generator=generator))
