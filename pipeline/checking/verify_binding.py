"""Do these shards belong here? What verify makes of their numbers, and of the file sizes that components recorded.

Checksums hold in a shard that was put in another one's place, and in one of another cache whose images have the same
names. Its number, or the digest of all numbers, is then not what was written when the component was built.
"""

import itertools
from collections.abc import Iterator, Sequence
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
    source_digest,
)
from ...cache_specs.components import Component, other_sizes
from ...cache_specs.errors import CacheError
from ...cache_specs.layout import ArrayLayout
from ...cache_specs.storage import Location
from ..store.records import THREADS, read_whole_record
from ..store.store import CacheStore

Problem = tuple[str, Location | None]  # and the file to delete for it, where that mends it


def binding_problems(store: CacheStore, component: Component, found: Sequence[int | None]) -> Iterator[Problem]:
    """Yield what is wrong with the places of shards, whose numbers as they lie there are `found`.

    These are in the order of the component's arrays, and of the ranges of each; None is of a shard that is missing or
    damaged, which is said elsewhere.
    """
    arrays = component.spec.arrays(store.layout)
    group, path = store.path / component.spec.path, component.spec.path
    shape = (len(arrays), store.layout.num_ranges)
    there = np.array([number is not None for number in found]).reshape(shape).T
    actual = np.array([number or 0 for number in found], dtype=NUMBER).reshape(shape).T
    written, readable = np.zeros_like(actual), np.zeros(len(actual), dtype=bool)
    expected = component.attributes.get(SHARDS_DIGEST)
    layout = checksums_layout(store.layout, len(arrays))
    folder = group / SHARD_CHECKSUMS

    def at(array: str, index: int) -> str:
        start, stop = store.layout.sample_range(index)
        return f"{path}/{array}: samples {start} to {stop - 1}"

    for listed, run in listed_runs(folder, layout, len(actual)):
        if not listed and expected is not None:
            yield missing_line(store, f"{path}/{SHARD_CHECKSUMS}", layout, run), None
        files = [folder / layout.shard_file(index) for index in run if listed]
        for index, file, numbers in zip(run, files, _read_all(files, len(arrays)), strict=False):
            if isinstance(numbers, np.ndarray):
                written[index], readable[index] = numbers, True
            elif isinstance(numbers, CacheError):
                yield f"{at(SHARD_CHECKSUMS, index)}: {numbers}", file
            elif expected is not None:  # gone since the listing
                yield missing_line(store, f"{path}/{SHARD_CHECKSUMS}", layout, [index]), None
    differs = (written != actual) & there & readable[:, None]
    if expected is not None and there.all() and numbers_digest(actual) == expected:
        # The shards are those that the component was completed with: what differs is what was written of them.
        for index in np.flatnonzero(differs.any(axis=1)).tolist():
            file = folder / layout.shard_file(index)
            yield f"{at(SHARD_CHECKSUMS, index)}: {file.name} is not of its shards, which hold", file
        return
    for index, column in np.argwhere(differs).tolist():
        array = arrays[column]
        file = group / array.name / array.shard_file(index)
        meant = np.flatnonzero(readable & (written[:, column] == actual[index, column]))
        whose = f"that of {at(array.name, int(meant[0])).partition(': ')[2]}" if len(meant) else "another one"
        yield f"{at(array.name, index)}: {file.name} is not the shard that was written here, but {whose}", file
    if expected is not None and readable.all() and numbers_digest(written) != expected:
        yield (
            f"{group}: {SHARD_CHECKSUMS} is not what the component was completed with: ranges were replaced together "
            "with their numbers. Restore the component, or remove it and build it again",
            None,
        )


def listed_runs(folder: Location, layout: ArrayLayout, num_ranges: int) -> Iterator[tuple[bool, list[int]]]:
    """Yield whether the shards of the next ranges in a row are in `folder`, which is listed once, and these ranges.

    Metadata may claim a million shards where there are none: nobody looks for one by one.
    """
    names = folder.names()
    for there, run in itertools.groupby(range(num_ranges), key=lambda index: layout.shard_file(index) in names):
        yield there, list(run)


def missing_line(store: CacheStore, array: str, layout: ArrayLayout, run: Sequence[int]) -> str:
    """Return the problem of ranges in a row whose shards are missing: a line, however many they are."""
    (start, _), (_, stop) = store.layout.sample_range(run[0]), store.layout.sample_range(run[-1])
    others = f"and {len(run) - 1} more are" if len(run) > 1 else "is"
    return f"{array}: samples {start} to {stop - 1}: {layout.shard_file(run[0])} {others} missing"


def _read_all(files: Sequence[Location], num_arrays: int) -> Iterator[np.ndarray | CacheError | None]:
    """Yield what `read_numbers` returns or raises for each file."""

    def read(file: Location) -> np.ndarray | CacheError | None:
        try:
            return read_numbers(file, num_arrays)
        except CacheError as error:
            return error

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(read, files)


def source_problems(
    store: CacheStore, components: Sequence[Component], sample_ids: Sequence[str] | None
) -> Iterator[str]:
    """Yield where components were made from other files under the same names, by the sizes that they recorded.

    Components of which a shard is missing or damaged are left out: that is said elsewhere. Memory: 10 bytes a sample.
    """
    size = store.layout.num_samples
    known, owner = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int16)
    for number, component in enumerate(components):
        path = component.spec.path
        try:
            sources = read_whole_record(store, component.spec, "source_bytes")
        except CacheError:
            continue
        expected = component.attributes.get(SOURCE_DIGEST)
        if expected is not None and source_digest(sources) != expected:
            yield f"{store.path / path}: its source_bytes are not those that it was completed with"
        clash = other_sizes(known, sources)
        for other in np.unique(owner[clash]).tolist():
            rows = np.flatnonzero(clash & (owner == other))
            row = int(rows[0])
            named = "" if sample_ids is None else f" ({sample_ids[row]})"
            yield (
                f"{path} and {components[other].spec.path} were made from other images under the same names: the files "
                f"of {len(rows)} samples had other sizes, first sample {row}{named}: {sources[row]} and {known[row]} "
                "bytes. verify with --recompute says which is of the images at hand; remove the other and build it "
                "again"
            )
        fresh = (known == 0) & (sources != 0)
        known[fresh], owner[fresh] = sources[fresh], number
