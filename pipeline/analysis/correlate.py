"""Which property of an encoder goes with the quality of what is generated? Correlations over encoders, with doubts.

Pearson and Spearman of each metric with the quality figure, a 95 % bootstrap interval over encoders, and both again
with each encoder left out: a correlation that one encoder carries shows there. (One row of the study's published figure
used another encoder's FID file.)
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...cache_specs.errors import JobError, UsageError
from .figures import new_figure, save
from .intervals import Estimate, percentiles, resampled
from .results import Results

FEWEST_ENCODERS = 3  # two points are always on a line
FEWEST_FOR_INTERVAL = 8  # resamples of fewer encoders are often two points again
PANELS = ("linear_probe", "lds", "cds", "srss", "rmsc")  # always drawn, empty with the reason where not measured
TITLES = {"linear_probe": "linear probe", "lds": "LDS", "cds": "CDS", "srss": "SRSS", "rmsc": "RMSC"}


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """One metric against quality: both coefficients, and both [n] with each of `encoders` left out in turn."""

    metric: str
    pearson: Estimate
    spearman: Estimate
    encoders: tuple[str, ...]
    pearson_without: tuple[float | None, ...] = ()
    spearman_without: tuple[float | None, ...] = ()


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Pearson's r of `x` and `y` [n], None where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else None


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Spearman's rho of `x` and `y` [n], ties at their mean rank; None where one of them does not vary."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def correlate(results: Results) -> list[Correlation]:
    """Return the correlation of every metric with quality, the figure's panels first.

    Raises `UsageError` for fewer than three encoders.
    """
    if len(results.names) < FEWEST_ENCODERS:
        raise UsageError(
            f"a correlation needs {FEWEST_ENCODERS} encoders with both metrics and {results.quality_name}; found "
            f"{len(results.names)}: {', '.join(results.names)}"
        )
    extra = [name for name in results.metrics if name not in PANELS]
    return [_correlation(metric, results) for metric in (*PANELS, *extra)]


def _correlation(metric: str, results: Results) -> Correlation:
    values = results.metrics.get(metric, np.full(len(results.names), math.nan))
    there = np.isfinite(values)
    x, y = values[there], results.quality[there]
    names = tuple(name for name, is_there in zip(results.names, there, strict=True) if is_there)
    reason = ""
    if len(x) < FEWEST_ENCODERS:
        reason = "not measured" if len(x) == 0 else f"measured for {', '.join(names)} only"
    elif np.ptp(x) == 0 or np.ptp(y) == 0:
        reason = f"{metric if np.ptp(x) == 0 else results.quality_name} is the same for every encoder"
    if reason:
        none = Estimate(num=len(x), reason=reason)
        return Correlation(metric=metric, pearson=none, spearman=none, encoders=names)
    without = [np.delete(np.arange(len(x)), i) for i in range(len(x))] if len(x) > FEWEST_ENCODERS else []
    return Correlation(
        metric=metric,
        pearson=_estimate(pearson, x, y),
        spearman=_estimate(spearman, x, y),
        encoders=names,
        pearson_without=tuple(pearson(x[kept], y[kept]) for kept in without),
        spearman_without=tuple(spearman(x[kept], y[kept]) for kept in without),
    )


def _estimate(coefficient: Any, x: np.ndarray, y: np.ndarray) -> Estimate:
    value = coefficient(x, y)
    if len(x) < FEWEST_FOR_INTERVAL:
        return Estimate(num=len(x), value=value, reason=f"{len(x)} encoders, too few for an interval")
    low, high = percentiles(resampled(lambda places: coefficient(x[places], y[places]), len(x)))
    return Estimate(num=len(x), value=value, low=low, high=high)


def lines(found: list[Correlation], results: Results) -> Iterator[str]:
    """Yield the table that is printed."""
    yield f"{len(results.names)} encoders, quality {results.quality_name}"
    rows = [("metric", "Pearson", "Spearman", "Pearson with one encoder left out")]
    for one in found:
        if one.pearson.value is None:
            rows.append((one.metric, f"left out: {one.pearson.reason}", "", ""))
        else:
            rows.append((one.metric, str(one.pearson), str(one.spearman), range_without(one)))
    measured = [row for row in rows if row[2]]  # a reason is as long as it is, and has no column beside it
    metric, first, second = (max(len(row[i]) for row in (measured if i else rows)) + 2 for i in range(3))
    for row in rows:
        yield f"  {row[0]:<{metric}}{row[1]:<{first}}{row[2]:<{second}}{row[3]}".rstrip()


def range_without(one: Correlation) -> str:
    """Return Pearson's least and largest value with one encoder left out, each with that encoder's name."""
    pairs = [(r, name) for r, name in zip(one.pearson_without, one.encoders, strict=False) if r is not None]
    if not pairs:
        return "too few encoders to leave one out"
    (low, without_low), (high, without_high) = min(pairs), max(pairs)
    return f"{low:.4f} (without {without_low}) to {high:.4f} (without {without_high})"


def write_tables(found: list[Correlation], results: Results, picture: Path) -> list[Path]:
    """Write beside the picture what was joined (`.joined.csv`) and the correlations (`.csv`); return both paths."""
    joined, table = picture.with_suffix(".joined.csv"), picture.with_suffix(".csv")
    metrics = list(results.metrics)
    rows: list[list[str]] = [["encoder", *metrics, results.quality_name]]
    for i, name in enumerate(results.names):
        rows.append([name, *(_text(results.metrics[metric][i]) for metric in metrics), _text(results.quality[i])])
    _write(joined, rows)
    header = ["metric", "coefficient", "left_out", "value", "low", "high", "num", "reason"]
    rows = [header]
    for one in found:
        for name, whole, without in (
            ("pearson", one.pearson, one.pearson_without),
            ("spearman", one.spearman, one.spearman_without),
        ):
            numbers = [_text(number) for number in (whole.value, whole.low, whole.high)]
            rows.append([one.metric, name, "", *numbers, str(whole.num), whole.reason])
            for encoder, value in zip(one.encoders, without, strict=False):
                reason = "" if value is not None else "one of the two does not vary"
                rows.append([one.metric, name, encoder, _text(value), "", "", str(whole.num - 1), reason])
    _write(table, rows)
    return [table, joined]


def _text(number: float | None) -> str:
    return "" if number is None or math.isnan(number) else f"{number:.9g}"


def _write(file: Path, rows: list[list[str]]) -> None:
    try:
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise JobError(f"{file} cannot be written ({error.strerror}); name an --out that can") from error


def figure(found: list[Correlation], results: Results, file: Path) -> None:
    """Draw quality over each metric, one panel a metric, every encoder named; errors as in `save`."""
    picture = new_figure(figsize=(2.9 * len(found), 3.1), layout="constrained")
    axes = np.atleast_1d(np.asarray(picture.subplots(1, len(found), sharey=True)))
    for axis, one in zip(axes, found, strict=True):
        axis.set_xlabel(TITLES.get(one.metric, one.metric))
        axis.spines[["top", "right"]].set_visible(False)
        if one.pearson.value is None:
            axis.text(0.5, 0.5, one.pearson.reason, transform=axis.transAxes, ha="center", wrap=True, color="#777777")
            axis.set_xticks([])
            continue
        x, y = results.metrics[one.metric], results.quality
        there = np.isfinite(x)
        axis.scatter(x[there], y[there], s=22, color="#2b6cb0", linewidths=0, zorder=3)
        slope, offset = np.polyfit(x[there], y[there], 1)
        ends = np.array([x[there].min(), x[there].max()])
        axis.plot(ends, slope * ends + offset, color="#c05621", linewidth=1.2, zorder=2)
        for name, a, b in zip(one.encoders, x[there], y[there], strict=True):
            axis.annotate(name, (a, b), xytext=(3, 3), textcoords="offset points", fontsize=5.5, color="#444444")
        axis.margins(x=0.15)
        axis.set_title(f"r = {_short(one.pearson)}\nrho = {_short(one.spearman)}", fontsize=8)
    axes[0].set_ylabel(results.quality_name)
    save(picture, file)


def _short(found: Estimate) -> str:
    interval = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.value:.2f}{interval}"
