"""The tables of encoders and autoencoders, and how an entry and a resolution become a component's spec.

A request is a name, an alias or a user's own file, with options: `dinov2`, `siglip2@irepa`, `hog:grid=8`, `my.yaml`.
Options become part of the spec, of the fingerprint and of the group's name (`features/hog-grid8`).
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .encoder_entry import VARIANT, EncoderEntry
from .errors import UsageError, nearest, reason
from .outside import MOST_SETTINGS_BYTES, parse_yaml, read_text

_COLUMNS = ("model", "width", "depth", "params_m", "gmac")  # of a row of encoders.yaml
OPTIONS = ("grid", "layers")  # of a request: NAME:grid=8:layers=8,11
RANDOM_SUFFIX = "-random"  # random weights never go by the name of the pretrained ones


@dataclass(frozen=True, kw_only=True)
class AutoencoderEntry:
    """One row of autoencoders.yaml; the fields are explained at its head."""

    name: str
    loader: Literal["diffusers", "builtin"]
    model: str
    latent_channels: int
    factor: int
    kind: Literal["mean_std", "sample"]
    pixel_range: tuple[float, float]
    scale: float | None
    bias: float | None
    licence: str
    library_class: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    params_m: float = 0.0
    gmac: float = 0.0

    @property
    def has_weights(self) -> bool:
        return self.loader != "builtin"

    @property
    def published(self) -> tuple[float, float] | None:
        """The scale and bias of latent_norm: fixed, None where none are published as one number each."""
        return None if self.scale is None or self.bias is None else (self.scale, self.bias)

    def resolve(self, *, resolution: int, random_weights: bool) -> dict[str, Any]:
        """Return the spec of this autoencoder's moments for square images of `resolution` pixels.

        The published scale and bias are left out: how latents are normalised belongs to a run, not to a cache.
        """
        if resolution % self.factor:
            raise UsageError(
                f"--autoencoder {self.name} needs a resolution that is a multiple of {self.factor}, not {resolution}; "
                f"try --resolution {max(1, round(resolution / self.factor)) * self.factor}"
            )
        side = resolution // self.factor
        return {
            "entry": self.name,
            "loader": self.loader,
            "model": self.model,
            "library_class": self.library_class,
            "config": dict(self.config),
            "kind": self.kind,
            "latent_channels": self.latent_channels,
            "moment_channels": self.latent_channels * (2 if self.kind == "mean_std" else 1),
            "latent_size": [side, side],
            "pixel_range": list(self.pixel_range),
            "random_weights": bool(random_weights and self.has_weights),
        }


Entry = TypeVar("Entry", "EncoderEntry", "AutoencoderEntry")


@functools.cache
def _table(file: str) -> dict[str, Any]:
    text = importlib.resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _entry(where: str, cls: type[Entry], name: str, row: Mapping[str, Any]) -> Entry:
    known = {field.name for field in dataclasses.fields(cls)} - {"name"}
    unknown = sorted(set(row) - known)
    if unknown:
        raise UsageError(f"{where}: {name}: unknown key {unknown[0]!r}; {nearest(unknown[0], known)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    try:
        return cls(name=name, **values)
    except TypeError as error:
        raise UsageError(f"{where}: {name}: {str(error).rpartition('__init__() ')[2]}") from error


@functools.cache
def encoder_table() -> dict[str, EncoderEntry]:
    """Return every encoder by name, in the table's order, each followed by its variants."""
    table = _table("encoders.yaml")
    study = set(table["irepa27"])
    entries = {}
    for family, block in table["families"].items():
        common = {key: value for key, value in block.items() if key not in ("encoders", "variants")}
        for name, (*columns, last) in block["encoders"].items():
            named = dict(zip(_COLUMNS, columns if isinstance(last, dict) else [*columns, last], strict=True))
            row = {**common, "family": family, "irepa27": name in study, **named}
            row |= last if isinstance(last, dict) else {}
            entries[name] = _entry("encoders.yaml", EncoderEntry, name, row)
            for variant, departure in block.get("variants", {}).items():
                full = f"{name}{VARIANT}{variant}"
                options = {**row.get("options", {}), **departure.get("options", {})}
                changed = {**row, **departure, "options": options, "irepa27": False}
                entries[full] = _entry("encoders.yaml", EncoderEntry, full, changed)
    return entries


