"""From noise to latents: Euler and Heun on the probability-flow ODE, Euler-Maruyama on the reverse SDE.

In: a trained model, the field that its method follows, noise at t = 1 and labels. Out: the state at t = 0, whose first
part is the model-space latents; most methods have no other. Steps, times, the last SDE step and
the guidance interval are those of SiT's and REPA's published samplers (arXiv 2401.08740, section 2.3 and appendix;
guidance on an interval of times: arXiv 2404.07724). The state is float64; the model sees the noise's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError, nearest
from ..diffusion.interpolant import Interpolant
from ..objectives.objective import Field

SamplerName = Literal["euler", "heun", "sde"]

ROUNDING = 1e-9  # of a time in equal steps
SDE_LAST_TIME = 0.04  # the score of the last stretch is stiff: one deterministic step covers it


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to integrate, and how strongly to guide.

    `steps` counts drift evaluations, but Heun's takes 2 * steps - 1. Guidance with `cfg_scale` above 1 acts where
    guidance_low <= t <= guidance_high, for some methods without these ends; elsewhere the model is conditional only. A
    guided evaluation doubles the batch. `cls_cfg_scale` is the class token's own scale, where the image is guided
    (REG); None is the image's. `internal_guidance` above 1 leads away from the model's middle head, on the same times,
    with `cfg_scale` or without.
    """

    sampler: SamplerName = "euler"
    steps: int = 50
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    cls_cfg_scale: float | None = None
    internal_guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler not in get_args(SamplerName):
            raise UsageError(f"sampler is {self.sampler!r}; {nearest(str(self.sampler), get_args(SamplerName))}")
        if self.steps < 1:
            raise UsageError(f"sampler steps is {self.steps}; expected 1 or more")
        if not 1 <= self.cfg_scale < float("inf"):
            raise UsageError(f"cfg_scale is {self.cfg_scale}; expected 1 (no guidance) or more")
        if self.cls_cfg_scale is not None and not 1 <= self.cls_cfg_scale < float("inf"):
            raise UsageError(
                f"cls_cfg_scale is {self.cls_cfg_scale}; expected 1 (no guidance of the class token, 0 in REG's own "
                f"code) or more"
            )
        if self.cls_cfg_scale is not None and self.cfg_scale == 1:
            raise UsageError(
                f"cls_cfg_scale is {self.cls_cfg_scale} and cfg_scale 1: a class token is guided where the image is. "
                f"Give both, or neither"
            )
        if not 1 <= self.internal_guidance < float("inf"):
            raise UsageError(f"internal_guidance is {self.internal_guidance}; expected 1 (none) or more")
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise UsageError(
                f"guidance interval is {self.guidance_low} to {self.guidance_high}; expected 0 <= low <= high <= 1"
            )

    def guides(self, t: float, *, ends: bool = True) -> bool:
        """Whether classifier-free guidance acts at time t; `ends` as in `within`."""
        return self.cfg_scale > 1 and self.within(t, ends=ends)

    def within(self, t: float, *, ends: bool = True) -> bool:
        """Whether time t is one of guidance; without `ends` not at the interval's own, but for those at 0 and 1."""
        if ends:
            return self.guidance_low <= t <= self.guidance_high
        return (self.guidance_low == 0 or t > self.guidance_low + ROUNDING) and (
            self.guidance_high == 1 or t < self.guidance_high - ROUNDING
        )


State = tuple[Tensor, ...]  # parts [B, *shape], float64 while they are integrated


class LabelledModel(Protocol):
    """What a sampler needs of a model beside what its field asks: the label that means none."""

    @property
    def null_label(self) -> int: ...


@torch.no_grad()
def sample_latents(
    model: LabelledModel,
    noise: State,
    labels: Tensor,
    config: SamplerConfig,
    *,
    field: Field,
    sde_noise: Callable[[], State] | None = None,
) -> State:
    """Return the state at t = 0 in the noise's dtype, model-space latents [B,C,H,W] first.

    noise is normal of deviation `field.noise_scale`, one part a shape of `field.shapes`, labels [B] int64. `sde_noise`
    is called once a stochastic step and returns standard normal parts; only the sampler "sde" asks for it. The model's
    mode is left as it is: hand it over in eval mode.

    Raises UsageError where the method has no such sampler, or guidance is asked for that it does not know.
    """
    check_sampler(config, field)
    drift, dtype = _Drift(model, labels, config, field, noise[0].dtype), noise[0].dtype
    start = tuple(part.double() for part in noise)
    if config.sampler == "sde":
        if sde_noise is None:
            raise UsageError("the sampler sde needs a source of noise")
        end = _euler_maruyama(drift, start, config, sde_noise)
    else:
        end = _euler_or_heun(drift, start, config)
    return tuple(part.to(dtype) for part in end)


