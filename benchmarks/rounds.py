"""Medians of interleaved rounds with their intervals: a slow phase of the machine falls on all that are compared."""

from collections.abc import Sequence

import numpy as np

from repa.pipeline.analysis.intervals import percentiles, resampled


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the median of `values` and its 95 % bootstrap interval over rounds, as JSON values."""
    array = np.array(values)
    low, high = percentiles(resampled(lambda places: float(np.median(array[places])), len(array)))
    return {"median": round(float(np.median(array)), 4), "low": round(low, 4), "high": round(high, 4)}


def show(estimate: dict[str, float], form: str = ".2f") -> str:
    """Return `0.97 [0.95, 0.99]`."""
    return f"{estimate['median']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"
