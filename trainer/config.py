"""What a run is: one frozen dataclass, resolved once from defaults < recipe < --config < --set < flags.

A key is the dotted path of a field (`optimizer.learning_rate`); a YAML file may nest the sections or write the dotted
keys. Unknown keys are errors that show the nearest known one. The resolved configuration is printed, stored as JSON
in the run folder and in every checkpoint, and compared at a resume.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NewType

import yaml

from ..cache_specs.errors import UsageError, nearest
from ..cache_specs.sizes import parse_bytes
from .interpolant import Interpolant
from .optimizer import OptimizerConfig
from .order import DEFAULT_WINDOW, Shuffle
from .samplers import SamplerConfig, SamplerName

Bytes = NewType("Bytes", int)  # may be written as 512MB or 2GiB
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How block `encoder_depth` of SiT is held to the encoders' tokens (REPA, arXiv 2410.06940; iREPA, 2512.10794)."""

    projector: Literal["none", "mlp", "conv", "linear"] = "mlp"  # none: no alignment, no encoder is read
    hidden_dim: int = 2048  # mlp
    kernel_size: int = 3  # conv
    encoder_depth: int = 8
    gamma: float | None = None  # strength of the spatial normalisation of the target; null for none
    proj_coeff: float = 0.5

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "kernel_size", "encoder_depth"):
            _at_least(f"alignment.{name}", getattr(self, name), 1)
        if self.kernel_size % 2 == 0:
            raise UsageError(f"alignment.kernel_size is {self.kernel_size}; expected an odd number")
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise UsageError(f"alignment.gamma is {self.gamma}; expected 0 to 1, or null for no normalisation")
        if not 0 < self.proj_coeff < float("inf"):
            raise UsageError(
                f"alignment.proj_coeff is {self.proj_coeff}; expected a number above 0 (no alignment is "
                f"alignment.projector=none, the recipe sit)"
            )


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Sample grids drawn from the EMA while training; `every` 0 draws none."""

    every: int = 0
    num: int = 16
    sampler: SamplerName = "euler"
    steps: int = 50
    cfg_scale: float = 1.0
    autoencoder_weights: str | None = None  # local weights of the decoder; null: the hub's

    def __post_init__(self) -> None:
        _at_least("grid.every", self.every, 0)
        _at_least("grid.num", self.num, 1)
        SamplerConfig(sampler=self.sampler, steps=self.steps, cfg_scale=self.cfg_scale)  # checks them


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Comparisons of the EMA's samples with the data while training; `every` 0 makes none."""

    every: int = 0
    num: int = 5000  # samples, more than the encoder is wide
    num_real: int = 50_000  # images of the cache, or all of them where there are fewer
    encoder: str | None = None  # null: the run's own, or the only one in the cache
    pooling: Literal["mean", "cls"] = "mean"  # of patch tokens, or the class token
    neighbours: int = 3  # of precision and recall
    sampler: SamplerName = "euler"
    steps: int = 50
    cfg_scale: float = 1.0
    batch_size: int = 64
    encoder_weights: str | None = None  # local weights; null: the hub's
    autoencoder_weights: str | None = None
    inception_weights: str | None = None  # for FID and Inception score by torch-fidelity; null: neither
    inception_data: str | None = None  # the images of FID, as in repa-cache build --data; null: Inception score only

    def __post_init__(self) -> None:
        _at_least("evaluation.every", self.every, 0)
        for name in ("num", "num_real", "neighbours", "batch_size"):
            _at_least(f"evaluation.{name}", getattr(self, name), 1)
        SamplerConfig(sampler=self.sampler, steps=self.steps, cfg_scale=self.cfg_scale)  # checks them


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. Defaults are SiT's and REPA's published ones."""

    recipe: str
    cache: str
    out: str
    model: str  # SiT-{Ti,S,B,L,XL}/patch
    autoencoder: str | None = None  # null: the only one in the cache
    encoders: tuple[str, ...] = ()  # empty: the only one in the cache, or none with alignment.projector=none
    steps: int = 400_000
    batch_size: int = 256  # samples an optimizer step, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches an optimizer step
    seed: int = 0
    shuffle: Shuffle = "global"  # or blocks: shards in random order, shuffled within a window of shuffle_window
    shuffle_window: int = DEFAULT_WINDOW
    precision: str = "auto"  # fp32 | bf16 of the passes; parameters and EMA stay float32. auto: bf16 on CUDA only
    compile: bool = False
    latent_norm: Literal["fixed", "channel"] = "fixed"
    label_dropout: float = 0.1
    ema_decay: float = 0.9999
    interpolant: Interpolant = field(default_factory=Interpolant)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_every: int = 50
    save_every: int = 10_000
    keep_last: int = 2
    stage: str | None = None  # folder of a local copy of what the run reads, made before the first step
    check_reads: bool = False  # verify the crc32c of every row that is read
    prefetch_bytes: Bytes = Bytes(512_000_000)  # of micro-batches read ahead, a rank; at least one is

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "shuffle_window", "log_every", "save_every", "keep_last")
        for name in (*counts, "prefetch_bytes"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        if self.precision == "fp16":
            raise UsageError(
                "precision is fp16: under the published loss most of the alignment's gradient underflows to zero there "
                "(86 % at weight 1/65536), and no loss scale reaches into the fused op. Train with bf16 or fp32"
            )
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}; {nearest(self.precision, PRECISIONS)}")
        if self.alignment.projector == "none" and self.encoders:
            raise UsageError(
                f"recipe {self.recipe} aligns with no encoder (alignment.projector=none), but --encoder names "
                f"{', '.join(self.encoders)}. Leave it out, or choose a recipe such as irepa"
            )
        if self.batch_size % self.accumulation:
            raise UsageError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}; "
                f"change one of them"
            )
        if self.stage == "":  # as of a variable that is not set
            raise UsageError("stage is empty; name a local folder for the copy, or leave it out")
        if not 0 <= self.label_dropout <= 1:
            raise UsageError(f"label_dropout is {self.label_dropout}; expected 0 to 1")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay is {self.ema_decay}; expected 0 <= ema_decay < 1")

    def plain(self) -> dict[str, Any]:
        """Return the configuration as nested dicts of JSON values."""
        return asdict(self) | {"encoders": list(self.encoders)}


# A resume may differ in these. `cache` is where the data lies; what it holds is compared by fingerprint.
MAY_CHANGE = frozenset(
    {"steps", "log_every", "save_every", "keep_last", "stage", "check_reads", "prefetch_bytes", "cache", "out"}
    | {f"grid.{item.name}" for item in fields(GridConfig)}
    | {f"evaluation.{item.name}" for item in fields(EvaluationConfig)}
)


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
    for layer in layers:
        for key, value in layer.values.items():
            if key not in known:
                raise UsageError(f"{layer.source}: unknown key {key!r}; {nearest(key, known)}")
            merged[key] = _coerce(value, known[key], f"{layer.source}: {key}")
    return _build(RunConfig, merged)


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
    size = model.removeprefix("SiT-").split("/")[0]
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
    return yaml.safe_load((files(__package__) / "recipes.yaml").read_text(encoding="utf-8"))


def file_layer(path: Path) -> Layer:
    """Return the settings of a YAML file, sections nested or dotted."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {error}") from error
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
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {assignment}: the value is not YAML") from error
    return Layer(source="--set", values=values)


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Say, field by field, where a resume asks for another run than the stored one: `key: stored 1, asked 2`."""
    before, now = flatten(stored), flatten(asked)
    return [
        f"{key}: stored {before.get(key)!r}, asked {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in MAY_CHANGE and before.get(key) != now.get(key)
    ]


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
        if value is None:
            return None
        (hint,) = (argument for argument in arguments if argument is not types.NoneType)
        return _coerce(value, hint, where)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{where} is {value!r}; {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(item, arguments[0], where) for item in items)
    if hint is Bytes:
        if isinstance(value, str):
            return parse_bytes(value, where=where)
        hint = int
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        raise UsageError(f"{where} is {value!r}; expected {hint.__name__}")
    return value


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name} is {value}; expected {least} or more")
