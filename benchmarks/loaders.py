"""The interface of the loaders that benchmarks/loader.py compares, the limits, and every reader of the cache itself.

`write` the samples in the loader's own format, `open` them, and take shuffled `batches`. Loaders of other formats are
in other_formats.py.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from samples import NDArray, Rows, Samples, array_paths, open_raw

from repa.trainer.reading.reader import CacheReader

LIMIT, OURS = "np.take", "CacheReader"


class Loader:
    """One way to read the samples. `batches` yields batches that are valid until the next one.

    `package` must be installed; `untimed` batches come before the clock starts, where a loader starts threads and
    opens files at each epoch; a `slow` one is given fewer and shorter rounds.
    """

    name: str
    order = "global"
    package: str | None = None
    shuffled = True  # within batches, too
    rival = False  # one of those that ours must beat by 4
    untimed = 0
    slow = False

    def __init__(self, samples: Samples, folder: Path) -> None:
        self.samples = samples
        self.folder = folder / self.name.replace(" ", "-")  # what it reads

    @classmethod
    def installed(cls) -> bool:
        return cls.package is None or find_spec(cls.package) is not None

    def write(self) -> None:
        """Write the samples in the loader's own format, where that is not the cache or the .npy files."""

    def open(self) -> None:
        """Open what was written."""

    def close(self) -> None:
        """Close it, and unmap it."""

    def batches(self, batch_size: int, num: int, seed: int) -> Iterator[Rows]:
        """Yield the first `num` batches of the epoch that `seed` shuffles."""
        raise NotImplementedError


class ByIndex(Loader):
    """A loader that reads the rows it is asked for: all of these see the same global shuffle."""

    def fill(self, rows: NDArray, out: Rows) -> Rows:
        """Read samples `rows` into `out`; return the batch."""
        raise NotImplementedError

    def order_of(self, batch_size: int, num: int, seed: int) -> NDArray:
        """Return rows [num, batch_size] of a global shuffle."""
        order = np.random.default_rng(seed).permutation(len(self.samples))
        return order[: num * batch_size].reshape(num, batch_size)

    def batches(self, batch_size: int, num: int, seed: int) -> Iterator[Rows]:
        out = self.buffer(batch_size)
        for rows in self.order_of(batch_size, num, seed):
            yield self.fill(rows, out)

    def buffer(self, batch_size: int) -> Rows:
        """Return the reused batch of this size; it is touched before the clock starts."""
        held = self.__dict__.setdefault("_buffers", {})
        return held.setdefault(batch_size, self.samples.empty_batch(batch_size))


class Take(ByIndex):
    """The limit: rows gathered from raw mapped files that lie in memory."""

    name = LIMIT

    def __init__(self, samples: Samples, folder: Path) -> None:
        super().__init__(samples, folder)
        self.folder = samples.raw

    def open(self) -> None:
        self._arrays = open_raw(self.folder)

    def close(self) -> None:
        del self._arrays

    def fill(self, rows: NDArray, out: Rows) -> Rows:
        for name, array in self._arrays.items():
            np.take(array, rows, axis=0, out=out[name], mode="clip")  # any other mode gathers into a second buffer
        return out


class TakeTwice(Take):
    """The limit of two threads: each gathers whole batches, two under way."""

    name = "np.take, 2 threads"

    def batches(self, batch_size: int, num: int, seed: int) -> Iterator[Rows]:
        free = deque([self.buffer(batch_size), self.second(batch_size)])
        under_way: deque[Future[Rows]] = deque()
        with ThreadPoolExecutor(2) as pool:
            for rows in self.order_of(batch_size, num, seed):
                if not free:
                    yield (batch := under_way.popleft().result())
                    free.append(batch)
                under_way.append(pool.submit(self.fill, rows, free.popleft()))
            while under_way:
                yield under_way.popleft().result()

    def second(self, batch_size: int) -> Rows:
        held = self.__dict__.setdefault("_seconds", {})
        return held.setdefault(batch_size, self.samples.empty_batch(batch_size))


