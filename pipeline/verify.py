"""Can this cache be trusted? Every file that must be there is, every checksum holds, every value is finite.

A flipped byte anywhere, in data or index, is found and named by sample; the files to delete, and the command that then
makes them anew, are said at the end.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..cache_specs.errors import CacheError
from ..cache_specs.fingerprint import digest, manifest_fingerprint, transform_fingerprint
from ..cache_specs.layout import ArrayLayout
from ..cache_specs.schema import LATENTS, ComponentSpec
from .shards import read_shard
from .statistics import component_statistics
from .store import DIGEST, METADATA, CacheStore, array_metadata, read_attributes


@dataclass(kw_only=True)
class VerifyReport:
    """What was looked at and what is wrong: one line a problem, and the shard files that a rebuild must replace."""

    num_shards: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged_files: list[Path] = field(default_factory=list)


def verify(path: Path, *, on_progress: Callable[[int, int], None]) -> VerifyReport:
    """Check a whole cache; `on_progress(shards done, shards)` is called as it goes.

    Memory is one shard a CPU core. Raises `CacheError` only where there is no cache to look at.
    """
    store = CacheStore.open(path)
    report = VerifyReport()
    report.problems += _check_attributes(path)
    sample_ids = _check_root(store, report)
    components = []
    for name in store.components():
        report.problems += _check_attributes(path / name)
        try:
            component = store.component(name)
            assert component is not None, name
            report.problems += _check_metadata(store, component)
            components.append(component)
        except CacheError as error:
            report.problems.append(str(error))
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
            report.problems += problems
            if problems and file.exists():
                report.damaged_files.append(file)
            on_progress(done, len(jobs))
    if not report.problems:
        for component in components:
            report.problems += _check_statistics(store, component)
    return report


def _check_attributes(path: Path) -> Iterator[str]:
    attributes = read_attributes(path) or {}
    expected = attributes.pop(DIGEST, None)
    if digest(attributes) != expected:
        yield f"{path / METADATA}: the attributes do not match their digest; the file was changed or is damaged"


def _check_root(store: CacheStore, report: VerifyReport) -> list[str] | None:
    layout = store.layout
    try:
        ids = store.read("sample_id", 0, layout.num_samples).tolist()
        labels = store.read("label", 0, layout.num_samples).tolist()
    except CacheError as error:
        report.problems.append(str(error))
        return None
    manifest = manifest_fingerprint(ids, labels)
    dataset = transform_fingerprint(
        manifest, resolution=layout.resolution, crop=layout.crop, views=layout.views, class_names=layout.class_names
    )
    if (manifest, dataset) != (layout.manifest_fingerprint, layout.dataset_fingerprint):
        report.problems.append(f"{store.path}: sample_id and label do not match the cache's fingerprint")
    return ids


def _check_metadata(store: CacheStore, component: ComponentSpec) -> Iterator[str]:
    where = store.path / component.path
    attributes = read_attributes(where) or {}
    if attributes.get("fingerprint") != component.fingerprint(store.layout):
        yield f"{where}: the fingerprint does not match the spec beside it"
    if not store.is_complete(component.path):
        yield f"{where}: not complete; run the build again to finish it"
    expected = array_metadata(component, store.layout)
    for layout in component.arrays(store.layout):
        file = where / layout.name / METADATA
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            yield f"{file}: cannot be read ({error}); delete {where / layout.name} and run the build again"
            continue
        wrong = [key for key, value in expected[layout.name].items() if found.get(key) != value]
        if wrong:
            yield f"{file}: {wrong[0]} is {found.get(wrong[0])!r}, expected {expected[layout.name][wrong[0]]!r}"


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
        if attributes.get(key) != value:
            kind = "latent statistics" if component.kind == LATENTS else key
            yield f"{store.path / component.path}: {kind} {key} is {attributes.get(key)}, the data give {value}"
