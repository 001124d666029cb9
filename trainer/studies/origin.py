"""Where a run came from, to do it again: its command, code, versions and data, as its config.json has them.

A run that was trained before they were recorded has the command that its settings amount to, said to be that.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from ...cache_specs.errors import RepaError
from ..runs.config import RunConfig
from ..runs.settings import FINGERPRINTS, HISTORY, NOT_SETTINGS, Layer, flatten, recipe_layer, resolve
from .records import RunRecord

_FLAGS = {"cache": "--cache", "model": "--model", "recipe": "--recipe", "steps": "--steps", "out": "--out"}


def starts(run: RunRecord) -> list[dict[str, Any]]:
    """Return how the run was started, and then resumed, as its config.json says; none for one of an older version."""
    found = run.config.get(HISTORY)
    return [one for one in found if isinstance(one, dict) and "command" in one] if isinstance(found, list) else []


def equivalent_command(config: Mapping[str, Any]) -> str:
    """Return the repa-train line with the settings of a config.json: flags, and --set where recipe and defaults differ.

    Settings that this version does not know stand in it too, so that it is refused by name, not run otherwise.
    """
    settings = flatten({key: value for key, value in config.items() if key not in NOT_SETTINGS})
    usual = _usual(config)
    words = ["repa-train"]
    for key, flag in _FLAGS.items():
        if key in settings:
            words += [flag, str(settings.pop(key))]
    for encoder in settings.pop("encoders", ()):
        words += ["--encoder", encoder]
    if (autoencoder := settings.pop("autoencoder", None)) is not None:
        words += ["--autoencoder", autoencoder]
    for key, value in settings.items():
        if key not in usual or usual[key] != value:
            words += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return shlex.join(words)


def _usual(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the recipe and the defaults say by themselves, nothing where this version lacks the recipe."""
    needed = {key: str(config.get(key, "")) for key in ("cache", "out")}
    recipe, model = str(config.get("recipe")), str(config.get("model"))
    try:
        plain: RunConfig = resolve([recipe_layer(recipe, model), Layer(source="run", values=needed | {"model": model})])
    except RepaError:
        return {}
    return flatten(json.loads(json.dumps(plain.plain())))


def about(run: RunRecord) -> dict[str, Any]:
    """Return what the page shows of a run's origin: command (and whether it is exact), versions, data, starts."""
    found = starts(run)
    first = {key: str(value) for key, value in found[0].items() if value is not None} if found else {}
    machine = [first[key] for key in ("device",) if key in first]
    machine += [
        f"{first[key]} {words}" for key, words in (("world_size", "rank(s)"), ("threads", "thread(s)")) if key in first
    ]
    machine += [str(run.config["precision"])] if found and "precision" in run.config else []
    fingerprints = run.config.get(FINGERPRINTS)
    return {
        "command": first["command"] if found else equivalent_command(run.config) if run.config else "",
        "exact": bool(found),
        "time": first.get("date", ""),
        "versions": ", ".join(
            f"{words} {first[key]}" for key, words in (("version", "repa-cache"), ("torch", "torch")) if key in first
        ),
        "commit": first.get("commit", ""),
        "machine": ", ".join(machine),
        "fingerprints": dict(fingerprints) if isinstance(fingerprints, dict) else {},
        "resumed": [
            {"step": one.get("step"), "time": one.get("date"), "commit": one.get("commit")} for one in found[1:]
        ],
    }


def mixed(runs: list[RunRecord]) -> list[str]:
    """Say where runs that are compared were trained by several commits or versions, or from other data."""
    found = [one for run in runs if (one := about(run))["exact"]]
    notes = []
    commits = {one["commit"] for one in found}
    if len(commits) > 1:
        short = sorted(name[:10] + name[40:] if name else "unknown" for name in commits)
        notes.append(f"the compared runs are of {len(commits)} commits: {', '.join(short)}")
    if len({one["versions"] for one in found}) > 1:
        notes.append("the compared runs were trained with different versions of packages: see each run")
    names = {name for one in found for name in one["fingerprints"]}
    other = sorted(n for n in names if len({one["fingerprints"].get(n) for one in found} - {None}) > 1)
    if other:
        notes.append(f"the compared runs read different data: {', '.join(other)} has several fingerprints")
    return notes
