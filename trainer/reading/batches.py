"""Which samples a step sees, and the random numbers that go with them, both as functions of the step alone.

Micro-batch m of rank r in step s covers the b positions from s * B + (m * world + r) * b of the endless stream of
samples (order.py). So a batch may straddle epochs, nothing is dropped or repeated within one, any N works, a resume
needs the step and nothing else (as NVlabs/edm2 does), and another number of ranks goes on with the same positions.

Everything random in a step is drawn on the CPU, from one generator a (seed, step, micro-batch, rank), while the step
before is running (draws.py). The same on every device.
"""

import dataclasses
import weakref
from dataclasses import dataclass

from ..rows.row_batch import Batch
from .draws import Draws, DrawSpec
from .order import DEFAULT_WINDOW, BlockOrder, GlobalOrder, NDArray, Order, Shuffle
from .reader import CacheReader


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
class MicroBatch:
    """One micro-batch: rows of the cache and the random numbers that go with them."""

    data: Batch
    draws: Draws


class Batches:
    """Reads what one rank sees in any (step, micro-batch).

    `rows` are those of the cache that are in the stream, ascending; by default all valid ones.
    `later` is a step and a reader of the same cache that reads less: from that step on rows come from it, those of the
    same samples. With shuffle "blocks" and rows that are left out, shards are counted in those that are in the
    stream: such a block may lie in two neighbouring files.
    """

    def __init__(
        self,
        reader: CacheReader,
        spec: DrawSpec,
        place: Place,
        *,
        shuffle: Shuffle = "global",
        window: int = DEFAULT_WINDOW,
        later: tuple[int, CacheReader] | None = None,
        rows: NDArray | None = None,
    ) -> None:
        self.reader = reader
        self.spec = spec
        self.place = place
        self._later = later
        self._row_bytes: dict[CacheReader, int] = {}
        self._shares: weakref.WeakKeyDictionary[Batch, Batch] = weakref.WeakKeyDictionary()
        self.trained_rows = reader.valid_rows if rows is None else rows
        num = len(self.trained_rows)
        self.order: Order
        if shuffle == "blocks":
            self.order = BlockOrder(num, seed=spec.seed, shard_samples=reader.layout.shard_samples, window=window)
        else:
            self.order = GlobalOrder(num, seed=spec.seed)

    def row_bytes(self, step: int = 0) -> int:
        """Return the bytes that are read for a sample of `step`."""
        reader = self._reader_at(step)
        if reader not in self._row_bytes:
            self._row_bytes[reader] = sum(tensor.nbytes for tensor in reader.empty_batch(1).tensors().values())
        return self._row_bytes[reader]

    @property
    def num_bytes(self) -> int:
        """Bytes of one micro-batch: rows and random numbers."""
        num = self.place.micro_batch
        return num * self.row_bytes() + self.spec.num_bytes(num)

    def rows(self, step: int, micro: int) -> NDArray:
        """Return the rows of the cache [b] int64 that micro-batch `micro` of step `step` covers."""
        samples = self.order.at(self.place.start(step, micro), self.place.micro_batch)
        return samples if len(self.trained_rows) == self.reader.num_samples else self.trained_rows[samples]

    def empty(self, *, pin_memory: bool = False) -> MicroBatch:
        """Return a micro-batch that is allocated and not filled."""
        num = self.place.micro_batch
        return MicroBatch(
            data=self.reader.empty_batch(num, pin_memory=pin_memory), draws=self.spec.empty(num, pin_memory=pin_memory)
        )

    def read(self, step: int, micro: int, *, out: MicroBatch | None = None) -> MicroBatch:
        """Return micro-batch `micro` of step `step` (both from 0), in the memory of `out` where that is given."""
        out = self.empty() if out is None else out
        num, rank = self.place.micro_batch, self.place.rank
        draws = self.spec.draw(num, step=step, micro=micro, rank=rank, out=out.draws)
        reader, data = self._reader_at(step), out.data
        if reader is not self.reader:
            if data not in self._shares:
                self._shares[data] = dataclasses.replace(data, features=[], encoders=(), images=None)
            data = self._shares[data]
        reader.rows(self.rows(step, micro), draws["views"].numpy(), out=data)
        return MicroBatch(data=data, draws=draws)

    def complete(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch, on the training device by now, with what is left to compute there."""
        data = self.reader.complete(batch.data)
        return batch if data is batch.data else dataclasses.replace(batch, data=data)

    def _reader_at(self, step: int) -> CacheReader:
        return self.reader if self._later is None or step < self._later[0] else self._later[1]
