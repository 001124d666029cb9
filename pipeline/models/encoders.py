"""Frozen vision encoders: images in, patch tokens out.

An encoder is its resolved spec (cache_specs/encoders.yaml) and weights; which tensor is taken, of which layers, before
or after the final norm, is in the spec. The libraries' models are made and read in timm_models.py and
transformers_models.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ...cache_specs.errors import UsageError
from ..images.preprocess import encoder_input
from .hog import MIN_PIXELS, hog_tokens
from .timm_models import load_timm
from .transformers_models import load_transformers
from .weights import NO_WEIGHTS, digest_of


class Features(Protocol):
    """A library's model behind one door; `model` is the torch module."""

    model: Any

    def __call__(self, pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return, for each layer of the spec, tokens [B, T, E] or a map [B, E, h, w], and prefix tokens or None."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen encoder on a device. `features` is None for one without weights; `weights` says what was loaded."""

    spec: Mapping[str, Any]
    weights: str
    features: Features | None
    precision: str
    device: torch.device

    @property
    def model(self) -> Any:
        """The library's module, None for an encoder without weights."""
        return None if self.features is None else self.features.model

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return patch tokens [B, T, E] and the class token [B, E] or None, float32, of `images` [B, 3, H, W] uint8.

        Tokens are row-major over the spec's grid, prefix tokens left out; on the encoder's device. Of several layers
        these are the last one's.
        """
        return self.by_layer(images)[-1]

    @torch.inference_mode()
    def by_layer(self, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return what a call returns for each of the spec's layers, in its order; one entry where it names none."""
        grid = tuple(self.spec["grid"])
        if self.features is None:
            return [(hog_tokens(images, grid).to(self.device), None)]
        pixels = encoder_input(images.to(self.device), self.spec)
        with autocast(self.device, self.precision):
            layers = self.features(pixels)
        return [self._checked(*layer, grid, len(images)) for layer in layers]

    def _checked(
        self, tokens: torch.Tensor, prefix: torch.Tensor | None, grid: tuple[int, ...], num: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.spec["output"] == "map":
            tokens = tokens.float()
            if tokens.shape[-2:] != grid:
                tokens = F.interpolate(tokens, size=grid, mode="bilinear", align_corners=False)
            tokens = tokens.flatten(2).mT
        expected = (num, grid[0] * grid[1], self.spec["width"])
        if tuple(tokens.shape) != expected:
            raise UsageError(
                f"{self.spec['entry']}: tokens of shape {tuple(tokens.shape)}, its table entry says {expected}"
            )
        cls_token = prefix[:, 0].float() if self.spec["cls_token"] and prefix is not None else None
        return tokens.float().contiguous(), cls_token


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Let a model run in this precision, whatever autocast and TF32 the caller is under.

    PyTorch's default for convolutions on CUDA is TF32, 10 bits of a float32's 23, in which an fp32 component would
    differ from the same one of a CPU, under one fingerprint.
    """
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    cudnn.allow_tf32 = precision != "fp32"
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        cudnn.allow_tf32 = before


_LOADERS: dict[str, Callable[[Mapping[str, Any], Path | None], Features]] = {
    "timm": load_timm,
    "transformers": load_transformers,
}


def load_encoder(
    spec: Mapping[str, Any], *, weights: Path | None = None, precision: str = "fp32", device: str = "cpu"
) -> Encoder:
    """Load the encoder of a resolved spec, its weights from the hub or from a local file in the published format.

    Raises `UsageError` where weights cannot be had, or do not fit (strict, the first differing names).
    """
    name = spec["entry"]
    target = torch.device(device)
    if spec["loader"] == "builtin":
        if min(spec["input_size"]) < MIN_PIXELS:
            raise UsageError(f"{name} needs images of at least {MIN_PIXELS} pixels, not {min(spec['input_size'])}")
        if weights is not None:
            raise UsageError(f"--weights {name}={weights}: {name} has no weights")
        return Encoder(spec=spec, weights=NO_WEIGHTS, features=None, precision=precision, device=target)
    features = _LOADERS[spec["loader"]](spec, weights)
    features.model.eval().requires_grad_(False)
    digest = digest_of(features.model)
    features.model.to(target)
    return Encoder(spec=spec, weights=digest, features=features, precision=precision, device=target)
