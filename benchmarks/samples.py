"""The rows that benchmarks/loader.py reads through every loader: a synthetic cache, and the same bytes as .npy files.

The .npy files are copied out of the cache by zarr-python, not by the reader under test: they are both what np.take
reads at the limit of memory and what every loader's batches are compared with.
"""

from collections.abc import Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from synthetic_cache import make_cache

NDArray = np.ndarray[Any, Any]
COPIED_SAMPLES = 256  # at a time
Rows = dict[str, NDArray]  # arrays by field: of one sample [*row], or of a batch [B, *row]


class WrongRows(Exception):
    """A loader gave other bytes than it was given, or another set of samples."""


class Samples:
    """N samples: the `cache`, and in `raw` one .npy file [N, *row] a field, among them `row`, which sample it is."""

    def __init__(self, cache: Path, raw: Path) -> None:
        self.cache = cache
        self.raw = raw
        self.fields = {
            name: (array.dtype, array.shape[1:], array.nbytes // len(array)) for name, array in open_raw(raw).items()
        }

    def __len__(self) -> int:
        return len(self.arrays["row"])

    @cached_property
    def arrays(self) -> Rows:
        """Maps of the .npy files by field. Pages that are mapped stay in memory: `release` lets them go."""
        return open_raw(self.raw)

    def release(self) -> None:
        """Unmap the files until they are asked for again."""
        self.__dict__.pop("arrays", None)

    @property
    def row_bytes(self) -> int:
        """Bytes of all fields of one sample."""
        return sum(num_bytes for _, _, num_bytes in self.fields.values())

    def sample(self, index: int) -> Rows:
        """Return one sample, views of the maps."""
        return {name: array[index] for name, array in self.arrays.items()}

    def empty_batch(self, num: int) -> Rows:
        """Return a batch of `num` rows, allocated and touched: its first use costs no page faults."""
        return {name: np.zeros((num, *shape), dtype) for name, (dtype, shape, _) in self.fields.items()}

    def pack(self, index: int) -> bytes:
        """Return one sample as one record, field after field, for formats of plain records."""
        return b"".join(np.asarray(value).tobytes() for value in self.sample(index).values())

    def unpack(self, record: Any) -> Rows:
        """Return the sample of a record as views of it."""
        fields, start = {}, 0
        for name, (dtype, shape, num_bytes) in self.fields.items():
            fields[name] = np.frombuffer(record, dtype, prod(shape), start).reshape(shape)
            start += num_bytes
        return fields

    def check(self, batch: Rows) -> None:
        """Raise WrongRows unless every row of a batch has the bytes of the sample that it says it is."""
        rows = batch["row"]
        for name, array in self.arrays.items():
            expected = array[rows]
            if batch[name].dtype != array.dtype or batch[name].tobytes() != expected.tobytes():
                wrong = [
                    row
                    for row, got, held in zip(rows.tolist(), batch[name], expected, strict=True)
                    if got.tobytes() != held.tobytes()
                ]
                raise WrongRows(f"{name} of sample {(wrong or rows)[0]}: expected {array.dtype} bytes of the source")

    def check_epoch(self, batches: Iterator[Rows], *, shuffled: bool = True) -> None:
        """Raise WrongRows unless an epoch holds every sample once, with its bytes, `shuffled` or in any order."""
        seen = []
        for batch in batches:
            self.check(batch)
            seen.append(batch["row"].copy())  # the next batch may overwrite it
        order = np.concatenate(seen)
        if not np.array_equal(np.sort(order), np.arange(len(self))):
            raise WrongRows(f"an epoch gave {len(order)} rows, {len(np.unique(order))} distinct; expected {len(self)}")
        if shuffled and np.array_equal(order, np.sort(order)):
            raise WrongRows("an epoch came in the order on disk; expected a shuffle")


def make_samples(folder: Path, *, num_samples: int, dtype: str, grid: int, width: int) -> Samples:
    """Write a cache with tokens of `dtype` into `folder`, and its rows as .npy files beside it."""
    cache = make_cache(folder / "cache", num_samples=num_samples, grid=grid, width=width, dtype=dtype)
    raw = folder / "npy"
    raw.mkdir()
    np.save(raw / "row.npy", np.arange(num_samples))
    np.save(raw / "label.npy", np.asarray(zarr.open_array(cache / "label", mode="r")[:]).astype(np.int64))
    for name, path in array_paths(cache).items():
        source = zarr.open_array(path, mode="r")
        with (raw / f"{name}.npy").open("wb") as target:
            header = {"descr": source.dtype.str, "fortran_order": False, "shape": (num_samples, *source.shape[2:])}
            np.lib.format.write_array_header_1_0(target, header)
            for start, stop in shard_ranges(num_samples, COPIED_SAMPLES):
                target.write(np.ascontiguousarray(source[start:stop, 0]).data)
    return Samples(cache, raw)


def array_paths(cache: Path) -> dict[str, Path]:
    """Return the arrays of a synthetic cache that training reads, by their name in a batch of `Samples`."""
    (features,) = (cache / "features").glob("*/zarr.json")
    found = (features.with_name(name) for name in ("patch_tokens", "token_scale", "channel_mean", "channel_std"))
    return {"moments": cache / "latents/synthetic/moments", **{path.name: path for path in found if path.exists()}}


def open_raw(folder: Path) -> Rows:
    """Map the .npy files of `folder`, by name; `row` and `label` first."""
    files = sorted(folder.glob("*.npy"), key=lambda file: (file.stem not in ("row", "label"), file.stem))
    return {file.stem: np.load(file, mmap_mode="r") for file in files}


def shard_ranges(num: int, shard: int) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of `shard` samples that cover `num`."""
    for start in range(0, num, shard):
        yield start, min(start + shard, num)
