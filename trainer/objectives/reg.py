"""REG: an encoder's class token is noised and denoised beside the latents (arXiv 2507.01467).

    x_t = alpha(t) x + sigma(t) eps          c_t = alpha(t) c + sigma(t) n          one t, two noises
    h   = [LN(W c_t); patches of x_t] + [0; pos_embed]                              one token more, in front
    L   = mean |v_theta - v|^2 + cls_coeff mean |v_theta,c - v_c|^2
        + proj_coeff / (1 + T) (sum over patches of -cos(h_phi, target) - cos(h_phi,cls, c))

c is the class token as the encoder gives it, after its last norm, and is never normalised. With a projector that needs
no grid one map serves all 1 + T tokens, as published. A convolution (REG with iREPA, published by nobody) takes the
patches, normalised as iREPA's are, and the class token has a linear map of its own. Samples start from noise in both
parts; c is guided where x is, and thrown away at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from ..diffusion.interpolant import Interpolant
from ..diffusion.losses import alignment_loss, denoising_loss
from ..models.projector import ProjectorConfig
from ..models.sit import SiT, SiTConfig
from ..reading.batches import MicroBatch
from ..reading.draws import Draw, gaussian
from ..reading.specs import FeatureSpec
from ..rows.row_batch import FeatureBatch
from .alignment import AlignmentConfig
from .objective import Field, Objective, Posed, Reads, Term
from .velocity import VelocityField


@dataclass(frozen=True, kw_only=True)
class REGConfig:
    """What REG adds to REPA's settings."""

    cls_coeff: float = 0.03  # weight of the class token's denoising loss

    def __post_init__(self) -> None:
        if not 0 < self.cls_coeff < float("inf"):
            raise UsageError(f"reg.cls_coeff is {self.cls_coeff}; expected a number above 0")


@dataclass(frozen=True, kw_only=True)
class ClassTarget:
    """A class token [B,1,E] as a target of alignment: one token, which has no statistics."""

    tokens: Tensor
    token_scale: None = None
    channel_mean: None = None
    channel_std: None = None


