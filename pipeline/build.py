"""The build: which ranges of which components are missing, and everything from the manifest to `complete`.

manifest -> layout -> locks -> missing ranges -> workers -> shards -> statistics -> complete
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..cache_specs.errors import JobError, UsageError, nearest
from ..cache_specs.fingerprint import transform_fingerprint
from ..cache_specs.group import group_attributes
from ..cache_specs.layout import CROP, DEFAULT_SHARD_SAMPLES, VIEWS, CacheLayout
from ..cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from ..cache_specs.storage import location
from ..cache_specs.tables import ResolvedModel, resolve_autoencoder, resolve_encoder
from .complete import complete_component
from .encode import ModelRequest, RangeResult, load_model
from .job import JobOptions, RangeWork, open_pool
from .manifest import Manifest
from .records import known_bytes
from .store import CacheStore

DEFAULT_RESOLUTION = 256
DEFAULT_AUTOENCODER = "sd-vae-ft-mse"
MAX_LISTED = 1000  # bad images named while they are found: where a whole disk is gone, the rest are the same


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
    precision: str = "fp32"
    compressor: str = "none"
    weights: Mapping[str, Path] = field(default_factory=dict)
    random_weights: bool = False
    batch_size: int = 32
    device: str | None = None
    threads: int | None = None
    workers: int | None = None
    address: str | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: expected at least 1")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"--workers {self.workers}: expected 0 (this process) or more")
        if self.resolution is not None and self.resolution < 8:
            raise UsageError(f"--resolution {self.resolution}: expected at least 8 pixels")


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build would do: `missing` ranges by component path, of `layout.num_ranges`."""

    layout: CacheLayout
    requests: tuple[ModelRequest, ...]
    missing: Mapping[str, list[int]]
    exists: bool

    def work(self) -> dict[int, tuple[str, ...]]:
        """Return, for each range with something missing, the component paths it is missing in."""
        by_range: dict[int, list[str]] = {}
        for path, ranges in self.missing.items():
            for index in ranges:
                by_range.setdefault(index, []).append(path)
        return {index: tuple(by_range[index]) for index in sorted(by_range)}


@dataclass(kw_only=True)
class BuildReport:
    """What a build did.

    `bad` gives the reason by sample row, `not_finite` the same by component path, `passing` the rows of `bad` that
    another try may well read; `statistics` is what completion wrote, by component path.
    """

    num_images: int = 0
    seconds: float = 0.0
    bad: dict[int, str] = field(default_factory=dict)
    passing: set[int] = field(default_factory=set)
    not_finite: dict[str, dict[int, str]] = field(default_factory=dict)
    completed: list[str] = field(default_factory=list)
    statistics: dict[str, dict[str, object]] = field(default_factory=dict)

    def add(self, result: RangeResult) -> None:
        """Take up one range."""
        self.num_images += result.num_samples
        self.bad.update(result.bad)
        self.passing.update(result.passing)
        for path, reasons in result.not_finite.items():
            self.not_finite.setdefault(path, {}).update(reasons)

    def reasons(self, path: str) -> dict[int, str]:
        """Return why rows of one component could not be used."""
        return {**self.not_finite.get(path, {}), **self.bad}

    @property
    def unusable(self) -> set[int]:
        """The rows that some component could not use."""
        return set(self.bad).union(*self.not_finite.values())


def plan_build(options: BuildOptions) -> BuildPlan:
    """Resolve every name and find what is missing, without loading a model or writing a byte."""
    attributes = group_attributes(location(options.cache))
    found = None if attributes is None else CacheLayout.from_attributes(attributes, str(options.cache))
    layout = _layout(options, found)
    requests = tuple(_requests(options, layout))
    missing = _missing(CacheStore(options.cache, layout), requests)
    return BuildPlan(layout=layout, requests=requests, missing=missing, exists=found is not None)


def _missing(store: CacheStore, requests: Sequence[ModelRequest]) -> dict[str, list[int]]:
    missing: dict[str, list[int]] = {}
    for request in requests:
        path = request.component("").path
        on_disk = store.component(path)
        missing[path] = list(range(store.layout.num_ranges)) if on_disk is None else store.missing_ranges(on_disk)
    return missing


