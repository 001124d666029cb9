"""Bootstrap intervals: how far a figure may be trusted, or the words why it has none.

Percentile bootstrap over images (or encoders), 1,000 resamples from a fixed seed: the same data give the same interval.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
FEWEST = 10  # values below which a resampled mean says little; an interval would look like knowledge
LEVEL = 95  # per cent
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval, from `num` values; what is not known is None, and `reason` says why."""

    num: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"- ({self.reason})"
        if self.low is None or self.high is None:
            return f"{self.value:.4f} ({self.reason})"
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_estimate(values: np.ndarray, *, unit: str = "images") -> Estimate:
    """Return the mean of finite `values` [n] with its bootstrap interval."""
    num = len(values)
    if num == 0:
        return Estimate(num=0, reason=f"no {unit}")
    mean = float(values.mean())
    if num < FEWEST:
        one = f"1 {unit.removesuffix('s')}"
        return Estimate(num=num, value=mean, reason=f"{one if num == 1 else f'{num} {unit}'}, too few for an interval")
    rng = np.random.default_rng(_SEED)
    means = np.array([values[rng.integers(0, num, num)].mean() for _ in range(RESAMPLES)])
    low, high = percentiles(means)
    return Estimate(num=num, value=mean, low=low, high=high)


def resampled(statistic: Callable[[np.ndarray], float | None], num: int) -> np.ndarray:
    """Return `statistic` of 1,000 resamples of `num` places, without those where it is undefined (None)."""
    rng = np.random.default_rng(_SEED)
    found = (statistic(rng.integers(0, num, num)) for _ in range(RESAMPLES))
    return np.array([value for value in found if value is not None])


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the central 95 % of `values`."""
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)
