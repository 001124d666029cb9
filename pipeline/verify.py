"""Can this cache be trusted? Every file that must be there is, every checksum holds, every value is finite.

A flipped byte anywhere, in data or index, is found and named by sample; the files to delete, and the command that then
makes them anew, are said at the end.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..cache_specs.errors import CacheError
from ..cache_specs.fingerprint import digest, manifest_fingerprint, transform_fingerprint
from ..cache_specs.layout import METADATA_CHUNK, ArrayLayout
from ..cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from .shards import read_shard
from .statistics import component_statistics
from .store import DIGEST, METADATA, CacheStore, component_files, read_attributes, root_files


@dataclass(kw_only=True)
class VerifyReport:
    """What was looked at and what is wrong: one line a problem, and the files to delete, which a build makes anew."""

    num_shards: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged_files: list[Path] = field(default_factory=list)

    def add(self, problem: str, file: Path) -> None:
        """Note a problem of one file."""
        self.problems.append(problem)
        if file.exists() and file not in self.damaged_files:
            self.damaged_files.append(file)


def verify(path: Path, *, on_progress: Callable[[int, int], None]) -> VerifyReport:
    """Check a whole cache; `on_progress(shards done, shards)` is called as it goes.

    Memory is one shard a CPU core. Raises `CacheError` only where there is no cache to look at.
    """
    store = CacheStore.open(path)
    report = VerifyReport()
    _check_attributes(report, path)
    _check_files(report, path, root_files(store.layout))
    sample_ids = _check_samples(report, store)
    components = list(_readable_components(report, store))
    jobs = [
        (component, layout, index)
        for component in components
        for layout in component.arrays(store.layout)
        for index in range(store.layout.num_ranges)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        checks = threads.map(lambda job: _check_shard(store, sample_ids, *job), jobs)
        for done, (num_bytes, file, problems) in enumerate(checks, start=1):
            report.num_shards += 1
            report.num_bytes += num_bytes
            for problem in problems:
                report.add(problem, file)
            on_progress(done, len(jobs))
    if not report.problems:
        for component in components:
            report.problems += _check_statistics(store, component)
    return report


def _check_attributes(report: VerifyReport, group: Path) -> None:
    attributes = read_attributes(group) or {}
    expected = attributes.pop(DIGEST, None)
    if digest(attributes) != expected:
        file = group / METADATA
        report.add(f"{file}: the attributes do not match their digest; the file was changed or is damaged", file)


def _check_files(report: VerifyReport, folder: Path, expected: Mapping[str, bytes]) -> None:
    """Compare metadata files with what they must hold; the folder's own attributes have a digest instead."""
    for name, text in expected.items():
        file, wanted = folder / name, json.loads(text)
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            report.add(f"{file}: cannot be read ({error})", file)
            continue
        if name == METADATA and isinstance(found, dict):
            wanted["attributes"] = found.get("attributes")
        if found != wanted:
            report.add(f"{file}: not the metadata of this array or group; the file was changed or is damaged", file)


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


def _readable_components(report: VerifyReport, store: CacheStore) -> Iterator[ComponentSpec]:
    """Yield the components whose metadata can be read, with what is wrong in it noted."""
    for group in sorted(folder for kind in (LATENTS, FEATURES) for folder in (store.path / kind).glob("*/")):
        file = group / METADATA
        name = f"{group.parent.name}/{group.name}"
        try:
            component = store.component(name)
            if component is None:
                report.add(f"{file}: missing; run the build of {group.name} again", file)
                continue
            _check_attributes(report, group)
            expected = component_files(component, store.layout)
        except CacheError as error:
            report.add(str(error), file)
            continue
        _check_files(report, group, expected)
        if (read_attributes(group) or {}).get("fingerprint") != component.fingerprint(store.layout):
            report.add(f"{file}: the fingerprint does not match the spec beside it", file)
        if not store.is_complete(name):
            report.problems.append(f"{group}: not complete; run the build again to finish it")
        yield component


def _check_shard(
    store: CacheStore, sample_ids: list[str] | None, component: ComponentSpec, layout: ArrayLayout, index: int
) -> tuple[int, Path, list[str]]:
    file = store.path / component.path / layout.name / layout.shard_file(index)
    start, stop = store.layout.sample_range(index)
    where = f"{component.path}/{layout.name}"
    if not file.exists():
        return 0, file, [f"{where}: samples {start} to {stop - 1}: {file.name} is missing"]
    try:
        chunks, damaged = read_shard(file, layout, component.compressor, num_chunks=layout.num_chunks(stop - start))
    except CacheError as error:
        return 0, file, [f"{where}: samples {start} to {stop - 1}: {error}"]
    num_bytes = file.stat().st_size
    if len(layout.inner) == 1:
        return num_bytes, file, [f"{where}: samples {start} to {stop - 1}: {reason}" for reason in damaged.values()]

    def name(chunk: int) -> str:
        sample, view = divmod(chunk, store.layout.num_views)
        row = start + sample
        known = "" if sample_ids is None else f" ({sample_ids[row]})"
        return f"{where}: sample {row}{known}, view {store.layout.views[view]}"

    rows = layout.num_chunks(stop - start)
    problems = [f"{name(chunk)}: {reason}" for chunk, reason in damaged.items()]
    if chunks.dtype.kind == "f":
        finite = np.isfinite(chunks[:rows]).reshape(rows, -1).all(axis=1)
        problems += [f"{name(int(chunk))}: values are not finite" for chunk in np.flatnonzero(~finite)]
    return num_bytes, file, problems


def _check_statistics(store: CacheStore, component: ComponentSpec) -> Iterator[str]:
    attributes = read_attributes(store.path / component.path) or {}
    for key, value in component_statistics(store, component).items():
        # Another machine's numpy may add in another order; nothing that is damaged is this close.
        if not np.allclose(attributes.get(key, math.nan), value, rtol=1e-9, atol=1e-12):
            yield f"{store.path / component.path}: {key} is {attributes.get(key)}, the data give {value}"
