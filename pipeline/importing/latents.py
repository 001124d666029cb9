"""Import: somebody's precomputed latents become a component of a cache, in the pipeline's own unit of work.

What is written is what a build would have written: the same shards, float16, committed range by range, so that an
import killed at any moment and run again leaves the same tree.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...cache_specs.files.asked import forget, remember
from ..store.binding import bind_ranges, lacks_numbers
from ..store.complete import complete_component
from ..store.component_writer import ComponentWriter
from ..store.records import known_bytes
from ..store.store import CacheStore
from .plan import ImportOptions, ImportPlan
from .source import BadLatent

BATCH = 64  # rows converted and appended at a time: memory, and nothing else
THREADS = 4  # that read rows: a file a sample waits for the disk, and no more than that of the CPU


@dataclass(kw_only=True)
class ImportReport:
    """What an import did: samples written by this run, and why others could not be, by row."""

    num_samples: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)


def run_import(
    options: ImportOptions,
    plan: ImportPlan,
    *,
    on_start: Callable[[int, int], None],
    on_progress: Callable[[int], None],
) -> ImportReport:
    """Write what is missing of the component and complete it.

    `on_start(done, total)` and `on_progress(samples)` count samples. A range with a sample that cannot be used is not
    written, the others are; the reasons are in the report.
    """
    store = CacheStore.create_or_open(options.cache, plan.layout, plan.source.manifest)
    component = plan.component
    report = ImportReport()
    with store.lock(component.path), ThreadPoolExecutor(THREADS, thread_name_prefix="import") as threads:
        store.create_component(component)
        store.reopen_component(component)
        if options.words:
            remember(store.partial, component.path, options.words)
        missing = store.missing_ranges(component)
        left = sum(stop - start for start, stop in map(plan.layout.sample_range, missing))
        on_start(plan.layout.num_samples - left, plan.layout.num_samples)
        others = [path for path in store.components() if path != component.path and store.is_complete(path)]
        for index in missing:
            start, stop = plan.layout.sample_range(index)
            bad = _import_range(store, plan, threads, index, known_bytes(store, others, start, stop))
            report.bad |= bad
            report.num_samples += 0 if bad else stop - start
            on_progress(stop - start)
        if lacks_numbers(store, component):
            bind_ranges(store, component)
        elif not report.bad and not store.is_complete(component.path):
            report.statistics = complete_component(store, component, plan.source.manifest, {})
        if store.is_complete(component.path):
            forget(store.partial, component.path)
    return report


def _import_range(
    store: CacheStore, plan: ImportPlan, threads: ThreadPoolExecutor, index: int, expected_bytes: np.ndarray
) -> dict[int, str]:
    """Write one range, unless some of its samples cannot be used: return their reasons by row."""
    start, stop = plan.layout.sample_range(index)
    writer = ComponentWriter(store, plan.component, index)
    bad: dict[int, str] = {}

    def read(row: int) -> tuple[np.ndarray, int] | str:
        try:
            stored = plan.source.read(row)
            values = plan.reading.convert(stored)
            num_bytes = plan.source.source_bytes(row, stored)
        except BadLatent as error:
            return str(error)
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        known = expected_bytes[row - start]
        if known not in (0, num_bytes):
            return f"the file has {num_bytes} bytes, and had {known} when another component of this cache was built"
        with np.errstate(over="ignore"):  # too large for float16: the writer finds it and says so
            return values.astype(np.float16), num_bytes

    try:
        for rows in _batches(start, stop):
            found = list(threads.map(read, rows))
            bad |= {row: item for row, item in zip(rows, found, strict=True) if isinstance(item, str)}
            if bad:
                continue
            values, sizes = zip(*(item for item in found if not isinstance(item, str)), strict=True)
            not_finite = writer.append(
                {"moments": np.stack(values)}, bad=(), source_bytes=np.array(sizes, dtype=np.int64)
            )
            bad |= {rows[offset]: reason for offset, reason in not_finite.items()}
        if not bad:
            writer.commit()
    finally:
        writer.abandon()
    return bad


def _batches(start: int, stop: int) -> Iterator[Sequence[int]]:
    for first in range(start, stop, BATCH):
        yield range(first, min(first + BATCH, stop))
