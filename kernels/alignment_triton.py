"""The fused alignment kernel: z and the stored tokens are read once, dz is written once.

A program takes ROWS tokens of one image, keeps that image's channel statistics in registers and goes through its
tokens one at a time. A row of E elements lies across the program's threads, 8 elements each, which is one 128-bit
load of bfloat16. The next row is fetched before the present one is reduced, so that two rows are in
flight: 64 registers, no spills, 1,024 threads on a multiprocessor of sm_90 (counted; benchmarks/kernel_resources.py,
with Triton 3.8; 3.5 to 3.7 take 72 for int8 tokens, of which 896 threads fit).

Every program writes its own partial loss, which torch then sums: no atomics, the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import NORM_EPS, STD_EPS

ROWS = 16  # tokens a program: its statistics cost 8 bytes an element once for 16 rows of 5 to 6, from L2
ELEMENTS_PER_THREAD = 8
SCALE_BLOCK = 4096
SCALE_PROGRAMS = 2048  # each loops, so that a gradient of 1 costs one small launch whatever the size


@triton.jit
def _read_row(
    z_ptr,
    tokens_ptr,
    token_scale_ptr,
    row_weight_ptr,
    row_index_ptr,
    image,
    row,
    exists,
    K,
    T,
    columns,
    E: tl.constexpr,
    INT8: tl.constexpr,
    WEIGHTED: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Return row's z and tokens as stored, token scale, row weight, and False where its index is outside [0, T)."""
    place = image.to(tl.int64) * K + row
    w = 1.0
    if WEIGHTED:
        w = tl.load(row_weight_ptr + place, mask=exists, other=0.0).to(tl.float32)
        exists = exists & (w != 0.0)  # a token left out is not read
    source = image.to(tl.int64) * T + row
    inside = exists
    if INDEXED:
        index = tl.load(row_index_ptr + place, mask=exists, other=0)
        inside = exists & (index >= 0) & (index < T)
        source = image.to(tl.int64) * T + index
    # The masks compare with a width of E or 0: the interpreter cannot broadcast a scalar of type bool.
    z = tl.load(z_ptr + place * E + columns, mask=columns < tl.where(exists, E, 0), other=0)
    f = tl.load(tokens_ptr + source * E + columns, mask=columns < tl.where(inside, E, 0), other=0)
    s = 1.0
    if INT8:
        s = tl.load(token_scale_ptr + source, mask=inside, other=0).to(tl.float32)
    return z, f, s, w, exists == inside


