"""The random numbers of a micro-batch: declared by name and shape, drawn on the CPU from one generator, in one order.

A method declares what it draws (objectives/); the order is part of what a run is, as each draw moves the generator on.
So a new draw goes behind those that a method has.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_DRAWS = 1  # the word of this use among the streams of one seed; the first is in order.py

Draws = dict[str, Tensor]  # by name, [B, *shape] each


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One random tensor: `fill` takes [B, *shape] of `dtype`, and the generator that it draws from."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fill: Callable[[Tensor, torch.Generator], object]


def view_coin(num_views: int) -> Draw:
    """Return `views`, int64 in [0, num_views): which view of each image is read."""
    return Draw(
        name="views",
        dtype=torch.int64,
        fill=lambda out, generator: torch.randint(num_views, out.shape, generator=generator, out=out),
    )


def gaussian(name: str, shape: tuple[int, ...]) -> Draw:
    """Return standard normal numbers of `shape` a sample."""
    return Draw(
        name=name, shape=shape, fill=lambda out, generator: torch.randn(out.shape, generator=generator, out=out)
    )


def coin(name: str, probability: float) -> Draw:
    """Return bools that are true with `probability`."""
    return Draw(
        name=name,
        dtype=torch.bool,
        fill=lambda out, generator: torch.lt(torch.rand(out.shape, generator=generator), probability, out=out),
    )


@dataclass(frozen=True, kw_only=True)
class DrawSpec:
    """What is drawn for a micro-batch, in this order, and the seed of it all. One of the draws is `views`."""

    seed: int
    draws: Sequence[Draw]

    def num_bytes(self, num: int) -> int:
        """Return the bytes of the draws of `num` samples."""
        return num * sum(math.prod(draw.shape) * draw.dtype.itemsize for draw in self.draws)

    def empty(self, num: int, *, pin_memory: bool = False) -> Draws:
        """Return the draws of `num` samples, allocated and not filled."""
        return {
            draw.name: torch.empty((num, *draw.shape), dtype=draw.dtype, pin_memory=pin_memory) for draw in self.draws
        }

    def draw(self, num: int, *, step: int, micro: int, rank: int, out: Draws | None = None) -> Draws:
        """Return the random numbers of `num` samples, a function of these alone, in `out` where that is given."""
        # torch's CPU generator keeps 32 bits of a seed: of n = steps x micro-batches x ranks draws, n^2 / 2^33 pairs
        # share their noise, on other samples: 19 for 400,000 steps of one rank, 1,200 for those of eight. numpy's
        # PCG64 keeps all bits and takes twice as long: 25 ms against 12 for 256 latents of 4 x 32 x 32 with posterior.
        sequence = np.random.SeedSequence(self.seed, spawn_key=(_DRAWS, step, micro, rank))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        drawn = self.empty(num) if out is None else out
        for draw in self.draws:
            draw.fill(drawn[draw.name], generator)
        return drawn
