"""The fused alignment kernel: z and the stored tokens are read once, dz is written once.

A program takes ROWS tokens of one image, keeps that image's channel statistics in registers and goes through its
tokens one at a time. A row of up to 1,280 elements is one warp's, in chunks of 256: 8 elements a thread and chunk, one
128-bit load of bfloat16. All sums of such a row are within the warp, so that no warp waits for another at a barrier;
all loads of a row are in flight together, and while one warp computes, those of the others are. Wider rows take 4 or 8
warps (`layout`). Counted (benchmarks/kernel_resources.py, Triton 3.8, sm_90, E = 768): 123 registers and 346
instructions a row; spread over four warps, of which one lay past E, a row took 788 and 6 barriers.

Every program writes its own partial loss, which torch then sums: no atomics, the same bits each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import NORM_EPS, STD_EPS

ROWS = 16  # tokens a program: its statistics cost 8 bytes an element once for 16 rows of 5 to 6, from L2
ELEMENTS_PER_THREAD = 8  # of a chunk: a 128-bit load of bfloat16
MOST_CHUNKS = 5  # of a row of one warp: up to 210 registers a thread; 6 would take 224 and more of the 255 there are
# Of one of several warps: there ptxas aims at fewer registers, so that more programs fit, and spills to get there. With
# 3 and 4 chunks of float32 it lost 24 and 32 bytes (Triton 3.9).
MOST_SHARED_CHUNKS = 2
SCALE_BLOCK = 4096
SCALE_PROGRAMS = 2048  # each loops, so that a gradient of 1 costs one small launch whatever the size


@triton.jit
def _chunks(ptr, width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Return `width` elements from `ptr` on as a tuple of CHUNKS vectors of CHUNK, zeros past the width."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        chunks += (tl.load(ptr + columns, mask=columns < width, other=0),)  # type: ignore[assignment]
    return chunks


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
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
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
    # torch.compile declares Python's numbers as fp64 (torch 2.11 does), which would make all that follows fp64.
    gamma = tl.cast(gamma, tl.float32)
    scale = tl.cast(weight, tl.float32)

    # f' = (f - offset) * gain for float tokens, s q gain + offset for int8. Past E all of it is 0.
    gains = ()
    offsets = ()
    if NORMALISED or INT8:
        means = _chunks(channel_mean_ptr + image.to(tl.int64) * E, E, CHUNK, CHUNKS)
        stds = _chunks(channel_std_ptr + image.to(tl.int64) * E, E, CHUNK, CHUNKS)
        for i in tl.static_range(CHUNKS):
            mean = means[i]
            std = stds[i]
            if INT8:
                gain = std
                offset = mean
                if NORMALISED:
                    gain = std / (std + STD_EPS)
                    offset = (1.0 - gamma) * mean / (std + STD_EPS)
            else:
                gain = 1.0 / (std + STD_EPS)
                offset = gamma * mean
            gains += (gain,)  # type: ignore[assignment]
            offsets += (offset,)  # type: ignore[assignment]
    if WEIGHTED:
        total = tl.load(total_ptr)
        scale = scale / tl.where(total == 0.0, 1.0, total)
    else:
        # B K is counted here: torch.compile would declare weight / (B K) as an integer where sizes may vary.
        rows = (tl.num_programs(0) // blocks).to(tl.int64) * K
        scale = tl.div_rn(scale, rows.to(tl.float32))

    first = block * ROWS
    sum_cos = 0.0
    for row in range(first, tl.minimum(first + ROWS, K)):
        place = image.to(tl.int64) * K + row
        source = image.to(tl.int64) * T + row
        w = 1.0
        exists = True
        if WEIGHTED:
            w = tl.load(row_weight_ptr + place).to(tl.float32)
            exists = w != 0.0  # a token left out is not read
        inside = exists
        if INDEXED:
            index = tl.load(row_index_ptr + place)
            inside = exists & (index >= 0) & (index < T)
            source = image.to(tl.int64) * T + index
        # A width of E or 0, not a mask of one bool, which the interpreter cannot broadcast.
        z_row = _chunks(z_ptr + place * E, tl.where(exists, E, 0), CHUNK, CHUNKS)
        f_row = _chunks(tokens_ptr + source * E, tl.where(inside, E, 0), CHUNK, CHUNKS)
        s = 1.0
        if INT8:
            s = tl.load(token_scale_ptr + source, mask=inside, other=0).to(tl.float32)

        zz = tl.zeros([CHUNK], dtype=tl.float32)
        ff = tl.zeros([CHUNK], dtype=tl.float32)
        zf = tl.zeros([CHUNK], dtype=tl.float32)
        targets = ()
        for i in tl.static_range(CHUNKS):
            z = z_row[i].to(tl.float32)
            f = f_row[i].to(tl.float32)
            if INT8:
                f = f * s * gains[i] + offsets[i]
            elif NORMALISED:
                f = (f - offsets[i]) * gains[i]
            if WEIGHTED:
                f = tl.where(w != 0.0, f, 0.0)
            zz += z * z
            ff += f * f
            zf += z * f
            targets += (f,)  # type: ignore[assignment]

        z_norm = tl.sqrt(tl.sum(zz, axis=0))
        z_safe = tl.maximum(z_norm, NORM_EPS)
        f_safe = tl.maximum(tl.sqrt(tl.sum(ff, axis=0)), NORM_EPS)
        cos = tl.sum(zf, axis=0) / (z_safe * f_safe)
        if INDEXED:
            cos = tl.where(exists == inside, cos, float("nan"))
        sum_cos += w * cos
        if NEEDS_DZ:
            along_f = -scale * w / (z_safe * f_safe)
            along_z = tl.where(z_norm >= NORM_EPS, scale * w * cos / (z_safe * z_safe), 0.0)
            for i in tl.static_range(CHUNKS):
                columns = i * CHUNK + tl.arange(0, CHUNK)
                dz = targets[i] * along_f + z_row[i].to(tl.float32) * along_z
                tl.store(dz_ptr + place * E + columns, dz.to(dz_ptr.dtype.element_ty), mask=columns < E)
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


class Layout(NamedTuple):
    """How a row lies across a program: `chunks` vectors of `chunk` elements, `chunk / threads` a thread and chunk."""

    warps: int
    chunk: int
    chunks: int


def layout(width: int, warp_size: int = 32) -> Layout:
    """Return the layout of rows of `width`: as few warps, by powers of 2, as their registers allow."""
    a_warp, warps = ELEMENTS_PER_THREAD * warp_size, 1
    while triton.cdiv(width, a_warp * warps) > (MOST_CHUNKS if warps == 1 else MOST_SHARED_CHUNKS):
        warps *= 2
    chunk = min(a_warp * warps, triton.next_power_of_2(width))
    return Layout(warps=warps, chunk=chunk, chunks=triton.cdiv(width, chunk))


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
    rows = layout(width, 64 if torch.version.hip else 32)

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
        CHUNK=rows.chunk,
        CHUNKS=rows.chunks,
        ROWS=ROWS,
        INT8=tokens.dtype == torch.int8,
        NORMALISED=gamma is not None,
        WEIGHTED=row_weight is not None,
        INDEXED=row_index is not None,
        NEEDS_DZ=dz is not None,
        STD_EPS=STD_EPS,
        NORM_EPS=NORM_EPS,
        num_warps=rows.warps,
    )
    return partial.sum()


def scale_unless_one(dz: Tensor, grad: Tensor) -> None:
    """Multiply dz, contiguous, by grad [] float32 in place; where grad is 1 nothing but grad is read."""
    if dz.numel() > 0:
        programs = min(SCALE_PROGRAMS, triton.cdiv(dz.numel(), SCALE_BLOCK))
        scale_unless_one_kernel[(programs,)](dz, grad, dz.numel(), BLOCK=SCALE_BLOCK, num_warps=8)
