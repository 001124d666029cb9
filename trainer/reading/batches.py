"""Which samples a step sees, and the random numbers that go with them, both as functions of the step alone.

Micro-batch m of rank r in step s covers the b positions from s * B + (m * world + r) * b of the endless stream of
samples (order.py). So a batch may straddle epochs, nothing is dropped or repeated within one, any N works, a resume
needs the step and nothing else (as NVlabs/edm2 does), and another number of ranks goes on with the same positions.

Everything random in a step is drawn here on the CPU, from one generator a (seed, step, micro-batch, rank), while the
step before is running: view coin, posterior noise, t, noise, label drop, in that order. The same on every device.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.interpolant import Interpolant
from ..rows.row_batch import Batch
from .order import DEFAULT_WINDOW, BlockOrder, GlobalOrder, NDArray, Order, Shuffle
from .reader import CacheReader

_DRAWS = 1  # the word of this use among the streams of one seed; the first is in order.py


@dataclass(frozen=True, kw_only=True)
class Place:
    """The share of one rank: `batch_size` samples a step over `world` ranks and `accumulation` micro-batches each."""

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def micro_batch(self) -> int:
        """Samples that one rank reads at a time, b."""
        return self.batch_size // (self.accumulation * self.world)

    def start(self, step: int, micro: int) -> int:
        """Return the first position of micro-batch `micro` in step `step` (from 0)."""
        return step * self.batch_size + (micro * self.world + self.rank) * self.micro_batch


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """What is random in one micro-batch.

    views [B] int64 in 0, 1; posterior_noise [B,C,h,w] float32 where the autoencoder has a posterior; t [B] float32;
    noise [B,C,h,w] float32; dropped [B] bool, the samples trained without their label.
    """

    views: Tensor
    posterior_noise: Tensor | None
    t: Tensor
    noise: Tensor
    dropped: Tensor


@dataclass(frozen=True, kw_only=True)
class DrawSpec:
    """How to draw: the seed, and what the model and the cache need."""

    seed: int
    num_views: int
    latent_shape: tuple[int, int, int]  # C, h, w
    posterior: bool
    interpolant: Interpolant
    label_dropout: float

    def num_bytes(self, num: int) -> int:
        """Return the bytes of the `Draws` of `num` samples."""
        noise_bytes = 4 * math.prod(self.latent_shape) * (2 if self.posterior else 1)
        return num * (8 + 4 + 1 + noise_bytes)

    def empty(self, num: int, *, pin_memory: bool = False) -> Draws:
        """Return the draws of `num` samples, allocated and not filled."""
        shape = (num, *self.latent_shape)
        return Draws(
            views=torch.empty(num, dtype=torch.int64, pin_memory=pin_memory),
            posterior_noise=torch.empty(shape, pin_memory=pin_memory) if self.posterior else None,
            t=torch.empty(num, pin_memory=pin_memory),
            noise=torch.empty(shape, pin_memory=pin_memory),
            dropped=torch.empty(num, dtype=torch.bool, pin_memory=pin_memory),
        )

    def draw(self, num: int, *, step: int, micro: int, rank: int, out: Draws | None = None) -> Draws:
        """Return the random numbers of `num` samples, a function of these alone, in `out` where that is given."""
        # torch's CPU generator keeps 32 bits of a seed: of n = steps x micro-batches x ranks draws, n^2 / 2^33 pairs
        # share their noise, on other samples: 19 for 400,000 steps of one rank, 1,200 for those of eight. numpy's
        # PCG64 keeps all bits and takes twice as long: 25 ms against 12 for 256 latents of 4 x 32 x 32 with posterior.
        sequence = np.random.SeedSequence(self.seed, spawn_key=(_DRAWS, step, micro, rank))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        draws = self.empty(num) if out is None else out
        torch.randint(self.num_views, (num,), generator=generator, out=draws.views)
        if draws.posterior_noise is not None:
            torch.randn(draws.posterior_noise.shape, generator=generator, out=draws.posterior_noise)
        draws.t.copy_(self.interpolant.sample_t(num, generator=generator))
        torch.randn(draws.noise.shape, generator=generator, out=draws.noise)
        torch.lt(torch.rand(num, generator=generator), self.label_dropout, out=draws.dropped)
        return draws


@dataclass(frozen=True, eq=False, kw_only=True)
class MicroBatch:
    """One micro-batch: rows of the cache and the random numbers that go with them."""

    data: Batch
    draws: Draws


class Batches:
    """Reads what one rank sees in any (step, micro-batch).

    With shuffle "blocks" and images that failed to decode, shards are counted in the samples that are left: such a
    block may lie in two neighbouring files.
    """

    def __init__(
        self,
        reader: CacheReader,
        spec: DrawSpec,
        place: Place,
        *,
        shuffle: Shuffle = "global",
        window: int = DEFAULT_WINDOW,
    ) -> None:
        self.reader = reader
        self.spec = spec
        self.place = place
        num = len(reader.valid_rows)
        self.order: Order
        if shuffle == "blocks":
            self.order = BlockOrder(num, seed=spec.seed, shard_samples=reader.layout.shard_samples, window=window)
        else:
            self.order = GlobalOrder(num, seed=spec.seed)

    @property
    def row_bytes(self) -> int:
        """Bytes that the reader returns for a sample."""
        return sum(tensor.nbytes for tensor in self.reader.empty_batch(1).tensors().values())

    @property
    def num_bytes(self) -> int:
        """Bytes of one micro-batch: rows and random numbers."""
        num = self.place.micro_batch
        return num * self.row_bytes + self.spec.num_bytes(num)

    def rows(self, step: int, micro: int) -> NDArray:
        """Return the rows of the cache [b] int64 that micro-batch `micro` of step `step` covers."""
        samples = self.order.at(self.place.start(step, micro), self.place.micro_batch)
        valid = self.reader.valid_rows
        return samples if len(valid) == self.reader.num_samples else valid[samples]

    def empty(self, *, pin_memory: bool = False) -> MicroBatch:
        """Return a micro-batch that is allocated and not filled."""
        num = self.place.micro_batch
        return MicroBatch(
            data=self.reader.empty_batch(num, pin_memory=pin_memory), draws=self.spec.empty(num, pin_memory=pin_memory)
        )

    def read(self, step: int, micro: int, *, out: MicroBatch | None = None) -> MicroBatch:
        """Return micro-batch `micro` of step `step` (both from 0), in `out` where that is given."""
        out = self.empty() if out is None else out
        num, rank = self.place.micro_batch, self.place.rank
        draws = self.spec.draw(num, step=step, micro=micro, rank=rank, out=out.draws)
        self.reader.rows(self.rows(step, micro), draws.views.numpy(), out=out.data)
        return out
