"""Can this cache be trusted? Every file that must be there is, every checksum holds, every value is finite.

A flipped byte anywhere, in data or index, is found and named by sample, and so is a shard that is whole and belongs
elsewhere; the files to delete, and the command that then makes them anew, are said at the end. Whether the shards of a
component are its own is checked in verify_binding.py, of numbers that are taken here as chunks are read.
"""

import math
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...cache_specs.binding import SHARD_CHECKSUMS, SHARDS_DIGEST, shard_number
from ...cache_specs.components import Component, check_fingerprint, check_place
from ...cache_specs.derived import FITS, Fit
from ...cache_specs.errors import CacheError
from ...cache_specs.files.outside import parse_json
from ...cache_specs.fingerprint import manifest_fingerprint, transform_fingerprint
from ...cache_specs.group import METADATA, check_digest, group_attributes
from ...cache_specs.layout import COMPLETE, METADATA_CHUNK, ArrayLayout
from ...cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from ...cache_specs.storage import Location
from ..store.binding import unbound
from ..store.metadata import component_files, fit_files, fits_file, root_files
from ..store.shards import iter_chunks
from ..store.statistics import component_statistics
from ..store.store import CacheStore
from .verify_binding import binding_problems, listed_runs, missing_line, source_problems
from .verify_fits import fit_notes, fit_problems, stored_fits

CONSOLIDATED = "consolidated_metadata"  # key of Zarr's own for a copy of the metadata of all arrays below


@dataclass(kw_only=True)
class VerifyReport:
    """What was looked at and what is wrong: one line a problem, and the files to delete, which a build makes anew.

    `notes` are no problems: what could not be checked, and why.
    """

    num_shards: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged_files: dict[Location, None] = field(default_factory=dict)  # a set in the order in which they were found

    def add(self, problem: str, file: Location | None) -> None:
        """Note a problem, and the file to delete for it."""
        self.problems.append(problem)
        if file is not None and file not in self.damaged_files and file.exists():
            self.damaged_files[file] = None


def verify(path: str | Path | Location, *, on_progress: Callable[[int, int], None]) -> VerifyReport:
    """Check a whole cache; `on_progress(shards done, shards)` is called as it goes.

    Memory is one inner chunk a CPU core. Raises `CacheError` only where there is no cache to look at.
    """
    store = CacheStore.open(path)
    report = VerifyReport()
    _check_files(report, store.path, root_files(store.layout))
    sample_ids = _check_samples(report, store)
    opened = list(_readable_components(report, store))
    components = [component.spec for component in opened]
    arrays = [(component, layout) for component in components for layout in component.arrays(store.layout)]
    num_shards = len(arrays) * store.layout.num_ranges
    numbers: dict[str, list[int | None]] = {component.path: [] for component in components}
    for found in _shard_checks(store, sample_ids, arrays):
        report.num_shards += len(found.numbers)
        report.num_bytes += found.num_bytes
        for problem in found.problems:
            report.add(problem, found.file)
        numbers[found.path] += found.numbers
        on_progress(report.num_shards, num_shards)
    for component in opened:
        if unbound(component):
            bind = f"repa-cache bind {shlex.quote(str(path))}"
            report.notes.append(f"{component.spec.path}: nothing ties its shards to their places: {bind} adds that")
            continue
        for problem, file in binding_problems(store, component, numbers[component.spec.path]):
            report.add(problem, file)
    report.problems += source_problems(store, opened, sample_ids)
    _check_fits(report, store, components)
    if not report.problems:
        for spec in components:
            report.problems += _check_statistics(store, spec)
    return report


