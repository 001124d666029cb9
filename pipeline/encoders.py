"""Frozen vision encoders: images in, patch tokens out.

An encoder is its resolved spec (cache_specs/encoders.yaml) and weights; which tensor is taken, before or after the
final norm, is in the spec. timm is imported here and nowhere else.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache_specs.errors import UsageError
from .hog import MIN_PIXELS, hog_tokens
from .preprocess import encoder_input
from .weights import (
    NO_WEIGHTS,
    RANDOM_SEED,
    check_weights_file,
    digest_of,
    no_weights_error,
    quiet_hub,
    wrong_weights_error,
)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen encoder on a device. `model` is None for one without weights; `weights` identifies what was loaded."""

    spec: Mapping[str, Any]
    weights: str
    model: Any
    precision: str
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return patch tokens [B, T, E] and the class token [B, E] or None, float32, of `images` [B, 3, H, W] uint8.

        Tokens are row-major over the spec's grid, prefix tokens left out; on the encoder's device.
        """
        if self.model is None:
            return hog_tokens(images, tuple(self.spec["grid"])).to(self.device), None
        pixels = encoder_input(images.to(self.device), self.spec)
        with autocast(self.device, self.precision):
            tokens, prefix = _last_tokens(self.model, pixels, after_norm=self.spec["tensor"] == "after_norm")
        expected = (len(images), self.spec["grid"][0] * self.spec["grid"][1], self.spec["width"])
        if tuple(tokens.shape) != expected:
            raise UsageError(
                f"{self.spec['entry']}: tokens of shape {tuple(tokens.shape)}, its table entry says {expected}"
            )
        cls_token = prefix[:, 0].float() if self.spec["cls_token"] and prefix is not None else None
        return tokens.float(), cls_token


def _last_tokens(model: Any, pixels: torch.Tensor, *, after_norm: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    last = model.forward_intermediates(
        pixels, indices=1, norm=after_norm, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )[0]
    return last if isinstance(last, tuple) else (last, None)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a model of this precision runs: bf16 autocast, or float32 as it is."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


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
        return Encoder(spec=spec, weights=NO_WEIGHTS, model=None, precision=precision, device=target)
    model = _create_timm(spec, weights)
    model.eval().requires_grad_(False)
    return Encoder(spec=spec, weights=digest_of(model), model=model.to(target), precision=precision, device=target)


def _create_timm(spec: Mapping[str, Any], weights: Path | None) -> torch.nn.Module:
    import timm

    name = spec["entry"]
    options: dict[str, Any] = {
        "img_size": tuple(spec["input_size"]),
        "num_classes": 0,
        "pretrained": not spec["random_weights"],
    }
    if weights is not None:
        check_weights_file(name, weights)
        # Without num_classes timm would load leniently whatever it believes to be a classifier's file.
        options["pretrained_cfg_overlay"] = {"file": str(weights), "num_classes": 0}
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(RANDOM_SEED)
        try:
            return timm.create_model(spec["model"], **options)
        except Exception as error:  # hub clients and unpicklers raise what they like; the cause is in the line
            if weights is not None:
                raise wrong_weights_error(name, weights, error) from error
            if spec["random_weights"]:
                raise
            raise no_weights_error(name, spec["model"], error) from error
