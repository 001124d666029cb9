"""A component that an earlier version completed is bound: it gets what a build of today writes beside its shards.

Its shards stay as they are, and so does its fingerprint: what is added says which shards these are. Whether they were
the right ones before, nothing in the cache says.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from ...cache_specs.binding import SHARDS_DIGEST
from ...cache_specs.components import Component
from ...cache_specs.errors import CacheError
from ...cache_specs.group import DIGEST
from ...cache_specs.layout import COMPLETE
from ...cache_specs.storage import Location
from ..store.binding import bind_ranges, binding
from ..store.store import CacheStore


def bind_cache(
    path: str | Path | Location,
    *,
    on_message: Callable[[str], None],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[str]:
    """Bind every finished component of a cache that is not; yield why one cannot be.

    `on_message` gets a line for each component, `on_progress(shards done, shards)` counts those of one. Raises
    `CacheError` where there is no cache, `JobError` where a build of a component is running.
    """
    store = CacheStore.open(path)
    for name in store.components():
        try:
            with store.lock(name):
                on_message(f"{name}: {_bind(store, store.opened(name), on_progress)}")
        except CacheError as error:
            yield str(error)


def _bind(store: CacheStore, component: Component | None, on_progress: Callable[[int, int], None]) -> str:
    """Bind one component; return what became of it."""
    if component is None:
        return "gone"
    if not component.complete or store.missing_ranges(component.spec):
        return "not complete; the build that finishes it binds it"
    bound = SHARDS_DIGEST in component.attributes
    numbers = bind_ranges(store, component.spec, on_progress=on_progress)
    if bound:
        return "was bound"
    before = component.spec.attributes(store.layout)
    results = {key: value for key, value in component.attributes.items() if key not in {*before, COMPLETE, DIGEST}}
    store.complete_component(component.spec, {**results, **binding(store, component.spec, numbers)})
    return f"{numbers.size} shards are bound"
