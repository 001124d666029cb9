"""One row of autoencoders.yaml, and how it and a resolution become the spec of a component's moments."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from .entries import (
    FILES,
    KEYWORDS,
    NUMBER,
    RANGE,
    TEXT,
    WHOLE,
    OwnCode,
    Rule,
    Ruled,
    check_fields,
    one_of,
    optional,
    read_own_code,
)
from .errors import UsageError
from .layout import STORED_VIEWS, VIEWS

RULES: dict[str, Rule] = {
    "loader": one_of("diffusers", "builtin", "python"),
    "model": TEXT,
    "target": optional(TEXT),
    "files": FILES,
    "options": KEYWORDS,
    "latent_channels": WHOLE,
    "factor": WHOLE,
    "kind": one_of("mean_std", "sample"),
    "pixel_range": RANGE,
    "scale": optional(NUMBER),
    "bias": optional(NUMBER),
    "licence": TEXT,
    "library_class": optional(TEXT),
    "config": KEYWORDS,
    "params_m": NUMBER,
    "gmac": NUMBER,
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderEntry(Ruled):
    """One autoencoder; the fields are explained in ENCODERS.md.

    `folder` is where a file of the user's lies, None for the table's own.
    """

    RULES: ClassVar = RULES
    HIDDEN: ClassVar = frozenset({"name", "folder"})  # in no row of a file
    IMPLIED: ClassVar[Mapping[str, Any]] = {}

    name: str
    loader: Literal["diffusers", "builtin", "python"]
    model: str
    latent_channels: int
    factor: int
    kind: Literal["mean_std", "sample"]
    pixel_range: tuple[float, float]
    licence: str
    scale: float | None = None
    bias: float | None = None
    library_class: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    files: tuple[str, ...] = ()
    folder: Path | None = None
    params_m: float = 0.0
    gmac: float = 0.0

    def __post_init__(self) -> None:
        what = f"autoencoder {self.name}"
        check_fields(what, self, RULES)
        if self.scale == 0 or (self.scale is None) != (self.bias is None):
            raise UsageError(f"{what}: scale {self.scale}, bias {self.bias}: expected both or neither, a scale above 0")
        if self.loader != "python" and (self.target or self.files or self.options):
            raise UsageError(f"{what}: target, files and options are of loader: python, not of {self.loader}")
        if self.loader == "diffusers" and not self.library_class:
            raise UsageError(f"{what}: library_class is missing, expected diffusers' class: AutoencoderKL")

    @property
    def has_weights(self) -> bool:
        return self.loader != "builtin"

    @property
    def published(self) -> tuple[float, float] | None:
        """The scale and bias of latent_norm: fixed, None where none are published as one number each."""
        return None if self.scale is None or self.bias is None else (self.scale, self.bias)

    def code(self) -> OwnCode | None:
        """Read the files of `loader: python`, None for any other; raise `UsageError` for one that is not there."""
        if self.loader != "python" or self.target is None:
            return None
        return read_own_code(f"autoencoder {self.name}", self.folder or Path(), self.target, self.files)

    def resolve(
        self, *, resolution: int, random_weights: bool, code: OwnCode | None = None, dtype: str = "float16"
    ) -> dict[str, Any]:
        """Return the spec of this autoencoder's moments for square images of `resolution` pixels, stored as `dtype`.

        The table's published scale and bias are left out: how latents are normalised belongs to a run, not to a cache.
        Those of a user's own file are in it, since a run has no other place to learn them from. `code` is what
        `code()` gave. Raises `UsageError` for a resolution or a dtype that the autoencoder has not.
        """
        if dtype == "uint8" and self.has_weights:
            raise UsageError(
                f"--dtype uint8 is for pixels, which are whole numbers; {self.name} gives real ones. Leave it out, or "
                "name --autoencoder pixels"
            )
        if resolution % self.factor:
            raise UsageError(
                f"--autoencoder {self.name} needs a resolution that is a multiple of {self.factor}, not {resolution}; "
                f"try --resolution {max(1, round(resolution / self.factor)) * self.factor}"
            )
        side = resolution // self.factor
        spec: dict[str, Any] = {
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
            "random_weights": bool(random_weights and self.has_weights and self.loader != "python"),
        }
        if dtype == "uint8":  # a mirror costs nothing to make, and of pixels it is exact
            spec[STORED_VIEWS] = list(VIEWS[:1])
        if self.folder is not None:
            spec |= {"factor": self.factor, "scale": self.scale, "bias": self.bias}
        if code is not None:
            spec |= {"model": code.target, "files": dict(code.digests), "options": dict(self.options)}
        return spec