def run_build(
    options: BuildOptions,
    *,
    on_start: Callable[[int, int], None],
    on_progress: Callable[[int], None],
    on_message: Callable[[str], None] = lambda line: None,
) -> BuildReport:
    """Build what is missing and complete every component that has all its ranges.

    `on_start(done, total)` and `on_progress(samples)` count samples of ranges; `on_message` gets a line for each bad
    image when it is found, and before each component that is completed. Raises `RepaError` for what cannot be built;
    bad images are no error here but entries of the report.
    """
    plan = plan_build(options)
    store = CacheStore.create_or_open(options.cache, plan.layout, options.manifest)
    report = BuildReport()
    with contextlib.ExitStack() as locks:
        for path in sorted(plan.missing):
            locks.enter_context(store.lock(path))
        # Again, now that no other build can change it: what is missing, never what is asked, which is what is locked.
        plan = replace(plan, missing=_missing(store, plan.requests))
        _check_on_disk(store, plan, options)
        if plan.work():
            _encode(store, plan, options, report, on_start, on_progress, on_message)
        else:
            on_start(store.layout.num_samples, store.layout.num_samples)
        _complete(store, plan, options, report, on_message)
    return report


def _encode(
    store: CacheStore,
    plan: BuildPlan,
    options: BuildOptions,
    report: BuildReport,
    on_start: Callable[[int, int], None],
    on_progress: Callable[[int], None],
    on_message: Callable[[str], None],
) -> None:
    pending = tuple(request for request in plan.requests if plan.missing[request.component("").path])
    job = JobOptions(
        cache=store.path.absolute(),
        layout=store.layout,
        requests=pending,
        source=options.manifest.source,
        batch_size=options.batch_size,
        device=options.device,
        threads=options.threads or max(1, (os.cpu_count() or 1) // max(1, options.workers or 1)),
        skip_bad=options.skip_bad,
    )
    with open_pool(job, workers=options.workers, address=options.address) as pool:
        for component in pool.components:
            store.create_component(component)
            store.reopen_component(component)
        # Once more: where a component's record was deleted, its shards could be told to be its own only by now.
        work = replace(plan, missing=_missing(store, plan.requests)).work()
        ranges = [store.layout.sample_range(index) for index in work]
        on_start(store.layout.num_samples - sum(stop - start for start, stop in ranges), store.layout.num_samples)
        started = time.monotonic()
        for result in pool.run(_range_works(store, work, options.manifest)):
            _list_bad(result, len(report.unusable), options.manifest, on_message)
            report.add(result)
            on_progress(result.num_samples)
        report.seconds = time.monotonic() - started


def _list_bad(result: RangeResult, listed: int, manifest: Manifest, on_message: Callable[[str], None]) -> None:
    reasons = dict(result.bad)
    for by_row in result.not_finite.values():
        reasons |= {row: "; ".join(filter(None, [reasons.get(row), reason])) for row, reason in by_row.items()}
    for row in sorted(reasons)[: max(0, MAX_LISTED - listed)]:
        on_message(f"bad image: {manifest.sample_ids[row]}: {reasons[row]}")
    if listed < MAX_LISTED < listed + len(reasons):
        on_message("bad image: further ones are only counted")


def _range_works(store: CacheStore, work: Mapping[int, tuple[str, ...]], manifest: Manifest) -> Iterator[RangeWork]:
    done = {}
    for path in store.components():
        component = store.component(path)
        if component is not None:
            done[path] = set(range(store.layout.num_ranges)) - set(store.missing_ranges(component))
    for index, paths in work.items():
        start, stop = store.layout.sample_range(index)
        yield RangeWork(
            index=index,
            paths=paths,
            sample_ids=tuple(manifest.sample_ids[start:stop].tolist()),
            expected_bytes=known_bytes(store, [path for path in done if index in done[path]], start, stop),
        )


def _complete(
    store: CacheStore, plan: BuildPlan, options: BuildOptions, report: BuildReport, on_message: Callable[[str], None]
) -> None:
    """Complete what has all its ranges; raise `JobError` for what was asked and is not whole, unless by bad images."""
    unfinished: list[str] = []
    for path, missing in _missing(store, plan.requests).items():
        reasons = report.reasons(path)
        explained = {row // store.layout.shard_samples for row in (report.passing if options.skip_bad else reasons)}
        component = store.component(path)
        lost = sorted(set(missing) - explained)
        if lost:
            start, stop = store.layout.sample_range(lost[0])
            unfinished.append(f"{path}: {len(lost)} ranges are missing, first samples {start} to {stop - 1}")
        elif component is not None and not missing and not store.is_complete(path):
            on_message(f"{path}: every range is there; reading {store.layout.num_ranges} shards to complete it")
            try:
                report.statistics[path] = complete_component(store, component, options.manifest, reasons)
                report.completed.append(path)
            except JobError as error:
                unfinished.append(str(error))
    if unfinished:
        raise JobError(f"{store.path}: not finished: {'; '.join(unfinished)}. Run the same command again")


def _check_on_disk(store: CacheStore, plan: BuildPlan, options: BuildOptions) -> None:
    """Refuse a component that is on disk with other settings.

    Weights are compared when a worker loads them for what is missing; where nothing is missing they are loaded for the
    comparison only if a file was named.
    """
    for request in plan.requests:
        found = store.component(request.component("").path)
        if found is not None:
            weights = found.weights
            if request.weights_file is not None and not plan.missing[found.path]:
                _, weights = load_model(request, options.device or "cpu")
            store.create_component(request.component(weights))


def _layout(options: BuildOptions, found: CacheLayout | None) -> CacheLayout:
    def choose(asked: int | None, on_disk: int | None, default: int) -> int:
        return asked if asked is not None else on_disk if on_disk is not None else default

    manifest = options.manifest
    resolution = choose(options.resolution, found.resolution if found else None, DEFAULT_RESOLUTION)
    shard_samples = choose(options.shard_samples, found.shard_samples if found else None, DEFAULT_SHARD_SAMPLES)
    flip = options.flip if options.flip is not None else found is not None and len(found.views) > 1
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


def _requests(options: BuildOptions, layout: CacheLayout) -> Iterator[ModelRequest]:
    resolved: list[tuple[str, str, ResolvedModel]] = []

    def resolve(resolver: Callable[..., ResolvedModel], name: str) -> ResolvedModel:
        return resolver(name, resolution=layout.resolution, random_weights=options.random_weights)

    autoencoder = options.autoencoder
    begun: list[ComponentSpec] = []
    if autoencoder is None:
        begun = _latents(options, layout)
        autoencoder = "none" if begun else DEFAULT_AUTOENCODER
    if autoencoder != "none":
        resolved.append((LATENTS, "float16", resolve(resolve_autoencoder, autoencoder)))
    resolved += [(FEATURES, options.dtype, resolve(resolve_encoder, request)) for request in options.encoders]
    if not resolved and not begun:
        raise UsageError("nothing to build: name at least one --encoder or an --autoencoder")
    entries = {model.entry.name for _, _, model in resolved} | {component.spec["entry"] for component in begun}
    for name in options.weights:
        if name not in entries:
            raise UsageError(f"--weights {name}=...: {name} is not asked for; {nearest(name, entries)}")
    yield from filter(None, (_as_begun(component, options, layout) for component in begun))
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
        )


def _latents(options: BuildOptions, layout: CacheLayout) -> list[ComponentSpec]:
    store = CacheStore(options.cache, layout)
    found = [store.component(path) for path in store.components() if path.startswith(LATENTS)]
    return [component for component in found if component is not None]


def _as_begun(component: ComponentSpec, options: BuildOptions, layout: CacheLayout) -> ModelRequest | None:
    """Return the request that finishes latents as they were begun, None where they are whole."""
    store = CacheStore(options.cache, layout)
    if store.is_complete(component.path) and not store.missing_ranges(component):
        return None
    random_weights = component.spec["random_weights"]
    entry = component.spec["entry"]
    return ModelRequest(
        kind=LATENTS,
        name=component.name,
        spec=resolve_autoencoder(entry, resolution=layout.resolution, random_weights=random_weights).spec,
        dtype=component.dtype,
        precision=component.precision,
        compressor=component.compressor,
        weights_file=None if random_weights else options.weights.get(entry),
    )


def describe(component: ComponentSpec, layout: CacheLayout) -> list[tuple[str, str, int]]:
    """Return a line an array, `(name, dtype and shape, bytes)`, uncompressed and without checksums."""
    return [
        (
            array.name,
            f"{array.dtype} {list(array.shape)}",
            int(np.prod(array.shape, dtype=np.int64)) * np.dtype(array.dtype).itemsize,
        )
        for array in component.arrays(layout)
    ]
