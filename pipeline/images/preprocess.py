"""uint8 squares become an encoder's input: range, resize, mean and std by the spec.

The study scales to [0, 1], normalises and resizes float tensors without antialias; the spec records interpolation and
antialias, so that a departure has a name.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F


def encoder_input(images: torch.Tensor, spec: Mapping[str, Any]) -> torch.Tensor:
    """Return [B, 3, h, w] float32 of `images` [B, 3, H, W] uint8 by `spec` (input_size, interpolation, mean, std)."""
    pixels = images.float() / 255
    if spec["mean"] is not None:
        mean = torch.tensor(spec["mean"], device=images.device).view(3, 1, 1)
        std = torch.tensor(spec["std"], device=images.device).view(3, 1, 1)
        pixels = (pixels - mean) / std
    size = tuple(spec["input_size"])
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size=size, mode=spec["interpolation"], antialias=spec["antialias"])
    return pixels
