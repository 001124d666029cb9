"""From noise to latents: Euler and Heun on the probability-flow ODE, Euler-Maruyama on the reverse SDE.

In: a velocity model, noise at t = 1 and labels. Out: model-space latents at t = 0. Steps, times, the last SDE step and
the guidance interval are those of SiT's and REPA's published samplers (arXiv 2401.08740, section 2.3 and appendix;
guidance on an interval of times: arXiv 2404.07724). The state is float64; the model sees the noise's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError, nearest
from ..diffusion.interpolant import Interpolant

SamplerName = Literal["euler", "heun", "sde"]

SDE_LAST_TIME = 0.04  # the score of the last stretch is stiff: one deterministic step covers it


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to integrate, and how strongly to guide.

    `steps` counts drift evaluations, but Heun's takes 2 * steps - 1. Guidance with `cfg_scale` above 1 acts where
    guidance_low <= t <= guidance_high; elsewhere the model is conditional only. A guided evaluation doubles the batch.
    """

    sampler: SamplerName = "euler"
    steps: int = 50
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler not in get_args(SamplerName):
            raise UsageError(f"sampler is {self.sampler!r}; {nearest(str(self.sampler), get_args(SamplerName))}")
        if self.steps < 1:
            raise UsageError(f"sampler steps is {self.steps}; expected 1 or more")
        if not 1 <= self.cfg_scale < float("inf"):
            raise UsageError(f"cfg_scale is {self.cfg_scale}; expected 1 (no guidance) or more")
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise UsageError(
                f"guidance interval is {self.guidance_low} to {self.guidance_high}; expected 0 <= low <= high <= 1"
            )

    def guides(self, t: float) -> bool:
        """Whether guidance acts at time t."""
        return self.cfg_scale > 1 and self.guidance_low <= t <= self.guidance_high


class VelocityModel(Protocol):
    """What a sampler needs of a SiT: velocity = model(x [B,C,H,W], t [B], y [B]), and the label that means none."""

    @property
    def null_label(self) -> int: ...
    @property
    def __call__(self) -> Callable[..., Any]: ...


@torch.no_grad()
def sample_latents(
    model: VelocityModel,
    noise: Tensor,
    labels: Tensor,
    config: SamplerConfig,
    *,
    interpolant: Interpolant,
    sde_noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return model-space latents [B,C,H,W] in the noise's dtype.

    noise is [B,C,H,W] standard normal, labels [B] int64. `sde_noise` is called once a stochastic step and returns
    standard normal [B,C,H,W]; only the sampler "sde" asks for it. The model's mode is left as it is: hand it over in
    eval mode.
    """
    drift = _Drift(model, labels, config, interpolant, noise.dtype)
    if config.sampler == "sde":
        if sde_noise is None:
            raise UsageError("the sampler sde needs a source of noise")
        return _euler_maruyama(drift, noise.double(), config, sde_noise).to(noise.dtype)
    return _euler_or_heun(drift, noise.double(), config).to(noise.dtype)


def _euler_or_heun(drift: "_Drift", x: Tensor, config: SamplerConfig) -> Tensor:
    """Integrate dx/dt = v from 1 to 0 in equal steps; Heun's last step, to t = 0, is Euler's."""
    times = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64).tolist()
    for step, (t, t_next) in enumerate(pairwise(times), start=1):
        guide = config.guides(t)  # the correction at t_next is guided as the step's start is, like the published code
        slope = drift(x, t, guide)
        if config.sampler == "heun" and step < config.steps:
            slope = 0.5 * slope + 0.5 * drift(x + (t_next - t) * slope, t_next, guide)
        x = x + (t_next - t) * slope
    return x


def _euler_maruyama(drift: "_Drift", x: Tensor, config: SamplerConfig, sde_noise: Callable[[], Tensor]) -> Tensor:
    """Integrate dx = (v - t score) dt + sqrt(2 t) dW backwards: steps - 1 times down to t = 0.04, then to 0 in one.

    The diffusion coefficient is 2 sigma of the linear path, 2t. The last step adds no noise and keeps the score term.
    """
    times = torch.linspace(1, SDE_LAST_TIME, config.steps, dtype=torch.float64).tolist()
    for t, t_next in pairwise(times):
        dt = t_next - t
        x = x + drift(x, t, config.guides(t)) * dt + (2 * t * abs(dt)) ** 0.5 * sde_noise().to(x)
    t = times[-1]
    return x - t * drift(x, t, config.guides(t))


class _Drift:
    """dx/dt at a time, guided on request: the velocity for an ODE, v - t score for the SDE, in float64."""

    def __init__(
        self,
        model: VelocityModel,
        labels: Tensor,
        config: SamplerConfig,
        interpolant: Interpolant,
        model_dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.labels = labels
        self.both_labels = torch.cat([labels, torch.full_like(labels, model.null_label)])
        self.config = config
        self.interpolant = interpolant
        self.model_dtype = model_dtype

    def __call__(self, x: Tensor, t: float, guide: bool) -> Tensor:
        if guide:
            x, labels = torch.cat([x, x]), self.both_labels
        else:
            labels = self.labels
        time = torch.full((len(x),), t, dtype=self.model_dtype, device=x.device)
        drift = self.model(x.to(self.model_dtype), time, labels).double()
        if self.config.sampler == "sde":
            drift = drift - t * score(drift, x, t, self.interpolant)
        if guide:
            conditional, unconditional = drift.chunk(2)
            drift = unconditional + self.config.cfg_scale * (conditional - unconditional)
        return drift


def score(velocity: Tensor, x: Tensor, t: float, interpolant: Interpolant) -> Tensor:
    """Return the gradient of log p_t at x, [B,C,H,W] like both, from the velocity (SiT, arXiv 2401.08740, eq. 9).

    (a/a' v - x) / (s^2 - a/a' s' s), with a = alpha, s = sigma and their derivatives at t > 0.
    """
    coefficients = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
    alpha, sigma, d_alpha, d_sigma = (value.item() for value in coefficients)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)
