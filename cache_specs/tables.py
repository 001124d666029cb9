"""The tables of encoders and autoencoders, and how an entry and a resolution become a component's spec.

A request is a name, an alias, or either with options: `dinov2`, `hog:grid=8`. Options become part of the spec, of the
fingerprint and of the group's name (`features/hog-grid8`).
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from .errors import UsageError, nearest

RANDOM_SUFFIX = "-random"  # random weights never go by the name of the pretrained ones


@dataclass(frozen=True, kw_only=True)
class EncoderEntry:
    """One row of encoders.yaml; the fields are explained at its head."""

    name: str
    loader: Literal["timm", "builtin"]
    model: str
    width: int
    patch: int
    prefix_tokens: int
    cls_token: bool
    tensor: Literal["after_norm", "before_norm"]
    interpolation: Literal["bicubic", "bilinear"]
    antialias: bool
    licence: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    params_m: float | None = None
    gmac: float | None = None

    @property
    def has_weights(self) -> bool:
        return self.loader != "builtin"

    def resolve(self, *, resolution: int, grid: int | None, random_weights: bool) -> dict[str, Any]:
        """Return the spec of this encoder's tokens for square images of `resolution` pixels.

        `grid` tokens a side; by default resolution / 16, the study's 16 x 16 at 256. The model sees `grid * patch`
        pixels a side; a weight-free encoder sees the image as it is.
        """
        if grid is None and resolution % 16:
            raise UsageError(
                f"--encoder {self.name} at resolution {resolution}: a token grid of resolution / 16 is not whole; "
                f"name one, --encoder {self.name}:grid={max(1, round(resolution / 16))}"
            )
        side = resolution // 16 if grid is None else grid
        if side < 2:
            raise UsageError(
                f"--encoder {self.name} at resolution {resolution}: a grid of {side} x {side}; spatial statistics "
                f"need at least 2 x 2, so name one: --encoder {self.name}:grid=8"
            )
        input_size = side * self.patch if self.has_weights else resolution
        return {
            "entry": self.name,
            "loader": self.loader,
            "model": self.model,
            "width": self.width,
            "grid": [side, side],
            "input_size": [input_size, input_size],
            "prefix_tokens": self.prefix_tokens,
            "cls_token": self.cls_token,
            "tensor": self.tensor,
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "random_weights": bool(random_weights and self.has_weights),
        }


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
    scale: float
    bias: float
    licence: str

    @property
    def has_weights(self) -> bool:
        return self.loader != "builtin"

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
            "kind": self.kind,
            "latent_channels": self.latent_channels,
            "moment_channels": self.latent_channels * (2 if self.kind == "mean_std" else 1),
            "latent_size": [side, side],
            "pixel_range": list(self.pixel_range),
            "random_weights": bool(random_weights and self.has_weights),
        }


@functools.cache
def _table(file: str) -> dict[str, Any]:
    text = importlib.resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _entries(file: str, section: str, cls: type) -> dict[str, Any]:
    rows = {}
    known = {field.name for field in dataclasses.fields(cls)}
    for name, row in _table(file)[section].items():
        unknown = sorted(set(row) - known)
        if unknown:
            raise UsageError(f"{file}: {name}: unknown key {unknown[0]!r}; {nearest(unknown[0], known)}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        try:
            rows[name] = cls(name=name, **values)
        except TypeError as error:
            raise UsageError(f"{file}: {name}: {error}") from error
    return rows


@functools.cache
def encoder_table() -> dict[str, EncoderEntry]:
    """Return every encoder by name, in the table's order."""
    return _entries("encoders.yaml", "encoders", EncoderEntry)


@functools.cache
def autoencoder_table() -> dict[str, AutoencoderEntry]:
    """Return every autoencoder by name, in the table's order."""
    return _entries("autoencoders.yaml", "autoencoders", AutoencoderEntry)


def encoder_aliases() -> Mapping[str, str]:
    """Return short names, each with the name that it stands for."""
    return _table("encoders.yaml")["aliases"]


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A request turned into a group's name, a table entry and a spec."""

    name: str
    entry: EncoderEntry | AutoencoderEntry
    spec: dict[str, Any]


def resolve_encoder(request: str, *, resolution: int, random_weights: bool = False) -> ResolvedModel:
    """Resolve `NAME[:grid=G]`; raise `UsageError` with the nearest known name for one that is not in the table."""
    name, _, options = request.partition(":")
    name = encoder_aliases().get(name, name)
    table = encoder_table()
    if name not in table:
        raise UsageError(f"unknown encoder {name!r}: {nearest(name, [*table, *encoder_aliases()])}")
    grid = None
    group = name
    if options:
        key, _, value = options.partition("=")
        if key != "grid":
            raise UsageError(f"--encoder {request}: unknown option {key!r}; {nearest(key, ['grid'])}")
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise UsageError(f"--encoder {request}: grid is {value!r}, expected a whole number of tokens a side")
        grid = int(value)
        group += f"-grid{grid}"
    entry = table[name]
    spec = entry.resolve(resolution=resolution, grid=grid, random_weights=random_weights)
    return ResolvedModel(name=group + RANDOM_SUFFIX * spec["random_weights"], entry=entry, spec=spec)


def resolve_autoencoder(name: str, *, resolution: int, random_weights: bool = False) -> ResolvedModel:
    """Resolve an autoencoder's name; raise `UsageError` with the nearest known one."""
    table = autoencoder_table()
    if name not in table:
        raise UsageError(f"unknown autoencoder {name!r}: {nearest(name, table)}")
    entry = table[name]
    spec = entry.resolve(resolution=resolution, random_weights=random_weights)
    return ResolvedModel(name=name + RANDOM_SUFFIX * spec["random_weights"], entry=entry, spec=spec)
