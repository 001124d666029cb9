"""Curves of runs, thinned to what a screen can show, and what a run's steps cost.

A curve of a metric keeps at most POINTS points. Where a run logged more, each point is the mean of the steps since the
last one, with their least and largest value beside it; the points lie evenly in steps and, on a log axis, evenly too,
so that the first steps are not lost. Time is that of the steps alone, from samples_per_s, which leaves saving and
evaluation out; wall time where the metrics have it.
"""

from dataclasses import dataclass

import numpy as np

from .records import RunRecord

POINTS = 300  # of a curve
_WALL = "wall_s"  # seconds that the run has trained; older runs do not have it
VALIDATION = "val_denoising_loss"  # on samples that the run never trained on
_NO_CURVE = {"step", _WALL}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric over `step` [n]; `low` and `high` [n] are the extremes of the steps that a point stands for."""

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    most: int  # logged steps in one point: 1 where nothing was thinned


def curve_names(runs: list[RunRecord]) -> list[str]:
    """Return the metrics that a run has, losses first."""
    names = {name for run in runs for name in run.metrics} - _NO_CURVE
    first = ("denoising_loss", VALIDATION, "val_ema_denoising_loss", "alignment_loss", "grad_norm")
    return sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))


def curve(run: RunRecord, name: str, *, points: int = POINTS) -> Curve | None:
    """Return the run's curve of a metric with at most `points` points, None where it has none."""
    values = run.metrics.get(name)
    if values is None:
        return None
    there = np.isfinite(values)
    step, values = run.metrics["step"][there], values[there]
    if not len(step):
        return None
    starts = _starts(step, points)
    counts = np.diff([*starts, len(step)])
    return Curve(
        step=np.add.reduceat(step.astype(np.float64), starts) / counts,
        mean=np.add.reduceat(values, starts) / counts,
        low=np.minimum.reduceat(values, starts),
        high=np.maximum.reduceat(values, starts),
        most=int(counts.max()),
    )


def _starts(step: np.ndarray, points: int) -> np.ndarray:
    """Return where points begin in `step` [n] ascending: each entry its own where they fit, else at most `points`."""
    if len(step) <= points:
        return np.arange(len(step))
    first, last = float(step[0]), float(step[-1])
    even = np.linspace(first, last, points - points // 3, endpoint=False)
    log = np.geomspace(max(first, 1.0), max(last, 2.0), points // 3, endpoint=False)
    return np.unique(np.searchsorted(step, np.concatenate([even, log])).clip(0, len(step) - 1))


def seconds(run: RunRecord) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return steps [n], the seconds that the run had taken by each [n], and whether that is wall time.

    Without wall time in the metrics: the sum over logs of (steps x batch size / samples_per_s).
    """
    metrics = run.metrics
    if _WALL in metrics and (there := np.isfinite(metrics[_WALL])).any():
        return metrics["step"][there], metrics[_WALL][there], True
    rate = metrics.get("samples_per_s")
    if rate is None:
        return np.empty(0), np.empty(0), False
    there = np.isfinite(rate) & (rate > 0)
    step = metrics["step"][there]
    before = np.concatenate([metrics["step"][:1] - 1, step[:-1]])
    return step, np.cumsum((step - before) * int(run.config["batch_size"]) / rate[there]), False


def last(run: RunRecord, name: str) -> float | None:
    """Return the last value of a metric, None where the run has none."""
    values = run.metrics.get(name, np.empty(0))
    there = values[np.isfinite(values)]
    return float(there[-1]) if len(there) else None


def speeds(run: RunRecord) -> dict[str, float]:
    """Return what a run's steps cost: samples_per_s and data_wait over all of its logs, train_s, and wall_s if known.

    A figure that the run lacks is not there.
    """
    metrics = run.metrics
    found: dict[str, float] = {}
    rate, wait = metrics.get("samples_per_s"), metrics.get("data_wait")
    if rate is not None and (there := np.isfinite(rate) & (rate > 0)).any():
        step = metrics["step"][there]
        num = np.diff(step, prepend=metrics["step"][0] - 1) * int(run.config["batch_size"])
        took = num / rate[there]
        found |= {"samples_per_s": float(num.sum() / took.sum()), "train_s": float(took.sum())}
        if wait is not None and np.isfinite(wait[there]).all():
            found["data_wait"] = float((wait[there] * took).sum() / took.sum())
    _, passed, is_wall = seconds(run)
    if is_wall:
        found["wall_s"] = float(passed[-1])
    return found
