"""The alignment loss and its gradient in one call, and the backward pass that hands the gradient on.

`loss_and_dz` takes the fused Triton kernel on CUDA and ROCm, the closed form of `composite` elsewhere. alignment.py
calls it for eager tensors on the CPU, registered.py makes it an operator of torch's for all others.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import composite


def is_eager(t: Tensor) -> bool:
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
            path = composite.eager_path() if is_eager(z) else composite.whole
            return path(
                z, tokens, token_scale, channel_mean, channel_std, row_weight, row_index, gamma, weight, needs_dz
            )
        if z.numel() == 0:
            return z.new_zeros((), dtype=torch.float32), torch.empty_like(z) if needs_dz else z.new_empty(0)
        # Imported here: without a GPU Triton is neither needed nor, outside Linux, there.
        from .alignment_triton import fused
        from .statistics_triton import channel_statistics

        # Triton launches on the current device, which need not be z's; Inductor sees to it in its own code.
        with torch.cuda.device(z.device) if is_eager(z) else contextlib.nullcontext():
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
    if not is_eager(dz) or torch._C._autograd._get_current_graph_task_keep_graph():
        return (dz.float() * grad).to(dz.dtype)
    if dz.is_cuda:
        from .alignment_triton import scale_unless_one

        scale_unless_one(dz, grad)
        return dz
    return dz if grad.item() == 1.0 else (dz.float() * grad).to(dz.dtype)
