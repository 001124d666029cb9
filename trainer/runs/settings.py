"""Where a run's settings come from, and how they become one `RunConfig`: defaults < recipe < --config < --set < flags.

A key is the dotted path of a field (`optimizer.learning_rate`); a YAML file may nest the sections or write the dotted
keys. Unknown keys are errors that show the nearest known one.
"""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from ...cache_specs.errors import UsageError, nearest, reason
from ...cache_specs.files.outside import MOST_SETTINGS_BYTES, parse_yaml, read_text
from ...cache_specs.sizes import parse_bytes
from ...cache_specs.tables import packaged_table
from ..objectives.alignment import AlignmentConfig
from ..objectives.choose import other_sections
from .config import BY_ENCODER, MAY_CHANGE, Bytes, RunConfig

RESOLVED = "resolved"  # what the cache made of a run's settings
HISTORY = "history"  # when, by what command and version a run was started and resumed
FINGERPRINTS = "fingerprints"  # of what it was trained on
NOT_SETTINGS = frozenset({RESOLVED, HISTORY, FINGERPRINTS})  # stand in config.json beside the settings


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One source of settings: where it comes from, in words for errors, and its values by dotted key."""

    source: str
    values: Mapping[str, Any]


def resolve(layers: Sequence[Layer]) -> RunConfig:
    """Merge layers, later ones win, into a checked `RunConfig`.

    Raises UsageError for an unknown key (with the nearest known one), a value of the wrong type, or a missing key.
    """
    known = _field_types(RunConfig)
    merged: dict[str, Any] = {}
    named: dict[str, dict[str, Any]] = {key: {} for key in BY_ENCODER}
    for layer in layers:
        for key, value in flatten(layer.values).items():
            owner = next((owner for owner in BY_ENCODER if key.startswith(f"{owner}.")), key)
            if owner not in known:
                raise UsageError(f"{layer.source}: unknown key {key!r}; {_meant(key, known)}")
            found = _coerce(value, known[owner], f"{layer.source}: {key}")
            if owner != key:
                named[owner][key.removeprefix(f"{owner}.")] = found
                continue
            merged[key] = found
            named.get(key, {}).clear()
    for key, chosen in named.items():
        merged |= _by_encoder(key, merged, chosen)
    for key in ("cache", "out"):
        if merged.get(key) == "":  # as of a variable that is not set: it would name the working folder
            raise UsageError(f"{key} is empty; name a folder")
    return _build(RunConfig, merged)


def _by_encoder(key: str, merged: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a setting with the values that were `chosen` for encoders by name: one an encoder, or one for all."""
    encoders = merged.get("encoders", ())
    if not chosen and key not in merged:
        return {}
    value = merged[key] if key in merged else getattr(AlignmentConfig(), key.rpartition(".")[2])
    values = list(value) if isinstance(value, tuple) else [value] * max(1, len(encoders))
    for encoder, one in chosen.items():
        if encoder not in encoders:
            raise UsageError(f"{key}.{encoder}: --encoder names no such encoder; {nearest(encoder, encoders)}")
        if isinstance(one, tuple) or len(values) != len(encoders):
            raise UsageError(f"{key}.{encoder} is {one!r} beside {values}; expected one number an encoder")
        values[encoders.index(encoder)] = one
    return {key: values[0] if len(set(values)) == 1 and len(values) in (1, len(encoders)) else tuple(values)}


# What people call settings elsewhere.
SYNONYMS = {
    "lr": "optimizer.learning_rate",
    "coeff": "alignment.proj_coeff",
    "depth": "alignment.encoder_depth",
    "ema": "ema_decay",
    "epochs": "steps",
    "max_steps": "steps",
    "batch": "batch_size",
    "num_samples": "subset",
    "val_fraction": "validation.fraction",
    "val_data": "validation.cache",
    "grad_clip": "optimizer.clip",
    "max_grad_norm": "optimizer.clip",
    "warmup": "optimizer.warmup_steps",
    "cfg_prob": "label_dropout",
    "checkpointing_steps": "save_every",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "activation_checkpointing",
    "mixed_precision": "precision",
    "enc_type": "encoders",
}


def _meant(key: str, known: Mapping[str, Any]) -> str:
    """Say which setting an unknown key was probably meant for: a synonym, the end of a dotted key, or the nearest."""
    last = key.rpartition(".")[2].replace("-", "_").lower()
    ends = [name for name in known if name.rpartition(".")[2] == last]
    if last in SYNONYMS:
        ends = [SYNONYMS[last]]
    hint = f"did you mean {' or '.join(map(repr, ends))}? " if ends else f"{nearest(key, known)}. "
    return f"{hint}repa-train --settings shows all {len(known)}"


def required(key: str, layers: Sequence[Layer]) -> str:
    """Return the text that the last layer to have `key` gives it; raise UsageError where none has it."""
    for layer in reversed(layers):
        if key in layer.values:
            return _coerce(layer.values[key], str, f"{layer.source}: {key}")
    raise UsageError(f"not set: {key}. Give it as a flag, in --config or with --set")