@triton.jit
def alignment_kernel(
    z_ptr,  # [B,K,E] bf16 or fp32
    tokens_ptr,  # [B,T,E] fp16, bf16, fp32 or int8
    token_scale_ptr,  # [B,T] if INT8
    channel_mean_ptr,  # [B,E] fp32 if NORMALISED or INT8
    channel_std_ptr,  # [B,E] fp32 if NORMALISED or INT8
    row_weight_ptr,  # [B,K] fp32 if WEIGHTED
    row_index_ptr,  # [B,K] int32 or int64 if INDEXED
    total_ptr,  # [] fp32, the sum of the row weights, if WEIGHTED
    loss_ptr,  # [B * cdiv(K, ROWS)] fp32
    dz_ptr,  # [B,K,E] if NEEDS_DZ
    gamma,
    weight,
    K,
    T,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    INT8: tl.constexpr,
    NORMALISED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    INDEXED: tl.constexpr,
    NEEDS_DZ: tl.constexpr,
    STD_EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    blocks = tl.cdiv(K, ROWS)
    image = tl.program_id(0) // blocks  # one dimension: the others end at 65,535
    block = tl.program_id(0) % blocks
    columns = tl.arange(0, BLOCK_E)
    in_row = columns < E
    # torch.compile declares Python's numbers as fp64 (torch 2.11 does), which would make all that follows fp64.
    gamma = tl.cast(gamma, tl.float32)
    scale = tl.cast(weight, tl.float32)

    # f' = (f - offset) * gain for float tokens, s q gain + offset for int8. Past E all of it is 0.
    if NORMALISED or INT8:
        at = image.to(tl.int64) * E + columns
        mean = tl.load(channel_mean_ptr + at, mask=in_row, other=0.0)
        std = tl.load(channel_std_ptr + at, mask=in_row, other=0.0)
        if INT8:
            gain = std
            offset = mean
            if NORMALISED:
                gain = std / (std + STD_EPS)
                offset = (1.0 - gamma) * mean / (std + STD_EPS)
        else:
            gain = 1.0 / (std + STD_EPS)
            offset = gamma * mean
    if WEIGHTED:
        total = tl.load(total_ptr)
        scale = scale / tl.where(total == 0.0, 1.0, total)
    else:
        # B K is counted here: torch.compile would declare weight / (B K) as an integer where sizes may vary.
        rows = (tl.num_programs(0) // blocks).to(tl.int64) * K
        scale = tl.div_rn(scale, rows.to(tl.float32))

    first = block * ROWS
    last = tl.minimum(first + ROWS, K)
    z_next, f_next, s_next, w_next, inside_next = _read_row(
        z_ptr, tokens_ptr, token_scale_ptr, row_weight_ptr, row_index_ptr, image, first, first < last, K, T,
        columns, E, INT8, WEIGHTED, INDEXED,
    )  # fmt: skip
    sum_cos = 0.0
    for row in range(first, last):
        z = z_next.to(tl.float32)
        f = f_next.to(tl.float32)
        s = s_next
        w = w_next
        inside = inside_next
        z_next, f_next, s_next, w_next, inside_next = _read_row(
            z_ptr, tokens_ptr, token_scale_ptr, row_weight_ptr, row_index_ptr, image, row + 1, row + 1 < last, K, T,
            columns, E, INT8, WEIGHTED, INDEXED,
        )  # fmt: skip
        if INT8:
            f = f * s * gain + offset
        elif NORMALISED:
            f = (f - offset) * gain
        if WEIGHTED:
            f = tl.where(w != 0.0, f, 0.0)

        z_norm = tl.sqrt(tl.sum(z * z, axis=0))
        z_safe = tl.maximum(z_norm, NORM_EPS)
        f_safe = tl.maximum(tl.sqrt(tl.sum(f * f, axis=0)), NORM_EPS)
        cos = tl.sum(z * f, axis=0) / (z_safe * f_safe)
        if INDEXED:
            cos = tl.where(inside, cos, float("nan"))
        sum_cos += w * cos
        if NEEDS_DZ:
            along_f = -scale * w / (z_safe * f_safe)
            along_z = tl.where(z_norm >= NORM_EPS, scale * w * cos / (z_safe * z_safe), 0.0)
            dz = f * along_f + z * along_z
            place = image.to(tl.int64) * K + row
            tl.store(dz_ptr + place * E + columns, dz.to(dz_ptr.dtype.element_ty), mask=in_row)
    tl.store(loss_ptr + tl.program_id(0), -scale * sum_cos)


@triton.jit
def scale_unless_one_kernel(
    dz_ptr,  # [n]
    grad_ptr,  # [] fp32
    n,
    BLOCK: tl.constexpr,
):
    grad = tl.load(grad_ptr)
    if grad != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            at = start + tl.arange(0, BLOCK)
            dz = tl.load(dz_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            tl.store(dz_ptr + at, (dz * grad).to(dz_ptr.dtype.element_ty), mask=at < n)


def num_warps(width: int, warp_size: int = 32) -> int:
    """Return the warps for rows of `width`: 8 elements a thread."""
    return max(1, triton.next_power_of_2(width) // (ELEMENTS_PER_THREAD * warp_size))


def launchable(kernel: Any, tensor: Tensor) -> Any:
    """Return the kernel as torch.compile can see it; on CPU tensors, which only the interpreter takes, as it is."""
    return torch.library.wrap_triton(kernel) if tensor.is_cuda else kernel


def fused(
    z: Tensor,
    tokens: Tensor,
    token_scale: Tensor | None,
    channel_mean: Tensor | None,
    channel_std: Tensor | None,
    row_weight: Tensor | None,
    row_index: Tensor | None,
    gamma: float | None,
    weight: float,
    dz: Tensor | None,
) -> Tensor:
    """Return the loss, float32 [], and fill dz [B,K,E] if it is given.

    Statistics are needed wherever gamma is. A row_index outside [0, T) makes the loss NaN. Inputs that are not
    contiguous are copied first; dz must be contiguous and of any floating dtype.
    """
    B, K, E = z.shape
    z, tokens = z.contiguous(), tokens.contiguous()
    token_scale, channel_mean, channel_std, row_index = (
        None if t is None else t.contiguous() for t in (token_scale, channel_mean, channel_std, row_index)
    )
    total = None
    if row_weight is not None:
        row_weight = row_weight.to(torch.float32).contiguous()
        total = row_weight.sum()
    programs = B * triton.cdiv(K, ROWS)
    partial = torch.empty(programs, dtype=torch.float32, device=z.device)

    width = int(E)  # a constant of the kernel: torch.compile makes one for each

    def given(t: Tensor | None) -> Tensor:
        return z if t is None else t  # an address that the kernel does not touch

    launchable(alignment_kernel, z)[(programs,)](
        z,
        tokens,
        given(token_scale),
        given(channel_mean),
        given(channel_std),
        given(row_weight),
        given(row_index),
        given(total),
        partial,
        given(dz),
        0.0 if gamma is None else gamma,
        weight,
        K,
        tokens.shape[1],
        E=width,
        BLOCK_E=triton.next_power_of_2(width),
        ROWS=ROWS,
        INT8=tokens.dtype == torch.int8,
        NORMALISED=gamma is not None,
        WEIGHTED=row_weight is not None,
        INDEXED=row_index is not None,
        NEEDS_DZ=dz is not None,
        STD_EPS=STD_EPS,
        NORM_EPS=NORM_EPS,
        num_warps=num_warps(width, 64 if torch.version.hip else 32),
    )
    return partial.sum()


def scale_unless_one(dz: Tensor, grad: Tensor) -> None:
    """Multiply dz, contiguous, by grad [] float32 in place; where grad is 1 nothing but grad is read."""
    if dz.numel() > 0:
        programs = min(SCALE_PROGRAMS, triton.cdiv(dz.numel(), SCALE_BLOCK))
        scale_unless_one_kernel[(programs,)](dz, grad, dz.numel(), BLOCK=SCALE_BLOCK, num_warps=8)