class REG(Objective):
    """The model answers two velocities, of x_t [B,C,H,W] and of the class token c_t [B,E]."""

    papers = "REG (arXiv 2507.01467), SiT (2401.08740), REPA (2410.06940)"
    section = "reg"
    Settings = REGConfig

    @classmethod
    def reads(cls, alignment: AlignmentConfig) -> Reads:
        """Return that one encoder's tokens are read, its class token always."""
        return Reads(patch_tokens=True, cls_token=True)

    @classmethod
    def model_extras(cls, features: Sequence[FeatureSpec], settings: REGConfig) -> dict[str, Any]:
        """Return the width of the class token; refuse several encoders, and one that has none."""
        if len(features) != 1:
            raise UsageError(
                f"objective reg denoises the class token of one encoder; {', '.join(spec.name for spec in features)} "
                f"are {len(features)}. Name one with --encoder"
            )
        (spec,) = features
        if not spec.cls_token:
            raise UsageError(
                f"features/{spec.name} has no class token, which objective reg denoises. Choose an encoder that has "
                f"one (DINOv2, CLIP and others: repa-cache encoders), or a recipe such as irepa"
            )
        return {"cls_width": spec.width}

    @classmethod
    def projectors(
        cls, alignment: AlignmentConfig, features: Sequence[FeatureSpec], shape: SiTConfig, settings: REGConfig
    ) -> list[ProjectorConfig]:
        """Return one map of all tokens, or with a convolution one of the patches and one of the class token."""
        (spec,) = features
        if alignment.projector == "none":
            return []
        if alignment.projector != "conv":
            return [alignment.projector_config(spec.width)]
        patches = alignment.projector_config(spec.width, of="patches")
        return [patches, ProjectorConfig(kind="linear", out_dim=spec.width, of="cls")]

    @classmethod
    def choices(cls, alignment: AlignmentConfig, settings: REGConfig) -> Sequence[str]:
        """Return how the class token is aligned beside a convolution or a normalised target."""
        if alignment.projector == "conv" or alignment.gamma is not None:
            through = "through a linear map of its own" if alignment.projector == "conv" else "through the same map"
            return [
                f"REG with iREPA (published by nobody): patches are aligned as iREPA's are, the class token {through}, "
                f"never normalised, each token with the same weight"
            ]
        return ()

    def draws(self) -> list[Draw]:
        """Return SiT's, and the class token's noise."""
        (spec,) = self.given.features
        return [*super().draws(), gaussian("cls_noise", (spec.width,))]

    def pose(self, batch: MicroBatch, model: SiT, ema: SiT) -> Posed:
        """Return (x_t, t, labels, c_t) and both velocities."""
        draws, path = batch.draws, self.given.interpolant
        x_t, velocity = path.x_t_and_velocity(self.latents(batch), draws["noise"], draws["t"])
        c_t, cls_velocity = path.x_t_and_velocity(_class_token(batch).float(), draws["cls_noise"], draws["t"])
        return Posed(inputs=(x_t, draws["t"], self.labels(batch), None, c_t), target=(velocity, cls_velocity))

    def terms(
        self,
        prediction: tuple[Tensor, Tensor],
        projections: Sequence[Tensor],
        posed: Posed,
        batch: MicroBatch,
        step: int,
    ) -> list[Term]:
        """Return both denoising losses, the class token's without its weight in the log, and the alignment loss."""
        settings: REGConfig = self.settings
        denoising, cls = (
            denoising_loss(answer, wanted) / self.given.accumulation
            for answer, wanted in zip(prediction, posed.target, strict=True)
        )
        terms = [
            Term(name="denoising_loss", value=denoising, logged=denoising),
            Term(name="cls_loss", value=settings.cls_coeff * cls, logged=cls),
        ]
        if projections:
            value, logged = self._alignment(projections, batch, step)
            terms.append(Term(name="alignment_loss", value=value, logged=logged))
        return terms

    def _alignment(self, projections: Sequence[Tensor], batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        """Return the mean over 1 + T tokens of -cos, weighted and as it is logged, in two calls of the op."""
        if len(projections) == 1:
            (tokens,) = projections
            projections = tokens[:, 1:], tokens[:, :1]
        patches, cls = projections
        (coefficient,) = self.alignment.coefficients(step)
        share = coefficient / self.given.accumulation / (1 + patches.shape[1])
        loss = alignment_loss(
            [patches], batch.data.features, gamma=self.given.alignment.gamma, weight=share * patches.shape[1]
        )
        target = ClassTarget(tokens=_class_token(batch).unsqueeze(1))
        loss = loss + alignment_loss([cls], [target], gamma=None, weight=share)
        return loss, loss.detach() / coefficient

    def dummy_inputs(self, num: int) -> tuple[Any, ...]:
        """Return zeros for x_t, t, labels and c_t."""
        (spec,) = self.given.features
        return *super().dummy_inputs(num), None, torch.zeros(num, spec.width, device=self.given.device)

    @classmethod
    def field(cls, interpolant: Interpolant, settings: REGConfig) -> Field:
        """Return both velocities."""
        return REGField(interpolant=interpolant)


def _class_token(batch: MicroBatch) -> Tensor:
    features: FeatureBatch = batch.data.features[0]
    assert features.cls_token is not None
    return features.cls_token


@dataclass(frozen=True, kw_only=True)
class REGField(VelocityField):
    """The state is (x, c); both follow their velocities, by an ODE or an SDE, each with a guidance scale."""

    cls_token: bool = True

    def shapes(self, model: SiT) -> tuple[tuple[int, ...], ...]:
        """Return those of x, [C,H,W], and of c, [E]."""
        assert model.config.cls_width is not None
        return (*super().shapes(model), (model.config.cls_width,))

    def velocities(
        self, model: Any, state: tuple[Tensor, ...], t: Tensor, t_next: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Return both velocities at (x, c)."""
        x, cls_token = state
        return model(x, t, labels, cls_token=cls_token)

    def scales(self, cfg_scale: float, cls_cfg_scale: float | None) -> tuple[float, ...]:
        """Return the image's, and the class token's, by default the same."""
        return cfg_scale, cfg_scale if cls_cfg_scale is None else cls_cfg_scale

    def identity(self) -> dict[str, Any]:
        """Return the path, and that a class token is sampled too."""
        return super().identity() | {"method": "reg"}
