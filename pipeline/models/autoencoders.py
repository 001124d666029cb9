"""Autoencoders: images to posterior moments, and latents back to images.

`kind: mean_std` stores the posterior's mean and standard deviation, not a sample and not the log-variance, so that
training draws a fresh latent at every epoch. `kind: sample` is for those that give the latent itself. diffusers is
imported here and nowhere else.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...cache_specs.entries import OwnCode
from ...cache_specs.errors import UsageError, nearest
from ...cache_specs.tables import autoencoder_table
from .encoders import autocast
from .python_models import PythonAutoencoder
from .soundness import check_network
from .weights import (
    RANDOM_SEED,
    check_weights,
    check_weights_file,
    load_network,
    no_weights_error,
    quiet_hub,
    wrong_weights_error,
)

_OF_FILMS = ("AutoencoderKLQwenImage",)


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """An autoencoder on a device. `model` is None for the identity; `weights` identifies what was loaded.

    A user's own gives tensors where a library's gives its outputs: moments as they are stored, pixels.
    """

    spec: Mapping[str, Any]
    weights: str
    model: Any
    precision: str
    device: torch.device

    @property
    def _of_films(self) -> bool:
        """Whether the library's model sees [B, C, frames, H, W]; an image is a film of one frame."""
        return self.spec["library_class"] in _OF_FILMS

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return moments [B, M, h, w] float32 of `images` [B, 3, H, W] uint8: mean then std, or the latent itself."""
        low, high = self.spec["pixel_range"]
        pixels = images.to(self.device).float() * ((high - low) / 255) + low
        if self.model is None:
            return pixels
        if self._of_films:
            pixels = pixels.unsqueeze(2)
        with autocast(self.device, self.precision):
            encoded = self.model.encode(pixels)
        if self.spec["loader"] == "python":
            return encoded.float()
        if self.spec["kind"] == "mean_std":
            moments = torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1).float()
            return moments.squeeze(2) if self._of_films else moments
        # The tiny autoencoder says latents, the deep compression one latent.
        return (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images [B, H, W, 3] uint8 on the CPU of `latents` [B, C, h, w] float32, as `encode` makes them."""
        latents = latents.to(self.device).float()
        if self.model is None:
            pixels = latents
        else:
            if self._of_films:
                latents = latents.unsqueeze(2)
            with autocast(self.device, self.precision):
                decoded = self.model.decode(latents)
            pixels = (decoded if self.spec["loader"] == "python" else decoded.sample).float()
            if self._of_films:
                pixels = pixels.squeeze(2)
        low, high = self.spec["pixel_range"]
        levels = ((pixels - low) * (255 / (high - low))).round_().clamp_(0, 255)
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu()


def load_autoencoder(
    spec: Mapping[str, Any],
    *,
    weights: Path | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    code: OwnCode | None = None,
) -> Autoencoder:
    """Load the autoencoder of a resolved spec, its weights from the hub, a local file or a save_pretrained folder.

    `code` is what a spec of `loader: python` was resolved with. Raises `UsageError` where weights or code cannot be
    had, do not fit (strict, the first differing names), or where a user's own network cannot be cached.
    """
    target = torch.device(device)
    check_weights(spec, weights)

    def library() -> tuple[Any, torch.nn.Module]:
        model = _create_diffusers(spec, weights)
        if target.type == "cuda" and precision != "fp32":  # tensor cores read channels last; else each layer is turned
            model.to(memory_format=torch.channels_last)
        return model, model

    model, digest = load_network(spec, code, target, own=PythonAutoencoder, library=library)
    loaded = Autoencoder(spec=spec, weights=digest, model=model, precision=precision, device=target)
    if spec["entry"] not in autoencoder_table():
        _check(loaded)
    return loaded


def _check(autoencoder: Autoencoder) -> None:
    """Raise `UsageError` where a user's own autoencoder gives what cannot be cached."""
    spec, what = autoencoder.spec, f"autoencoder {autoencoder.spec['entry']}"
    channels, size = spec["latent_channels"], spec["latent_size"]

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        moments = autoencoder.encode(images)
        expected = (len(images), spec["moment_channels"], *size)
        if tuple(moments.shape) != expected:
            raise UsageError(f"{what}: moments of shape {tuple(moments.shape)}, its entry says {expected}")
        if spec["kind"] == "mean_std" and bool((moments[:, channels:] < 0).any()):
            raise UsageError(f"{what}: kind is mean_std, and its second half has values below 0: no standard deviation")
        return [moments, autoencoder.decode(moments[:, :channels]).float()]

    check_network(what, run, side=size[0] * spec["factor"], precision=autoencoder.precision)


def _create_diffusers(spec: Mapping[str, Any], weights: Path | None) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    name = spec["entry"]
    cls = library_class(spec)
    if spec["random_weights"]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            return cls(**spec["config"])
    if weights is None:
        owner, repository, *folder = spec["model"].split("/")
        try:
            return _from_pretrained(cls, f"{owner}/{repository}", subfolder="/".join(folder) or None)
        except Exception as error:  # hub clients raise what they like; the cause is in the line
            raise no_weights_error(name, spec["model"], error) from error
    check_weights_file(name, weights)
    try:
        if weights.is_dir():
            return _from_pretrained(cls, weights)
        with tempfile.TemporaryDirectory() as folder:
            # A folder as save_pretrained makes it: the library's own loader then converts the names of old files.
            cls.from_config(dict(spec["config"])).save_config(folder)
            ending = ".safetensors" if weights.suffix == ".safetensors" else ".bin"
            (Path(folder) / f"diffusion_pytorch_model{ending}").symlink_to(weights.absolute())
            return _from_pretrained(cls, folder)
    except Exception as error:  # unpicklers and the library raise what they like; the cause is in the line
        raise wrong_weights_error(name, weights, error) from error


def library_class(spec: Mapping[str, Any]) -> Any:
    """Return diffusers' class of an autoencoder; raise `UsageError` with the nearest one where it has none."""
    import diffusers

    known = [name for name in dir(diffusers) if name.startswith("Autoencoder")]
    if spec["library_class"] not in known:
        raise UsageError(f"autoencoder {spec['entry']}: library_class: {nearest(spec['library_class'], known)}")
    return getattr(diffusers, spec["library_class"])


def _from_pretrained(cls: Any, source: Any, **options: Any) -> Any:
    with quiet_hub():
        model, report = cls.from_pretrained(source, output_loading_info=True, low_cpu_mem_usage=False, **options)
    differing = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if differing:
        raise ValueError(f"{len(differing)} names differ, the first are {', '.join(map(str, differing[:3]))}")
    return model
