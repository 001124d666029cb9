"""`repa-cache derive`: a component made from one that is there, range by range, as a build makes one from images.

source -> fit -> ranges -> shards -> statistics -> complete

What is written is what a build would have written: the same shards, committed range by range, so that a derivation that
was killed at any moment and runs again leaves the same tree. A sample that the source could not use is left out here
too, for the source's reason.
"""

from collections.abc import Callable, Sequence
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
from ...cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from ...cache_specs.tables import stored_encoder
from ..store.binding import check_images
from ..store.record import check_writable
from ..store.store import CacheStore
from ..store.token_writer import Tokens, source_of, write_tokens
from .choose import method_of
from .fit import ensure_fit, stored_sources
from .method import Derivation, Fitting, Method
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
    latents: str | None = None

    def __post_init__(self) -> None:
        at_least("--sample", self.sample, 1)


@dataclass(frozen=True, kw_only=True)
class DerivePlan:
    """What would be made of the finished `sources`, features first.

    `component` is without its weights, which are its fit's, and None where a fit called `name` is all that is made.
    """

    store: CacheStore
    request: MethodRequest
    method: Fitting
    sources: tuple[Component, ...]
    name: str
    component: ComponentSpec | None

    def rows(self) -> StoredSource:
        """Open what is read."""
        return StoredSource(self.store, *(source.spec for source in self.sources))


def plan_derive(options: DeriveOptions) -> DerivePlan:
    """Find the sources and resolve what is made of them; reads no token and writes nothing.

    Raises `UsageError` for what cannot be asked, `CacheError` for a source that is not whole, and where the component
    on disk is another.
    """
    store = CacheStore.open(options.cache)
    request = read_method(options.method)
    method = method_of(request)
    sources = [find_source(store, options.source)]
    source = sources[0].spec
    if method.latents:
        sources.append(find_latents(store, sources[0], options.latents))
    elif options.latents is not None:
        raise UsageError(f"--latents {options.latents}: {request.label} reads none; leave it out")
    component = None
    if isinstance(method, Method):
        component = _component(options, request, method, [found.spec for found in sources])
        found = store.component(component.path)
        if found is not None:
            store.check_component(found, replace(component, weights=found.weights))
    check_writable(store.path)
    name = f"{source.path.removeprefix(f'{FEATURES}/')}-{request.suffix}"
    return DerivePlan(
        store=store,
        request=request,
        method=method,
        sources=tuple(sources),
        name=name if component is None else fit_name(component.path),
        component=component,
    )


def _component(
    options: DeriveOptions, request: MethodRequest, method: Method, sources: Sequence[ComponentSpec]
) -> ComponentSpec:
    source = sources[0]
    if source.derived is not None:
        made, origin = source.spec["model"], source.derived["from"][0]
        raise UsageError(f"--from {options.source}: it is {made}; derive from {origin} itself")
    request.check_width(source.path, stored_width(source.spec))
    width = method.width(stored_width(source.spec))
    paths = [found.path for found in sources]
    return ComponentSpec(
        kind=FEATURES,
        name=f"{source.path.removeprefix(f'{FEATURES}/')}-{request.suffix}",
        spec=derived_spec(request, source.spec, paths, width=width, sample=options.sample),
        weights="",
        precision=source.precision,
        dtype=options.dtype,  # type: ignore[arg-type]  # checked in ComponentSpec.__post_init__, as the next
        compressor=options.compressor,  # type: ignore[arg-type]
    )


def find_source(store: CacheStore, name: str) -> Component:
    """Return the finished features component that `--from` names, as it lies or as a build was asked for it."""
    present = [path.removeprefix(f"{FEATURES}/") for path in store.components() if path.startswith(f"{FEATURES}/")]
    found = stored_encoder(name.removeprefix(f"{FEATURES}/"), present)
    if found is None or found[1] is not None:
        known = nearest(f"{FEATURES}/{name.removeprefix(f'{FEATURES}/')}", [f"{FEATURES}/{group}" for group in present])
        raise UsageError(f"--from {name}: {store.path} holds no such component; {known}")
    return source_of(store, f"{FEATURES}/{found[0]}")


def find_latents(store: CacheStore, features: Component, name: str | None) -> Component:
    """Return the finished latents `name`, or the only ones, for a method that reads them beside the features.

    Raises `UsageError` where a token has no whole patch of them, or not every image of the features is in them.
    """
    present = [path.removeprefix(f"{LATENTS}/") for path in store.components() if path.startswith(f"{LATENTS}/")]
    if name is None and len(present) != 1:
        has = f"several: {', '.join(present)}; choose with --latents" if present else "no latents, which this needs"
        raise UsageError(f"{store.path} holds {has}")
    asked = present[0] if name is None else name.removeprefix(f"{LATENTS}/")
    if asked not in present:
        raise UsageError(f"--latents {name}: {store.path} holds no such latents; {nearest(asked, present)}")
    latents = source_of(store, f"{LATENTS}/{asked}")
    size, grid = latents.spec.spec["latent_size"], features.spec.spec["grid"]
    if size[0] % grid[0] or size[1] % grid[1] or size[0] // grid[0] != size[1] // grid[1]:
        raise UsageError(
            f"{latents.spec.path} are {size[0]} x {size[1]}, no whole patches for {grid[0]} x {grid[1]} tokens of "
            f"{features.spec.path}"
        )
    lacking = sorted(latents.bad_files.keys() - features.bad_files.keys())
    if lacking:
        raise UsageError(
            f"{latents.spec.path} lack {len(lacking)} images that {features.spec.path} has ({lacking[0]}); build them "
            "anew of mended images"
        )
    check_images(store, [latents.spec.path, features.spec.path])
    return latents


def run_derive(
    options: DeriveOptions,
    *,
    on_start: Callable[[int, int], None],
    on_progress: Callable[[int], None],
    on_message: Callable[[str], None] = lambda line: None,
) -> int:
    """Make what is missing of the component and complete it; return how many samples this call made.

    Of a fit that is all that is asked for, it is the images that it was made of. `on_start(done, total)` and
    `on_progress(samples)` count samples; `on_message` gets a line before what takes long. Raises as
    `plan_derive` does, and `JobError` where another process makes the same, or values are not finite as stored.
    """
    plan = plan_derive(options)
    store, method, rows = plan.store, plan.method, plan.rows()
    num_views = store.layout.num_views if method.whole else 1
    with store.lock(f"{FITS}/{plan.name}"):
        if method.whole:
            on_start(0, store.layout.num_samples * num_views)
        fit = ensure_fit(
            store,
            plan.name,
            plan.request.label,
            method,
            stored_sources(store, plan.sources),
            options.sample,
            sample=lambda drawn: rows.batches(rows.usable(drawn), num_views),
            on_message=on_message,
            on_images=on_progress if method.whole else lambda num: None,
        )
        if plan.component is None or not isinstance(method, Method):
            return fit.sample["images"]
        return write_tokens(
            store,
            replace(plan.component, weights=fit.weights),
            plan.sources[0],
            derived_tokens(rows, Derivation(method, fit), store.layout.num_views),
            batch_size=rows.batch_size,
            on_start=on_start,
            on_progress=on_progress,
        )


def derived_tokens(rows: StoredSource, derivation: Derivation, num_views: int) -> Tokens:
    """Return the function from rows to what is made of them."""
    return lambda asked: torch.stack([derivation(rows.read(asked, view)) for view in range(num_views)], dim=1)
