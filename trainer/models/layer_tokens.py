"""A trained SiT as an encoder: its tokens of a cache's latents, as DDAE has them (arXiv 2303.09769).

    z   = the posterior's mean, x = (z - bias) * scale as the model was trained
    x_t = alpha(t) x + sigma(t) eps        t = 0 data, t = 1 noise; eps a function of (seed, row, view) alone
    f   = tokens of the patches after block l, under the null label

Whichever rows are asked for together, and in whichever order, a sample's input is the same to the bit.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from ..diffusion.interpolant import Interpolant
from ..diffusion.latents import LatentNorm, latent_means, to_model_input
from ..reading.reader import CacheReader
from .layers import check_fits, null_labels, tokens_after
from .sit import SiT

_TOKEN_NOISE = 7  # the word of this use among the streams of one seed; see layers.py


class LayerTokens:
    """A SiT's tokens of a cache's samples, by depth: what a run answers to the cache's latents at time t.

    `noise_scale` is that of the field of the model's method; `precision` that of the forward pass. The model is used in
    eval mode and on its device. Raises UsageError for latents that do not fit, a time outside 0 to 1, and for a model
    that denoises a class token beside them: its tokens would be that encoder's in part.
    """

    def __init__(
        self,
        model: SiT,
        reader: CacheReader,
        *,
        t: float,
        norm: LatentNorm,
        interpolant: Interpolant,
        noise_scale: float = 1.0,
        seed: int = 0,
        precision: str = "fp32",
    ) -> None:
        check_fits(model, reader, t)
        if model.config.cls_width is not None:
            raise UsageError(
                f"{model.config.name} takes an encoder's class token beside the latents (REG), so its tokens would be "
                f"that encoder's in part, and not of the latents. Take a run of another method"
            )
        self.t = t
        self._model, self._reader = model.eval(), reader
        self._norm, self._interpolant, self._noise_scale = norm, interpolant, noise_scale
        self._seed, self._bf16 = seed, precision == "bf16"

    def identity(self) -> dict[str, Any]:
        """Return what the tokens depend on beside rows, weights and block, as JSON values."""
        return {
            "t": self.t,
            "seed": self._seed,
            "path": self._interpolant.path,
            "noise_scale": self._noise_scale,
            "scale": list(self._norm.scale),
            "bias": list(self._norm.bias),
            "convention": self._model.config.convention,
        }

    def noised(self, rows: np.ndarray, view: int) -> Tensor:
        """Return x_t [b,C,h,w] float32 of samples `rows` in one view, on the CPU."""
        reader = self._reader
        batch = reader.rows(rows, np.full(len(rows), view))
        z = latent_means(batch.moments, reader.latents.kind)
        x = to_model_input(z, *self._norm.tensors("cpu"))
        drawn = np.stack([token_noise(self._seed, int(row), view, tuple(x.shape[1:])) for row in rows])
        noise = self._noise_scale * torch.from_numpy(drawn)
        x_t, _ = self._interpolant.x_t_and_velocity(x, noise, torch.full((len(x),), self.t))
        return x_t

    @torch.no_grad()
    def read(self, rows: np.ndarray, view: int, depths: Sequence[int]) -> dict[int, Tensor]:
        """Return, by depth, the tokens [b,T,D] float32 of samples `rows` in one view, on the model's device."""
        device = self._model.pos_embed.device
        x_t = self.noised(rows, view).to(device)
        t = torch.full((len(x_t),), self.t, device=device)
        with torch.autocast(device.type, torch.bfloat16) if self._bf16 else nullcontext():
            found = tokens_after(self._model, (x_t, t, null_labels(self._model, len(x_t))), depths)
        return {depth: tokens.float() for depth, tokens in found.items()}

    def every_view(self, rows: np.ndarray, depth: int) -> Tensor:
        """Return the tokens [b,V,T,D] float32 after one block of samples `rows`, of all views."""
        views = range(len(self._reader.views))
        return torch.stack([self.read(rows, view, [depth])[depth] for view in views], dim=1)


def token_noise(seed: int, row: int, view: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the noise of one view of a sample, float32: whichever rows it is asked with, and whenever."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_TOKEN_NOISE, row, view))
    return np.random.Generator(np.random.PCG64(sequence)).standard_normal(shape, dtype=np.float32)
