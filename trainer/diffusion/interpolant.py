"""The path between data and noise: x_t = alpha(t) x + sigma(t) eps, with t = 0 data and t = 1 noise.

In: latents, noise and times. Out: x_t, the velocity that SiT learns, and the times that training draws
(SiT, arXiv 2401.08740, section 2; the distributions of t as REPA's published code has them).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError, nearest

PathName = Literal["linear", "cosine"]
TimeDistribution = Literal["uniform", "lognormal"]


@dataclass(frozen=True, kw_only=True)
class Interpolant:
    """A path and the distribution of t on it.

    `lognormal` draws the noise-to-data ratio sigma/alpha = exp(N(0, 1)), EDM's habit with mean 0 and deviation 1.
    """

    path: PathName = "linear"  # between data and noise
    time_distribution: TimeDistribution = "uniform"  # of t in training

    def __post_init__(self) -> None:
        _one_of("interpolant.path", self.path, get_args(PathName))
        _one_of("interpolant.time_distribution", self.time_distribution, get_args(TimeDistribution))

    def sample_t(self, num: int, *, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """Draw times [num] float32 in [0, 1], from `generator`, which lives on `device`."""
        if self.time_distribution == "uniform":
            return torch.rand(num, generator=generator, device=device)
        ratio = torch.randn(num, generator=generator, device=device).exp()
        if self.path == "linear":
            return ratio / (1 + ratio)  # the t at which t / (1 - t) is the ratio
        return ratio.atan() * (2 / math.pi)  # the t at which tan(pi t / 2) is the ratio

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma and their derivatives by t, each of t's shape and dtype."""
        if self.path == "linear":
            return 1 - t, t, torch.full_like(t, -1), torch.ones_like(t)
        half_pi = math.pi / 2
        alpha, sigma = torch.cos(t * half_pi), torch.sin(t * half_pi)
        return alpha, sigma, -half_pi * sigma, half_pi * alpha

    def x_t_and_velocity(self, x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and its time derivative, each of x's shape [B, ...], as eps is; t is [B]."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t.view(-1, *(1,) * (x.dim() - 1)))
        return alpha * x + sigma * eps, d_alpha * x + d_sigma * eps


def _one_of(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{field} is {value!r}; {nearest(str(value), known)}")
