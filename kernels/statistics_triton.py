"""Channel statistics on the GPU, for tokens whose cache has none (imported features).

A program takes BLOCK_E channels of one image and merges tiles of BLOCK_T tokens by Chan's rule: means and sums of
squared deviations, never raw sums of squares, which in float32 are off by 2.6 times where mean/std is 5000. Tokens are
read once, 2 bytes an element, on top of the alignment kernel's 6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .alignment_triton import launchable

BLOCK_E = 64  # 128 bytes of float16: whole cache lines of a token's row
BLOCK_T = 32


@triton.jit
def statistics_kernel(
    tokens_ptr,  # [B,T,E] fp16, bf16 or fp32
    mean_ptr,  # [B,E] fp32
    std_ptr,  # [B,E] fp32
    T,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(E, BLOCK_E)
    channels = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    in_row = channels < E
    rows = tl.arange(0, BLOCK_T)
    # Everything is relative to the image's first token: the mean of a constant channel is that constant to the bit,
    # and a mean of 5000 is rounded once, not at every merge.
    first = tl.load(tokens_ptr + image * T * E + channels, mask=in_row, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_E], dtype=tl.float32)
    squares = tl.zeros([BLOCK_E], dtype=tl.float32)  # sum of squared deviations from the mean so far
    for start in range(0, T, BLOCK_T):
        inside = ((start + rows) < T)[:, None] & in_row[None, :]
        at = (image * T + start + rows)[:, None] * E + channels[None, :]
        x = tl.load(tokens_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - first[None, :], 0.0)
        num_new = tl.minimum(T - start, BLOCK_T).to(tl.float32)
        new_mean = tl.sum(x, axis=0) / num_new
        deviation = tl.where(inside, x - new_mean[None, :], 0.0)
        delta = new_mean - mean
        share = num_new / (num_new + start)
        # Chan et al. 1983: the merged mean, and both sums plus what the distance of the means adds.
        mean += delta * share
        squares += tl.sum(deviation * deviation, axis=0) + delta * delta * (start * share)
    at = image * E + channels
    tl.store(mean_ptr + at, first + mean, mask=in_row)
    tl.store(std_ptr + at, tl.sqrt(squares / (T - 1)), mask=in_row)


def channel_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation over T of tokens [B,T,E], each [B,E] float32."""
    B, T, E = tokens.shape
    tokens = tokens.contiguous()
    mean = torch.empty((B, E), dtype=torch.float32, device=tokens.device)
    std = torch.empty_like(mean)
    launchable(statistics_kernel, tokens)[(B * triton.cdiv(E, BLOCK_E),)](
        tokens, mean, std, T, E=E, BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E, num_warps=4
    )
    return mean, std
