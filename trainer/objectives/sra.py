"""SRA: a SiT aligned with a later block of its own average, at less noise; no encoder is read (arXiv 2505.02831).

    s  = h_phi(tokens of theta after block encoder_depth, at (x_t, t))
    t' = max(0, t - U(0, max_gap))
    g  = tokens of EMA(theta) after block teacher_depth, at (x_t', t'), the same noise, the same dropped labels
    L  = mean |v_theta - v|^2 + proj_coeff mean over tokens of -cos(s, sg(g))

h_phi is Linear(D, 2D), SiLU, Linear(2D, D). The cosine is over a token's features: the published code calls
cosine_similarity without a dimension, which takes it over the tokens. The teacher moves with the run, so nothing of it
can be cached: a step pays for one more partial forward pass, without gradient and on the plain module.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError, at_least
from ..models.projector import ProjectorConfig
from ..models.sit import SiT, SiTConfig
from ..reading.batches import MicroBatch
from ..reading.draws import Draw
from ..reading.specs import FeatureSpec
from .alignment import Alignment, AlignmentConfig
from .objective import Given, Posed, Reads, Term
from .velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class SRAConfig:
    """The teacher's block, and how much less noise it may see."""

    teacher_depth: int = 20  # block of the average whose tokens are the target, from 1; the student's: encoder_depth
    max_gap: float = 0.2  # the teacher's time is earlier by up to this, drawn uniformly for each sample

    def __post_init__(self) -> None:
        at_least("sra.teacher_depth", self.teacher_depth, 1)
        if not 0 <= self.max_gap <= 1:
            raise UsageError(f"sra.max_gap is {self.max_gap}; expected 0 to 1")


@dataclass(frozen=True, kw_only=True)
class TeacherTarget:
    """The teacher's tokens [B,T,D] as a target of alignment."""

    tokens: Tensor
    token_scale: None = None
    channel_mean: None = None
    channel_std: None = None


class SRA(Velocity):
    """The model answers the velocity at x_t; the target of its projector is in `Posed.extra`."""

    papers = "SRA (arXiv 2505.02831), SiT (2401.08740)"
    section = "sra"
    Settings = SRAConfig

    def __init__(self, given: Given, settings: SRAConfig) -> None:
        super().__init__(given, settings)
        self.alignment = Alignment(given.alignment, names=["its average"], accumulation=given.accumulation)

    @classmethod
    def reads(cls, alignment: AlignmentConfig) -> Reads:
        """Return that no encoder is read."""
        return Reads(patch_tokens=False)

    @classmethod
    def projectors(
        cls, alignment: AlignmentConfig, features: Sequence[FeatureSpec], shape: SiTConfig, settings: SRAConfig
    ) -> list[ProjectorConfig]:
        """Return one map into the model's own width."""
        if alignment.projector == "none":
            raise UsageError("alignment.projector is none: SRA without its alignment is the recipe sit")
        if alignment.end is not None:
            which = "horizon" if alignment.stop_step is None else "stop_step"
            raise UsageError(f"alignment.{which} is set, and SRA's teacher has no stop. Leave it out")
        if settings.teacher_depth > shape.depth:
            raise UsageError(
                f"sra.teacher_depth is {settings.teacher_depth}; {shape.name} has {shape.depth} blocks. Choose one of "
                f"them, later than alignment.encoder_depth"
            )
        return [alignment.projector_config(shape.hidden_size)]

    @classmethod
    def choices(cls, alignment: AlignmentConfig, settings: SRAConfig) -> Sequence[str]:
        """Return what departs from the published code."""
        return [
            "SRA's cosine is over features; the published code's is over tokens",
            "SRA's blocks are known for SiT-XL (8 and 20 of 28); in other sizes they lie at like shares of the depth",
        ]

    def draws(self) -> list[Draw]:
        """Return SiT's, and by how much the teacher's time is earlier."""
        return [*super().draws(), Draw(name="gap", fill=self._draw_gap)]

    def pose(self, batch: MicroBatch, model: SiT, ema: SiT) -> Posed:
        """Return (x_t, t, labels) and the velocity; as `extra` what the average holds at (x_t', t')."""
        draws, path = batch.draws, self.given.interpolant
        x, noise, t, labels = self.latents(batch), draws["noise"], draws["t"], self.labels(batch)
        x_t, velocity = path.x_t_and_velocity(x, noise, t)

        earlier = (t - draws["gap"]).clamp(min=0)
        cleaner, _ = path.x_t_and_velocity(x, noise, earlier)
        with self.autocast():
            tokens = ema.tokens_after(self.settings.teacher_depth, cleaner, earlier, labels)
        return Posed(inputs=(x_t, t, labels), target=velocity, extra=TeacherTarget(tokens=tokens))

    def terms(
        self, prediction: Tensor, projections: Sequence[Tensor], posed: Posed, batch: MicroBatch, step: int
    ) -> list[Term]:
        """Return the denoising loss and the alignment loss."""
        terms = super().terms(prediction, (), posed, batch, step)
        return [*terms, *self.alignment_terms(projections, [posed.extra], step)]

    def _draw_gap(self, out: Tensor, generator: torch.Generator) -> None:
        torch.rand(out.shape, generator=generator, out=out).mul_(self.settings.max_gap)
