"""Rows of a cache as one batch of CPU tensors, and the memory that they are read into."""

import math
import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureBatch:
    """One encoder's rows as stored. E channels, T tokens.

    tokens [B,T,E] float16 | int8; token_scale [B,T] float16 with int8 only; channel_mean, channel_std [B,E] float32;
    cls_token [B,E] float16 where the encoder has one and the reader was asked for it.
    """

    tokens: Tensor
    channel_mean: Tensor
    channel_std: Tensor
    token_scale: Tensor | None = None
    cls_token: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows of a cache: rows [B] int64 and labels [B] int64, moments [B,M,h,w] float16, one FeatureBatch an encoder."""

    rows: Tensor
    labels: Tensor
    moments: Tensor
    features: list[FeatureBatch] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, those of encoder i as features[i].tokens and so on."""
        named: dict[str, Tensor] = {"rows": self.rows, "labels": self.labels, "moments": self.moments}
        for i, features in enumerate(self.features):
            named |= {f"features[{i}].{name}": tensor for name, tensor in features.tensors().items()}
        return named


def empty_pages(shape: tuple[int, ...], dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """Return an empty tensor that begins at a page.

    A read is a copy by the processor, which on AMD's takes three to four times as long where the memory begins 1 to 31
    bytes after the data, counted modulo 4096 (measured: 0.8 against 3 ms for 64 rows of 96 pages). In a shard row i
    begins 4 i bytes into a page, so that torch's memory, 64 bytes into one, met every sixteenth row so.
    """
    if pin_memory:  # whole pages already
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(num_bytes + mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + num_bytes].view(dtype).view(shape)
