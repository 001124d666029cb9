"""MoCo v3's published checkpoints as a timm ViT.

A checkpoint of training: `state_dict` holds the momentum encoder, projection heads and, under `module.base_encoder.`,
the ViT that is wanted, its projector in the place of the classifier (arXiv 2104.02057). In the published ViT-L two
blocks have names that a careless renaming left: the block's number in the place of 1 or 2.
"""

from collections.abc import Mapping
from typing import Any

import torch

PREFIX = "module.base_encoder."
_MISNAMED = {
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}


def mocov3_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the ViT's weights by timm's names; a file that holds them already is returned as it is.

    The fixed sine-cosine position embedding comes along; the library resamples it to another grid. Raises
    `ValueError` where the file is neither.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise ValueError("no state_dict of tensors in it")
    if "patch_embed.proj.weight" in state:
        return dict(state)
    converted = {}
    for name, tensor in state.items():
        if not name.startswith(PREFIX):
            continue
        ours = name.removeprefix(PREFIX)
        for wrong, right in _MISNAMED.items():
            ours = ours.replace(wrong, right)
        if ours.partition(".")[0] not in ("head", "fc"):
            converted[ours] = tensor
    if not converted:
        raise ValueError(f"no names beginning with {PREFIX}, the first are {', '.join(list(state)[:3])}")
    return converted
