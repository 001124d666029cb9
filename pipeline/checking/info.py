"""What is in a cache, as text: components, shapes, bytes, fingerprints, and what is still missing."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from ...cache_specs.components import Component
from ...cache_specs.errors import CacheError
from ...cache_specs.layout import CacheLayout
from ...cache_specs.schema import describe
from ...cache_specs.sizes import human_bytes
from ..store.binding import unbound
from ..store.store import CacheStore


def info_lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of `repa-cache info`; raise `CacheError` where there is none, or it does not hold."""
    store = CacheStore.open(path)
    layout = store.layout
    yield (
        f"{path}: {layout.num_samples} samples, {len(layout.class_names)} classes, {layout.resolution} px, "
        f"views {' + '.join(layout.views)}, {layout.num_ranges} shards of {layout.shard_samples}"
    )
    yield f"dataset {layout.dataset_fingerprint}"
    names = store.components()
    damaged: CacheError | None = None
    for name in names:
        try:
            component = store.opened(name)
        except CacheError as error:  # the others are told all the same
            damaged = damaged or error
            continue
        if component is not None:
            yield ""
            yield from _component_lines(store, component)
    if damaged is not None:
        raise damaged
    if not names:
        yield "no components yet; add one with repa-cache build"


def _component_lines(store: CacheStore, opened: Component) -> Iterator[str]:
    component, attributes = opened.spec, opened.attributes
    missing = store.missing_ranges(component)
    complete = opened.complete and not missing
    yield f"{component.path}: {'complete' if complete else 'INCOMPLETE'}"
    yield f"  {component.spec['loader']} {component.spec['model']}, weights {component.weights}, {component.precision}"
    if component.imported is not None:
        images = "with its images" if component.imported["images"] else "without images"
        yield f"  imported from the layout {component.imported['layout']}, {images}"
    if component.tokens is not None:
        tokens = component.tokens
        yield f"  tokens after block {tokens['block']} at t {tokens['t']:g}, null label, of {tokens['from']}"
    yield f"  fingerprint {attributes.get('fingerprint')}"
    for name, shape, size in describe(component, store.layout):
        yield f"  {name:<13} {shape:<32} {human_bytes(size)}"
    if "latent_mean" in attributes:
        yield f"  latent mean {_numbers(attributes['latent_mean'])} std {_numbers(attributes['latent_std'])}"
    if "float16_error" in attributes:
        yield f"  float16 moves a channel's mean by at most {attributes['float16_error']:.2g} of its std"
    if opened.bad_files:
        yield f"  {len(opened.bad_files)} bad files left out:"
        yield from (f"    {sample_id}: {reason}" for sample_id, reason in opened.bad_files.items())
    if unbound(opened):
        yield f"  nothing ties its shards to their places: repa-cache bind {shlex.quote(str(store.path))} adds that"
    if not complete:
        if missing:
            samples = _ranges(store.layout, missing)
            yield f"  {len(missing)} of {store.layout.num_ranges} ranges missing: samples {samples}"
        yield f"  finish it: {component.build_command(store.path)}"
        if component.tokens is None and component.imported is None:
            yield "    with --labels and --weights as at the first build, if they were given"
        elif component.imported is not None:
            yield "    with --labels and --images as at the first import, if they were given"


def _numbers(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"


def _ranges(layout: CacheLayout, missing: list[int]) -> str:
    shown = [f"{start}-{stop - 1}" for start, stop in map(layout.sample_range, missing[:4])]
    return ", ".join(shown) + (", ..." if len(missing) > 4 else "")
