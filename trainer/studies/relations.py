"""Quality against what was measured of the encoders: which property goes with good samples, over settings alike.

In: a comparison, metrics by encoder and a function that correlates. Out: points with intervals, and coefficients over
the encoders of one family: settings equal in everything but the encoder. A setting that is judged by its own network is
drawn, marked, and left out of the coefficients.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .compare import Comparison, Setting, show

TITLES = {
    "linear_probe": "Linear probe",
    "linear_probe_cls": "Linear probe (class token)",
    "knn20": "20-NN",
    "knn20_cls": "20-NN (class token)",
    "lds": "LDS",
    "cds": "CDS",
    "srss": "SRSS",
    "rmsc": "RMSC",
}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % interval where there is one; `reason` says why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """A metric's correlation with quality over `num` encoders; `without` tells the range with one encoder left out."""

    metric: str
    num: int
    pearson: Interval
    spearman: Interval
    without: str


# names [n], what quality is called, quality [n], metrics by name [n] -> coefficients, one a metric
Correlate = Callable[[Sequence[str], str, np.ndarray, Mapping[str, np.ndarray]], list[Coefficients]]
Metrics = Mapping[str, Mapping[str, Interval]]  # by encoder and metric


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting in a panel."""

    setting: Setting
    x: Interval


@dataclass(kw_only=True)
class Relations:
    """`panels` by metric: settings with that metric and quality. `coefficients` by family; `notes` on what lacks."""

    panels: dict[str, list[Point]]
    coefficients: dict[str, list[Coefficients]]
    notes: list[str]


def relate(found: Comparison, metrics: Metrics, correlate: Correlate) -> Relations:
    """Return how quality goes with each metric, for settings that are aligned with exactly one encoder."""
    result = Relations(panels={}, coefficients={}, notes=[])
    if found.quality is None:
        return result
    settings = [one for one in found.ranked if len(one.encoders) == 1]
    missing = sorted({one.encoders[0] for one in settings if one.encoders[0] not in metrics})
    if missing:
        result.notes.append(f"no metrics for {', '.join(missing)}")
    settings = [one for one in settings if one.encoders[0] in metrics]
    names = list(dict.fromkeys(name for one in settings for name in metrics[one.encoders[0]]))
    for name in sorted(names, key=metric_order):
        points = [Point(setting=one, x=x) for one in settings if (x := _known(metrics, one, name)) is not None]
        if points:
            result.panels[name] = points
        else:
            reasons = {metrics[one.encoders[0]][name].reason for one in settings if name in metrics[one.encoders[0]]}
            result.notes.append(f"{TITLES.get(name, name)}: {', '.join(sorted(reasons)) or 'not measured'}")
    result.notes += _enlarged(result.panels)
    unbiased = [one for one in settings if not one.figures[found.quality.name].biased]
    if len(unbiased) < len(settings):
        left = sorted({one.encoders[0] for one in settings} - {one.encoders[0] for one in unbiased})
        result.notes.append(f"left out of the coefficients, judged by their own network: {', '.join(left)}")
    for label, family in _families(found, unbiased).items():
        encoders = [one.encoders[0] for one in family]
        values = {name: np.array([_value(metrics, one, name) for one in family]) for name in result.panels}
        if len(encoders) < 3:
            result.notes.append(
                f"{label}: {len(encoders)} encoder{'' if len(encoders) == 1 else 's'}, too few for a correlation"
            )
            continue
        quality = np.array([one.figures[found.quality.name].mean for one in family])
        result.coefficients[label] = correlate(encoders, found.quality.name, quality, values)
    return result


def enlarged(found: Interval) -> str:
    """Return `enlarged from 4 x 4` where a metric says so of its encoder's map, else nothing."""
    return next((words for words in found.reason.split("; ") if words.startswith("enlarged from")), "")


def _enlarged(panels: Mapping[str, Sequence[Point]]) -> list[str]:
    """Return a note for each encoder whose map was enlarged: what measures likeness over space says so of it."""
    names = {
        point.setting.encoders[0]: how for points in panels.values() for point in points if (how := enlarged(point.x))
    }
    return [
        f"{name} ({how}): neighbours are alike by construction, not by what the encoder sees"
        for name, how in sorted(names.items())
    ]


def _families(found: Comparison, settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Return settings that differ in the encoder alone, by what they have in common."""
    families: dict[str, list[Setting]] = {}
    for one in settings:
        common = [
            f"{key.rpartition('.')[2]} {show(value)}" for key, value in one.differing.items() if key != "encoders"
        ]
        families.setdefault(", ".join(common) or "all settings", []).append(one)
    return families


def _known(metrics: Metrics, one: Setting, name: str) -> Interval | None:
    found = metrics[one.encoders[0]].get(name)
    return found if found is not None and found.value is not None else None


def _value(metrics: Metrics, one: Setting, name: str) -> float:
    found = _known(metrics, one, name)
    return float("nan") if found is None or found.value is None else found.value


def metric_order(name: str) -> tuple[int, str]:
    first = ("lds", "cds", "srss", "rmsc", "linear_probe")
    return (first.index(name) if name in first else len(first), name)
