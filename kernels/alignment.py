"""The alignment loss that trainers call: one op with a gradient.

`cosine_alignment` checks its arguments and calls `loss_and_dz`, which returns the loss and dz together: the fused
Triton kernel on CUDA and ROCm, the closed form of `composite` elsewhere. Eager tensors on the CPU reach it through an
autograd function, all others through `repa::cosine_alignment` (registered.py): as a triton_op it stays whole under
torch.compile(fullgraph=True), and Inductor sees the Triton launches and the composite's arithmetic, not a black box.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import arguments, composite


def _is_eager(t: Tensor) -> bool:
    # torch.compile and export run op and backward on fake and functional tensors, which are subclasses.
    return type(t) in (Tensor, torch.nn.Parameter)


def loss_and_dz(
    z: Tensor,
    tokens: Tensor,
    token_scale: Tensor | None,
    channel_mean: Tensor | None,
    channel_std: Tensor | None,
    row_weight: Tensor | None,
    row_index: Tensor | None,
    gamma: float | None,
    weight: float,
    needs_dz: bool,
) -> tuple[Tensor, Tensor]:
    """Return (loss float32 [], dz like z, or empty [0] where it is not needed)."""
    with torch.autocast(z.device.type, enabled=False):
        if not z.is_cuda:
            path = composite.eager_path() if _is_eager(z) else composite.whole
            return path(
                z, tokens, token_scale, channel_mean, channel_std, row_weight, row_index, gamma, weight, needs_dz
            )
        if z.numel() == 0:
            return z.new_zeros((), dtype=torch.float32), torch.empty_like(z) if needs_dz else z.new_empty(0)
        # Imported here: without a GPU Triton is neither needed nor, outside Linux, there.
        from .alignment_triton import fused
        from .statistics_triton import channel_statistics

        # Triton launches on the current device, which need not be z's; Inductor sees to it in its own code.
        with torch.cuda.device(z.device) if _is_eager(z) else contextlib.nullcontext():
            if gamma is not None and channel_mean is None:
                channel_mean, channel_std = channel_statistics(tokens)
            dz = torch.empty(z.shape, dtype=z.dtype, device=z.device) if needs_dz else None
            loss = fused(z, tokens, token_scale, channel_mean, channel_std, row_weight, row_index, gamma, weight, dz)
        return loss, z.new_empty(0) if dz is None else dz


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # dz's own gradient does not exist: do not fill [B,T,E] zeros for it
    ctx.num_inputs = len(inputs)


def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "cosine_alignment: backward(create_graph=True) asks for a second derivative, which the fused op does not "
            "have. Use repa.kernels.reference.cosine_alignment, which autograd differentiates as often as asked."
        )
    (dz,) = ctx.saved_tensors
    return (_times_upstream(dz, grad), *[None] * (ctx.num_inputs - 1))


def _times_upstream(dz: Tensor, grad: Tensor) -> Tensor:
    """Return dz * grad, at no cost where grad is 1, as it is when `weight` carries every coefficient.

    On the GPU the value of grad is known only there, and looking at it would wait for the whole forward pass: a kernel
    of a few microseconds reads it and goes home where it is 1. dz is touched in place only where nobody can ask for it
    again, which the engine knows: without retain_graph this node's buffers are freed after the call. With retain_graph
    the product has memory of its own, so that a second backward gives the same gradient.
    """
    if not _is_eager(dz) or torch._C._autograd._get_current_graph_task_keep_graph():
        return (dz.float() * grad).to(dz.dtype)
    if dz.is_cuda:
        from .alignment_triton import scale_unless_one

        scale_unless_one(dz, grad)
        return dz
    return dz if grad.item() == 1.0 else (dz.float() * grad).to(dz.dtype)


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
    if not torch.compiler.is_compiling() and not z.is_cuda and _is_eager(z):
        op = _OnCPU.apply
    else:
        from .registered import cosine_alignment as op
    loss, _ = op(z, tokens, token_scale, channel_mean, channel_std, row_weight, row_index, gamma, weight, needs_dz)
    return loss