def check_sampler(config: SamplerConfig, field: Field, *, where: str = "") -> None:
    """Raise UsageError, with `where` before its words, if a method cannot be sampled like this."""
    if config.sampler not in field.samplers:
        raise UsageError(f"{where}sampler is {config.sampler}; this model's method has {', '.join(field.samplers)}")
    if config.cfg_scale > 1 and not field.guided:
        raise UsageError(
            f"{where}cfg_scale is {config.cfg_scale}; this model's method learns its guidance while training, and "
            f"guiding it again would count it twice. Sample with cfg_scale 1"
        )
    if config.internal_guidance > 1 and not field.internal:
        raise UsageError(
            f"{where}internal_guidance is {config.internal_guidance}; this model has no middle head to lead away from, "
            f"as those of the recipes sit-internal and irepa-internal have. Leave it out"
        )
    if config.cls_cfg_scale is not None and not field.cls_token:
        raise UsageError(
            f"cls_cfg_scale is {config.cls_cfg_scale}; this model's method has no class token to guide, as only REG's "
            f"has. Leave it out"
        )


def _euler_or_heun(drift: "_Drift", x: State, config: SamplerConfig) -> State:
    """Integrate dx/dt = v from 1 to 0 in equal steps; Heun's last step, to t = 0, is Euler's."""
    times = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64).tolist()
    for step, (t, t_next) in enumerate(pairwise(times), start=1):
        dt = t_next - t
        slope = drift(x, t, t_next, guide_at=t)
        if config.sampler == "heun" and step < config.steps:
            # SiT's published code guides the correction as it does the step's start; other methods by its own time.
            ahead = tuple(part + dt * rate for part, rate in zip(x, slope, strict=True))
            then = drift(ahead, t_next, t_next, guide_at=t_next if drift.field.own_times else t)
            slope = tuple(0.5 * a + 0.5 * b for a, b in zip(slope, then, strict=True))
        x = tuple(part + dt * rate for part, rate in zip(x, slope, strict=True))
    return x


def _euler_maruyama(drift: "_Drift", x: State, config: SamplerConfig, sde_noise: Callable[[], State]) -> State:
    """Integrate dx = (v - t score) dt + sqrt(2 t) dW backwards: steps - 1 times down to t = 0.04, then to 0 in one.

    The diffusion coefficient is 2 sigma of the linear path, 2t. The last step adds no noise and keeps the score term.
    """
    times = torch.linspace(1, SDE_LAST_TIME, config.steps, dtype=torch.float64).tolist()
    for t, t_next in pairwise(times):
        dt = t_next - t
        rates, noise = drift(x, t, t_next, guide_at=t), sde_noise()
        x = tuple(
            part + rate * dt + (2 * t * abs(dt)) ** 0.5 * eps.to(part)
            for part, rate, eps in zip(x, rates, noise, strict=True)
        )
    t = times[-1]
    return tuple(part - t * rate for part, rate in zip(x, drift(x, t, 0.0, guide_at=t), strict=True))


class _Drift:
    """dx/dt of each part at a time, guided on request: the velocity for an ODE, v - t score for the SDE, in float64."""

    def __init__(
        self, model: LabelledModel, labels: Tensor, config: SamplerConfig, field: Field, model_dtype: torch.dtype
    ) -> None:
        self.model = model
        self.labels = labels
        self.both_labels = torch.cat([labels, torch.full_like(labels, model.null_label)])
        self.config = config
        self.field = field
        self.led = field.led(config.internal_guidance)
        self.model_dtype = model_dtype

    def __call__(self, x: State, t: float, t_next: float, *, guide_at: float) -> State:
        ends, labels = not self.field.own_times, self.labels
        guide = self.config.guides(guide_at, ends=ends)
        field = self.led if self.config.within(guide_at, ends=ends) else self.field
        if guide:
            x, labels = tuple(torch.cat([part, part]) for part in x), self.both_labels
        now, then = (torch.full((len(x[0]),), time, dtype=self.model_dtype, device=x[0].device) for time in (t, t_next))
        asked = tuple(part.to(self.model_dtype) for part in x)
        drift = tuple(part.double() for part in field.velocities(self.model, asked, now, then, labels))
        if self.config.sampler == "sde":
            drift = tuple(v - t * score(v, part, t, self.field.interpolant) for v, part in zip(drift, x, strict=True))
        if guide:
            scales = self.field.scales(self.config.cfg_scale, self.config.cls_cfg_scale)
            drift = tuple(_guided(part, scale) for part, scale in zip(drift, scales, strict=True))
        return drift


def _guided(drift: Tensor, scale: float) -> Tensor:
    """Return unconditional + scale (conditional - unconditional) of a drift [2B, ...], the conditional half first."""
    conditional, unconditional = drift.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def score(velocity: Tensor, x: Tensor, t: float, interpolant: Interpolant) -> Tensor:
    """Return the gradient of log p_t at x, [B,C,H,W] like both, from the velocity (SiT, arXiv 2401.08740, eq. 9).

    (a/a' v - x) / (s^2 - a/a' s' s), with a = alpha, s = sigma and their derivatives at t > 0.
    """
    coefficients = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
    alpha, sigma, d_alpha, d_sigma = (value.item() for value in coefficients)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)
