"""STUDY.yaml: what is varied in a study of many runs, and the runs that follow from it.

    base        settings that all runs share, as in --config
    grid        lists by dotted key, crossed: every combination is a run
    runs        further runs, each a few settings, beside the grid
    exclude     settings whose combination is left out of the grid
    seeds       seeds of every run [0]
    evaluation  what judges: settings of `evaluation`, the same for all

Settings as in `repa-train --settings`. A run whose method reads no encoder keeps none of the grid's `encoders` and
`alignment`: the baseline of a grid over encoders is one run, not one an encoder.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache_specs.errors import UsageError, nearest, reason
from ...cache_specs.files.outside import MOST_SETTINGS_BYTES, parse_yaml, read_text
from ..objectives.choose import objective_class
from ..runs.config import BY_ENCODER, RunConfig
from ..runs.settings import Layer, flatten, recipe_layer, required, resolve

SECTIONS = ("base", "grid", "runs", "exclude", "seeds", "evaluation")
MOST_RUNS = 10_000
LABEL_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """A parsed STUDY.yaml; settings by dotted key."""

    path: Path
    base: Mapping[str, Any]
    grid: Mapping[str, list[Any]]
    runs: tuple[Mapping[str, Any], ...]
    exclude: tuple[Mapping[str, Any], ...]
    seeds: tuple[int, ...]
    evaluation: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run as it is asked for: what it varies, and what all its settings come to (out is not known yet)."""

    varied: Mapping[str, Any]  # by dotted key, the seed last
    config: RunConfig

    @property
    def label(self) -> str:
        """What it varies in a few words that a folder may be called by."""
        words = [_word(key, value) for key, value in self.varied.items()]
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", "-".join(filter(None, words)))[:LABEL_CHARACTERS].strip("-.") or "run"


def read_study(path: Path) -> StudyFile:
    """Return a parsed file; raise UsageError, naming the place, for whatever is not of the form above."""
    try:
        loaded = parse_yaml(read_text(path, most=MOST_SETTINGS_BYTES))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a study: {reason(error)}") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: holds a {type(loaded).__name__}; expected {', '.join(SECTIONS)}")
    for key in loaded:
        if key not in SECTIONS:
            raise UsageError(f"{path}: unknown section {key!r}; {nearest(str(key), SECTIONS)}")
    grid = {key: _list(values, f"{path}: grid.{key}") for key, values in _settings(loaded, "grid", path).items()}
    seeds = _list(loaded.get("seeds", [0]), f"{path}: seeds")
    if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise UsageError(f"{path}: seeds is {seeds}; expected different whole numbers of 0 or more")
    for name in ("base", "grid"):
        if "seed" in _settings(loaded, name, path):
            raise UsageError(f"{path}: {name}.seed; say the seeds of all runs in seeds: [0, 1, 2]")
    return StudyFile(
        path=path,
        base=_settings(loaded, "base", path),
        grid=grid,
        runs=tuple(_rows(loaded, "runs", path)),
        exclude=tuple(_rows(loaded, "exclude", path)),
        seeds=tuple(seeds),
        evaluation={f"evaluation.{key}": value for key, value in _settings(loaded, "evaluation", path).items()},
    )


def rows_of(study: StudyFile) -> list[Row]:
    """Return the runs of a study, each once, in the order of the file: the grid, then the others, seeds innermost.

    Raises UsageError naming the run that makes no sense.
    """
    # Counted before any is resolved, which takes milliseconds each.
    asked = list(itertools.islice(itertools.chain(_crossed(study), study.runs), MOST_RUNS + 1))
    if len(asked) * len(study.seeds) > MOST_RUNS:
        raise UsageError(f"{study.path}: more than {MOST_RUNS} runs; cross fewer lists")
    found: dict[tuple[Any, ...], Row] = {}
    for varied, seed in itertools.product(asked, study.seeds):
        row = _resolved(study, {**varied, "seed": seed})
        found.setdefault(tuple(sorted((key, repr(value)) for key, value in _plain(row.config).items())), row)
    if not found:
        raise UsageError(f"{study.path}: no run: give a grid or runs")
    return list(found.values())


def _crossed(study: StudyFile) -> Iterator[dict[str, Any]]:
    if not study.grid:
        if not study.runs:
            yield {}
        return
    for values in itertools.product(*study.grid.values()):
        varied = dict(zip(study.grid, values, strict=True))
        if not any(all(varied.get(key) == value for key, value in left_out.items()) for left_out in study.exclude):
            yield varied


def _resolved(study: StudyFile, varied: Mapping[str, Any]) -> Row:
    try:
        return _row(study, varied)
    except UsageError as error:
        if str(study.path) in str(error):
            raise
        told = ", ".join(f"{key} {value}" for key, value in varied.items())
        raise UsageError(f"{study.path}: the run with {told}: {error}") from error


def _row(study: StudyFile, varied: Mapping[str, Any]) -> Row:
    where = f"{study.path}: run {', '.join(f'{key} {value}' for key, value in varied.items())}"
    sources = [
        Layer(source=f"{study.path}: base", values={"out": "-", **study.base}),
        Layer(source=f"{study.path}: evaluation", values=study.evaluation),
        Layer(source=where, values=varied),
    ]
    recipe = recipe_layer(required("recipe", sources), required("model", sources))
    method = objective_class(str(recipe.values.get("objective", "velocity")))
    alone = resolve([recipe, *map(_without_encoders, sources)])
    if method.reads(alone.alignment).patch_tokens:
        return Row(varied=varied, config=resolve([recipe, *sources]))
    kept = {key: value for key, value in varied.items() if key != "encoders" and not key.startswith("alignment.")}
    sources = [_without_encoders(source) for source in sources[:2]]
    return Row(varied=kept, config=resolve([recipe, *sources, Layer(source=where, values=kept)]))


def _without_encoders(layer: Layer) -> Layer:
    """Return the settings of a layer less the encoders and what is said of each of them."""
    kept = {
        key: value
        for key, value in layer.values.items()
        if key != "encoders"
        and not key.startswith(tuple(f"{owner}." for owner in BY_ENCODER))
        and not (key in BY_ENCODER and isinstance(value, list | tuple))
    }
    return Layer(source=layer.source, values=kept)


def _plain(config: RunConfig) -> dict[str, Any]:
    return flatten(config.plain())


def _word(key: str, value: Any) -> str:
    """Return a setting as part of a name: texts by themselves, numbers behind the last part of their key."""
    name = {"seed": "s", "learning_rate": "lr", "proj_coeff": "coeff", "encoder_depth": "depth"}
    last = key.rpartition(".")[2]
    if isinstance(value, list | tuple):
        return ("" if key not in BY_ENCODER else name[last]) + "+".join(map(str, value))
    if isinstance(value, str):
        return value
    return f"{name.get(last, last)}{'none' if value is None else format(value, 'g') if _number(value) else value}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _settings(loaded: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = loaded.get(name) or {}
    if not isinstance(section, dict):
        raise UsageError(f"{path}: {name} is a {type(section).__name__}; expected settings by key")
    return flatten(section)


def _rows(loaded: Mapping[str, Any], name: str, path: Path) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_list(loaded.get(name) or [], f"{path}: {name}"), start=1):
        if not isinstance(row, dict) or not row:
            raise UsageError(f"{path}: {name}, entry {number} is {row!r}; expected settings by key")
        yield flatten(row)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{where} is {value!r}; expected a list")
    return value
