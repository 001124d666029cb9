"""What runs say of the encoders that they were aligned with: their quality at the last evaluation, averaged over seeds.

A run is a folder with config.json and evaluation.jsonl, a line an evaluated step (trainer/evaluating/evaluation.py).
Runs of one encoder are averaged only where they differ in nothing that could matter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...cache_specs.errors import UsageError, nearest
from ...cache_specs.files.outside import MOST_SETTINGS_BYTES, MOST_TABLE_BYTES, parse_json, read_file, read_text

EVALUATION_FILE = "evaluation.jsonl"  # of a run
CONFIG_FILE = "config.json"
# Of a config.json: what changes no result, or is no setting; and the seed, over which runs are averaged. What a resume
# may change is the trainer's to say; tests/test_rooms_agree.py holds the two to each other.
_AVERAGED = frozenset(
    {"seed", "steps", "log_every", "save_every", "save_minutes", "keep_last", "keep_every", "stage", "check_reads"}
    | {"prefetch_bytes", "cache", "out", "entries", "logger", "grid", "evaluation", "online"}
    | {"activation_checkpointing", "validation.every", "validation.cache"}
    | {"resolved", "history", "fingerprints"}
)
_SETTINGS = ("step", "num")  # of an evaluation: runs are compared at equal ones


def grouped(folders: Sequence[Path], keys: Sequence[str]) -> dict[str, list[Path]]:
    """Return runs by their values of the settings `keys`: `alignment.gamma 0.6`, in the order in which they come up.

    A key is a setting's dotted name, or its last part where that is one setting's alone. Raises `UsageError` for one
    that no run has.
    """
    configs = {folder: _flat(_run(folder)[0], skip=frozenset()) for folder in folders}
    known = {name for config in configs.values() for name in config}
    parts = {name.rpartition(".")[2] for name in known}
    names = []
    for key in keys:
        alike = [name for name in known if name == key or name.rpartition(".")[2] == key]
        if key not in known and len(alike) != 1:
            meant = (
                f"which of {', '.join(sorted(alike))}?"
                if alike
                else f"no setting of runs; {nearest(key, known | parts)}"
            )
            raise UsageError(f"--group-by {key}: {meant}")
        names.append(key if key in known else alike[0])
    groups: dict[str, list[Path]] = {}
    for folder, config in configs.items():
        label = ", ".join(f"{name} {config.get(name, 'absent')}" for name in names)
        groups.setdefault(label, []).append(folder)
    return groups


def qualities_of(folders: Sequence[Path], notes: list[str]) -> dict[str, dict[str, float]]:
    """Return quality by encoder, the mean over runs that differ in their seed alone, at the last evaluated step."""
    figures: dict[str, list[dict[str, float]]] = {}
    settings: dict[tuple[Any, ...], Path] = {}
    configs: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        config, record = _run(folder)
        encoders = [str(encoder) for encoder in config["encoders"]]
        if len(encoders) != 1:
            notes.append(f"left out: {folder} is aligned with {', '.join(sorted(encoders)) or 'no encoder'}, not one")
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
            f"{encoder}: {first} and {folder} differ in {shown}. Runs are averaged over seed alone: add "
            f"{' '.join(f'--group-by {key}' for key in differing)} for a table a value, or give those of one value"
        )


def _differing(before: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of each setting, by dotted name, in which two runs differ and that could matter."""
    one, other = _flat(before), _flat(config)
    keys = sorted({*one, *other})
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _flat(config: Mapping[str, Any], *, skip: frozenset[str] = _AVERAGED, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" in skip:
            continue
        nested = isinstance(value, Mapping)
        flat |= _flat(value, skip=skip, prefix=f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
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
