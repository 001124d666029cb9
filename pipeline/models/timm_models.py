"""Encoders of timm: made by name at the input size of a spec, and read at the tensor that the spec names.

ViTs (the Perception Encoder and DINOv3 among them) give tokens. SAM, SAM 2 and VGG give a map; each is read at the one
place that the study reads. timm is imported here and nowhere else.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...cache_specs.errors import UsageError
from .mocov3 import mocov3_state_dict
from .weights import (
    RANDOM_SEED,
    check_weights_file,
    hub_file,
    no_weights_error,
    quiet_hub,
    read_state_dict,
    wrong_weights_error,
)

VGG_POOL4 = 24  # layers of VGG16's `features` up to and with the fourth pool
_CONVERTERS: dict[str, Callable[[Mapping[str, Any]], dict[str, torch.Tensor]]] = {"mocov3": mocov3_state_dict}


class TimmFeatures:
    """A timm model and how its tokens are taken."""

    def __init__(self, model: Any, spec: Mapping[str, Any]) -> None:
        self.model = model
        self._spec = spec

    def __call__(self, pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return one pair a layer: tokens [B, T, E] or a map [B, E, h, w], and prefix tokens [B, P, E] or None."""
        spec = self._spec
        if spec["output"] == "map":
            return [(_channels_first(_map(self.model, pixels), spec["width"]), None)]
        prefixed = spec["prefix_tokens"] > 0
        layers = self.model.forward_intermediates(
            pixels,
            indices=1 if spec["layers"] is None else list(spec["layers"]),
            norm=spec["tensor"] == "after_norm",
            return_prefix_tokens=prefixed,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return layers if prefixed else [(tokens, None) for tokens in layers]

    def stages(self, pixels: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
        """Return the maps [B, E, h, w] of the stages `names`, numbered as in the model's `feature_info`."""
        indices = sorted({int(name) for name in names})
        maps = self.model.forward_intermediates(
            pixels, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return [maps[indices.index(int(name))] for name in names]


def _map(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    forward = getattr(model, "forward_features", model)  # a cut VGG is a plain sequence of layers
    return forward(pixels)


def _channels_first(features: torch.Tensor, width: int) -> torch.Tensor:
    """Return a map as [B, E, h, w]; SAM 2's pyramid gives [B, h, w, E]."""
    last = features.shape[1] != width and features.shape[-1] == width
    return features.permute(0, 3, 1, 2) if last else features


def load_timm(spec: Mapping[str, Any], weights: Path | None) -> TimmFeatures:
    """Make the model of `spec` with its weights: from the hub, from `weights`, or random.

    Weights are loaded strictly, the classifier of the published file included, which is then taken off. Raises
    `UsageError` where they cannot be had or do not fit, naming the first differing names.
    """
    native = spec["positions"] == "published"
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(RANDOM_SEED)
        model = _create(spec, weights, native_size=native)
        if native:
            model = _with_published_positions(model, spec)
    if spec["model"].startswith("vgg"):
        model = model.features[:VGG_POOL4]
    elif model.num_classes:
        model.reset_classifier(0)
    if spec.get("stage") is not None:
        _check_stage(model, spec)
    return TimmFeatures(model, spec)


def timm_stages(model: Any) -> list[list[int]]:
    """Return [width, stride] of each stage of a model, [] where timm names none or cannot give their maps."""
    info = getattr(model, "feature_info", None)
    if info is None or not hasattr(model, "forward_intermediates"):
        return []
    return [[level["num_chs"], level["reduction"]] for level in (info if isinstance(info, list) else info.info)]


def _check_stage(model: Any, spec: Mapping[str, Any]) -> None:
    known, stage = timm_stages(model), spec["stage"]
    if not stage.isdecimal() or int(stage) >= len(known) or known[int(stage)][0] != spec["width"]:
        has = f"its stages are {known}" if known else "it has no stages to take"
        raise UsageError(
            f"encoder {spec['entry']}: no stage {stage} of width {spec['width']} in timm's {spec['model']}; {has}"
        )


def _create(spec: Mapping[str, Any], weights: Path | None, *, native_size: bool) -> Any:
    import timm

    name = spec["entry"]
    options: dict[str, Any] = dict(spec["options"])
    if spec["output"] == "tokens" and not native_size:
        options["img_size"] = tuple(spec["input_size"])
    if spec["random_weights"]:
        try:
            return timm.create_model(spec["model"], **options)
        except (TypeError, RuntimeError) as error:
            raise _not_made(spec, error) from error
    if weights is not None:
        check_weights_file(name, weights)
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    elif (spec["weights_from"] or "").startswith("https://"):
        options["pretrained_cfg_overlay"] = {"url": spec["weights_from"], "hf_hub_id": None}
    try:
        if spec["converter"]:
            state = _CONVERTERS[spec["converter"]](read_state_dict(weights or hub_file(spec["weights_from"])))
            options["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": 0}
        # No num_classes among the options: with any but the published file's, timm would load leniently.
        return timm.create_model(spec["model"], pretrained=True, **options)
    except TypeError as error:
        raise _not_made(spec, error) from error
    except Exception as error:  # hub clients and unpicklers raise what they like; the cause is in the line
        if weights is not None:
            raise wrong_weights_error(name, weights, error) from error
        raise no_weights_error(name, spec["weights_from"] or spec["model"], error) from error


def _not_made(spec: Mapping[str, Any], error: Exception) -> UsageError:
    hint = "; a convolutional network gives a map: set output: map" if "img_size" in str(error) else ""
    return UsageError(f"encoder {spec['entry']}: timm does not make {spec['model']} with these options ({error}){hint}")


def _with_published_positions(model: Any, spec: Mapping[str, Any]) -> Any:
    """Return the Perception Encoder for the spec's input size with positions as its authors' code has them.

    Off the native size they resize the position embedding bilinearly, without antialias, and count rotary positions
    in whole patches; timm resizes bicubically with antialias and rescales rotary positions to the native grid.
    """
    import timm

    grid = tuple(spec["grid"])
    state = model.state_dict()
    if model.pos_embed is not None:
        num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        prefix, patches = model.pos_embed.detach().split([num_prefix, model.pos_embed.shape[1] - num_prefix], dim=1)
        side = model.patch_embed.grid_size
        plane = patches.reshape(1, *side, -1).permute(0, 3, 1, 2)
        plane = F.interpolate(plane, size=grid, mode="bilinear", align_corners=False)
        state["pos_embed"] = torch.cat([prefix, plane.flatten(2).mT], dim=1)
    resized = timm.create_model(
        spec["model"],
        **{**spec["options"], "img_size": tuple(spec["input_size"]), "ref_feat_shape": grid},
        num_classes=model.num_classes,
    )
    resized.load_state_dict(state)
    return resized
