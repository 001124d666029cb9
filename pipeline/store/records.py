"""What every component records of a sample beside its values: whether the row holds anything, and its file's size."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...cache_specs.errors import CacheError
from ...cache_specs.group import METADATA
from ...cache_specs.schema import ComponentSpec
from .shards import read_shard
from .store import CacheStore

THREADS = 8  # that read small files: from an object store each waits for its answer


def read_valid(store: CacheStore, component: ComponentSpec, index: int) -> np.ndarray:
    """Return `valid` [samples of the range] bool; raise `CacheError` where its shard is damaged."""
    return read_record(store, component, "valid", index)


def read_record(store: CacheStore, component: ComponentSpec, name: str, index: int) -> np.ndarray:
    """Return `valid` or `source_bytes` [samples of the range]; raise `CacheError` where the shard is damaged.

    The shard is read directly: a reader that opens the array for each of some thousand ranges takes minutes.
    """
    layout = next(array for array in component.arrays(store.layout) if array.name == name)
    path = store.path / component.path / layout.name / layout.shard_file(index)
    start, stop = store.layout.sample_range(index)
    chunks, problems = read_shard(path, layout, component.compressor, num_chunks=1)
    if problems:
        raise CacheError(f"{path}: {problems[0]}; delete this file and run the build again")
    values: np.ndarray = chunks.reshape(-1)[: stop - start]
    return values


def read_whole_record(store: CacheStore, component: ComponentSpec, name: str) -> np.ndarray:
    """Return `valid` or `source_bytes` [N]; raise `CacheError` where a shard is missing or damaged."""
    layout = next(array for array in component.arrays(store.layout) if array.name == name)
    folder = store.path / component.path / name
    names = folder.names()  # once: metadata may claim a million shards where there are none
    for index in range(store.layout.num_ranges):
        if layout.shard_file(index) not in names:
            raise CacheError(f"{folder / layout.shard_file(index)}: missing; run the build again")
    with ThreadPoolExecutor(THREADS) as threads:
        parts = threads.map(lambda index: read_record(store, component, name, index), range(store.layout.num_ranges))
        return np.concatenate(list(parts))


def invalid_rows(store: CacheStore, component: ComponentSpec) -> list[int]:
    """Return the rows whose image or values could not be used when their range was encoded."""
    rows: list[int] = []
    for index in range(store.layout.num_ranges):
        start, _ = store.layout.sample_range(index)
        rows += (start + np.flatnonzero(~read_valid(store, component, index))).tolist()
    return rows


def known_bytes(store: CacheStore, paths: Sequence[str], start: int, stop: int) -> np.ndarray:
    """Return the file sizes [stop - start] int64 that the components at `paths` recorded, 0 where none did.

    One component is enough where it has every sample; the others only fill the gaps that its bad images left. One whose
    metadata of the sizes was deleted, as `verify` may have advised, knows none until its own build writes it again.
    """
    known = np.zeros(stop - start, dtype=np.int64)
    for path in paths:
        if known.all():
            break
        if (store.path / path / "source_bytes" / METADATA).size() is None:
            continue
        known = np.where(known == 0, store.read(f"{path}/source_bytes", start, stop), known)
    return known
