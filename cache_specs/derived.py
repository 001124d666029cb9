"""Components that are made from others, and the fits that make them: names, specs, and what is stored (README.md).

A fit is what a method has found in its sources, once: the principal axes of an encoder's tokens, their mean and spread.
It is a small group of its own, `fits/<name>`, of whole arrays, and its digest stands in the fingerprint of whatever was
made with it. Read here without a Zarr library: a trainer that wants a statistic needs no more.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .binding import SHARDS_DIGEST
from .errors import CacheError, UsageError, nearest
from .fingerprint import digest
from .group import check_digest, group_attributes
from .layout import MOST_LAYERS, MOST_SAMPLES, MOST_WIDTH, whole
from .shard_index import CHECKSUM_BYTES, checksum
from .storage import Location

FITS = "fits"
TOKENS = "tokens"  # key of the spec of features that repa-features made of latents: a trained model's tokens
TOKENS_LOADER = "repa-features"  # their `loader`: what alone can make them
DERIVED = "derived"  # key of a derived component's spec, and its `loader`
METHODS = {
    "pca": True,
    "pca-scaled": True,
    "purify-linear": False,
    "standardise": False,
}  # by name: whether a width follows, as in pca:16
DEFAULT_SAMPLE = 4096  # images of a fit: a million tokens of a 16 x 16 grid
SAMPLE_SEED = 0
MOST_FIT_BYTES = 2**30  # of one array
MOST_ARRAYS = 100


@dataclass(frozen=True, kw_only=True)
class MethodRequest:
    """What `--with METHOD[:K]` asks for; `width` is 0 where the method has none to ask for."""

    name: str
    width: int = 0

    @property
    def label(self) -> str:
        return f"{self.name}:{self.width}" if self.width else self.name

    @property
    def suffix(self) -> str:
        """What follows the source's name in that of the group."""
        return self.label.replace(":", "")

    def check_width(self, source: str, width: int) -> None:
        """Raise `UsageError` where more channels are asked for than the source has."""
        if self.width > width:
            raise UsageError(f"{self.label}: {source} has {width} channels; ask for at most {width}")


def read_method(text: str, *, option: str = "--with") -> MethodRequest:
    """Read `METHOD[:K]`; raise `UsageError` for an unknown one, or a width that is none."""
    name, colon, width = text.partition(":")
    if name not in METHODS:
        raise UsageError(f"{option} {text}: unknown method {name!r}; {nearest(name, METHODS)}")
    if METHODS[name] != bool(colon):
        form = f"{name}:K, as in {name}:16" if METHODS[name] else f"{name} alone"
        raise UsageError(f"{option} {text}: expected {form}")
    if not colon:
        return MethodRequest(name=name)
    if not re.fullmatch(r"[1-9][0-9]{0,5}", width) or int(width) > MOST_WIDTH:
        raise UsageError(f"{option} {text}: {width[:20]!r} channels, expected a whole number from 1 to {MOST_WIDTH}")
    return MethodRequest(name=name, width=int(width))


def stored_width(source: Mapping[str, Any]) -> int:
    """Return the channels of a source's tokens: those of several layers lie one after the other."""
    return int(source["width"]) * len(source.get("layers") or (None,))


def derived_spec(
    method: MethodRequest, source: Mapping[str, Any], paths: Sequence[str], *, width: int, sample: int
) -> dict[str, Any]:
    """Return the spec of what `method` makes of a features component with the spec `source`.

    `paths` are the components that are read, the features first; `sample` the images that the fit was asked to take.
    """
    kept = {key: source[key] for key in ("native_grid", "resize") if key in source}  # what tables say of a grid
    return {
        "entry": source["entry"],
        "loader": DERIVED,
        "model": f"{method.label} of {' and '.join(paths)}",
        "width": width,
        "grid": list(source["grid"]),
        "cls_token": False,
        "random_weights": source["random_weights"],
        **kept,
        DERIVED: {
            "from": list(paths),
            "method": method.label,
            "sample": sample,
            "seed": SAMPLE_SEED,
            "spec": dict(source),
        },
    }


