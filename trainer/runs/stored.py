"""The settings that a run on disk was made with, in today's words: what a resume begins from.

They replace defaults and recipe, so that a run goes on with its own numbers whatever a later version recommends; only
what the user gives now is compared with them. A setting that the stored ones lack takes the value at which it does
nothing, and one that was renamed is translated here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...cache_specs.errors import UsageError, reason
from ...cache_specs.files.outside import MOST_TABLE_BYTES, parse_json, read_file
from ..models.checkpoint import latest_checkpoint, load_checkpoint
from .settings import NOT_SETTINGS, RESOLVED, Layer, flatten, resolve

CONFIG_FILE = "config.json"

RENAMED = {"evaluation.encoder": "evaluation.encoders"}  # by dotted key: what it is called now
# Of later settings whose default does something, the value that does nothing.
NEUTRAL: dict[str, Any] = {"save_minutes": None, "compile": False}


def stored_layer(folder: Path) -> Layer | None:
    """Return the settings of the run in `folder`, None where it has no checkpoint yet: nothing binds it then.

    Raises UsageError where the checkpoint is not one of a run here, CheckpointError where it is damaged.
    """
    newest = latest_checkpoint(folder)
    if newest is None:
        return None
    try:
        return layer_of(parse_json(read_file(folder / CONFIG_FILE, most=MOST_TABLE_BYTES)), source=str(folder))
    except (OSError, ValueError, AttributeError, RecursionError):  # lost or damaged: every checkpoint has it too
        stored = load_checkpoint(newest, mmap=True)
    if not isinstance(stored.get("config"), Mapping):
        raise UsageError(f"{newest} is not a checkpoint of repa-train; it cannot be resumed, only sampled from")
    return layer_of(stored["config"], source=str(newest))


def named_run(run: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of `--resume RUN`: the given ones, and the run's folder as --out.

    Raises UsageError where there is nothing to resume, or --out names another folder.
    """
    if latest_checkpoint(run) is None:
        raise UsageError(
            f"--resume {run}: there is no checkpoint in it. Name the folder of a run, or start one with --out"
        )
    if "out" in given and Path(given["out"]) != run:
        raise UsageError(f"--resume {run} goes on in its own folder, and --out names {given['out']}; leave --out away")
    return {**given, "out": str(run)}


def layer_of(config: Mapping[str, Any], *, source: str) -> Layer:
    """Return a stored configuration as settings by dotted key, translated; raise UsageError where it is none."""
    try:
        json.dumps(config)  # a checkpoint may hold what no config.json does: numbers of 5,000 digits, a list in itself
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{source}: its settings cannot be written out ({reason(error)}); it is damaged") from error
    values = flatten({key: value for key, value in config.items() if key not in NOT_SETTINGS})
    return Layer(source=source, values=NEUTRAL | {RENAMED.get(key, key): value for key, value in values.items()})


def in_todays_words(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Return a stored configuration as a run of today would store it, to be compared with one."""
    plain = resolve([layer_of(config, source=source)]).plain()
    return plain | ({RESOLVED: config[RESOLVED]} if RESOLVED in config else {})
