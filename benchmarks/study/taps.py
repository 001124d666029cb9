"""The study's networks as `loader: python` entries: each gives its taps, maps by name, from one forward.

Copied by prepare.py to the weights, whose `catalog.py` knows how each network is made and what it is fed.
"""

from collections.abc import Callable
from pathlib import Path

import catalog
import nets
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def load(network: str, taps: list[str]) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """Return the function from pixels [B,3,h,w] in [0, 1] to the maps [B,C,h/s,w/s] of `taps`."""
    features, (mean, std) = catalog.ENCODERS[network]()
    mean, std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = features((pixels - mean) / std)
        return {tap: found[tap] for tap in taps}

    return encode


class Taef2(torch.nn.Module):
    """The autoencoder TAEF2: [B,3,H,W] in [0, 1] to [B,32,H/8,W/8] and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nets.TaeEncoder(), nets.TaeDecoder()
        for part, name in ((self.encode, "encoder"), (self.decode, "decoder")):
            part.load_state_dict(load_file(HERE / f"taef2_{name}.safetensors"))