def straight_spec(method: MethodRequest, source: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec of what is derived straight from an encoder: what it is of the component `source`, not stored."""
    method.check_width(source, stored_width(spec))
    return derived_spec(method, spec, [source], width=method.width, sample=DEFAULT_SAMPLE)


def check_derived(spec: Mapping[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` where a spec says that it is derived and does not say from what, or how."""
    if (spec.get("loader") == DERIVED) != (DERIVED in spec):
        raise ValueError(
            f"loader {str(spec.get('loader'))[:40]!r} of a spec {'with' if DERIVED in spec else 'without'} {DERIVED}"
        )
    if DERIVED in spec:
        derived = spec[DERIVED]
        texts = [derived["method"], *derived["from"], derived["spec"]["entry"], derived["spec"]["loader"]]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{DERIVED} is {str(derived)[:80]}")
        whole(derived["sample"], "sample", most=MOST_SAMPLES)


def check_tokens(spec: Mapping[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` where a spec says that a model made its tokens and does not say how."""
    if (spec.get("loader") == TOKENS_LOADER) != (TOKENS in spec):
        which = "with" if TOKENS in spec else "without"
        raise ValueError(f"loader {str(spec.get('loader'))[:40]!r} of a spec {which} {TOKENS}")
    if TOKENS in spec:
        tokens = spec[TOKENS]
        if not all(isinstance(tokens[key], str) for key in ("from", "fingerprint", "average")):
            raise TypeError(f"{TOKENS} is {str(tokens)[:80]}")
        whole(tokens["block"], "block", most=MOST_LAYERS)
        whole(tokens["seed"], "seed", least=0, most=2**64)
        if not isinstance(tokens["t"], float) or not 0 <= tokens["t"] <= 1:
            raise ValueError(f"t is {str(tokens['t'])[:40]}")


def fit_name(component: str) -> str:
    """Return the name of the fit of the derived component at this path: its group's."""
    return component.rpartition("/")[2]


def network_spec(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the spec of the network whose tokens these are, or of which they were made."""
    derived: Mapping[str, Any] | None = spec.get(DERIVED)
    return spec if derived is None else derived["spec"]


# Fits


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What a method has found: `arrays` by name, and from what.

    `sources` gives, by component path, its `fingerprint` and `weights`, and `shards_digest` where its stored values
    were read (fits of earlier versions lack it); `sample` the images that were asked for and
    used, or those and the views where all were taken.
    """

    name: str
    method: str
    sources: Mapping[str, Mapping[str, str]]
    sample: Mapping[str, int]
    arrays: Mapping[str, np.ndarray]

    def attributes(self) -> dict[str, Any]:
        """Return the group's attributes, in the order in which they are written."""
        return {
            "name": self.name,
            "method": self.method,
            "sources": {path: dict(source) for path, source in self.sources.items()},
            "sample": dict(self.sample),
            "arrays": {
                name: {"dtype": values.dtype.name, "shape": list(values.shape), "sha256": _sha256(values)}
                for name, values in self.arrays.items()
            },
        }

    def is_of(self, method: str, sources: Mapping[str, Mapping[str, str]], asked: Mapping[str, int]) -> bool:
        """Return whether the fit is what `method` gives of `sources` and the sample `asked` for."""
        return self.method == method and same_sources(self.sources, sources) and asked.items() <= self.sample.items()

    @property
    def weights(self) -> str:
        """What stands for weights in the spec of a component that was made with it: the digest of all of the above.

        But of `shards_digest`: a fit that is made again of the same values is the same, whichever version made it.
        """
        attributes = self.attributes()
        for source in attributes["sources"].values():
            source.pop(SHARDS_DIGEST, None)
        return f"sha256:{digest(attributes)}"


def same_sources(found: Mapping[str, Mapping[str, str]], asked: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether two fits' sources are the same; `shards_digest` counts where both say it."""
    if found.keys() != asked.keys():
        return False
    for path, source in found.items():
        other = asked[path]
        shared = {SHARDS_DIGEST} if SHARDS_DIGEST in source and SHARDS_DIGEST in other else set()
        keys = ((source.keys() | other.keys()) - {SHARDS_DIGEST}) | shared
        if any(source.get(key) != other.get(key) for key in keys):
            return False
    return True


def read_fit(cache: Location, name: str) -> Fit | None:
    """Return a fit of a cache, None where there is none; raise `CacheError` where it does not hold."""
    group = cache / FITS / name
    attributes = group_attributes(group)
    if attributes is None:
        return None
    check_digest(attributes, group)
    try:
        if attributes["name"] != name:
            raise ValueError(f"it is that of {attributes['name']!r}: it was copied or renamed")
        claims = attributes["arrays"]
        if not 1 <= len(claims) <= MOST_ARRAYS:
            raise ValueError(f"{len(claims)} arrays")
        arrays = {array: _read_array(group, array, **claims[array]) for array in sorted(claims)}
        fit = Fit(
            name=name,
            method=str(attributes["method"]),
            sources={path: dict(source) for path, source in attributes["sources"].items()},
            sample=dict(attributes["sample"]),
            arrays=arrays,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(
            f"{group}: a damaged fit ({error}); delete this folder and run repa-cache derive again"
        ) from error
    return fit


def chunk_file(shape: Sequence[int]) -> str:
    """Return the file of an array that is one chunk, relative to its folder."""
    return ".".join(["c"] + ["0"] * len(shape))


def array_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of one array's values."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def _read_array(group: Location, name: str, dtype: str, shape: Sequence[int], sha256: str) -> np.ndarray:
    if not re.fullmatch("[a-z_]+", name) or dtype not in ("float32", "float64") or not 1 <= len(shape) <= 4:
        raise ValueError(f"{name[:40]!r} is {str(dtype)[:20]} of {len(shape)} dimensions")
    for side in shape:
        whole(side, f"a side of {name}", most=MOST_FIT_BYTES)
    size = array_bytes(dtype, shape)
    if size > MOST_FIT_BYTES:
        raise ValueError(f"{name} says that it has {size} bytes")
    data = (group / name / chunk_file(shape)).read(size + CHECKSUM_BYTES)
    if data is None or len(data) != size + CHECKSUM_BYTES or checksum(data[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise ValueError(f"{name} is missing, cut, or not what its checksum says")
    values = np.frombuffer(data[:-CHECKSUM_BYTES], dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)
    if _sha256(values) != sha256:
        raise ValueError(f"{name} has not the sha256 that its group says")
    return values


def _sha256(values: np.ndarray) -> str:
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()
