"""What is in a cache, as text: components, shapes, bytes, fingerprints, and what is still missing."""

from collections.abc import Iterator
from pathlib import Path

from ...cache_specs.group import group_attributes
from ...cache_specs.layout import BAD_FILES, CacheLayout
from ...cache_specs.schema import ComponentSpec
from ...cache_specs.sizes import human_bytes
from ..building.plan import describe
from ..store.store import CacheStore


def info_lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of `repa-cache info`; raise `CacheError` where there is no cache."""
    store = CacheStore.open(path)
    layout = store.layout
    yield (
        f"{path}: {layout.num_samples} samples, {len(layout.class_names)} classes, {layout.resolution} px, "
        f"views {' + '.join(layout.views)}, {layout.num_ranges} shards of {layout.shard_samples}"
    )
    yield f"dataset {layout.dataset_fingerprint}"
    for name in store.components():
        component = store.component(name)
        if component is not None:
            yield ""
            yield from _component_lines(store, component)
    if not store.components():
        yield "no components yet; add one with repa-cache build"


def _component_lines(store: CacheStore, component: ComponentSpec) -> Iterator[str]:
    attributes = group_attributes(store.path / component.path) or {}
    missing = store.missing_ranges(component)
    complete = store.is_complete(component.path) and not missing
    yield f"{component.path}: {'complete' if complete else 'INCOMPLETE'}"
    yield f"  {component.spec['loader']} {component.spec['model']}, weights {component.weights}, {component.precision}"
    if component.imported is not None:
        images = "with its images" if component.imported["images"] else "without images"
        yield f"  imported from the layout {component.imported['layout']}, {images}"
    yield f"  fingerprint {attributes.get('fingerprint')}"
    for name, shape, size in describe(component, store.layout):
        yield f"  {name:<13} {shape:<32} {human_bytes(size)}"
    if "latent_mean" in attributes:
        yield f"  latent mean {_numbers(attributes['latent_mean'])} std {_numbers(attributes['latent_std'])}"
    if "float16_error" in attributes:
        yield f"  float16 moves a channel's mean by at most {attributes['float16_error']:.2g} of its std"
    if attributes.get(BAD_FILES):
        yield f"  {len(attributes[BAD_FILES])} bad files left out:"
        yield from (f"    {sample_id}: {reason}" for sample_id, reason in attributes[BAD_FILES].items())
    if not complete:
        if missing:
            samples = _ranges(store.layout, missing)
            yield f"  {len(missing)} of {store.layout.num_ranges} ranges missing: samples {samples}"
        yield f"  finish it: {component.build_command(store.path)}"
        if component.imported is None:
            yield "    with --labels and --weights as at the first build, if they were given"
        else:
            yield "    with --labels and --images as at the first import, if they were given"


def _numbers(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"


def _ranges(layout: CacheLayout, missing: list[int]) -> str:
    shown = [f"{start}-{stop - 1}" for start, stop in map(layout.sample_range, missing[:4])]
    return ", ".join(shown) + (", ..." if len(missing) > 4 else "")
