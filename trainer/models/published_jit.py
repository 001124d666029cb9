"""What a checkpoint of JiT's own code says of its model: names as here behind `net.`, sizes told by the shapes.

Such a file holds `model`, its averages `model_ema1` and `model_ema2` and `args`, which name their decays.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import CheckpointError
from .jit import SIZES, JiTConfig

DECAYS = (0.9999, 0.9996)  # of the two averages, where args do not say


def named_averages(stored: Mapping[str, Any], args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a file with its two averages under the names of ours; any other file as it is."""
    if "model_ema1" not in stored:
        return stored
    first, second = (args.get(f"ema_decay{number}", decay) for number, decay in enumerate(DECAYS, start=1))
    return {
        **{key: stored[key] for key in ("model", "args") if key in stored},
        "ema": stored["model_ema1"],
        "emas": {str(second): stored.get("model_ema2")},
        "config": {"ema_decay": [first]},
    }


def is_jit(state: Mapping[str, Any]) -> bool:
    """Whether these are the names of JiT and not of SiT: patches are embedded by two layers."""
    return "x_embedder.proj1.weight" in state


def jit_shape(state: Mapping[str, Tensor], file: Path) -> JiTConfig:
    """Read the architecture off the shapes; what they do not tell comes from the size of the same depth and width."""
    try:
        bottleneck, in_channels, patch_size, _ = state["x_embedder.proj1.weight"].shape
        num_labels, hidden_size = state["y_embedder.embedding_table.weight"].shape
        _, num_tokens, _ = state["pos_embed"].shape
    except KeyError as error:
        raise CheckpointError(f"{file}: not a JiT: it has no {error.args[0]}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not a JiT: a weight has another number of dimensions") from error
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    size = next((name for name, (d, width, *_) in SIZES.items() if (d, width) == (depth, hidden_size)), None)
    if size is None:
        raise CheckpointError(
            f"{file}: depth {depth} and width {hidden_size} are none of the sizes {', '.join(SIZES)} of JiT, "
            f"and shapes do not tell the number of heads"
        )
    _, _, num_heads, _, class_tokens_at, dropout = SIZES[size]
    return JiTConfig(
        name=f"JiT-{size}/{patch_size}",
        input_size=math.isqrt(num_tokens) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_labels - 1,
        bottleneck=bottleneck,
        class_tokens_at=class_tokens_at,
        dropout=dropout,
    )
