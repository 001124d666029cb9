"""From stored moments to what SiT sees, and back: draw from the posterior, then normalise.

Two words are kept apart: a latent z is what the autoencoder decodes; the model's input x = (z - bias) * scale is what
diffusion works on. Scale and bias belong to the run, not to the cache: they stand in its config and checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ...cache_specs.errors import CacheError, UsageError, nearest
from ...cache_specs.layout import LEVEL_BIAS, LEVEL_SCALE
from ...cache_specs.tables import autoencoder_table


def draw_latents(moments: Tensor, noise: Tensor | None, kind: Literal["mean_std", "sample"]) -> Tensor:
    """Return latents z [B,C,h,w] float32 from stored moments [B,M,h,w], as `Batch.moments` has them, on their device.

    mean_std: M = 2C, z = mean + std * noise with noise [B,C,h,w], a draw from the autoencoder's posterior (Kingma and
    Welling, arXiv 1312.6114, section 2.4); sample: M = C, z is what is stored, or of pixels u as uint8 2 u / 255 - 1,
    in the operations that a build applies before it rounds to float16. `kind` is `reader.latents.kind`.
    """
    if kind == "sample":
        return _values(moments)
    assert noise is not None
    mean, std = moments.float().chunk(2, dim=1)
    return torch.addcmul(mean, std, noise)


def latent_means(moments: Tensor, kind: Literal["mean_std", "sample"]) -> Tensor:
    """Return the means of the posteriors [B,C,h,w] float32, or the latents where there is no posterior."""
    return _values(moments) if kind == "sample" else moments.float().chunk(2, dim=1)[0]


def _values(moments: Tensor) -> Tensor:
    values = moments.float()
    return values.mul_(LEVEL_SCALE).add_(LEVEL_BIAS) if moments.dtype == torch.uint8 else values


@dataclass(frozen=True, kw_only=True)
class LatentNorm:
    """The numbers between latents and the model's input, one a channel."""

    scale: tuple[float, ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.scale) != len(self.bias) or not self.scale:
            raise UsageError(
                f"latent_norm: {len(self.scale)} scales and {len(self.bias)} biases; expected one a channel"
            )
        if any(not 0 < scale < float("inf") for scale in self.scale):
            raise UsageError(f"latent_norm: scale {list(self.scale)}; expected finite numbers above 0")

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return scale and bias as [C,1,1] float32 on `device`, for `to_model_input`."""
        scale, bias = (torch.tensor(numbers).view(-1, 1, 1).to(device) for numbers in (self.scale, self.bias))
        return scale, bias


@dataclass(frozen=True, kw_only=True)
class LatentSource:
    """Whose latents a model was trained on: the autoencoder's record, its weights' digest, the run's normalisation.

    `weights` is None where nobody noted them (published checkpoints).
    """

    name: str
    spec: Mapping[str, Any]
    weights: str | None
    norm: LatentNorm

    def plain(self) -> dict[str, Any]:
        """Return what config.json and checkpoints hold under `resolved.latents`."""
        return {
            "autoencoder": self.name,
            "spec": dict(self.spec),
            "weights": self.weights,
            "scale": list(self.norm.scale),
            "bias": list(self.norm.bias),
        }

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `plain` returned."""
        norm = LatentNorm(scale=tuple(stored["scale"]), bias=tuple(stored["bias"]))
        return cls(name=stored["autoencoder"], spec=stored["spec"], weights=stored["weights"], norm=norm)

    @classmethod
    def published(cls, name: str, *, input_size: int, channels: int) -> Self:
        """Return an autoencoder of the table with its published scale and bias, for latents of `input_size` a side.

        Raises UsageError for an unknown one, with the nearest, or one whose latents have not `channels` channels.
        """
        table = autoencoder_table()
        if name not in table:
            raise UsageError(f"unknown autoencoder {name!r}; {nearest(name, table)}")
        entry = table[name]
        spec = entry.resolve(resolution=input_size * entry.factor, random_weights=False)
        if entry.latent_channels != channels:
            raise UsageError(f"{name} has latents of {entry.latent_channels} channels; the model draws {channels}")
        if entry.published is None:
            raise UsageError(
                f"{name} has no published scale; its latents' numbers are those of a run, so sample that run"
            )
        scale, bias = entry.published
        norm = LatentNorm(scale=(scale,) * channels, bias=(bias,) * channels)
        return cls(name=name, spec=spec, weights=None, norm=norm)


def to_model_input(z: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return x = (z - bias) * scale, what diffusion works on; z [B,C,h,w], the others [C,1,1] (`LatentNorm.tensors`).

    Latent diffusion's scale (arXiv 2112.10752, section 4.3.2), with a bias for autoencoders that publish one.
    """
    return (z - bias) * scale


def to_latents(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return z = x / scale + bias, what the autoencoder decodes: the inverse of `to_model_input`."""
    return x / scale + bias


def resolve_latent_norm(
    mode: Literal["fixed", "channel"],
    *,
    channels: int,
    published: tuple[float, float],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    where: str,
) -> LatentNorm:
    """Return a run's numbers: `fixed` the autoencoder's published (scale, bias), `channel` the cache's statistics.

    Raises CacheError where `channel` is asked of a cache without usable statistics.
    """
    if mode == "fixed":
        return LatentNorm(scale=(published[0],) * channels, bias=(published[1],) * channels)
    if mean is None or std is None or len(mean) != channels or len(std) != channels:
        raise CacheError(f"{where} has no per-channel statistics of {channels} channels; train with latent_norm=fixed")
    if min(std) <= 0:
        raise CacheError(
            f"{where}: channel {std.index(min(std))} of the latents is constant; train with latent_norm=fixed"
        )
    return LatentNorm(scale=tuple(1 / float(value) for value in std), bias=tuple(float(value) for value in mean))
