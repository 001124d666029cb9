"""Encoders of transformers: WebSSL's DINO models, which timm does not carry.

transformers is an optional dependency (`pip install 'repa-cache[webssl]'`), imported here and nowhere else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...cache_specs.errors import UsageError
from .weights import (
    RANDOM_SEED,
    check_weights_file,
    no_weights_error,
    quiet_hub,
    read_state_dict,
    wrong_weights_error,
)

EXTRA = "webssl"
NATIVE_PIXELS = 224
NATIVE_PATCH = 14


class Dinov2Features:
    """transformers' `Dinov2Model` and how its tokens are taken."""

    def __init__(self, model: Any, spec: Mapping[str, Any]) -> None:
        self.model = model
        self._spec = spec

    def __call__(self, pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return one pair a layer: tokens [B, T, E], prefix tokens [B, P, E]."""
        layers, norm = self._spec["layers"], self._spec["tensor"] == "after_norm"
        if layers is None and norm:
            chosen = [self.model(pixels).last_hidden_state]
        else:
            # hidden_states[0] is the embedding; the model's own norm is not in any of them.
            states = self.model(pixels, output_hidden_states=True).hidden_states[1:]
            chosen = [states[layer] for layer in (layers or [len(states) - 1])]
            chosen = [self.model.layernorm(state) for state in chosen] if norm else chosen
        prefix = self._spec["prefix_tokens"]
        return [(state[:, prefix:], state[:, :prefix]) for state in chosen]


def dinov2_config(spec: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of a WebSSL model: what all have in common, and sizes from the spec."""
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=spec["width"],
        num_hidden_layers=spec["depth"],
        image_size=NATIVE_PIXELS,
        patch_size=NATIVE_PATCH,
        use_swiglu_ffn=True,
        **spec["options"],
    )


def load_transformers(spec: Mapping[str, Any], weights: Path | None) -> Dinov2Features:
    """Make the model of `spec` with its weights: from the hub, a local file or save_pretrained folder, or random.

    Raises `UsageError` where transformers is not installed, or weights cannot be had or do not fit.
    """
    name = spec["entry"]
    try:
        from transformers import Dinov2Model
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError(f"{name} needs transformers: pip install 'repa-cache[{EXTRA}]' ({error})") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(RANDOM_SEED)
        if spec["random_weights"]:
            return Dinov2Features(Dinov2Model(dinov2_config(spec)), spec)
        if weights is None:
            try:
                return Dinov2Features(_from_pretrained(Dinov2Model, spec["model"]), spec)
            except Exception as error:  # hub clients raise what they like; the cause is in the line
                raise no_weights_error(name, spec["model"], error) from error
        check_weights_file(name, weights)
        try:
            if weights.is_dir():
                return Dinov2Features(_from_pretrained(Dinov2Model, weights), spec)
            model = Dinov2Model(dinov2_config(spec))
            model.load_state_dict(read_state_dict(weights))
            return Dinov2Features(model, spec)
        except Exception as error:  # unpicklers and the library raise what they like; the cause is in the line
            raise wrong_weights_error(name, weights, error) from error


def _from_pretrained(cls: Any, source: Any) -> Any:
    model, report = cls.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    differing = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if differing:
        raise ValueError(f"{len(differing)} names differ, the first are {', '.join(map(str, differing[:3]))}")
    return model
