"""What bfloat16 and TF32 do to tokens and latents of a real network, beside what storing them does.

    python benchmarks/precision.py --data photos --encoder my-cnn.yaml:grid=8 --weights my-cnn=FILE
    python benchmarks/precision.py --data photos --autoencoder sd-vae-ft-mse --resolution 256 --dry-run

Images are encoded in float32, under bf16 autocast, and with the operands of every convolution and linear layer rounded
to TF32's 10 bits (what tensor cores do with them, emulated: sums stay float32). Tokens are compared as the loss sees
them, each channel normalised over its image by the float32 statistics: the root mean square of the error beside that of
float16 and of int8, and the cosine of a token with its float32 self. Of moments the mean half is compared, in units of
a channel's spread over all images. A line goes to results/precision.jsonl.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import append_line, conditions
from torch import Tensor

from repa.cache_specs.tables import ResolvedModel, resolve_autoencoder, resolve_encoder
from repa.pipeline.commands.build import weights_of
from repa.pipeline.images.decode import decode_batch
from repa.pipeline.images.manifest import scan_folder
from repa.pipeline.models.autoencoders import load_autoencoder
from repa.pipeline.models.encoders import load_encoder
from repa.pipeline.store.quantize import channel_statistics, quantize_int8

BATCH = 16
TF32_DROPPED = 13  # of float32's 23 bits of fraction
LAYERS = (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose2d, torch.nn.Linear)


def to_tf32(values: Tensor) -> Tensor:
    """Return float32 `values` rounded to the nearest of TF32, ties to even."""
    bits = values.contiguous().view(torch.int32)
    half = (1 << (TF32_DROPPED - 1)) - 1
    odd = (bits >> TF32_DROPPED) & 1
    return ((bits + half + odd) & -(1 << TF32_DROPPED)).view(torch.float32)


@contextmanager
def tf32_operands(module: torch.nn.Module) -> Iterator[None]:
    """Round the weights of `module`'s convolutions and linear layers to TF32, and what they are given."""
    layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
    weights = [layer.weight.data for layer in layers]
    hooks = [layer.register_forward_pre_hook(lambda _, given: (to_tf32(given[0]), *given[1:])) for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = to_tf32(weight)
    try:
        yield
    finally:
        for hook, layer, weight in zip(hooks, layers, weights, strict=True):
            hook.remove()
            layer.weight.data = weight


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def compare_tokens(exact: Tensor, others: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return, for each of `others` [B, T, E], how far it is from `exact`; channels that hardly vary are left out."""
    mean, std = channel_statistics(exact)
    varies = std > 1e-3 * mean.abs()

    def normalised(tokens: Tensor) -> Tensor:
        return torch.where(varies[:, None], (tokens - mean[:, None]) / std.clamp_min(1e-12)[:, None], 0.0)

    wanted = normalised(exact)
    compared = {}
    for name, tokens in others.items():
        found = normalised(tokens)
        cosine = torch.nn.functional.cosine_similarity(found.double(), wanted.double(), dim=-1)
        compared[name] = {
            "relative": rms(tokens - exact) / rms(exact),
            "rms_normalised": rms(found - wanted),
            "mean_cosine": float(cosine.mean()),
            "min_cosine": float(cosine.min()),
        }
    return compared


def compare_latents(exact: Tensor, others: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return, for each of `others` [B, C, h, w], how far it is from `exact`."""
    spread = exact.std(dim=(0, 2, 3), keepdim=True)
    return {
        name: {
            "relative": rms(values - exact) / rms(exact),
            "rms_normalised": rms((values - exact) / spread),
            "max_normalised": float(((values - exact) / spread).abs().max()),
        }
        for name, values in others.items()
    }


def stored(tokens: Tensor) -> dict[str, Tensor]:
    """Return float32 `tokens` after float16 and after int8."""
    mean, std = channel_statistics(tokens)
    codes, scale = quantize_int8(tokens, mean, std)
    int8 = codes.float() * scale.float()[..., None] * std[:, None] + mean[:, None]
    return {"float16": tokens.half().float(), "int8": int8}


def in_precisions(load: Callable[[str], Callable[[Tensor], Tensor]], images: Tensor) -> dict[str, Tensor]:
    """Return what a network gives in each precision; `load` returns it as a function with its module as `.module`."""

    def run(network: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([network(part) for part in images.split(BATCH)]).float()

    exact = load("fp32")
    outcome = {"fp32": run(exact), "bf16": run(load("bf16"))}
    with tf32_operands(exact.module):  # type: ignore[attr-defined]
        outcome["tf32"] = run(exact)
    return outcome


class Tokens:
    """An encoder as a function of images; `module` is what computes them."""

    def __init__(self, model: ResolvedModel, weights: Path | None, precision: str) -> None:
        self._encoder = load_encoder(model.spec, weights=weights, precision=precision, code=model.code)
        self.module = self._encoder.model

    def __call__(self, images: Tensor) -> Tensor:
        return self._encoder(images)[0]


class Means:
    """The mean half of an autoencoder's moments, or its latent, as a function of images."""

    def __init__(self, model: ResolvedModel, weights: Path | None, precision: str) -> None:
        self._autoencoder = load_autoencoder(model.spec, weights=weights, precision=precision, code=model.code)
        own = model.spec["loader"] == "python"
        self.module = self._autoencoder.model.module if own else self._autoencoder.model
        self._channels = model.spec["latent_channels"]

    def __call__(self, images: Tensor) -> Tensor:
        return self._autoencoder.encode(images)[:, : self._channels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--encoder")
    parser.add_argument("--autoencoder")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--random-weights", action="store_true", help="untrained: what rounding adds up to, no result")
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument("--num", type=int, default=64, help="images, spread over the folder")
    parser.add_argument("--dry-run", action="store_true", help="append no line")
    options = parser.parse_args()

    manifest = scan_folder(options.data)
    rows = np.linspace(0, len(manifest) - 1, options.num).round().astype(int)
    ids = manifest.sample_ids[rows].tolist()
    batch = decode_batch(manifest.source, ids, options.resolution, np.zeros(len(ids), dtype=np.int64))
    images = torch.tensor(batch.images[[i for i in range(len(ids)) if i not in batch.bad]]).permute(0, 3, 1, 2)

    choice = {"resolution": options.resolution, "random_weights": options.random_weights}
    if options.encoder:
        model, make = resolve_encoder(options.encoder, default_grid=16, **choice), Tokens
    else:
        model, make = resolve_autoencoder(options.autoencoder, **choice), Means
    weights = weights_of(tuple(options.weights)).get(model.entry.name)
    outcome = in_precisions(lambda precision: make(model, weights, precision), images)
    exact = outcome.pop("fp32")
    result: dict[str, Any]
    if options.encoder:
        result = compare_tokens(exact, outcome | stored(exact))
    else:
        result = compare_latents(exact, outcome | {"float16": exact.half().float()})
    measured = {name: {key: float(f"{value:.6g}") for key, value in row.items()} for name, row in result.items()}
    about = {"model": model.name, "images": len(images), "resolution": options.resolution, "shape": list(exact.shape)}
    print(f"{model.name}, {len(images)} images of {options.resolution} px, {list(exact.shape)}")
    for name, row in measured.items():
        print(f"  {name:<8}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if not options.dry_run:
        append_line("precision", {**conditions(), **about, "error": measured})


if __name__ == "__main__":
    main()
