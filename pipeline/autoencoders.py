"""Autoencoders: images to posterior moments, and latents back to images.

`kind: mean_std` stores the posterior's mean and standard deviation, not a sample and not the log-variance, so that
training draws a fresh latent at every epoch. diffusers is imported here and nowhere else.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache_specs.errors import UsageError
from .encoders import autocast
from .weights import (
    NO_WEIGHTS,
    RANDOM_SEED,
    check_weights_file,
    digest_of,
    no_weights_error,
    quiet_hub,
    wrong_weights_error,
)

# AutoencoderKL of Stable Diffusion 1.x, whose fine-tuned decoders are published as sd-vae-ft-mse and -ema.
SD_VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "sample_size": 256,
}


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """An autoencoder on a device. `model` is None for the identity; `weights` identifies what was loaded."""

    spec: Mapping[str, Any]
    weights: str
    model: Any
    precision: str
    device: torch.device

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return moments [B, M, h, w] float32 of `images` [B, 3, H, W] uint8: mean then std, or the latent itself."""
        low, high = self.spec["pixel_range"]
        pixels = images.to(self.device).float() * ((high - low) / 255) + low
        if self.model is None:
            return pixels
        with autocast(self.device, self.precision):
            posterior = self.model.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images [B, H, W, 3] uint8 on the CPU of `latents` [B, C, h, w] float32, as `encode` makes them."""
        latents = latents.to(self.device).float()
        if self.model is None:
            pixels = latents
        else:
            with autocast(self.device, self.precision):
                pixels = self.model.decode(latents).sample.float()
        low, high = self.spec["pixel_range"]
        levels = ((pixels - low) * (255 / (high - low))).round_().clamp_(0, 255)
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu()


def load_autoencoder(
    spec: Mapping[str, Any], *, weights: Path | None = None, precision: str = "fp32", device: str = "cpu"
) -> Autoencoder:
    """Load the autoencoder of a resolved spec, its weights from the hub, a local file or a save_pretrained folder.

    Raises `UsageError` where weights cannot be had, or do not fit (strict, the first differing names).
    """
    name = spec["entry"]
    target = torch.device(device)
    if spec["loader"] == "builtin":
        if weights is not None:
            raise UsageError(f"--weights {name}={weights}: {name} has no weights")
        return Autoencoder(spec=spec, weights=NO_WEIGHTS, model=None, precision=precision, device=target)
    model = _create_diffusers(spec, weights)
    model.eval().requires_grad_(False)
    return Autoencoder(spec=spec, weights=digest_of(model), model=model.to(target), precision=precision, device=target)


def _create_diffusers(spec: Mapping[str, Any], weights: Path | None) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    name = spec["entry"]
    if spec["random_weights"]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            return diffusers.AutoencoderKL(**SD_VAE_CONFIG)
    if weights is None:
        try:
            return _from_pretrained(diffusers.AutoencoderKL, spec["model"])
        except Exception as error:  # hub clients raise what they like; the cause is in the line
            raise no_weights_error(name, spec["model"], error) from error
    check_weights_file(name, weights)
    try:
        if weights.is_dir():
            return _from_pretrained(diffusers.AutoencoderKL, weights)
        with tempfile.TemporaryDirectory() as folder:
            # A folder as save_pretrained makes it: the library's own loader then converts the names of old files.
            diffusers.AutoencoderKL.from_config(SD_VAE_CONFIG).save_config(folder)
            ending = ".safetensors" if weights.suffix == ".safetensors" else ".bin"
            (Path(folder) / f"diffusion_pytorch_model{ending}").symlink_to(weights.absolute())
            return _from_pretrained(diffusers.AutoencoderKL, folder)
    except Exception as error:  # unpicklers and the library raise what they like; the cause is in the line
        raise wrong_weights_error(name, weights, error) from error


def _from_pretrained(cls: Any, source: Any) -> Any:
    with quiet_hub():
        model, report = cls.from_pretrained(source, output_loading_info=True, low_cpu_mem_usage=False)
    differing = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if differing:
        raise ValueError(f"{len(differing)} names differ, the first are {', '.join(map(str, differing[:3]))}")
    return model
