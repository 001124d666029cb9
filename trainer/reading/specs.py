"""What a reader says of the components it reads: shapes, kinds and names, before any row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...cache_specs.schema import IMPORTED


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What the cache's moments are: kind mean_std (M = 2C) or sample (M = C), of h, w = `size`."""

    name: str
    spec: Mapping[str, Any]  # the autoencoder's whole record, from which repa.pipeline loads its decoder
    weights: str  # sha256:... of the encoder's weights, or none
    kind: Literal["mean_std", "sample"]
    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...] | None  # of sampled latents, one a channel
    std: tuple[float, ...] | None

    @property
    def without_images(self) -> bool:
        """Whether the latents were imported without the images that encoders would need."""
        return not self.spec.get(IMPORTED, {"images": True})["images"]


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What one encoder's tokens are: T = h * w = `grid` tokens of E = `width` channels."""

    name: str  # what --encoder calls it
    grid: tuple[int, int]
    width: int
    dtype: Literal["float16", "int8", "float32"]  # float32: computed, not read (online.py)
    group: str  # in features/
    layer: int | None  # of a group of several layers
    cls_token: bool  # whether a class token is stored too
