"""From a checkpoint file to a SiT that can be asked for velocities: ours, REPA's and iREPA's.

Ours say what they are. A published file is a dict of model, ema, opt, args and steps, or (REPA's download) a bare
state dict; its shapes give everything but the number of heads, which comes from the table of sizes.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from ..diffusion.interpolant import Interpolant
from ..diffusion.latents import LatentSource
from .checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from .projector import ProjectorConfig
from .sit import SIZES, SiT, SiTConfig

REPA_ENCODER_DEPTH = 8  # REPA's default; it stands in `args`, which a bare state dict lacks


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A checkpoint's model and what is needed to sample from it.

    `config` is the resolved configuration of our own run, None for a published file, which does not say how its
    latents were normalised; `steps` is None for a bare state dict.
    """

    model: SiT
    path: Path
    steps: int | None
    interpolant: Interpolant
    config: dict[str, Any] | None

    def latents(self, autoencoder: str | None) -> LatentSource:
        """Return whose latents it draws: its own record, or what the user says of a published checkpoint."""
        if self.config is not None:
            if autoencoder is not None:
                raise UsageError(f"{self.path} says itself whose latents it draws; leave out --autoencoder")
            return LatentSource.from_plain(self.config["resolved"]["latents"])
        if autoencoder is None:
            raise UsageError(
                f"{self.path} does not say whose latents it draws. Name them with --autoencoder (REPA's and SiT's are "
                f"sd-vae-ft-mse at its published scale)"
            )
        shape = self.model.config
        return LatentSource.published(autoencoder, input_size=shape.input_size, channels=shape.in_channels)


def load_model(path: str | Path, *, weights: str = "ema") -> SiT:
    """Return the SiT of a checkpoint or of a run's newest one, in eval mode on the CPU, float32.

    `model(x, t, y)` is the velocity. Raises CheckpointError where the file is damaged, refused or not a SiT.
    """
    return open_model(path, weights=weights).model


def open_model(path: str | Path, *, weights: str = "ema") -> TrainedModel:
    """Return a checkpoint's model with the settings that sampling needs.

    `weights` is ema (the first average), model, or ema:DECAY of a run that keeps several; `path` and errors as in
    `load_model`, and UsageError for weights that the file does not hold.
    """
    file = Path(path)
    if file.is_dir():
        newest = latest_checkpoint(file)
        if newest is None:
            raise CheckpointError(f"{file}: there is no checkpoint in this run yet; train it, or name a .pt file")
        file = newest
    stored = load_checkpoint(file, mmap=True)
    if "pos_embed" in stored:
        if weights == "model":
            raise CheckpointError(f"{file}: a bare state dict holds one set of weights; ask for --weights ema")
        stored = {"ema": stored}
    state = _weights(stored, weights, file)
    if not isinstance(state, Mapping) or "pos_embed" not in state:
        raise CheckpointError(f"{file}: holds no SiT under {weights!r} (found {', '.join(map(str, stored))})")

    args = stored.get("args") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if "architecture" in stored:
        config, projectors, encoder_depth = _our_architecture(stored["architecture"])
        path_name = stored["config"].get("interpolant", {}).get("path", "linear")
    else:
        state = {_our_name(name): value for name, value in state.items()}
        config = _published_config(state, args, file)
        projectors = _published_projectors(state)
        encoder_depth = int(args.get("encoder_depth", REPA_ENCODER_DEPTH)) if projectors else None
        path_name = args.get("path_type", "linear")
    return TrainedModel(
        model=_filled(config, projectors, encoder_depth, state, file),
        path=file,
        steps=stored.get("steps"),
        interpolant=Interpolant(path=path_name),
        config=stored.get("config"),
    )


def _weights(stored: Mapping[str, Any], weights: str, file: Path) -> Any:
    """Return the state dict that `weights` names."""
    part, _, decay = weights.partition(":")
    if part not in ("ema", "model") or (decay and part == "model"):
        raise UsageError(f"--weights {weights}; expected ema, model, or ema:DECAY of a run that keeps several averages")
    if not decay:
        return stored.get(part)
    config = stored.get("config")
    decays = config.get("ema_decay") if isinstance(config, Mapping) else None
    first = decays[0] if isinstance(decays, list) else decays  # of older runs, one number
    averages = {str(first): stored.get("ema"), **stored.get("emas", {})}
    if decay not in averages:
        raise UsageError(f"{file} holds averages of decay {', '.join(averages)}; --weights ema:{decay} names none")
    return averages[decay]


def _filled(
    config: SiTConfig,
    projectors: list[ProjectorConfig],
    encoder_depth: int | None,
    state: Mapping[str, Tensor],
    file: Path,
) -> SiT:
    """Return SiT with the weights of `state`, all of them and no others."""
    with torch.device("meta"):
        model = SiT(config, projectors, encoder_depth=encoder_depth)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{file}: not the weights of {config.name} as SiT, REPA and iREPA publish it: {name} is "
            f"{_shape(found.get(name))}, expected {_shape(expected.get(name))} ({len(differing)} names differ)"
        )
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _our_architecture(stored: Mapping[str, Any]) -> tuple[SiTConfig, list[ProjectorConfig], int | None]:
    projectors = [ProjectorConfig(**settings) for settings in stored["projectors"]]
    return SiTConfig(**stored["sit"]), projectors, stored["encoder_depth"]


def _our_name(name: str) -> str:
    """Return a parameter's name here: iREPA's code keeps an MLP one level deeper than REPA's."""
    head, _, rest = name.partition(".projection_layer.")
    return f"{head}.{rest}" if rest and rest[0].isdecimal() else name


def _published_config(state: Mapping[str, Tensor], args: Mapping[str, Any], file: Path) -> SiTConfig:
    """Read the architecture off the shapes; the heads come from the size of the same depth and width."""
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        num_labels = len(state["y_embedder.embedding_table.weight"])
    except KeyError as error:
        raise CheckpointError(f"{file}: not a SiT: it has no {error.args[0]}") from error
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    size = next((name for name, (d, width, _) in SIZES.items() if (d, width) == (depth, hidden_size)), None)
    if size is None:
        raise CheckpointError(
            f"{file}: depth {depth} and width {hidden_size} are none of the sizes {', '.join(SIZES)}, "
            f"and shapes do not tell the number of heads"
        )
    if args.get("num_classes") == num_labels:
        raise CheckpointError(f"{file}: trained without label dropout, it has no null class; SiT here needs one")
    return SiTConfig(
        name=f"SiT-{size}/{patch_size}",
        input_size=math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=SIZES[size][2],
        num_classes=num_labels - 1,
    )


def _published_projectors(state: Mapping[str, Tensor]) -> list[ProjectorConfig]:
    """Tell each projector's kind from its names and the rank of its weight."""
    projectors = []
    for index in range(len({name.split(".")[1] for name in state if name.startswith("projectors.")})):
        last = state.get(f"projectors.{index}.4.weight")
        only = state.get(f"projectors.{index}.projection_layer.weight")
        if last is not None:
            projectors.append(ProjectorConfig(kind="mlp", out_dim=last.shape[0], hidden_dim=last.shape[1]))
        elif only is not None and only.dim() == 4:
            projectors.append(ProjectorConfig(kind="conv", out_dim=only.shape[0], kernel_size=only.shape[2]))
        elif only is not None:
            projectors.append(ProjectorConfig(kind="linear", out_dim=only.shape[0]))
    return projectors