def recipe_layer(name: str, model: str) -> Layer:
    """Return the settings of recipe `name` for a model such as "SiT-B/2"."""
    recipes = known_recipes()
    if name not in recipes:
        raise UsageError(f"unknown recipe {name!r}; {nearest(name, recipes)}")
    size = model.partition("-")[2].split("/")[0]
    values: dict[str, Any] = {"recipe": name}
    for key, value in recipes[name].items():
        if isinstance(value, dict):
            if size not in value:
                continue  # no such size: the model's name is refused where the model is made, with the nearest one
            value = value[size]
        values[key] = value
    return Layer(source=f"recipe {name}", values=values)


def known_recipes() -> dict[str, dict[str, Any]]:
    """Return recipes.yaml: dotted keys by recipe name."""
    assert __package__
    return packaged_table(__package__, "recipes.yaml")


def file_layer(path: Path) -> Layer:
    """Return the settings of a YAML file, sections nested or dotted."""
    try:
        loaded = parse_yaml(read_text(path, most=MOST_SETTINGS_BYTES))
    except OSError as error:
        raise UsageError(f"--config {path}: {reason(error)}") from error
    except ValueError as error:
        raise UsageError(f"--config {path} is not YAML: {reason(error)}") from error
    if isinstance(loaded, dict):
        loaded = {key: value for key, value in loaded.items() if key not in NOT_SETTINGS}
    if not isinstance(loaded or {}, dict):
        raise UsageError(f"--config {path} holds a {type(loaded).__name__}; expected keys and values")
    return Layer(source=f"--config {path}", values=flatten(loaded or {}))


def set_layer(assignments: Sequence[str]) -> Layer:
    """Return the settings of `--set key=value` options; values are read as YAML."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: expected key=value")
        try:
            values[key.strip()] = parse_yaml(text)
        except ValueError as error:
            raise UsageError(f"--set {assignment[:100]}: the value is not YAML ({reason(error)})") from error
    return Layer(source="--set", values=values)


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Say, field by field, where a resume asks for another run than the stored one: `key: stored 1, asked 2`."""
    before, now = flatten(used(stored)), flatten(used(asked))
    return [
        f"{key}: stored {before[key]!r}, asked {now[key]!r}"
        for key in sorted(before.keys() & now.keys())  # one that has no effect in either follows from another
        if key not in MAY_CHANGE and before[key] != now[key]
    ]


def used(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as nested dicts without the settings that its others leave without effect."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    alignment = kept.get("alignment")
    if isinstance(alignment, dict):
        projector = alignment.get("projector")
        if projector == "none":
            kept["alignment"] = {"projector": "none"}
        for name, kind in (("hidden_dim", "mlp"), ("kernel_size", "conv")):
            if projector != kind:
                alignment.pop(name, None)
    if kept.get("shuffle") == "global":
        kept.pop("shuffle_window", None)
    validation = kept.get("validation")
    if isinstance(validation, dict) and not validation.get("fraction") and validation.get("cache") is None:
        kept["validation"] = {"fraction": 0.0}
        if kept.get("subset") is None:
            kept.pop("split_seed", None)
    for section in other_sections(config.get("objective", "velocity")):
        kept.pop(section, None)
    for section in ("grid", "evaluation"):
        if isinstance(kept.get(section), dict) and not kept[section].get("every"):
            kept[section] = {"every": 0}
    online = kept.get("online")
    if isinstance(online, dict) and online.get("data") is None:
        kept.pop("online")
    return kept


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every leaf field by dotted key."""
    hints = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for item in fields(cls):
        hint = hints[item.name]
        if is_dataclass(hint):
            known |= _field_types(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            known[f"{prefix}{item.name}"] = hint
    return known


def _build(cls: type, merged: Mapping[str, Any], prefix: str = "") -> Any:
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    missing = []
    for item in fields(cls):
        key = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            values[item.name] = _build(typing.cast(type, hints[item.name]), merged, f"{key}.")
        elif key in merged:
            values[item.name] = merged[key]
        elif item.default is MISSING and item.default_factory is MISSING:
            missing.append(key)
    if missing:
        raise UsageError(f"not set: {', '.join(missing)}. Give it as a flag, in --config or with --set")
    return cls(**values)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the field's type, refusing what would change its meaning."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        none = value is None or (isinstance(value, str) and value.lower() in ("none", "null") and str not in arguments)
        if none and types.NoneType in arguments:
            return None
        single, *several = (argument for argument in arguments if argument is not types.NoneType)
        return _coerce(value, several[0] if several and isinstance(value, list | tuple) else single, where)
    if origin is Literal:
        if isinstance(value, str) and value.lower() in arguments:
            value = value.lower()
        if not any(type(value) is type(known) and value == known for known in arguments):  # 1 is not true
            known = [str(argument).lower() if isinstance(argument, bool) else str(argument) for argument in arguments]
            raise UsageError(f"{where} is {value!r}; {nearest(str(value), known)}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return tuple(_coerce(item, arguments[0], where) for item in items)
    if hint is Bytes:
        if isinstance(value, str):
            return parse_bytes(value, where=where)
        hint = int
    if hint is int and isinstance(value, str | float):
        # YAML 1.1 reads 1e5 as text.
        try:
            whole = float(value)
        except ValueError:
            whole = math.nan
        if whole.is_integer():
            return int(whole)
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        raise UsageError(f"{where} is {value!r}; expected {hint.__name__}")
    if hint is str:
        try:
            value.encode()
        except UnicodeEncodeError:  # a file's name in other bytes; config.json could not hold it
            raise UsageError(f"{where} is {value!r}, which is not UTF-8; rename it, or choose another") from None
    return value
