"""What ties a component's shards to their places and to its images: written, made up for, and compared (README.md).

A build writes a range's numbers as it commits it. Ranges of an earlier version have none: their shards are read once,
every checksum compared, before the component is completed or where `repa-cache bind` asks for it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...cache_specs.binding import (
    NUMBER,
    SHARD_CHECKSUMS,
    SHARDS_DIGEST,
    SOURCE_DIGEST,
    checksums_layout,
    numbers_digest,
    read_numbers,
    shard_number,
    source_digest,
)
from ...cache_specs.components import Component, check_same_images
from ...cache_specs.errors import CacheError
from ...cache_specs.layout import ArrayLayout
from ...cache_specs.schema import ComponentSpec
from .records import THREADS, read_whole_record
from .shards import iter_chunks
from .store import CacheStore


def number_of(store: CacheStore, component: ComponentSpec, layout: ArrayLayout, index: int) -> int:
    """Return the number of a shard as it lies there, its checksums compared; raise `CacheError` naming a damaged one.

    Memory is one chunk.
    """
    start, stop = store.layout.sample_range(index)
    path = store.path / component.path / layout.name / layout.shard_file(index)
    checksums = bytearray()
    rows = layout.num_chunks(stop - start)
    for _, found in iter_chunks(path, layout, component.compressor, num_chunks=rows, checksums=checksums):
        if isinstance(found, str):
            raise CacheError(f"{path}: {found}; delete this file and run the build again")
    return shard_number(checksums)


def unbound(component: Component) -> bool:
    """Say whether a component was completed by a version that tied no shard to its place."""
    return component.complete and SHARDS_DIGEST not in component.attributes


def unbound_ranges(store: CacheStore, component: ComponentSpec) -> list[int]:
    """Return the ranges whose numbers were not written."""
    layout = checksums_layout(store.layout, len(component.arrays(store.layout)))
    names = (store.path / component.path / SHARD_CHECKSUMS).names()
    return [index for index in range(store.layout.num_ranges) if layout.shard_file(index) not in names]


def stored_numbers(store: CacheStore, component: ComponentSpec, ranges: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the numbers [arrays] uint32 of each of these ranges; raise `CacheError` where one is missing or damaged."""
    num_arrays = len(component.arrays(store.layout))
    layout = checksums_layout(store.layout, num_arrays)
    folder = store.path / component.path / SHARD_CHECKSUMS

    def read(index: int) -> np.ndarray:
        file = folder / layout.shard_file(index)
        numbers = read_numbers(file, num_arrays)
        if numbers is None:
            raise CacheError(f"{file}: missing; run the build again")
        return numbers

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(read, ranges)


def bind_ranges(
    store: CacheStore, component: ComponentSpec, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> np.ndarray:
    """Return the numbers [ranges, arrays] uint32 of all shards, those that were not written from the shards themselves.

    They are written once all of them agree with the component's digest, where it has one already: raises `CacheError`
    where they do not, and where a shard is damaged. `on_progress(shards done, shards)` counts what is read.
    """
    arrays = component.arrays(store.layout)
    unbound = unbound_ranges(store, component)
    numbers = np.zeros((store.layout.num_ranges, len(arrays)), dtype=NUMBER)
    bound = sorted(set(range(store.layout.num_ranges)) - set(unbound))
    for index, found in zip(bound, stored_numbers(store, component, bound), strict=True):
        numbers[index] = found
    places = [(index, column) for index in unbound for column in range(len(arrays))]
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as threads:
        for first in range(0, len(places), cores):  # not all at once: a large cache has a million shards
            part = places[first : first + cores]
            read = threads.map(lambda place: number_of(store, component, arrays[place[1]], place[0]), part)
            for place, number in zip(part, read, strict=True):
                numbers[place] = number
            on_progress(first + len(part), len(places))
    opened = store.opened(component.path)
    expected = None if opened is None else opened.attributes.get(SHARDS_DIGEST)
    if expected is not None and expected != numbers_digest(numbers):
        raise CacheError(
            f"{store.path}: {component.path}: its shards are not those that it was completed with; repa-cache verify "
            "names them where it can. Restore the component, or remove it and build it again"
        )
    for index in unbound:
        store.write_numbers(component, index, numbers[index].tolist())
    return numbers


def lacks_numbers(store: CacheStore, component: ComponentSpec) -> bool:
    """Say whether a finished component has lost numbers; one of an earlier version never had any."""
    opened = store.opened(component.path)
    return opened is not None and SHARDS_DIGEST in opened.attributes and bool(unbound_ranges(store, component))


def binding(store: CacheStore, component: ComponentSpec, numbers: np.ndarray) -> dict[str, str]:
    """Return the attributes that tie a component to its images and shards, given all numbers [ranges, arrays]."""
    return {
        SOURCE_DIGEST: source_digest(read_whole_record(store, component, "source_bytes")),
        SHARDS_DIGEST: numbers_digest(numbers),
    }


def check_images(store: CacheStore, paths: Iterable[str]) -> None:
    """Raise `CacheError` where two of these components were made from other images under the same names."""
    opened = [component for path in dict.fromkeys(paths) if (component := store.opened(path)) is not None]
    by_path = {component.spec.path: component.spec for component in opened}
    check_same_images(store.path, opened, lambda path, _: read_whole_record(store, by_path[path], "source_bytes"))