def read_encoder_file(path: Path) -> EncoderEntry:
    """Read a user's own entry: the fields of encoders.yaml, flat, named by the field `name` or by the file.

    Raises `UsageError` naming the file and the field where it cannot be one.
    """
    try:
        row = parse_yaml(read_text(path, most=MOST_SETTINGS_BYTES))
    except (OSError, ValueError) as error:
        raise UsageError(f"--encoder {path}: cannot be read as YAML ({reason(error)})") from error
    if not isinstance(row, dict):
        raise UsageError(f"--encoder {path}: expected one encoder's fields (cache_specs/encoders.yaml explains them)")
    name = str(row.pop("name", path.stem))
    if name in encoder_table() or name in encoder_aliases():
        raise UsageError(f"--encoder {path}: {name} is the table's; give yours another name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.@-]*", name):
        raise UsageError(f"--encoder {path}: the name {name!r} becomes a folder's: letters, digits and _ . @ - only")
    return _entry(str(path), EncoderEntry, name, row)


@functools.cache
def autoencoder_table() -> dict[str, AutoencoderEntry]:
    """Return every autoencoder by name, in the table's order."""
    rows = _table("autoencoders.yaml")["autoencoders"]
    return {name: _entry("autoencoders.yaml", AutoencoderEntry, name, row) for name, row in rows.items()}


def encoder_aliases() -> Mapping[str, str]:
    """Return short names, each with the name that it stands for."""
    return _table("encoders.yaml")["aliases"]


def encoders_left_out() -> Mapping[str, str]:
    """Return encoders of the study that the table does not have, each with the reason."""
    return _table("encoders.yaml")["left_out"]


def encoder_table_lines() -> Iterator[str]:
    """Yield the table as text, a line an encoder; an asterisk marks the 27 of the iREPA study."""
    short = {name: alias for alias, name in encoder_aliases().items()}
    yield (
        f"  {'name':<31} {'short':<9} {'width':>5} {'tokens':<11} {'params M':>8} {'GMAC':>7}  "
        f"{'licence':<25} weights from"
    )
    for name, entry in encoder_table().items():
        yield (
            f"{'*' if entry.irepa27 else ' '} {name:<31} {short.get(name, ''):<9} {entry.width:>5} {entry.tensor:<11} "
            f"{entry.params_m:>8.1f} {entry.gmac:>7.1f}  {entry.licence:<25} {entry.source}"
        )
    yield "* one of the 27 of the iREPA study; @irepa: as the study computes it, where that is not the model's card"
    for name, why in encoders_left_out().items():
        yield f"left out: {name}: {why}"


def encoder_name(request: str) -> str:
    """Return the table's name for a name or a short one, with or without a variant: `siglip2@irepa`."""
    name, separator, variant = request.partition(VARIANT)
    return encoder_aliases().get(name, name) + separator + variant


@dataclass(frozen=True, kw_only=True)
class EncoderRequest:
    """What `--encoder NAME[:grid=G][:layers=I,J,...]` asks for, its name and its values read."""

    entry: EncoderEntry
    grid: int | None
    layers: tuple[int, ...] | None

    @property
    def group(self) -> str:
        """The group's name for pretrained weights: `dinov2-vit-b-grid8-layers8-11`."""
        name = self.entry.name if self.grid is None else f"{self.entry.name}-grid{self.grid}"
        return name if self.layers is None else f"{name}-layers{'-'.join(map(str, self.layers))}"


