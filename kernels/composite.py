"""The alignment loss and its gradient in closed form, for the CPU and for torch.compile.

In: the op's arguments, checked. Out: (loss, dz) in one go, so that nothing is kept for a backward pass. With
z^ and f^ the normalised rows and s a row's share of the mean,

    loss = sum over rows of -s cos,   dz = s (cos z^ - f^) / |z|

and where |z| is under F.normalize's eps the norm is the constant eps and the cos z^ term vanishes.

Three ways to run the one formula. Eager: in chunks of images that stay in the cores' cache. Inside a caller's
torch.compile: whole, and Inductor fuses it. REPA_CPU_ALIGNMENT=compiled: whole, compiled by itself. The last is not
the default: at B=16, T=256, E=768 on two cores it takes 3.5 ms where chunks take 9 and autograd 49, but its first call
takes 10 s, which is 1,800 steps of several seconds each to earn back (README.md has the table).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .reference import NORM_EPS, STD_EPS

CHUNK_ELEMENTS = 2**19  # 2 MiB of float32: of 1, 2, 4 and 16 images of 256 x 768, two were fastest
SWITCH = "REPA_CPU_ALIGNMENT"


def channel_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation over T of tokens [B,T,E], each [B,E] float32.

    Two passes relative to the first token: in float32 that is exact for constant channels and keeps 6 digits where
    mean/std is 5000; a sum of squares would keep none.
    """
    x = tokens.to(torch.float32)
    first = x[:, :1]
    x = x - first
    mean = x.mean(dim=1, keepdim=True)
    std = ((x - mean).square().sum(dim=1) / (tokens.shape[1] - 1)).sqrt()
    return (first + mean).squeeze(1), std


def _target(
    tokens: Tensor,
    token_scale: Tensor | None,
    channel_mean: Tensor | None,
    channel_std: Tensor | None,
    gamma: float | None,
) -> Tensor:
    """Return f' in float32, in memory of its own; tokens and token_scale may be a subset of the image's rows."""
    f = tokens.to(torch.float32, copy=True)
    if channel_mean is None or channel_std is None:
        return f
    mean, std = channel_mean.unsqueeze(1), channel_std.unsqueeze(1)
    inverse = 1.0 if gamma is None else 1.0 / (std + STD_EPS)
    if token_scale is not None:
        kept = 1.0 if gamma is None else 1.0 - gamma
        f.mul_(token_scale.to(torch.float32).unsqueeze(-1)).mul_(std * inverse).add_(kept * mean * inverse)
    elif gamma is not None:
        f.sub_(gamma * mean).mul_(inverse)
    return f


def _rows(
    z: Tensor,
    tokens: Tensor,
    token_scale: Tensor | None,
    channel_mean: Tensor | None,
    channel_std: Tensor | None,
    share: Tensor | None,
    row_index: Tensor | None,
    gamma: float | None,
    scale: float,
    needs_dz: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (sum of -s cos, dz [b,K,E] float32 or None) of b images; s is scale, times share [b,K] if given."""
    if gamma is not None and channel_mean is None:
        channel_mean, channel_std = channel_statistics(tokens)
    if row_index is not None:
        index = row_index.long()
        tokens = tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        token_scale = None if token_scale is None else token_scale.gather(1, index)
    x = z.to(torch.float32)
    f = _target(tokens, token_scale, channel_mean, channel_std, gamma)
    if share is not None:
        share = share.unsqueeze(-1)
        x, f = torch.where(share != 0, x, 0), torch.where(share != 0, f, 0)
    z_norm = (x * x).sum(-1, keepdim=True).sqrt()
    f_norm = (f * f).sum(-1, keepdim=True).sqrt().clamp_min(NORM_EPS)
    z_safe = z_norm.clamp_min(NORM_EPS)
    cos = (x * f).sum(-1, keepdim=True) / (z_safe * f_norm)
    s = scale if share is None else scale * share
    loss = -(s * cos).sum()
    if not needs_dz:
        return loss, None
    along_z = torch.where(z_norm >= NORM_EPS, s * cos / (z_safe * z_safe), 0)
    return loss, f.mul_(-s / (z_safe * f_norm)).addcmul_(x, along_z)


def _shares(row_weight: Tensor | None, num_rows: int, weight: float) -> tuple[Tensor | None, float]:
    """Return (row_weight / its sum or None, scale): all-zero weights stay zero."""
    if row_weight is None:
        return None, weight / max(num_rows, 1)
    w = row_weight.to(torch.float32)
    total = w.sum()
    return w / torch.where(total == 0, 1, total), weight


def whole(
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
    """Return (loss float32 [], dz like z or empty [0]) in one expression: what Inductor fuses into two loops."""
    share, scale = _shares(row_weight, z.shape[0] * z.shape[1], weight)
    loss, dz = _rows(z, tokens, token_scale, channel_mean, channel_std, share, row_index, gamma, scale, needs_dz)
    return loss, z.new_empty(0) if dz is None else dz.to(z.dtype)


def chunked(
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
    """Return what `whole` returns, a few images at a time; the loss is summed in float64 in the order of images."""
    B, K, E = z.shape
    images = max(1, CHUNK_ELEMENTS // max(1, tokens.shape[1] * E))
    share, scale = _shares(row_weight, B * K, weight)
    loss = torch.zeros((), dtype=torch.float64, device=z.device)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device) if needs_dz else z.new_empty(0)
    for first in range(0, B, images):
        part = slice(first, first + images)
        mean, std, s, scales, index = (
            None if t is None else t[part] for t in (channel_mean, channel_std, share, token_scale, row_index)
        )
        part_loss, part_dz = _rows(z[part], tokens[part], scales, mean, std, s, index, gamma, scale, needs_dz)
        loss += part_loss
        if part_dz is not None:
            dz[part] = part_dz
    return loss.to(torch.float32), dz


@functools.cache
def compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `whole` compiled by Inductor; the first call takes 10 to 20 s."""
    # dynamic: one set of kernels for all sizes, so that a batch size met earlier in the process changes no bit.
    return torch.compile(whole, fullgraph=True, dynamic=True)


@functools.cache
def _has_compiler() -> bool:
    """Say whether Inductor finds a C++ compiler, and warn once if it does not."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        warnings.warn(
            f"{SWITCH}=compiled, but no C++ compiler was found: the alignment loss runs uncompiled, "
            "about twice as slow and equal to rounding. Install g++ or set CXX.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def eager_path() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that runs on CPU tensors outside torch.compile, as REPA_CPU_ALIGNMENT says."""
    choice = os.environ.get(SWITCH, "chunked")
    if choice not in ("chunked", "compiled"):
        raise ValueError(f"environment: {SWITCH} is {choice!r}; expected chunked (the default) or compiled.")
    return compiled() if choice == "compiled" and _has_compiler() else chunked
