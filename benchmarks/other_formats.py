"""Loaders with a format of their own, each used as its documentation has it for a random order of training.

They run in this process: worker processes would copy every batch once more (on two cores, a DataLoader with two
workers measured half of one without). Two more, named `by hand`, are the fastest that we could write on formats of
others: they are no one's published loader, are not among the rivals of the bar, and stand in the table all the same.
"""

import contextlib
import gc
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loaders import ByIndex, Copy, Loader, Ours, Take, TakeTwice, TensorStore, ZarrPython, ZarrWithZarrs
from samples import NDArray, Rows, Samples, shard_ranges
from torch.utils.data import default_collate

FILE_SAMPLES = 256  # a file, where the format has files of several samples: what our shards hold
SEED = 1


class Safetensors(ByIndex):
    """Files of 256 samples, opened at every sample, one slice a field: as LightningDiT reads its latents."""

    name = "safetensors"
    package = "safetensors"
    rival = True

    def write(self) -> None:
        from safetensors.numpy import save_file

        self.folder.mkdir()
        for k, (start, stop) in enumerate(shard_ranges(len(self.samples), FILE_SAMPLES)):
            fields = {name: np.ascontiguousarray(array[start:stop]) for name, array in self.samples.arrays.items()}
            save_file(fields, self._file(k))

    def _file(self, k: int) -> Path:
        return self.folder / f"{k:05d}.safetensors"

    def batches(self, batch_size: int, num: int, seed: int) -> Iterator[Rows]:
        for rows in self.order_of(batch_size, num, seed):
            batch = default_collate([self._sample(row) for row in rows.tolist()])
            yield {name: tensor.numpy() for name, tensor in batch.items()}

    def _sample(self, row: int) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        file, within = divmod(row, FILE_SAMPLES)
        with safe_open(self._file(file), "pt") as opened:
            return {name: opened.get_slice(name)[within : within + 1].squeeze(0) for name in self.samples.fields}


class OpenSafetensors(ByIndex):
    """The same files kept open, rows copied into a reused batch: what one can write by hand on this format."""

    name = "safetensors, by hand"
    package = "safetensors"

    def __init__(self, samples: Samples, folder: Path) -> None:
        super().__init__(samples, folder)
        self._published = Safetensors(samples, folder)
        self.folder = self._published.folder

    def write(self) -> None:
        if not self.folder.exists():
            self._published.write()

    def open(self) -> None:
        from safetensors import safe_open

        self._open = contextlib.ExitStack()
        files = [self._open.enter_context(safe_open(file, "np")) for file in sorted(self.folder.iterdir())]
        self._slices = [{name: file.get_slice(name) for name in self.samples.fields} for file in files]

    def close(self) -> None:
        del self._slices
        self._open.close()

    def fill(self, rows: NDArray, out: Rows) -> Rows:
        for i, row in enumerate(rows.tolist()):
            file, within = divmod(row, FILE_SAMPLES)
            for name, part in self._slices[file].items():
                out[name][i] = part[within : within + 1][0]
        return out


class Datasets(ByIndex):
    """An Arrow data set on disk read row by row through its numpy format."""

    name = "datasets"
    package = "datasets"
    slow = True

    def write(self) -> None:
        import datasets

        blocks = {2: datasets.Array2D, 3: datasets.Array3D}
        features = {}
        for name, (dtype, shape, _) in self.samples.fields.items():
            value = datasets.Value(str(dtype))
            if len(shape) in blocks:
                features[name] = blocks[len(shape)](shape, str(dtype))
            else:
                features[name] = datasets.Sequence(value, length=shape[0]) if shape else value
        datasets.disable_progress_bars()
        made = self.folder / "made"
        rows = datasets.Dataset.from_generator(
            lambda: (self.samples.sample(i) for i in range(len(self.samples))),
            features=datasets.Features(features),
            cache_dir=str(made),
            writer_batch_size=FILE_SAMPLES,
            fingerprint="samples",  # or it pickles the generator, and with it every sample, to make one
        )
        rows.save_to_disk(self.folder / "rows")
        del rows
        shutil.rmtree(made)

    def open(self) -> None:
        import datasets

        self._rows = datasets.load_from_disk(self.folder / "rows").with_format("numpy")

    def close(self) -> None:
        del self._rows

    def fill(self, rows: NDArray, out: Rows) -> Rows:
        for i, row in enumerate(rows.tolist()):
            for name, value in self._rows[row].items():
                out[name][i] = value
        return out


class Stream(Loader):
    """A loader that decides the order itself, epoch after epoch, as in a training.

    It is not begun anew each round, and the first batch of a round, which threads may have read ahead, is not timed.
    """

    untimed = 1

    def open(self) -> None:
        self._running: dict[int, Iterator[Rows]] = {}

    def close(self) -> None:
        self._running.clear()
        gc.collect()  # some of them have cycles, and hold maps of files

    def loader(self, batch_size: int) -> Iterable[Any]:
        """Return the loader of shuffled batches, which may be iterated again for another epoch."""
        raise NotImplementedError

    def arrays(self, batch: Any) -> Rows:
        """Return what the loader gives as arrays by field, without a copy."""
        return {name: tensor.numpy() for name, tensor in batch.items()}

    def batches(self, batch_size: int, num: int, seed: int) -> Iterator[Rows]:
        if batch_size not in self._running:
            self._running[batch_size] = self._endless(batch_size)
        return islice(self._running[batch_size], num)

    def _endless(self, batch_size: int) -> Iterator[Rows]:
        loader = self.loader(batch_size)
        while True:
            yield from map(self.arrays, loader)


