"""Frozen vision encoders: images in, patch tokens out.

An encoder is its resolved spec (cache_specs/encoders.yaml) and weights; which tensor is taken, of which layers, before
or after the final norm, is in the spec. The libraries' models are made and read in timm_models.py and
transformers_models.py, a user's own in python_models.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ...cache_specs.derived import DERIVED, TOKENS
from ...cache_specs.entries import OwnCode
from ...cache_specs.errors import UsageError
from ...cache_specs.tables import encoder_table
from ..images.preprocess import encoder_input
from .hog import MIN_PIXELS, hog_tokens
from .python_models import PythonFeatures
from .soundness import check_network
from .timm_models import load_timm
from .transformers_models import load_transformers
from .weights import check_weights, load_network


class Features(Protocol):
    """A model behind one door; `model` is the torch module, None for a user's own that is none."""

    model: Any

    def __call__(self, pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return, for each layer of the spec, tokens [B, T, E] or a map [B, E, h, w], and prefix tokens or None."""


class StagedFeatures(Features, Protocol):
    """A model that gives several maps of one forward: timm's convolutional ones, and a user's own."""

    def stages(self, pixels: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
        """Return the maps [B, E, h, w] of the stages `names`."""


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
        if self.features is None:
            return [(hog_tokens(images, tuple(self.spec["grid"])).to(self.device), None)]
        if self.spec.get("stage") is not None:
            return [(tokens, None) for tokens in self.stages(images, [self.spec])]
        pixels = encoder_input(images.to(self.device), self.spec)
        with autocast(self.device, self.precision):
            layers = self.features(pixels)
        return [_checked(*layer, self.spec, len(images)) for layer in layers]

    @torch.inference_mode()
    def stages(self, images: torch.Tensor, specs: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        """Return patch tokens [B, T, E] float32 for each of `specs`: other stages of this network, of one forward.

        They differ from the encoder's own spec in what concerns a stage alone (`network_of`).
        """
        pixels = encoder_input(images.to(self.device), self.spec)
        features: Any = self.features
        with autocast(self.device, self.precision):
            maps = features.stages(pixels, [spec["stage"] for spec in specs])
        return [_checked(one, None, spec, len(images))[0] for one, spec in zip(maps, specs, strict=True)]

    def check(self, specs: Sequence[Mapping[str, Any]]) -> None:
        """Raise `UsageError` where a user's own network gives what cannot be cached, of `specs` as in `stages`."""
        staged = self.spec.get("stage") is not None

        def run(images: torch.Tensor) -> list[torch.Tensor]:
            if staged:
                return self.stages(images, specs)
            return [tokens for tokens, _ in self.by_layer(images)]

        convolutional = self.spec["loader"] == "timm" and self.spec["output"] == "tokens"
        check_network(
            f"encoder {self.spec['entry']}",
            run,
            side=self.spec["input_size"][0],
            precision=self.precision,
            hint="; a convolutional network gives a map: set output: map" if convolutional else "",
        )


def _checked(
    tokens: torch.Tensor, prefix: torch.Tensor | None, spec: Mapping[str, Any], num: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return tokens [B, T, E] over the spec's grid and the class token or None, float32; refuse other shapes."""
    grid = tuple(spec["grid"])
    where = f"encoder {spec['entry']}"
    if spec["output"] == "map":
        if tokens.ndim != 4 or tokens.shape[1] != spec["width"]:
            raise UsageError(f"{where}: a map of shape {list(tokens.shape)}, expected [{num}, {spec['width']}, h, w]")
        found, side = tuple(tokens.shape[-2:]), spec["input_size"][0]
        native = tuple(spec.get("native_grid") or found)
        if found != native or (spec.get("native_grid") is None and (found[0] < grid[0] or found[1] < grid[1])):
            expected = "x".join(map(str, native if found != native else grid))
            raise UsageError(
                f"{where}: its map has {found[0]} x {found[1]} places for {side} x {side} pixels, its entry says "
                f"{expected.replace('x', ' x ')}; a patch of {side // max(1, found[0])} pixels would say so"
            )
        tokens = tokens.float()
        if found != grid:
            tokens = F.interpolate(tokens, size=grid, mode="bilinear", align_corners=False)
        tokens = tokens.flatten(2).mT
    expected_shape = (num, grid[0] * grid[1], spec["width"])
    if tuple(tokens.shape) != expected_shape:
        raise UsageError(f"{where}: tokens of shape {tuple(tokens.shape)}, its entry says {expected_shape}")
    cls_token = prefix[:, 0].float() if spec["cls_token"] and prefix is not None else None
    return tokens.float().contiguous(), cls_token


def network_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what specs of several stages of one network, seeing the same pixels, have in common."""
    own = ("stage", "width", "grid", "native_grid", "resize")
    return {key: value for key, value in spec.items() if key not in own}


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Let a model run in this precision, whatever autocast and TF32 the caller is under.

    PyTorch's default for convolutions on CUDA is TF32, 10 bits of a float32's 23, in which an fp32 component would
    differ from the same one of a CPU, under one fingerprint. Under tf32 products of matrices are rounded so too.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = precision != "fp32", precision == "tf32"
    try:
        kind = "cpu" if device.type == "meta" else device.type  # shapes alone know no precision
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def check_loadable(spec: Mapping[str, Any], weights: Path | None) -> None:
    """Raise `UsageError` for what keeps the encoder of `spec` from being loaded and is known without loading it."""
    if spec["loader"] == DERIVED:
        raise UsageError(
            f"{spec['model']} is what repa-cache derive makes of a cache's tokens, and no encoder of pictures: name one"
        )
    if TOKENS in spec:
        raise UsageError(
            f"these are tokens of a trained {spec['model']}, of noised latents: no picture can be encoded to them. "
            "Name another encoder"
        )
    check_weights(spec, weights)
    if spec["loader"] == "builtin" and min(spec["input_size"]) < MIN_PIXELS:
        raise UsageError(f"{spec['entry']} needs images of at least {MIN_PIXELS} pixels, not {min(spec['input_size'])}")


_LOADERS: dict[str, Callable[[Mapping[str, Any], Path | None], Features]] = {
    "timm": load_timm,
    "transformers": load_transformers,
}


def load_encoder(
    spec: Mapping[str, Any],
    *,
    weights: Path | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    code: OwnCode | None = None,
) -> Encoder:
    """Load the encoder of a resolved spec, its weights from the hub or from a local file in the published format.

    `code` is what a spec of `loader: python` was resolved with. Raises `UsageError` where weights or code cannot be
    had, do not fit (strict, the first differing names), or where a user's own network cannot be cached.
    """
    target = torch.device(device)
    check_loadable(spec, weights)

    def library() -> tuple[Features, torch.nn.Module]:
        features = _LOADERS[spec["loader"]](spec, weights)
        return features, features.model

    features, digest = load_network(spec, code, target, own=PythonFeatures, library=library)
    encoder = Encoder(spec=spec, weights=digest, features=features, precision=precision, device=target)
    if spec["entry"] not in encoder_table():
        encoder.check([spec])
    return encoder
