"""One table from what was measured apart: a line an encoder, its metrics, and the quality of the runs trained on it.

Quality comes from RUN/evaluation.jsonl (trainer/evaluating/evaluation.py writes a line an evaluated step) or from the
columns of a results file; metrics from the CSVs of `repa-cache metrics` and `repa-cache probe`, or from the same
results file.
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
from ...cache_specs.files.outside import MOST_SETTINGS_BYTES, MOST_TABLE_BYTES, parse_json, read_file, read_text
from .intervals import Estimate
from .measure import ALL_CLASSES, CSV_HEADER, METRICS

EVALUATION_FILE = "evaluation.jsonl"  # of a run
CONFIG_FILE = "config.json"
_METRIC = re.compile(rf"{'|'.join(METRICS)}|(linear_probe|knn\d+)(_cls)?")
# Of a config.json: what changes no result, or is no setting; and the seed, over which runs are averaged.
_AVERAGED = frozenset(
    {"seed", "steps", "log_every", "save_every", "save_minutes", "keep_last", "keep_every", "stage", "check_reads"}
    | {"prefetch_bytes", "cache", "out", "entries", "logger", "grid", "evaluation"}
    | {"resolved", "history", "fingerprints"}
)
_SETTINGS = ("step", "num")  # of an evaluation: runs are compared at equal ones


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
        qualities = _runs(sources, notes)
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


def _runs(folders: Sequence[Path], notes: list[str]) -> dict[str, dict[str, float]]:
    """Return quality by encoder, the mean over runs that differ in their seed alone, at the last evaluated step."""
    figures: dict[str, list[dict[str, float]]] = {}
    settings: dict[tuple[Any, ...], Path] = {}
    configs: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        config, record = _run(folder)
        encoders = [str(encoder) for encoder in config["encoders"]]
        if len(encoders) != 1:
            notes.append(f"left out: {folder} is aligned with {_list(encoders) if encoders else 'no encoder'}, not one")
            continue
        first_folder, first_config = configs.setdefault(encoders[0], (folder, config))
        _check_alike(encoders[0], first_folder, first_config, folder, config)
        settings.setdefault(tuple(record.get(key) for key in _SETTINGS), folder)
        values = {name: float(value) for name, value in record.items() if name not in _SETTINGS}
        figures.setdefault(encoders[0], []).append(values)
    if len(settings) > 1:
        (one, first), (other, second) = list(settings.items())[:2]
        raise UsageError(
            f"{first} was last evaluated at step {one[0]} with {one[1]} samples, {second} at step {other[0]} with "
            f"{other[1]}: they cannot be compared. Train and evaluate all of them alike"
        )
    for encoder, runs in figures.items():
        if len(runs) > 1:
            notes.append(f"{encoder}: the mean of {len(runs)} runs")
    (_, first_config), *others = configs.values() if configs else [(None, {})]
    across = sorted({key for _, config in others for key in _differing(first_config, config)} - {"encoders"})
    if across:
        notes.append(f"runs of different encoders differ in {', '.join(across)}, too")
    return {
        encoder: {name: float(np.mean([run[name] for run in runs])) for name in runs[0] if all(name in r for r in runs)}
        for encoder, runs in figures.items()
    }


def _check_alike(encoder: str, first: Path, before: dict[str, Any], folder: Path, config: dict[str, Any]) -> None:
    """Raise `UsageError` where two runs with one encoder differ in more than their seed: their mean says nothing."""
    differing = _differing(before, config)
    if differing:
        shown = "; ".join(f"{key}: {_short(one)} and {_short(other)}" for key, (one, other) in differing.items())
        raise UsageError(
            f"{encoder}: {first} and {folder} differ in {shown}. Runs are averaged over seed alone: give those of one "
            f"value of {', '.join(differing)} at a time"
        )


def _differing(before: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of each setting, by dotted name, in which two runs differ and that could matter."""
    one, other = _flat(before), _flat(config)
    keys = sorted({*one, *other})
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if not prefix and key in _AVERAGED:
            continue
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    return "absent" if value is None else str(value)[:40]


def _run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = parse_json(read_file(folder / CONFIG_FILE, most=MOST_SETTINGS_BYTES))
        lines = read_text(folder / EVALUATION_FILE, most=MOST_TABLE_BYTES).splitlines()
        record = dict(parse_json(lines[-1]))
        if not all(isinstance(figure, int | float) for figure in record.values()):
            raise TypeError("not all figures are numbers")
        if not isinstance(config["encoders"], list):
            raise TypeError("encoders is no list")
        return dict(config), record
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder}: no {Path(error.filename).name}; expected the folder of a run with evaluations (repa-train "
            "--set evaluation.every=STEPS), or one results file"
        ) from error
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise UsageError(f"{folder}: {CONFIG_FILE} or {EVALUATION_FILE} is damaged ({error!r})") from error


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