def _check_files(report: VerifyReport, folder: Location, expected: Mapping[str, bytes]) -> None:
    """Compare metadata files with what they must hold; the folder's own attributes have a digest instead."""
    for name, text in expected.items():
        file, wanted = folder / name, parse_json(text)
        try:
            found = parse_json(file.read() or b"")
        except (CacheError, ValueError) as error:
            report.add(f"{file}: cannot be read ({error})", file)
            continue
        if name == METADATA and isinstance(found, dict):
            wanted["attributes"] = found.get("attributes")
        if isinstance(found, dict) and found != wanted and {**wanted, CONSOLIDATED: found.get(CONSOLIDATED)} == found:
            report.add(
                f"{file}: holds a copy of all other metadata, by zarr.consolidate_metadata, which no build keeps true",
                file,
            )
        elif found != wanted:
            report.add(f"{file}: not the metadata of this array or group; the file was changed or is damaged", file)


def _check_fits(report: VerifyReport, store: CacheStore, components: Sequence[ComponentSpec]) -> None:
    fits: dict[str, Fit] = {}
    for name, fit in stored_fits(store):
        group = store.path / FITS / name
        if isinstance(fit, CacheError):
            report.add(str(fit), group / METADATA)
            continue
        fits[name] = fit
        _check_files(report, group, {file: data for file, data in fit_files(fit).items() if METADATA in file})
    if fits:
        _check_files(report, store.path / FITS, {METADATA: fits_file()})
    report.problems += fit_problems(store, components, fits)
    report.notes += fit_notes(store, components, fits)


def _check_samples(report: VerifyReport, store: CacheStore) -> list[str] | None:
    """Check ids and labels; return the ids, None where some cannot be read."""
    layout = store.layout
    columns: dict[str, list[Any]] = {"sample_id": [], "label": []}
    for name, values in columns.items():
        for chunk, start in enumerate(range(0, layout.num_samples, METADATA_CHUNK)):
            file = store.path / name / "c" / str(chunk)
            stop = min(start + METADATA_CHUNK, layout.num_samples)
            try:
                if not file.exists():
                    raise CacheError(f"{file}: {name} of samples {start} to {stop - 1} is missing")
                values += store.read(name, start, stop).tolist()
            except CacheError as error:
                report.add(str(error), file)
    if any(len(values) < layout.num_samples for values in columns.values()):
        return None
    ids, labels = columns.values()
    manifest = manifest_fingerprint(ids, labels)
    dataset = transform_fingerprint(
        manifest, resolution=layout.resolution, crop=layout.crop, views=layout.views, class_names=layout.class_names
    )
    if (manifest, dataset) != (layout.manifest_fingerprint, layout.dataset_fingerprint):
        report.problems.append(f"{store.path}: sample_id and label do not match the cache's fingerprint")
    return ids


def _readable_components(report: VerifyReport, store: CacheStore) -> Iterator[Component]:
    """Yield the components whose metadata can be read, with what is wrong in it noted.

    Attributes that do not hold are left out: nothing is compared with them.
    """
    for name in [f"{kind}/{name}" for kind in (LATENTS, FEATURES) for name in sorted((store.path / kind).names())]:
        if METADATA in name:  # the kind's own, checked with the root's
            continue
        group = store.path / name
        file = group / METADATA
        try:
            attributes = group_attributes(group)
            if attributes is None:
                report.add(f"{file}: missing; run the build of {group.name} again", file)
                continue
            component = ComponentSpec.from_attributes(attributes, str(group))
            expected = component_files(component, store.layout)
        except CacheError as error:
            report.add(str(error), file)
            continue
        if component.path == name and not attributes.get(COMPLETE):
            report.problems.append(f"{group}: not complete; run the build again to finish it")
        try:
            check_digest(attributes, group)
            check_fingerprint(component, attributes, store.path, store.layout)
        except CacheError as error:
            report.add(str(error), file)
            attributes = {}
        try:
            check_place(component, store.path, name)
        except CacheError as error:
            if attributes:  # else it may be the name that is damaged
                report.add(str(error), None)
            continue
        numbers = f"{SHARD_CHECKSUMS}/{METADATA}"
        if SHARDS_DIGEST not in attributes and not (group / numbers).exists():
            del expected[numbers]  # of an earlier version, or begun by one
        _check_files(report, group, expected)
        yield Component(component, attributes)