class LitData(Stream):
    """StreamingDataset of dicts of tensors in chunks of 64 MB, shuffled: chunks, and samples within a chunk."""

    name = "LitData"
    package = "litdata"
    order = "within chunks"
    rival = True

    def write(self) -> None:
        from litdata.streaming.writer import BinaryWriter

        self.folder.mkdir()
        writer = BinaryWriter(str(self.folder), chunk_bytes="64MB")
        for i in range(len(self.samples)):
            writer[i] = self.stored(i)
        writer.done()
        writer.merge()

    def stored(self, index: int) -> Any:
        return {name: torch.tensor(value) for name, value in self.samples.sample(index).items()}

    def loader(self, batch_size: int) -> Iterable[Any]:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(str(self.folder), shuffle=True, seed=SEED)
        return StreamingDataLoader(dataset, batch_size=batch_size, num_workers=0, collate_fn=self.collate)

    def collate(self, samples: list[Any]) -> Any:
        return default_collate(samples)


class LitDataRecords(LitData):
    """The same with a sample as one plain record, unpacked without a copy: what one can write by hand."""

    name = "LitData, by hand"
    rival = False

    def stored(self, index: int) -> Any:
        return self.samples.pack(index)

    def collate(self, samples: list[Any]) -> Any:
        unpacked = [self.samples.unpack(record) for record in samples]
        return {name: np.stack([sample[name] for sample in unpacked]) for name in self.samples.fields}

    def arrays(self, batch: Any) -> Rows:
        return batch


class MosaicML(Stream):
    """StreamingDataset over MDS shards of 64 MB with typed columns, in its default shuffle."""

    name = "MosaicML streaming"
    package = "streaming"
    order = "its own (py1e)"
    rival = True

    def write(self) -> None:
        from streaming import MDSWriter

        columns = {
            name: f"ndarray:{dtype}:{','.join(map(str, shape))}" if shape else "int"
            for name, (dtype, shape, _) in self.samples.fields.items()
        }
        with MDSWriter(out=str(self.folder), columns=columns, size_limit=64 << 20) as writer:
            for i in range(len(self.samples)):
                sample = self.samples.sample(i)
                writer.write({name: value if value.shape else int(value) for name, value in sample.items()})

    def loader(self, batch_size: int) -> Iterable[Any]:
        from streaming import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(local=str(self.folder), shuffle=True, shuffle_seed=SEED, batch_size=batch_size)
        return StreamingDataLoader(dataset, batch_size=batch_size)


class WebDataset(Stream):
    """Tar files of 256 samples, one .npy a field, in random order through a shuffle buffer of 256."""

    name = "WebDataset"
    package = "webdataset"
    order = "files, buffer of 256"
    rival = True

    def write(self) -> None:
        import webdataset

        self.folder.mkdir()
        pattern = str(self.folder / "%05d.tar")
        with webdataset.ShardWriter(pattern, maxcount=FILE_SAMPLES, verbose=0) as writer:
            for i in range(len(self.samples)):
                fields = {f"{name}.npy": np.asarray(value) for name, value in self.samples.sample(i).items()}
                writer.write({"__key__": f"{i:07d}", **fields})

    def loader(self, batch_size: int) -> Iterable[Any]:
        import webdataset

        files = sorted(map(str, self.folder.iterdir()))
        dataset = webdataset.WebDataset(files, shardshuffle=len(files), seed=SEED).shuffle(256, seed=SEED).decode()
        return dataset.to_tuple(*(f"{name}.npy" for name in self.samples.fields)).batched(batch_size)

    def arrays(self, batch: Any) -> Rows:
        return {name: np.asarray(values) for name, values in zip(self.samples.fields, batch, strict=True)}


class Grain(Stream):
    """Grain over ArrayRecord files, one record a group, globally shuffled; two threads read ahead."""

    name = "Grain + ArrayRecord"
    package = "grain"
    order = "global"
    rival = True

    @classmethod
    def installed(cls) -> bool:
        return find_spec("grain") is not None and find_spec("array_record") is not None

    def write(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.folder.mkdir()
        for k, (start, stop) in enumerate(shard_ranges(len(self.samples), FILE_SAMPLES)):
            writer = ArrayRecordWriter(str(self.folder / f"{k:05d}.arrayrecord"), "group_size:1,uncompressed")
            for i in range(start, stop):
                writer.write(self.samples.pack(i))
            writer.close()

    def loader(self, batch_size: int) -> Iterable[Any]:
        import grain

        files = sorted(map(str, self.folder.iterdir()))
        source = grain.sources.ArrayRecordDataSource(files)
        dataset = grain.MapDataset.source(source).seed(SEED).shuffle().map(self.samples.unpack)
        return dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)).batch(batch_size)

    def arrays(self, batch: Any) -> Rows:
        return batch


LOADERS: tuple[type[Loader], ...] = (
    Take,
    TakeTwice,
    Copy,
    Ours,
    TensorStore,
    ZarrWithZarrs,
    ZarrPython,
    LitData,
    Grain,
    LitDataRecords,
    Safetensors,
    OpenSafetensors,
    MosaicML,
    WebDataset,
    Datasets,
)
