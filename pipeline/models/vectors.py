"""Pictures that are not in a cache, encoded as the cache's own were: generated images beside real ones.

Encoder, weights, precision, input size and what is kept of the tokens come from the component, so that a distance
between the two never measures a difference in how they were encoded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ...cache_specs.errors import UsageError
from ...cache_specs.schema import ComponentSpec, stored_layers
from ...cache_specs.tables import code_of
from ..store.quantize import channel_statistics
from .encoders import load_encoder


def load_vectors(
    component: ComponentSpec,
    pooling: str,
    *,
    layer: int | None = None,
    weights: Path | None = None,
    device: str = "cpu",
    entries: Sequence[str | Path] = (),
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from pictures [B, H, W, 3] uint8 to vectors [B, E] float32 as `component` stores them.

    `pooling` is mean (the tokens' mean, float32) or cls (rounded to float16, as stored), of `layer`, one of those that
    the component stores; `entries` are files of networks of one's own. Raises `UsageError` where the
    weights cannot be had or are not those that the component was built with.
    """
    code = code_of(component.path, component.spec, entries)
    encoder = load_encoder(component.spec, weights=weights, precision=component.precision, device=device, code=code)
    if encoder.weights != component.weights:
        raise UsageError(
            f"the weights of {component.name} ({encoder.weights}) are not those that the cache was built with "
            f"({component.weights}); give the same ones (evaluation.encoder_weights)"
        )

    place = stored_layers(component.spec).index(layer)

    def encode(pictures: np.ndarray) -> np.ndarray:
        tokens, cls_token = encoder.by_layer(torch.tensor(pictures).permute(0, 3, 1, 2))[place]
        if pooling == "mean":
            return channel_statistics(tokens)[0].cpu().numpy()
        assert cls_token is not None, component.name
        return cls_token.half().float().cpu().numpy()

    return encode
