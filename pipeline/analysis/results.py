"""One table from what was measured apart: a line an encoder, its metrics, and the quality of the runs trained on it.

Quality comes from runs (run_results.py) or from the columns of a results file; metrics from the CSVs of `repa-cache
metrics` and `repa-cache probe`, or from the same results file.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...cache_specs.errors import UsageError, nearest, reason
from ...cache_specs.files.outside import MOST_TABLE_BYTES, read_text
from .intervals import Estimate
from .measure import ALL_CLASSES, CSV_HEADER, METRICS
from .run_results import qualities_of

_METRIC = re.compile(rf"{'|'.join(METRICS)}|(linear_probe|knn\d+)(_cls)?")


@dataclass(kw_only=True)
class Results:
    """Encoders [n] in the order of `names`; `quality` [n] float64; `metrics[name]` [n] float64, NaN where missing."""

    names: list[str]
    quality_name: str
    quality: np.ndarray
    metrics: dict[str, np.ndarray]
    notes: list[str] = field(default_factory=list)


def join(sources: Sequence[Path], metrics_files: Sequence[Path], quality: str | None) -> Results:
    """Join one results file, or run folders with metrics files, by encoder.

    Raises `UsageError` where the sources cannot be joined: nothing in common, runs evaluated at different steps, a
    quality figure that is missing or must be chosen.
    """
    notes: list[str] = []
    metrics = _merge(_figures(file, notes) for file in metrics_files)
    if len(sources) == 1 and sources[0].is_file():
        table = _results_file(sources[0])
        for encoder, row in table.items():
            metrics.setdefault(encoder, {}).update({name: row[name] for name in row if _METRIC.fullmatch(name)})
        qualities = {
            encoder: {name: value for name, value in row.items() if not _METRIC.fullmatch(name)}
            for encoder, row in table.items()
        }
        where = str(sources[0])
    else:
        if not metrics_files:
            raise UsageError(
                "runs alone say nothing of their encoders: add --metrics FILE.csv, as repa-cache metrics CACHE --csv "
                "FILE.csv and repa-cache probe CACHE --csv FILE.csv write it"
            )
        qualities = qualities_of(sources, notes)
        where = f"{len(sources)} runs"
    chosen = _choose(quality, qualities, where)
    both = sorted(encoder for encoder in qualities if encoder in metrics and chosen in qualities[encoder])
    for encoder in sorted(set(qualities) - set(both)):
        missing = chosen if encoder in metrics else "metrics"
        notes.append(f"left out: {encoder} has no {missing}")
    if not both:
        raise UsageError(
            f"{where}: no encoder with both {chosen} and metrics; quality is known for {_list(qualities)}, metrics for "
            f"{_list(metrics)}"
        )
    names = sorted({name for encoder in both for name in metrics[encoder]}, key=_order)
    return Results(
        names=both,
        quality_name=chosen,
        quality=np.array([qualities[encoder][chosen] for encoder in both]),
        metrics={name: np.array([metrics[encoder].get(name, math.nan) for encoder in both]) for name in names},
        notes=notes,
    )


def _order(metric: str) -> tuple[int, str]:
    """Linear probe first, beside it the spatial metrics, then the rest."""
    first = ("linear_probe", "lds", "cds", "srss", "rmsc")
    return (first.index(metric) if metric in first else len(first), metric)


def _merge(tables: Iterator[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    merged: dict[str, dict[str, float]] = {}
    for table in tables:
        for encoder, row in table.items():
            merged.setdefault(encoder, {}).update(row)
    return merged


def _read_csv(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        reader = csv.DictReader(io.StringIO(read_text(file, most=MOST_TABLE_BYTES), newline=""), strict=True)
        rows = [dict(row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file}: cannot be read ({reason(error)}); expected a CSV") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UsageError(f"{file}: row {number} has not one value for each of its {len(row)} columns")
    return list(reader.fieldnames or []), rows


def _figures(file: Path, notes: list[str]) -> dict[str, dict[str, float]]:
    """Return metrics by encoder from a CSV of `repa-cache metrics` or `probe`: over all images, tokens as stored.

    Notes encoders whose maps were enlarged: their spatial metrics are so by construction.
    """
    found = estimates(file)
    for encoder, figures in found.items():
        notes += [note for one in figures.values() if (note := enlarged(encoder, one.reason)) and note not in notes]
    return {
        encoder: {name: one.value for name, one in figures.items() if one.value is not None}
        for encoder, figures in found.items()
    }


def enlarged(encoder: str, reason: str) -> str:
    """Return a note where the `reason` beside a metric says that the encoder's map was enlarged, else nothing."""
    marks = [words for words in reason.split("; ") if words.startswith("enlarged from")]
    return f"{encoder}: its map was {''.join(marks)}: neighbours are alike by construction" if marks else ""


def estimates(file: Path) -> dict[str, dict[str, Estimate]]:
    """Return what `_figures` does, each with its interval where the file has one, or the reason why it has no value."""
    header, rows = _read_csv(file)
    if tuple(header) != CSV_HEADER:
        raise UsageError(f"--metrics {file}: columns {header}; expected what repa-cache metrics --csv writes")
    found: dict[str, dict[str, Estimate]] = {}
    for row in rows:
        if row["class"] == ALL_CLASSES and not row["gamma"]:
            encoder, metric = row["encoder"], row["metric"]
            numbers = {
                field: _number(row[column], file, encoder, metric)
                for field, column in (("value", "mean"), ("low", "low"), ("high", "high"))
                if row[column]
            }
            num = int(_number(row["num"] or "0", file, encoder, "num"))
            found.setdefault(encoder, {})[metric] = Estimate(num=num, reason=row["reason"] or "", **numbers)
    return found


def _results_file(file: Path) -> dict[str, dict[str, float]]:
    header, rows = _read_csv(file)
    if "encoder" not in header or len(header) < 3:
        raise UsageError(f"{file}: its columns are {header}; expected encoder, its metrics, and quality figures")
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        encoder = row.pop("encoder")
        if encoder in table:
            raise UsageError(f"{file}: encoder {encoder} has two lines; keep one")
        table[encoder] = {name: _number(value, file, encoder, name) for name, value in row.items() if value}
    return table


def _number(text: str, file: Path, encoder: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(
            f"{file}: {encoder}: {column} is {text[:40]!r}; expected a number, or nothing where there is none"
        )
    return value


def _choose(quality: str | None, qualities: Mapping[str, Mapping[str, float]], where: str) -> str:
    known = sorted({name for row in qualities.values() for name in row})
    if quality is not None:
        if quality not in known:
            raise UsageError(f"--quality {quality}: {where} has no such figure; {nearest(quality, known)}")
        return quality
    frechet = [name for name in known if name.startswith("frechet")]
    candidates = known if len(known) == 1 else frechet
    if len(candidates) != 1:
        raise UsageError(f"{where}: which figure is to be explained? Choose with --quality: {_list(known)}")
    return candidates[0]


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
