"""uint8 squares become an encoder's input: range, resize, mean and std by the spec.

The study scales to [0, 1], normalises and resizes float tensors without antialias; the spec records interpolation and
antialias, so that a departure has a name.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F


def encoder_input(images: torch.Tensor, spec: Mapping[str, Any]) -> torch.Tensor:
    """Return [B, 3, h, w] float32 of `images` [B, 3, H, W] uint8 by `spec` (input_size, interpolation, mean, std)."""
    pixels = images.float() / 255
    if spec["mean"] is not None:
        mean, std = _by_channel(tuple(spec["mean"]), tuple(spec["std"]), images.device)
        pixels = (pixels - mean) / std
    size = tuple(spec["input_size"])
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size=size, mode=spec["interpolation"], antialias=spec["antialias"])
    return pixels


@functools.lru_cache(maxsize=128)
def _by_channel(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `mean` and `std` [3, 1, 1] on the device, sent there once: each time would be a sync of a GPU."""
    with torch.inference_mode(False):  # they outlive the caller's mode
        return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))  # type: ignore[return-value]