def read_encoder_request(request: str) -> EncoderRequest:
    """Read `NAME|FILE.yaml[:grid=G][:layers=I,J,...]`.

    Raises `UsageError` with the nearest known name for one that is not in the table.
    """
    asked, *options = request.split(":")
    if asked.endswith((".yaml", ".yml")):
        entry = read_encoder_file(Path(asked))
    else:
        name = encoder_name(asked)
        if name in encoders_left_out():
            raise UsageError(f"--encoder {request}: {name} is left out: {encoders_left_out()[name]}")
        if name not in encoder_table():
            raise UsageError(f"unknown encoder {name!r}: {nearest(name, [*encoder_table(), *encoder_aliases()])}")
        entry = encoder_table()[name]
    values: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in OPTIONS:
            raise UsageError(f"--encoder {request}: unknown option {key!r}; {nearest(key, OPTIONS)}")
        numbers = value.split(",") if key == "layers" else [value]
        if not all(number.isascii() and number.isdigit() for number in numbers) or (key, value) == ("grid", "0"):
            what = "block numbers, as in layers=8,9" if key == "layers" else "a whole number of tokens a side"
            raise UsageError(f"--encoder {request}: {key} is {value!r}, expected {what}")
        values[key] = tuple(map(int, numbers))
    return EncoderRequest(
        entry=entry, grid=values["grid"][0] if "grid" in values else None, layers=values.get("layers")
    )


def stored_encoder(request: str, present: Sequence[str]) -> tuple[str, int | None] | None:
    """Return the group among `present` that a reader's `--encoder` means, and the layer picked of it.

    A request names a group as it lies (`dinov2-vit-b-int8`) or as it was asked of the build (`dinov2`, `hog:grid=8`);
    `:layer=9` at the end picks one layer of a group that holds several. None where no group matches.
    """
    name, separator, layer = request.partition(":layer=")
    if separator and not (layer.isascii() and layer.isdigit()):
        raise UsageError(f"--encoder {request}: layer is {layer!r}, expected the number of a block, as in :layer=9")
    candidates = [name]
    with contextlib.suppress(UsageError):  # the name of a group need not be one that a build understands
        candidates.append(read_encoder_request(name).group)
    picked = int(layer) if separator else None
    return next(((group, picked) for group in candidates if group in present), None)


def pick_layer(where: str, stored: Sequence[int | None], layer: int | None) -> int | None:
    """Return the layer to read of a group that holds `stored` ones; raise `UsageError` where that is not clear."""
    if layer is None and len(stored) == 1:
        return stored[0]
    if layer not in stored or layer is None:
        name = where.rpartition("/")[2]
        if tuple(stored) == (None,):
            raise UsageError(f"{where} holds the last layer's tokens alone; leave out :layer={layer}")
        raise UsageError(
            f"{where} holds layers {', '.join(map(str, stored))}; pick one, as in --encoder {name}:layer={stored[-1]}"
        )
    return layer


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A request turned into a group's name, a table entry and a spec."""

    name: str
    entry: EncoderEntry | AutoencoderEntry
    spec: dict[str, Any]


def resolve_encoder(request: str, *, resolution: int, random_weights: bool = False) -> ResolvedModel:
    """Resolve `NAME|FILE.yaml[:grid=G][:layers=I,J,...]` for images of `resolution` pixels."""
    asked = read_encoder_request(request)
    spec = asked.entry.resolve(
        resolution=resolution, grid=asked.grid, layers=asked.layers, random_weights=random_weights
    )
    return ResolvedModel(name=asked.group + RANDOM_SUFFIX * spec["random_weights"], entry=asked.entry, spec=spec)


def resolve_autoencoder(name: str, *, resolution: int, random_weights: bool = False) -> ResolvedModel:
    """Resolve an autoencoder's name; raise `UsageError` with the nearest known one."""
    table = autoencoder_table()
    if name not in table:
        raise UsageError(f"unknown autoencoder {name!r}: {nearest(name, table)}")
    entry = table[name]
    spec = entry.resolve(resolution=resolution, random_weights=random_weights)
    return ResolvedModel(name=name + RANDOM_SUFFIX * spec["random_weights"], entry=entry, spec=spec)
