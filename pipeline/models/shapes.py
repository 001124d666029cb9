"""What shapes a user's own entry gives, before a weight is loaded or an image decoded: on PyTorch's meta device.

A library's model is made without memory and run on nothing; of `loader: python` the target is imported alone, since a
function of anyone's own reads its weights. The tables' rows are compared with the libraries by tests instead.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ...cache_specs.entries import OwnCode
from ...cache_specs.errors import UsageError
from ...cache_specs.tables import encoder_table
from .encoders import Encoder
from .own_modules import cause, own_function
from .timm_models import load_timm, timm_stages
from .transformers_models import load_transformers


def check_shapes(spec: Mapping[str, Any], code: OwnCode | None) -> None:
    """Raise `UsageError` where the model of a user's own encoder or autoencoder cannot be, or gives other shapes."""
    kind = "encoder" if "grid" in spec else "autoencoder"
    if code is not None:
        own_function(f"{kind} {spec['entry']}", code)
    elif kind == "encoder" and spec["entry"] not in encoder_table():
        _run_on_meta(spec)


def _run_on_meta(spec: Mapping[str, Any]) -> None:
    load = load_timm if spec["loader"] == "timm" else load_transformers
    device = torch.device("meta")
    with device:
        features = load({**spec, "random_weights": True}, None)
        features.model.eval()
        encoder = Encoder(spec=spec, weights="", features=features, precision="fp32", device=device)
        pictures = torch.empty(1, 3, *spec["input_size"], dtype=torch.uint8)
        try:
            layers = encoder.by_layer(pictures)
        except UsageError:
            raise
        except Exception as error:  # whatever a library raises; the cause is in the line
            hint = "; is it convolutional? Then output: map" if spec["output"] == "tokens" else ""
            side = spec["input_size"][0]
            raise UsageError(
                f"encoder {spec['entry']}: {spec['loader']}'s {spec['model']} fails on pictures of {side} x {side} "
                f"pixels ({cause(error)}){hint}"
            ) from error
    if spec["cls_token"] and any(cls_token is None for _, cls_token in layers):
        raise UsageError(f"encoder {spec['entry']}: cls_token is true, and the model gives none")


def stages_of(spec: Mapping[str, Any]) -> list[list[int]]:
    """Return [width, patch] of each stage that timm's model of `spec` could give, [] of any other."""
    if spec["loader"] != "timm":
        return []
    with torch.device("meta"):
        return timm_stages(load_timm({**spec, "random_weights": True}, None).model)