class Copy(Take):
    """memcpy: as many bytes in one piece a field, in the order on disk, blocks of rows in random order."""

    name = "memcpy"
    order = "blocks of a batch"
    shuffled = False

    def order_of(self, batch_size: int, num: int, seed: int) -> NDArray:
        starts = np.random.default_rng(seed).permutation(len(self.samples) // batch_size)[:num] * batch_size
        return starts[:, None] + np.arange(batch_size)

    def fill(self, rows: NDArray, out: Rows) -> Rows:
        for name, array in self._arrays.items():
            np.copyto(out[name], array[rows[0] : rows[0] + len(rows)])
        return out


class OfTheCache(ByIndex):
    """A reader of the cache as it lies. `row` and `label` need no reading."""

    def __init__(self, samples: Samples, folder: Path) -> None:
        super().__init__(samples, folder)
        self.folder = samples.cache

    def known(self, rows: NDArray, out: Rows) -> None:
        """Fill `row` and `label`."""
        out["row"][:] = rows
        np.take(self._labels, rows, out=out["label"], mode="clip")

    def open(self) -> None:
        import zarr

        self._labels = np.asarray(zarr.open_array(self.folder / "label", mode="r")[:]).astype(np.int64)


class Ours(OfTheCache):
    """`repa.trainer.CacheReader.rows` into a reused batch of torch tensors, called from one thread."""

    name = OURS

    def open(self) -> None:
        self._reader = CacheReader(self.folder)

    def close(self) -> None:
        self._reader.close()

    def batches(self, batch_size: int, num: int, seed: int) -> Iterator[Rows]:
        held = self.__dict__.setdefault("_torch_batches", {})
        out = held.setdefault(batch_size, self._reader.empty_batch(batch_size))
        (features,) = out.features
        stored = {**features.tensors(), "patch_tokens": features.tokens}
        tensors = {"row": out.rows, "label": out.labels, "moments": out.moments, **stored}
        views = {name: tensors[name].numpy() for name in self.samples.fields}
        for rows in self.order_of(batch_size, num, seed):
            self._reader.rows(rows, out=out)
            yield views


class TensorStore(OfTheCache):
    """tensorstore on the cache, one read of a batch a field, all under way at once."""

    name = "tensorstore"
    package = "tensorstore"

    def open(self) -> None:
        import tensorstore

        super().open()
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
        spec = {"driver": "zarr3", "recheck_cached_data": "open"}
        self._stores = {
            name: tensorstore.open({**spec, "kvstore": f"file://{path}/"}, context=context, read=True).result()
            for name, path in array_paths(self.folder).items()
        }

    def close(self) -> None:
        del self._stores

    def fill(self, rows: NDArray, out: Rows) -> Rows:
        self.known(rows, out)
        reads = {name: store[rows, 0].read() for name, store in self._stores.items()}
        for name, read in reads.items():
            np.copyto(out[name], read.result())
        return out


class ZarrPython(OfTheCache):
    """zarr-python on the cache, row by row: its `oindex` of a batch is slower still."""

    name = "zarr-python"
    slow = True
    pipeline: str | None = None

    def open(self) -> None:
        import zarr

        super().open()
        settings: dict[str, Any] = {}
        if self.pipeline is not None:
            settings = {"codec_pipeline": {"path": self.pipeline, "strict": True}}
        with zarr.config.set(settings):
            self._arrays = {name: zarr.open_array(path, mode="r") for name, path in array_paths(self.folder).items()}

    def fill(self, rows: NDArray, out: Rows) -> Rows:
        self.known(rows, out)
        for name, array in self._arrays.items():
            for i, row in enumerate(rows.tolist()):
                out[name][i] = array[row, 0]
        return out


class ZarrWithZarrs(ZarrPython):
    """The same through the codec pipeline of zarrs."""

    name = "zarr-python + zarrs"
    package = "zarrs"
    pipeline = "zarrs.ZarrsCodecPipeline"
