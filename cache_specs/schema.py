"""What one component is: which model, which tensor of it, from which weights, stored how.

A component's group carries this whole record as attributes, and its fingerprint is the digest of what can change a
stored value. The compressor is kept beside it, outside the fingerprint: it changes bytes on disk, no value.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np

from .derived import DEFAULT_SAMPLE, DERIVED, TOKENS, check_derived, check_tokens
from .errors import CacheError, UsageError
from .fingerprint import digest
from .layout import (
    MOST_LAYERS,
    MOST_ROW_BYTES,
    MOST_SIDE,
    MOST_WIDTH,
    STORED_VIEWS,
    ArrayLayout,
    CacheLayout,
    feature_arrays,
    latent_arrays,
    views_of,
    whole,
)

LATENTS: Final = "latents"
FEATURES: Final = "features"
TOKEN_DTYPES = ("float16", "int8")
STORAGE_DTYPES = (*TOKEN_DTYPES, "uint8")  # of pixels alone
PRECISIONS = ("fp32", "tf32", "bf16")
COMPRESSORS = ("none", "zstd", "blosc")
IMPORTED = "imported"  # key of the spec of latents that `repa-cache import` brought in: from which layout, and how
UNKNOWN: Final = "unknown"  # weights and precision of what was imported


def component_path(kind: str, name: str, dtype: str) -> str:
    """Return a group's path inside the cache: `features/dinov2-vit-b-int8`."""
    return f"{kind}/{name}" + ("" if dtype == "float16" else f"-{dtype}")


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """One component of a cache.

    `spec` is the resolved table entry (`EncoderEntry.resolve`, `AutoencoderEntry.resolve`); `weights`
    is `sha256:<digest>` of the loaded weights, or `none` for a model without any. Of imported latents `weights` and
    `precision` are `unknown`; of a derived component (`derived_spec`) `weights` is the digest of its fit.
    """

    kind: Literal["features", "latents"]
    name: str
    spec: Mapping[str, Any]
    weights: str
    dtype: Literal["float16", "int8", "uint8"] = "float16"
    precision: Literal["fp32", "tf32", "bf16", "unknown"] = "fp32"
    compressor: Literal["none", "zstd", "blosc"] = "none"

    def __post_init__(self) -> None:
        for field, known in (
            ("dtype", STORAGE_DTYPES),
            ("precision", PRECISIONS if self.imported is None else (UNKNOWN,)),
            ("compressor", COMPRESSORS),
        ):
            if getattr(self, field) not in known:
                raise UsageError(f"--{field} {getattr(self, field)}: expected one of {', '.join(known)}")
        if self.kind == LATENTS and self.dtype == "int8":
            raise UsageError(f"latents are stored as float16, not {self.dtype}")
        if (self.dtype == "uint8") != (self.kind == LATENTS and STORED_VIEWS in self.spec):
            raise UsageError(f"{self.name} as {self.dtype}: {STORED_VIEWS} are in the spec of pixels as uint8 alone")

    @property
    def imported(self) -> Mapping[str, Any] | None:
        """How an import brought the component in, None where it was built from images."""
        return self.spec.get(IMPORTED)

    @property
    def tokens(self) -> Mapping[str, Any] | None:
        """Of which latents and how a trained model's tokens were made, which only repa-features can; else None."""
        return self.spec.get(TOKENS)

    @property
    def derived(self) -> Mapping[str, Any] | None:
        """From what the component was made and how, None where it comes from images or an import."""
        return self.spec.get(DERIVED)

    @property
    def path(self) -> str:
        """The group's path inside the cache: `features/dinov2-vit-b-int8`."""
        return component_path(self.kind, self.name, self.dtype)

    def arrays(self, cache: CacheLayout) -> tuple[ArrayLayout, ...]:
        """Return the component's arrays in the order in which a range is committed, `valid` last."""
        return component_arrays(self.kind, self.spec, self.dtype, cache)

    def fingerprint(self, cache: CacheLayout) -> str:
        """Return the digest of everything that can change a stored value."""
        return digest(
            {
                "transform": cache.dataset_fingerprint,
                "kind": self.kind,
                "spec": dict(self.spec),
                "weights": self.weights,
                "precision": self.precision,
                "dtype": self.dtype,
            }
        )

    def build_command(self, cache: object) -> str:
        """Return the command that builds or finishes this component; only the data's place is not known to a cache."""
        if self.imported is not None:
            return self._import_command(cache)
        if self.tokens is not None:
            return self._features_command(cache)
        if self.derived is not None:
            return self._derive_command(cache)
        from .tables import autoencoder_table, encoder_table

        request = str(self.spec["entry"])
        # A user's own entry lies in a file; where, a cache does not know either.
        request += "" if request in (autoencoder_table() if self.kind == LATENTS else encoder_table()) else ".yaml"
        if self.kind == LATENTS:
            options = [f"--autoencoder {request}"]
        else:
            side, layers = self.spec["grid"][0], self.spec.get("layers")
            request += f":grid={side}" if f"-grid{side}" in self.name else ""
            request += "" if layers is None else f":layers={','.join(map(str, layers))}"
            for option in ("stage", "resize"):
                request += "" if self.spec.get(option) is None else f":{option}={self.spec[option]}"
            options = [f"--encoder {shlex.quote(request)}", "--autoencoder none"]
        for option, default in (("dtype", "float16"), ("precision", "auto"), ("compressor", "none")):
            if getattr(self, option) != default:
                options.append(f"--{option} {getattr(self, option)}")
        if self.spec["random_weights"]:
            options.append("--random-weights")
        return f"repa-cache build --data PATH --cache {shlex.quote(str(cache))} {' '.join(options)}"

    def _features_command(self, cache: object) -> str:
        tokens = self.tokens or {}
        options = [f"--cache {shlex.quote(str(cache))}", f"--layer {tokens['block']}", f"--t {tokens['t']}"]
        options.append(f"--name {shlex.quote(self.name)}")
        for option, value, default in (
            ("weights", tokens["average"], "ema"),
            ("seed", tokens["seed"], 0),
            ("dtype", self.dtype, "float16"),
            ("precision", self.precision, "fp32"),
            ("compressor", self.compressor, "none"),
        ):
            if value != default:
                options.append(f"--{option} {value}")
        return f"repa-features RUN {' '.join(options)}"

    def _import_command(self, cache: object) -> str:
        imported = self.imported or {}
        options = [f"--from {imported['layout']}", "--data PATH", f"--cache {shlex.quote(str(cache))}"]
        options.append(f"--autoencoder {self.spec['entry']}")
        if self.spec["loader"] == UNKNOWN:
            options.append("--resolution PIXELS")
        if self.spec["pixel_range"] is not None:
            options.append("--pixel-range " + ",".join(f"{end:g}" for end in self.spec["pixel_range"]))
        if imported["scaled_by"] != 1:
            options.append(f"--scaled-by {imported['scaled_by']:g}")
        if imported["log_variance"]:
            options.append("--log-variance")
        if self.compressor != "none":
            options.append(f"--compressor {self.compressor}")
        return "repa-cache import " + " ".join(options)

    def _derive_command(self, cache: object) -> str:
        derived = self.derived or {}
        options = [f"--from {shlex.quote(derived['from'][0])}", f"--with {derived['method']}"]
        options += [f"--latents {shlex.quote(path)}" for path in derived["from"][1:]]
        options += [f"--sample {derived['sample']}"] if derived["sample"] != DEFAULT_SAMPLE else []
        for option, default in (("dtype", "float16"), ("compressor", "none")):
            if getattr(self, option) != default:
                options.append(f"--{option} {getattr(self, option)}")
        return f"repa-cache derive {shlex.quote(str(cache))} {' '.join(options)}"

    def attributes(self, cache: CacheLayout) -> dict[str, Any]:
        """Return the group's attributes before completion, in the order in which they are written."""
        return {
            "kind": self.kind,
            "name": self.name,
            "spec": dict(self.spec),
            "weights": self.weights,
            "precision": self.precision,
            "dtype": self.dtype,
            "compressor": self.compressor,
            "dataset_fingerprint": cache.dataset_fingerprint,
            "fingerprint": self.fingerprint(cache),
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], where: Path | str) -> Self:
        """Read a component group's attributes; raise `CacheError` where they are damaged."""
        try:
            found = {name: attributes[name] for name in cls.__dataclass_fields__}
            if found["kind"] not in (LATENTS, FEATURES) or not isinstance(found["spec"], Mapping):
                raise TypeError(f"kind {found['kind']!r}, spec a {type(found['spec']).__name__}")
            if not all(isinstance(found[name], str) for name in ("name", "weights")):
                raise TypeError("name and weights are not both text")
            check_derived(found["spec"])
            check_tokens(found["spec"])
            return cls(**found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CacheError(f"{where}: damaged attributes of the component ({error!r})") from error

    def difference(self, other: Self) -> str | None:
        """Return `field: found X, asked Y` for the first field in which `other` (asked) departs from self (on disk)."""
        for field in ("kind", "name", "dtype", "precision", "compressor", "weights"):
            if getattr(self, field) != getattr(other, field):
                return f"{field}: found {getattr(self, field)}, asked {getattr(other, field)}"
        return _difference("spec", self.spec, other.spec)


def _difference(where: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    for key in sorted({*found, *asked}):
        old, new = found.get(key), asked.get(key)
        if old != new:
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                return _difference(f"{where}.{key}", old, new)
            return f"{where}.{key}: found {old}, asked {new}"
    return None


def enlarged(spec: Mapping[str, Any]) -> str:
    """Return `enlarged from 4 x 4` for tokens of a map that was smaller than their grid, else nothing.

    Neighbours of an enlarged map are alike by construction, so whatever measures likeness over space must say it.
    """
    native, grid = spec.get("native_grid"), spec.get("grid")
    if spec.get("resize") is None or native is None or grid is None or native >= grid:
        return ""
    return f"enlarged from {native[0]} x {native[1]}"


def stored_layers(spec: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the layers whose tokens an encoder's group holds, (None,) where it is the last one's alone."""
    layers = spec.get("layers")
    return (None,) if layers is None else tuple(layers)


def component_arrays(kind: str, spec: Mapping[str, Any], dtype: str, cache: CacheLayout) -> tuple[ArrayLayout, ...]:
    """Return the arrays of a component of `kind` with the resolved `spec`, `valid` last.

    Raises `CacheError` where the spec lacks what shapes are made of, or claims what no model has: it comes from a file
    that was changed.
    """
    try:
        if kind == LATENTS:
            arrays = latent_arrays(
                cache,
                channels=whole(spec["moment_channels"], "moment_channels", most=MOST_WIDTH),
                size=_pair(spec["latent_size"], "latent_size"),
                dtype=dtype,
                num_views=len(views_of(spec, cache)),
            )
        else:
            layers = stored_layers(spec)
            if len(layers) > MOST_LAYERS or len(set(layers)) < len(layers):
                raise ValueError(f"{len(layers)} layers, expected at most {MOST_LAYERS}, each once")
            for layer in layers:
                if layer is not None:
                    whole(layer, "a layer", least=0, most=MOST_LAYERS)
            arrays = feature_arrays(
                cache,
                grid=_pair(spec["grid"], "grid"),
                width=whole(spec["width"], "width", most=MOST_WIDTH),
                cls_token=bool(spec["cls_token"]),
                dtype=dtype,
                layers=layers,
            )
        if max(array.inner_bytes for array in arrays[:-2]) > MOST_ROW_BYTES:
            raise ValueError(f"a row of more than {MOST_ROW_BYTES} bytes")
        return arrays
    except (LookupError, TypeError, ValueError) as error:
        raise CacheError(f"damaged spec of a component of {kind} ({error!r}): {str(dict(spec))[:400]}") from error


def _pair(value: Any, name: str) -> tuple[int, int]:
    height, width = value
    return whole(height, name, most=MOST_SIDE), whole(width, name, most=MOST_SIDE)


def describe(component: ComponentSpec, layout: CacheLayout) -> list[tuple[str, str, int]]:
    """Return a line an array, `(name, dtype and shape, bytes)`, uncompressed and without checksums."""
    return [
        (
            array.name,
            f"{array.dtype} {list(array.shape)}",
            math.prod(array.shape) * np.dtype(array.dtype).itemsize,
        )
        for array in component.arrays(layout)
    ]
