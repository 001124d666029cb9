"""Activation checkpointing: keep each block's input alone, and compute the block again in the backward pass.

The same bits for a third more time (arXiv 1604.06174, a segment a block). What a block draws is a function of the
sample and its place, never of a generator, so that there is no state to bring back.
"""

from collections.abc import Callable
from typing import Any

import torch

from .sit import SiT


def checkpoint_activations(model: SiT) -> None:
    """Have the blocks of `model` computed twice where there is a gradient; after its EMA was copied from it."""
    for block in model.blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    return run