@dataclass(frozen=True, kw_only=True)
class _ShardCheck:
    """What a shard, or a run of shards that are missing, is found to be.

    `numbers` tie each to its place, None where something is wrong with it.
    """

    path: str  # the component's
    numbers: list[int | None]
    problems: list[str]
    file: Location | None = None
    num_bytes: int = 0


def _shard_checks(
    store: CacheStore, sample_ids: list[str] | None, arrays: list[tuple[ComponentSpec, ArrayLayout]]
) -> Iterator[_ShardCheck]:
    """Yield what is found of every shard of `arrays`, in order, checked on every CPU core."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=cores) as threads:
        ahead: deque[Future[_ShardCheck]] = deque()
        for check in _checks(store, sample_ids, arrays):
            ahead.append(threads.submit(check))
            if len(ahead) == 2 * cores:  # not all at once: a large cache has a million shards
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _checks(
    store: CacheStore, sample_ids: list[str] | None, arrays: list[tuple[ComponentSpec, ArrayLayout]]
) -> Iterator[Callable[[], _ShardCheck]]:
    for component, layout in arrays:
        array = f"{component.path}/{layout.name}"
        for there, run in listed_runs(store.path / array, layout, store.layout.num_ranges):
            if there:
                yield from (partial(_check_shard, store, sample_ids, component, layout, index) for index in run)
            else:
                line = missing_line(store, array, layout, run)
                yield partial(_ShardCheck, path=component.path, numbers=[None] * len(run), problems=[line])


def _check_shard(
    store: CacheStore, sample_ids: list[str] | None, component: ComponentSpec, layout: ArrayLayout, index: int
) -> _ShardCheck:
    file = store.path / component.path / layout.name / layout.shard_file(index)
    start, stop = store.layout.sample_range(index)
    where = f"{component.path}/{layout.name}"

    def found(num_bytes: int, problems: list[str], number: int | None = None) -> _ShardCheck:
        return _ShardCheck(path=component.path, numbers=[number], problems=problems, file=file, num_bytes=num_bytes)

    num_bytes = file.size()
    if num_bytes is None:
        return found(0, [missing_line(store, where, layout, [index])])

    def name(chunk: int) -> str:
        if len(layout.inner) == 1:
            return f"{where}: samples {start} to {stop - 1}"
        sample, view = divmod(chunk, layout.num_views)
        row = start + sample
        known = "" if sample_ids is None else f" ({sample_ids[row]})"
        return f"{where}: sample {row}{known}, view {store.layout.views[view]}"

    rows = layout.num_chunks(stop - start)
    problems, checksums = [], bytearray()
    try:
        for chunk, values in iter_chunks(file, layout, component.compressor, num_chunks=rows, checksums=checksums):
            if isinstance(values, str):
                problems.append(f"{name(chunk)}: {values}")
            elif chunk < rows and not all_finite(values):
                problems.append(f"{name(chunk)}: values are not finite")
    except CacheError as error:
        return found(0, [*problems, f"{where}: samples {start} to {stop - 1}: {error}"])
    return found(num_bytes, problems, None if problems else shard_number(checksums))


def all_finite(values: np.ndarray) -> bool:
    """Return whether no value of the contiguous array `values` is NaN or infinite; integers always are finite."""
    if values.dtype == np.float16:
        # numpy has no float16 arithmetic: looking at the exponent, all ones where not finite, is several times faster.
        exponent = np.uint16(0x7C00)
        return bool((values.view(np.uint16) & exponent).max() != exponent)
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _check_statistics(store: CacheStore, component: ComponentSpec) -> Iterator[str]:
    attributes = group_attributes(store.path / component.path) or {}
    for key, value in component_statistics(store, component).items():
        # Another machine's numpy may add in another order; nothing that is damaged is this close.
        if not np.allclose(attributes.get(key, math.nan), value, rtol=1e-9, atol=1e-12):
            yield f"{store.path / component.path}: {key} is {attributes.get(key)}, the data give {value}"
