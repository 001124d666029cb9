"""Which samples a step sees, and the random numbers that go with them, both as functions of the step alone.

The order is an endless stream of positions: position p is sample permutation_epoch[p % N] of epoch p // N, N valid
samples, and the permutation is numpy's, seeded by (seed, epoch). Micro-batch m of rank r in step s covers the b
positions from s * B + (m * world + r) * b. So a batch may straddle epochs, nothing is dropped or repeated within one,
any N works, and a resume needs the step and nothing else (as NVlabs/edm2 does).

Everything random in a step is drawn here on the CPU, from one generator a (seed, step, micro-batch, rank), while the
step before is running: view coin, posterior noise, t, noise, label drop, in that order. The same on every device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .interpolant import Interpolant
from .reader import Batch, CacheReader
from .shards import NDArray

# SeedSequence pads short entropy with zeros: (seed, epoch) and (seed, epoch, 0) would be the same. A spawn key is not
# padded, so each use has its own word there.
_ORDER, _DRAWS = 0, 1


class SampleOrder:
    """The endless stream of rows of one seed; `rows` [N] are the samples to permute.

    Holds one permutation or two, 8 bytes a sample each.
    """

    def __init__(self, rows: NDArray, seed: int) -> None:
        self._rows = rows
        self._seed = seed
        self._epochs: dict[int, NDArray] = {}

    def at(self, start: int, num: int) -> NDArray:
        """Return the rows [num] at positions start .. start + num - 1."""
        epochs, places = np.divmod(np.arange(start, start + num), len(self._rows))
        order = np.empty(num, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order[here] = self._rows[self._permutation(epoch)[places[here]]]
        return order

    def _permutation(self, epoch: int) -> NDArray:
        if epoch not in self._epochs:
            # A batch near an epoch's end needs two; older ones never come back.
            self._epochs = {kept: self._epochs[kept] for kept in self._epochs if kept == epoch - 1}
            sequence = np.random.SeedSequence(self._seed, spawn_key=(_ORDER, epoch))
            self._epochs[epoch] = np.random.Generator(np.random.PCG64(sequence)).permutation(len(self._rows))
        return self._epochs[epoch]


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


@dataclass(kw_only=True)
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

    def draw(self, num: int, *, step: int, micro: int, rank: int) -> Draws:
        """Return the random numbers of `num` samples, a function of the arguments alone."""
        # torch's CPU generator keeps 32 bits of a seed: of n = steps x micro-batches x ranks draws, n^2 / 2^33 pairs
        # share their noise, on other samples: 19 for 400,000 steps of one rank, 1,200 for those of eight. numpy's
        # PCG64 keeps all bits and takes twice as long: 25 ms against 12 for 256 latents of 4 x 32 x 32 with posterior.
        sequence = np.random.SeedSequence(self.seed, spawn_key=(_DRAWS, step, micro, rank))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        views = torch.randint(self.num_views, (num,), generator=generator)
        shape = (num, *self.latent_shape)
        posterior_noise = torch.randn(shape, generator=generator) if self.posterior else None
        t = self.interpolant.sample_t(num, generator=generator)
        noise = torch.randn(shape, generator=generator)
        dropped = torch.rand(num, generator=generator) < self.label_dropout
        return Draws(views=views, posterior_noise=posterior_noise, t=t, noise=noise, dropped=dropped)


@dataclass(kw_only=True)
class MicroBatch:
    """One micro-batch: rows of the cache and the random numbers that go with them."""

    data: Batch
    draws: Draws


class Batches:
    """Reads what one rank sees in any (step, micro-batch)."""

    def __init__(self, reader: CacheReader, spec: DrawSpec, place: Place) -> None:
        self.reader = reader
        self.spec = spec
        self.place = place
        self.order = SampleOrder(reader.valid_rows, spec.seed)

    def read(self, step: int, micro: int, out: Batch | None = None) -> MicroBatch:
        """Return micro-batch `micro` of step `step` (both from 0), its rows in `out` where that is given."""
        num = self.place.micro_batch
        rows = self.order.at(self.place.start(step, micro), num)
        draws = self.spec.draw(num, step=step, micro=micro, rank=self.place.rank)
        return MicroBatch(data=self.reader.rows(rows, draws.views.numpy(), out=out), draws=draws)
