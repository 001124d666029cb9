"""What is in a cache: components, shapes, bytes, fingerprints, and what is still missing; as a record, and as text."""

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...cache_specs.components import Component, finish_command
from ...cache_specs.derived import FITS, array_bytes, read_fit
from ...cache_specs.errors import CacheError
from ...cache_specs.group import component_names
from ...cache_specs.layout import STORED_VIEWS
from ...cache_specs.schema import IMPORTED, TOKENS, describe
from ...cache_specs.sizes import human_bytes
from ..store.binding import unbound
from ..store.store import CacheStore

MAX_LISTED = 4  # of missing runs of samples


def cache_record(path: str | Path) -> dict[str, Any]:
    """Return what `repa-cache info --json` prints (README.md); raise `CacheError` where there is no cache to look at.

    A component whose attributes do not hold has `path` and `error` alone.
    """
    store = CacheStore.open(path)
    layout = store.layout
    components = []
    for name in store.components():
        try:
            component = store.opened(name)
        except CacheError as error:  # the others are told all the same
            components.append({"path": name, "error": str(error)})
            continue
        if component is not None:
            components.append(_component_record(store, component))
    return {
        "cache": str(path),
        "num_samples": layout.num_samples,
        "class_names": list(layout.class_names),
        "resolution": layout.resolution,
        "views": list(layout.views),
        "shard_samples": layout.shard_samples,
        "num_ranges": layout.num_ranges,
        "dataset_fingerprint": layout.dataset_fingerprint,
        "components": components,
        "fits": [_fit_record(store, name) for name in component_names(store.path, FITS)],
    }


def _fit_record(store: CacheStore, name: str) -> dict[str, Any]:
    try:
        fit = read_fit(store.path, name)
    except CacheError as error:
        return {"name": name, "error": str(error)}
    return {"name": name} if fit is None else {**fit.attributes(), "weights": fit.weights}


def _component_record(store: CacheStore, opened: Component) -> dict[str, Any]:
    component, attributes = opened.spec, opened.attributes
    missing = store.missing_ranges(component)
    complete = opened.complete and not missing
    arrays = zip(component.arrays(store.layout), describe(component, store.layout), strict=True)
    return {
        "path": component.path,
        "complete": complete,
        "spec": dict(component.spec),
        "weights": component.weights,
        "precision": component.precision,
        "dtype": component.dtype,
        "compressor": component.compressor,
        "fingerprint": attributes.get("fingerprint"),
        "arrays": [
            {"name": array.name, "dtype": array.dtype, "shape": list(array.shape), "num_bytes": size}
            for array, (_, _, size) in arrays
        ],
        **{key: attributes.get(key) for key in ("latent_mean", "latent_std", "float16_error")},
        "bad_files": dict(opened.bad_files),
        "bound": not unbound(opened),
        "missing_ranges": len(missing),
        "missing_samples": [[runs[0], runs[-1]] for runs in _runs(store, missing)],
        "finish": None if complete else finish_command(store.path, component),
    }


def _runs(store: CacheStore, ranges: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the half-open runs of samples that these ranges cover together."""
    for _, run in itertools.groupby(enumerate(ranges), key=lambda pair: pair[1] - pair[0]):
        indexes = [index for _, index in run]
        yield store.layout.sample_range(indexes[0])[0], store.layout.sample_range(indexes[-1])[1]


def info_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `repa-cache info` from its record."""
    yield (
        f"{record['cache']}: {record['num_samples']} samples, {len(record['class_names'])} classes, "
        f"{record['resolution']} px, views {' + '.join(record['views'])}, "
        f"{record['num_ranges']} shards of {record['shard_samples']}"
    )
    yield f"dataset {record['dataset_fingerprint']}"
    for component in record["components"]:
        if "error" not in component:
            yield ""
            yield from _component_lines(record, component)
    for fit in record["fits"]:
        if "arrays" in fit:
            yield ""
            yield from _fit_lines(fit)
    if not record["components"]:
        yield "no components yet; add one with repa-cache build"


def _fit_lines(fit: Mapping[str, Any]) -> Iterator[str]:
    yield f"{FITS}/{fit['name']}: {fit['method']}, fitted to {fit['sample'].get('images')} images"
    yield f"  of {' and '.join(fit['sources'])}"
    yield f"  weights {fit['weights'].removeprefix('sha256:')}"
    for name, array in fit["arrays"].items():
        shape = f"{array['dtype']} {array['shape']}"
        yield f"  {name:<13} {shape:<32} {human_bytes(array_bytes(array['dtype'], array['shape']))}"


def _component_lines(record: Mapping[str, Any], one: Mapping[str, Any]) -> Iterator[str]:
    yield f"{one['path']}: {'complete' if one['complete'] else 'INCOMPLETE'}"
    yield f"  {one['spec']['loader']} {one['spec']['model']}, {one['precision']}"
    yield f"  weights {one['weights'].removeprefix('sha256:')}"
    imported = one["spec"].get(IMPORTED)
    if imported is not None:
        images = "with its images" if imported["images"] else "without images"
        yield f"  imported from the layout {imported['layout']}, {images}"
    tokens = one["spec"].get(TOKENS)
    if tokens is not None:
        yield f"  tokens after block {tokens['block']} at t {tokens['t']:g}, null label, of {tokens['from']}"
    if STORED_VIEWS in one["spec"]:
        yield "  view identity alone, whose mirror is made as it is read"
    yield f"  fingerprint {one['fingerprint']}"
    for array in one["arrays"]:
        shape = f"{array['dtype']} {array['shape']}"
        yield f"  {array['name']:<13} {shape:<32} {human_bytes(array['num_bytes'])}"
    for name in ("mean", "std"):
        if one[f"latent_{name}"] is not None:
            yield f"  latent {name} {_numbers(one[f'latent_{name}'])}"
    if one["float16_error"] is not None:
        yield f"  float16 moves a channel's mean by at most {one['float16_error']:.2g} of its std"
    if one["bad_files"]:
        yield f"  {len(one['bad_files'])} bad files left out:"
        yield from (f"    {sample_id}: {reason}" for sample_id, reason in one["bad_files"].items())
    if not one["bound"]:
        yield f"  nothing ties its shards to their places: repa-cache bind {shlex.quote(record['cache'])} adds that"
    if one["finish"] is None:
        return
    if one["missing_ranges"]:
        shown = [f"{start}-{stop - 1}" for start, stop in one["missing_samples"][:MAX_LISTED]]
        more = ", ..." if len(one["missing_samples"]) > MAX_LISTED else ""
        yield (f"  {one['missing_ranges']} of {record['num_ranges']} ranges missing: samples {', '.join(shown)}{more}")
    lacks = "build's --labels and --weights" if imported is None else "import's --labels and --images"
    yield "  finish it:" if " PATH " not in one["finish"] else f"  finish it (with the first {lacks}, if any):"
    yield f"    {one['finish']}"


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"
