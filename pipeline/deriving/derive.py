"""`repa-cache derive`: a component made from one that is there, range by range, as a build makes one from images.

source -> fit -> ranges -> shards -> statistics -> complete

What is written is what a build would have written: the same shards, committed range by range, so that a derivation that
was killed at any moment and runs again leaves the same tree. A sample that the source could not use is left out here
too, for the source's reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...cache_specs.components import Component
from ...cache_specs.derived import (
    DEFAULT_SAMPLE,
    FITS,
    MethodRequest,
    derived_spec,
    fit_name,
    read_method,
    stored_width,
)
from ...cache_specs.errors import UsageError, at_least, nearest
from ...cache_specs.schema import FEATURES, ComponentSpec
from ...cache_specs.tables import stored_encoder
from ..store.record import check_writable
from ..store.store import CacheStore
from ..store.token_writer import Tokens, source_of, write_tokens
from .choose import method_of
from .fit import ensure_fit, fit_sources
from .method import Derivation
from .source import StoredSource


@dataclass(frozen=True, kw_only=True)
class DeriveOptions:
    """What `repa-cache derive` is asked."""

    cache: str | Path  # a folder, or a URL of an object store
    source: str
    method: str
    dtype: str = "float16"
    compressor: str = "none"
    sample: int = DEFAULT_SAMPLE

    def __post_init__(self) -> None:
        at_least("--sample", self.sample, 1)


@dataclass(frozen=True, kw_only=True)
class DerivePlan:
    """What would be made: `component` without its weights, which are its fit's, and the finished `sources` of it."""

    store: CacheStore
    method: MethodRequest
    sources: tuple[Component, ...]
    component: ComponentSpec


def plan_derive(options: DeriveOptions) -> DerivePlan:
    """Find the source and resolve what is made of it; reads no token and writes nothing.

    Raises `UsageError` for what cannot be asked, `CacheError` for a source that is not whole, and where the component
    on disk is another.
    """
    store = CacheStore.open(options.cache)
    method = read_method(options.method)
    found_source = find_source(store, options.source)
    source = found_source.spec
    method.check_width(source.path, stored_width(source.spec))
    width = method_of(method).width(stored_width(source.spec))
    component = ComponentSpec(
        kind=FEATURES,
        name=f"{source.path.removeprefix(f'{FEATURES}/')}-{method.suffix}",
        spec=derived_spec(method, source.spec, [source.path], width=width, sample=options.sample),
        weights="",
        precision=source.precision,
        dtype=options.dtype,  # type: ignore[arg-type]  # checked in ComponentSpec.__post_init__, as the next
        compressor=options.compressor,  # type: ignore[arg-type]
    )
    found = store.component(component.path)
    if found is not None:
        store.check_component(found, replace(component, weights=found.weights))
    check_writable(store.path)
    return DerivePlan(store=store, method=method, sources=(found_source,), component=component)


def find_source(store: CacheStore, name: str) -> Component:
    """Return the finished features component that `--from` names, as it lies or as a build was asked for it."""
    present = [path.removeprefix(f"{FEATURES}/") for path in store.components() if path.startswith(f"{FEATURES}/")]
    found = stored_encoder(name.removeprefix(f"{FEATURES}/"), present)
    if found is None or found[1] is not None:
        known = nearest(f"{FEATURES}/{name.removeprefix(f'{FEATURES}/')}", [f"{FEATURES}/{group}" for group in present])
        raise UsageError(f"--from {name}: {store.path} holds no such component; {known}")
    source = source_of(store, f"{FEATURES}/{found[0]}")
    if source.spec.derived is not None:
        made, origin = source.spec.spec["model"], source.spec.derived["from"][0]
        raise UsageError(f"--from {name}: it is {made}; derive from {origin} itself")
    return source


def run_derive(
    options: DeriveOptions,
    *,
    on_start: Callable[[int, int], None],
    on_progress: Callable[[int], None],
    on_message: Callable[[str], None] = lambda line: None,
) -> int:
    """Make what is missing of the component and complete it; return how many samples this call made.

    `on_start(done, total)` and `on_progress(samples)` count samples; `on_message` gets a line before what takes long.
    Raises as `plan_derive` does, and `JobError` where another process makes the same component, or values are not
    finite as stored.
    """
    plan = plan_derive(options)
    store, name = plan.store, fit_name(plan.component.path)
    (source,) = plan.sources
    rows, method = StoredSource(store, source.spec), method_of(plan.method)
    with store.lock(f"{FITS}/{name}"):
        fit = ensure_fit(
            store,
            name,
            plan.method.label,
            method,
            fit_sources(store, [source.spec]),
            options.sample,
            sample=lambda drawn: rows.batches(rows.usable(drawn)),
            on_message=on_message,
        )
        return write_tokens(
            store,
            replace(plan.component, weights=fit.weights),
            source,
            derived_tokens(rows, Derivation(method, fit), store.layout.num_views),
            batch_size=rows.batch_size,
            on_start=on_start,
            on_progress=on_progress,
        )


def derived_tokens(rows: StoredSource, derivation: Derivation, num_views: int) -> Tokens:
    """Return the function from rows to what is made of them."""
    return lambda asked: torch.stack([derivation(rows.read(asked, view)) for view in range(num_views)], dim=1)
