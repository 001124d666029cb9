"""Which run is which: a digest of everything that a run's numbers depend on, and of nothing else."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..objectives.choose import objective_class
from .config import MAY_CHANGE, RunConfig
from .settings import Layer, flatten, resolve, used

DIGITS = 10
# Names of things whose contents are in the fingerprints, or of where something lies.
NAMES = frozenset({"recipe", "cache", "out"})


def run_digest(config: RunConfig, fingerprints: Mapping[str, str], *, world_size: int) -> str:
    """Return the first digits of a run's sha256.

    It covers the resolved settings that do something, without those that a resume may change and those at their
    default, so that a setting that a later version adds changes no digest; the fingerprints of dataset, components and
    valid rows; the number of ranks; and the version of the method. Where the cache lies is not in it, nor the name of
    the recipe, whose settings are.
    """
    # `compile` was false when it was not asked for, and is left to the device now: no other run.
    config = dataclasses.replace(config, compile=config.compile is True)
    needed = Layer(source="", values={"recipe": "-", "cache": "-", "out": "-", "model": config.model, "compile": False})
    default = flatten(resolve([needed]).plain())
    settings = {
        key: value
        for key, value in flatten(used(config.plain())).items()
        if key not in MAY_CHANGE and key not in NAMES and (key == "model" or value != default.get(key))
    }
    about: dict[str, Any] = {
        "settings": settings,
        "fingerprints": dict(fingerprints),
        "world_size": world_size,
        "version": objective_class(config.objective).version,
    }
    text = json.dumps(about, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
