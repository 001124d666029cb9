"""What a build is asked and what it will do: names resolved, missing ranges found, nothing loaded or written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...cache_specs.components import finish_command, read_layout
from ...cache_specs.errors import UsageError, nearest
from ...cache_specs.fingerprint import transform_fingerprint
from ...cache_specs.layout import CROP, DEFAULT_SHARD_SAMPLES, VIEWS, CacheLayout
from ...cache_specs.schema import FEATURES, LATENTS, ComponentSpec, component_path
from ...cache_specs.storage import location
from ...cache_specs.tables import ResolvedModel, autoencoder_table, resolve_autoencoder, resolve_encoder
from ..images.manifest import Manifest
from ..store.binding import lacks_numbers
from ..store.record import nothing_encoded
from ..store.store import CacheStore
from .grids import default_grid
from .request import AUTO, ModelRequest, check_request

DEFAULT_RESOLUTION = 256
MOST_RESOLUTION = 2**14
DEFAULT_AUTOENCODER = "sd-vae-ft-mse"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What `repa-cache build` is asked. None leaves a choice to the cache on disk, or to the default for a new one."""

    manifest: Manifest
    cache: str | Path  # a folder, or a URL of an object store
    encoders: tuple[str, ...]
    autoencoder: str | None = None
    resolution: int | None = None
    flip: bool | None = None
    shard_samples: int | None = None
    dtype: str = "float16"
    precision: str = AUTO
    compressor: str = "none"
    weights: Mapping[str, Path] = field(default_factory=dict)
    random_weights: bool = False
    batch_size: int | None = None
    device: str | None = None
    threads: int | None = None
    workers: int | None = None
    address: str | None = None
    skip_bad: bool = False
    words: tuple[str, ...] = ()  # the arguments as they were typed, for whoever goes on; none in one's own code

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: expected at least 1")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: expected at least 1")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"--workers {self.workers}: expected 0 (this process) or more")
        if self.device == "cuda" and self.address is None and not torch.cuda.is_available():
            raise UsageError("--device cuda: there is none here; leave it out, or name a Ray cluster with --address")
        if self.workers == 0 and self.address is not None:
            raise UsageError("--workers 0 encodes in this process; leave out --address, or ask for workers")
        if self.resolution is not None and not 8 <= self.resolution <= MOST_RESOLUTION:
            raise UsageError(
                f"--resolution {self.resolution}: expected at least 8 pixels, and at most {MOST_RESOLUTION}"
            )

    @property
    def known_device(self) -> str | None:
        """Where it will be encoded, None where a cluster that is joined later decides."""
        if self.device is not None or self.address is not None:
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def in_process(self) -> bool:
        """Whether this process encodes: as asked, or where Ray would have one device to schedule."""
        if self.workers is not None or self.address is not None:
            return self.workers == 0
        return self.device == "cpu" or torch.cuda.device_count() < 2


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build would do: `missing` ranges by component path, of `layout.num_ranges`."""

    layout: CacheLayout
    requests: tuple[ModelRequest, ...]
    missing: Mapping[str, list[int]]
    exists: bool
    latents: Mapping[str, int] = field(default_factory=dict)  # side by path, of those that are there

    def work(self) -> dict[int, tuple[str, ...]]:
        """Return, for each range with something missing, the component paths it is missing in."""
        by_range: dict[int, list[str]] = {}
        for path, ranges in self.missing.items():
            for index in ranges:
                by_range.setdefault(index, []).append(path)
        return {index: tuple(by_range[index]) for index in sorted(by_range)}


def plan_build(options: BuildOptions) -> BuildPlan:
    """Resolve every name and find what is missing, without loading a model or writing a byte.

    Raises for whatever will keep a build from its first image and can be known without its models.
    """
    found = read_layout(location(options.cache))
    layout = resolve_layout(
        options.manifest,
        found,
        resolution=options.resolution,
        shard_samples=options.shard_samples,
        flip=options.flip,
    )
    if found is not None:  # first of all: whatever is asked, nothing goes with some imported latents
        _check_imported(options, CacheStore(options.cache, found))
    store = CacheStore.planned(options.cache, layout)
    if found is None:
        _check_imported(options, store)
    latents = {component.path: int(component.spec["latent_size"][0]) for component in _latents(store)}
    requests = as_begun(store, tuple(_requests(options, layout, store, latents)))
    missing = missing_ranges(store, requests)
    for request in requests:
        check_request(request)
        on_disk = store.component(request.path)
        if on_disk is not None and request.precision != AUTO:
            store.check_component(on_disk, request.component(on_disk.weights))
        if options.known_device is not None and missing[request.path]:
            request.check_device(options.known_device)
    exists = found is not None and not store.leftover
    return BuildPlan(layout=layout, requests=requests, missing=missing, exists=exists, latents=latents)


def as_begun(store: CacheStore, requests: Sequence[ModelRequest]) -> tuple[ModelRequest, ...]:
    """Return `requests` with the precision of what is encoded of them, where that is left to it."""
    return tuple(
        request if nothing_encoded(store.path / request.path) else request.begun(store.component(request.path))
        for request in requests
    )


def missing_ranges(store: CacheStore, requests: Sequence[ModelRequest]) -> dict[str, list[int]]:
    """Return, for each component asked for, the sample ranges that are not on disk, by component path."""
    missing: dict[str, list[int]] = {}
    for request in requests:
        path = request.path
        on_disk = store.component(path)
        missing[path] = list(range(store.layout.num_ranges)) if on_disk is None else store.missing_ranges(on_disk)
    return missing


def resolve_layout(
    manifest: Manifest,
    found: CacheLayout | None,
    *,
    resolution: int | None,
    shard_samples: int | None,
    flip: bool | None,
) -> CacheLayout:
    """Return the layout of the cache of `manifest`: what is asked, else as `found` on disk, else the default."""

    def choose(asked: int | None, on_disk: int | None, default: int) -> int:
        return asked if asked is not None else on_disk if on_disk is not None else default

    resolution = choose(resolution, found.resolution if found else None, DEFAULT_RESOLUTION)
    shard_samples = choose(shard_samples, found.shard_samples if found else None, DEFAULT_SHARD_SAMPLES)
    flip = flip if flip is not None else found is not None and len(found.views) > 1
    views = VIEWS if flip else VIEWS[:1]
    fingerprint = manifest.fingerprint
    return CacheLayout(
        num_samples=len(manifest),
        resolution=resolution,
        views=views,
        class_names=manifest.class_names,
        shard_samples=shard_samples,
        manifest_fingerprint=fingerprint,
        dataset_fingerprint=transform_fingerprint(
            fingerprint, resolution=resolution, crop=CROP, views=views, class_names=manifest.class_names
        ),
    )


def _check_imported(options: BuildOptions, store: CacheStore) -> None:
    """Raise `UsageError` where latents were imported that no build can finish, replace or go with."""
    for component in _latents(store):
        if component.imported is None:
            continue
        where = f"{options.cache}: {component.path} was imported"
        if not store.is_complete(component.path) or store.missing_ranges(component):
            raise UsageError(f"{where} and is not whole; finish it with {finish_command(store.path, component)}")
        if not component.imported["images"]:
            raise UsageError(f"{where} without images, so nothing can be added to it; train from it with --recipe sit")
        if options.autoencoder in (component.name, component.spec["entry"]):
            keep = f"leave out --autoencoder {options.autoencoder} to keep it"
            raise UsageError(f"{where}; {keep}, or name another --cache")


def _requests(
    options: BuildOptions, layout: CacheLayout, store: CacheStore, latents: Mapping[str, int]
) -> Iterator[ModelRequest]:
    resolved: list[tuple[str, str, ResolvedModel]] = []

    def resolve(resolver: Callable[..., ResolvedModel], name: str, **choice: Any) -> ResolvedModel:
        return resolver(name, resolution=layout.resolution, random_weights=options.random_weights, **choice)

    autoencoder = options.autoencoder
    begun: list[ComponentSpec] = []
    if autoencoder is None:
        begun = _latents(store)
        autoencoder = "none" if begun else DEFAULT_AUTOENCODER
    of_tokens, of_latents = (options.dtype, "float16") if options.dtype != "uint8" else ("float16", "uint8")
    if autoencoder != "none":
        resolved.append((LATENTS, of_latents, resolve(resolve_autoencoder, autoencoder, dtype=of_latents)))
    elif of_latents == "uint8":
        raise UsageError("--dtype uint8 is for pixels; name --autoencoder pixels too")
    sides = [model.spec["latent_size"][0] for _, _, model in resolved] or list(latents.values())
    for request in options.encoders:
        model = resolve(resolve_encoder, request, default_grid=default_grid(layout.resolution, sides))
        on_disk = store.component(component_path(FEATURES, model.name, of_tokens))
        if on_disk is not None and on_disk.spec["grid"] != model.spec["grid"]:  # begun when the default was another
            model = resolve(resolve_encoder, request, default_grid=on_disk.spec["grid"][0])
        resolved.append((FEATURES, of_tokens, model))
    if not resolved and not begun:
        raise UsageError("nothing to build: name at least one --encoder or an --autoencoder")
    entries = {model.entry.name for _, _, model in resolved} | {component.spec["entry"] for component in begun}
    for name in options.weights:
        if name not in entries:
            raise UsageError(f"--weights {name}=...: {name} is not asked for; {nearest(name, entries)}")
    yield from filter(None, (_unfinished(component, options, store) for component in begun))
    seen = set()
    for kind, dtype, model in resolved:
        if (kind, model.name) in seen:
            continue
        seen.add((kind, model.name))
        yield ModelRequest(
            kind=kind,
            name=model.name,
            spec=model.spec,
            dtype=dtype,
            precision=options.precision,
            compressor=options.compressor,
            weights_file=None if model.spec["random_weights"] else options.weights.get(model.entry.name),
            code=model.code,
        )


def _latents(store: CacheStore) -> list[ComponentSpec]:
    found = [store.component(path) for path in store.components() if path.startswith(LATENTS)]
    return [component for component in found if component is not None]


def _unfinished(component: ComponentSpec, options: BuildOptions, store: CacheStore) -> ModelRequest | None:
    """Return the request that finishes latents as they were begun, None where they are whole."""
    whole = store.is_complete(component.path) and not store.missing_ranges(component)
    if whole and (component.imported is not None or not lacks_numbers(store, component)):
        return None
    entry, random_weights, dtype = component.spec["entry"], component.spec["random_weights"], component.dtype
    if entry not in autoencoder_table():
        raise UsageError(
            f"{options.cache}: {component.path} is not whole, and of an autoencoder of your own; finish it with "
            f"{finish_command(store.path, component)}"
        )
    return ModelRequest(
        kind=LATENTS,
        name=component.name,
        spec=resolve_autoencoder(
            entry, resolution=store.layout.resolution, random_weights=random_weights, dtype=dtype
        ).spec,
        dtype=dtype,
        precision=options.precision if nothing_encoded(store.path / component.path) else component.precision,
        compressor=component.compressor,
        weights_file=None if random_weights else options.weights.get(entry),
    )
