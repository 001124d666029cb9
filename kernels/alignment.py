"""The alignment loss that trainers call: one op with a gradient.

`cosine_alignment` checks its arguments and calls `loss_and_dz` (gradient.py), which returns the loss and dz together.
Eager tensors on the CPU reach it through an autograd function, all others through `repa::cosine_alignment`
(registered.py): as a triton_op it stays whole under torch.compile(fullgraph=True), and Inductor sees the Triton
launches and the composite's arithmetic, not a black box.
"""

import torch
from torch import Tensor

from . import arguments
from .gradient import backward, is_eager, loss_and_dz, save


class _OnCPU(torch.autograd.Function):
    """The op for eager tensors on the CPU, which need no registered one."""

    forward = staticmethod(loss_and_dz)
    setup_context = staticmethod(save)
    backward = staticmethod(backward)


def cosine_alignment(
    z: Tensor,
    tokens: Tensor,
    *,
    token_scale: Tensor | None = None,
    channel_mean: Tensor | None = None,
    channel_std: Tensor | None = None,
    gamma: float | None = None,
    weight: float = 1.0,
    row_weight: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """Return weight * mean over rows of -cos(z, target), a float32 scalar whose gradient flows to z alone.

    z            [B,T,E] float32 or bfloat16, the projector's output; [B,K,E] with row_index
    tokens       [B,T,E] as stored: float16, bfloat16, float32, or int8 with token_scale and both statistics
    token_scale  [B,T] float16, int8 tokens only
    channel_mean, channel_std   [B,E] float32 over the image's T tokens, std unbiased; computed from tokens where
                 gamma needs them and they are None; not looked at for float tokens without gamma
    gamma        spatial normalisation, target = (f - gamma * mean) / (std + 1e-6); None takes f as it is
    weight       coefficient, folded into loss and gradient so that the upstream gradient is exactly 1
    row_weight   [B,T] (or [B,K]), floating point or bool, not negative: the mean becomes
                 sum(row_weight * -cos) / sum(row_weight). 0 leaves a token out: neither its z nor its target is
                 looked at, and 0/1 weights equal a row_index of the tokens kept. All zero: loss and gradient are 0
    row_index    [B,K] int64 or int32 in [0, T): row k of z is aligned with token row_index[b, k]; the statistics
                 are still those of all T tokens

    Negative is good: aligned tokens give -weight. A batch of no rows gives 0. The mean is over this call's rows: where
    ranks or micro-batches have different sums of row_weight, their average is not the mean over all rows.

    Raises ValueError naming the argument that does not fit; an index outside [0, T) raises on the CPU and makes the
    loss NaN on CUDA, where looking at it would wait for the device. REPA arXiv 2410.06940 eq. 8; iREPA arXiv
    2512.10794; the equations in code: `reference`.
    """
    arguments.check(z, tokens, token_scale, channel_mean, channel_std, gamma, weight, row_weight, row_index)
    needs_dz = z.requires_grad and torch.is_grad_enabled()
    if not torch.compiler.is_compiling() and not z.is_cuda and is_eager(z):
        op = _OnCPU.apply
    else:
        from .registered import cosine_alignment as op
    loss, _ = op(z, tokens, token_scale, channel_mean, channel_std, row_weight, row_index, gamma, weight, needs_dz)
    return loss
