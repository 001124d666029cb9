"""A component asked for, before its weights are loaded, and the precision that a new one is encoded in.

float32 keeps a GPU's tensor cores idle: the 27 encoders of the iREPA study on ImageNet with its mirror images are 205
GPU-hours of an H100 in float32, 37 in TF32, 23 in bfloat16 (counted: 6,471 GMAC an image, times 2.56 million). What a
precision moves, beside what storage does, is measured in benchmarks/precision.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ...cache_specs.derived import DERIVED, Fit, network_spec
from ...cache_specs.entries import OwnCode
from ...cache_specs.errors import UsageError
from ...cache_specs.schema import FEATURES, ComponentSpec, component_path
from ..models.encoders import check_loadable
from ..models.weights import check_weights

AUTO = "auto"  # the precision of what is on disk, else the workers' device decides


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A component asked for: a `ComponentSpec` whose weights are not loaded yet, and where to find them.

    `precision` may be AUTO until the device is known (`on`). `code` is that of a network of the user's own, `fit` what
    a derived component is made with (straight.py); both travel with the request.
    """

    kind: str
    name: str
    spec: Mapping[str, Any]
    dtype: str
    precision: str
    compressor: str
    weights_file: Path | None = None
    code: OwnCode | None = None
    fit: Fit | None = None

    @property
    def path(self) -> str:
        """The component's group inside the cache."""
        return component_path(self.kind, self.name, self.dtype)

    def source(self, weights: str) -> ComponentSpec:
        """Return the component of the encoder's own tokens, of which this one is derived, given the weights' digest."""
        path = self.spec[DERIVED]["from"][0]
        return ComponentSpec(
            kind=FEATURES,
            name=path.removeprefix(f"{FEATURES}/"),
            spec=network_spec(self.spec),
            precision=self.precision,  # type: ignore[arg-type]  # checked as in `component`
            weights=weights,
        )

    def component(self, weights: str) -> ComponentSpec:
        """Return the component's spec, given what identifies its weights; the precision must be known."""
        return ComponentSpec(
            kind=self.kind,  # type: ignore[arg-type]  # checked in ComponentSpec.__post_init__, as the next two
            name=self.name,
            spec=self.spec,
            dtype=self.dtype,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            compressor=self.compressor,  # type: ignore[arg-type]
            weights=weights,
        )

    def begun(self, component: ComponentSpec | None) -> Self:
        """Return the request with the precision of what is on disk, where that is left to it and there is something."""
        if component is None or self.precision != AUTO:
            return self
        return replace(self, precision=component.precision)

    def on(self, device: str) -> Self:
        """Return the request as a worker on `device` (cpu, cuda, cuda:1) encodes it, its precision known."""
        if self.precision != AUTO:
            return self
        return replace(self, precision=default_precision(self.kind, self.spec, on_cpu=device == "cpu"))

    def check_device(self, device: str) -> None:
        """Raise `UsageError` for TF32 without a GPU: what would be computed is float32, under another name."""
        if self.precision == "tf32" and device == "cpu":
            raise UsageError(f"{self.path}: its precision is tf32, which CPUs lack; encode it on a GPU, --device cuda")


def default_precision(kind: str, spec: Mapping[str, Any], *, on_cpu: bool) -> str:
    """Return the precision of a new component where none is named.

    On a GPU bf16 for transformers, whose tokens pass through a stream that is added to. TF32 for maps of convolutional
    networks, which bf16 moves by 7 % of their size (TF32 by 0.4 %, int8 by 1.2 %), and for latents, which pictures are
    made from again.
    """
    network = network_spec(spec)
    if on_cpu or network["loader"] == "builtin":
        return "fp32"
    return "bf16" if kind == FEATURES and network["output"] == "tokens" else "tf32"


def check_request(request: ModelRequest) -> None:
    """Raise `UsageError` for what keeps a model from being loaded and is known without loading it."""
    check = check_loadable if request.kind == FEATURES else check_weights
    check(network_spec(request.spec), request.weights_file)
