"""The end of a component: its statistics and the reasons of its bad files are taken, then `complete` is written."""

from collections.abc import Mapping
from typing import Any

from ...cache_specs.errors import JobError
from ...cache_specs.layout import BAD_FILES
from ...cache_specs.schema import ComponentSpec
from ..images.decode import decode_batch
from ..images.manifest import Manifest
from .binding import bind_ranges, binding
from .records import invalid_rows, known_bytes
from .statistics import component_statistics
from .store import CacheStore


def complete_component(
    store: CacheStore, component: ComponentSpec, manifest: Manifest, reasons: Mapping[int, str]
) -> dict[str, Any]:
    """Complete a component that has all its ranges; return what was written beside `complete`.

    `reasons` are those found by this build, by row. Raises `JobError` where a row was left out that could be used now.
    """
    return complete_without(store, component, _bad_files(store, component, manifest, reasons))


def complete_without(store: CacheStore, component: ComponentSpec, bad: Mapping[str, str]) -> dict[str, Any]:
    """Complete a component that has all its ranges; `bad` says by sample id why a row is not valid."""
    results = component_statistics(store, component)
    if bad:
        results[BAD_FILES] = dict(bad)
    results |= binding(store, component, bind_ranges(store, component))
    store.complete_component(component, results)
    return results


def _bad_files(
    store: CacheStore, component: ComponentSpec, manifest: Manifest, reasons: Mapping[int, str]
) -> dict[str, str]:
    """Return the reason by sample id of every row that is not valid.

    Files of which this build knows nothing are looked at once more: the build that left them out was killed, or their
    range is older. One that can be used now has its range taken back.
    """
    others = [other for other in store.components() if other != component.path and store.is_complete(other)]
    found: dict[str, str] = {}
    usable: list[int] = []
    for row in invalid_rows(store, component):
        sample_id = str(manifest.sample_ids[row])
        if row in reasons:
            found[sample_id] = reasons[row]
            continue
        expected = known_bytes(store, others, row, row + 1)
        batch = decode_batch(manifest.source, [sample_id], store.layout.resolution, expected)
        if batch.passing:
            raise JobError(f"{component.path}: {sample_id} {batch.bad[0]}, so it is not known why it was left out")
        if batch.bad:
            found[sample_id] = batch.bad[0]
        else:
            usable.append(row)
    if usable:
        ranges = {row // store.layout.shard_samples for row in usable}
        store.take_back(component, ranges)
        raise JobError(
            f"{component.path}: {manifest.sample_ids[usable[0]]} was left out, and can be used now "
            f"({len(usable)} such images; their {len(ranges)} ranges are to be encoded again)"
        )
    return found
