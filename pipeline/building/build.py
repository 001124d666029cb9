"""The build: which ranges of which components are missing, and everything from the manifest to `complete`.

manifest -> layout -> locks -> missing ranges -> workers -> shards -> statistics -> complete
"""

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...cache_specs.derived import DERIVED, FITS, fit_name, read_fit
from ...cache_specs.errors import JobError
from ...cache_specs.files.asked import forget, remember
from ...cache_specs.schema import PRECISIONS, ComponentSpec
from ..images.manifest import Manifest
from ..store.binding import bind_ranges, lacks_numbers
from ..store.complete import complete_component
from ..store.record import nothing_encoded
from ..store.records import known_bytes
from ..store.store import CacheStore
from .encode import RangeResult
from .job import InProcessPool, JobOptions, Pool, RangeWork
from .networks import load_model
from .plan import BuildOptions, BuildPlan, as_begun, missing_ranges, plan_build
from .ray_pool import RayPool
from .request import AUTO
from .resources import CPU_IMAGES, GPU_THREADS
from .straight import with_fits

MAX_LISTED = 1000  # bad images named while they are found: where a whole disk is gone, the rest are the same


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


def run_build(
    options: BuildOptions,
    *,
    on_start: Callable[[int, int], None],
    on_progress: Callable[[int], None],
    on_message: Callable[[str], None] = lambda line: None,
    on_plan: Callable[[BuildPlan], None] = lambda plan: None,
) -> BuildReport:
    """Build what is missing and complete every component that has all its ranges.

    `on_start(done, total)` and `on_progress(samples)` count samples of ranges; `on_message` gets a line for each bad
    image when it is found, and before each component that is completed; `on_plan` what is about to be encoded, if
    anything is, before a model is loaded. Raises `RepaError` for what cannot be built;
    bad images are no error here but entries of the report.
    """
    plan = plan_build(options)
    store = CacheStore.create_or_open(options.cache, plan.layout, options.manifest)
    report = BuildReport()
    with contextlib.ExitStack() as locks:
        for path in sorted(plan.missing):
            locks.enter_context(store.lock(path))
        for request in plan.requests:
            if DERIVED in request.spec:
                locks.enter_context(store.lock(f"{FITS}/{fit_name(request.path)}"))
        store.check_record()
        _write_lost_records(store, plan)
        # Again, now that no other build can change it: what is missing, never what is asked, which is what is locked.
        requests = as_begun(store, plan.requests)
        plan = replace(plan, requests=requests, missing=missing_ranges(store, requests))
        _check_on_disk(store, plan, options)
        if plan.work():
            on_plan(plan)
            _encode(store, plan, options, report, on_start, on_progress, on_message)
        else:
            on_start(store.layout.num_samples, store.layout.num_samples)
        _complete(store, plan, options, report, on_message)
    return report


def _write_lost_records(store: CacheStore, plan: BuildPlan) -> None:
    """Write the records anew of components that lost theirs, where the device would decide on a precision.

    It may be another than that of the shards there, which would then pass for those of some other component; `valid`
    tells in which of all precisions they were made.
    """
    for request in plan.requests:
        path = request.path
        if request.precision != AUTO or store.component(path) is not None or nothing_encoded(store.path / path):
            continue
        if DERIVED in request.spec:
            fit = read_fit(store.path, fit_name(path))
            weights = None if fit is None else fit.weights
        else:
            _, weights = load_model(request.on("cpu"), "cpu")
        if weights is not None:
            made = [replace(request, precision=precision).component(weights) for precision in PRECISIONS]
            for component in filter(store.owns_shards, made):
                store.create_component(component)


def _encode(
    store: CacheStore,
    plan: BuildPlan,
    options: BuildOptions,
    report: BuildReport,
    on_start: Callable[[int, int], None],
    on_progress: Callable[[int], None],
    on_message: Callable[[str], None],
) -> None:
    pending = tuple(request for request in plan.requests if plan.missing[request.path])
    decided = {request.path for request in pending if request.precision == AUTO}
    threads = options.threads or max(1, (os.cpu_count() or 1) // max(1, options.workers or 1))
    pending = with_fits(
        store,
        pending,
        options.manifest,
        batch_size=options.batch_size or CPU_IMAGES,
        # Of this process, which on a cluster may have none of the GPUs that the workers have.
        device="cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu",
        threads=threads,
        skip_bad=options.skip_bad,
        on_message=on_message,
    )
    job = JobOptions(
        cache=store.path.absolute(),
        layout=store.layout,
        requests=pending,
        source=options.manifest.source,
        batch_size=options.batch_size,
        device=options.device,
        threads=threads,
        gpu_threads=options.threads or GPU_THREADS,
        skip_bad=options.skip_bad,
    )
    with _open_pool(job, options) as pool:
        _say_precision([component for component in pool.components if component.path in decided], on_message)
        if options.batch_size is None and pool.batch_size != CPU_IMAGES:
            on_message(f"forward passes of {pool.batch_size} images, by the GPU's memory (--batch-size)")
        for component in pool.components:
            store.create_component(component)
            store.reopen_component(component)
            if options.words:
                remember(store.partial, component.path, options.words)
        # Once more: where a component's record was deleted, its shards could be told to be its own only by now.
        work = replace(plan, missing=missing_ranges(store, plan.requests)).work()
        ranges = [store.layout.sample_range(index) for index in work]
        on_start(store.layout.num_samples - sum(stop - start for start, stop in ranges), store.layout.num_samples)
        started = time.monotonic()
        for result in pool.run(_range_works(store, work, options.manifest)):
            _list_bad(result, len(report.unusable), options.manifest, on_message)
            report.add(result)
            on_progress(result.num_samples)
        report.seconds = time.monotonic() - started


def _open_pool(job: JobOptions, options: BuildOptions) -> Pool:
    """Return where ranges are encoded: Ray where there is something to schedule, else this process, as quick."""
    if options.in_process:
        return InProcessPool(job)
    go_on = shlex.join(["repa-cache", *options.words]) if options.words else ""
    return RayPool(job, num_workers=options.workers, address=options.address, go_on=go_on)


def _say_precision(decided: Sequence[ComponentSpec], on_message: Callable[[str], None]) -> None:
    """Say what the workers' device has decided, where that is not float32."""
    if any(component.precision != "fp32" for component in decided):
        chosen = ", ".join(f"{component.path} {component.precision}" for component in decided)
        on_message(f"precision by the device: {chosen}; kept for good (--precision fp32 asks for float32)")


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
    for path, missing in missing_ranges(store, plan.requests).items():
        reasons = report.reasons(path)
        explained = {row // store.layout.shard_samples for row in (report.passing if options.skip_bad else reasons)}
        component = store.component(path)
        lost = sorted(set(missing) - explained)
        if lost:
            start, stop = store.layout.sample_range(lost[0])
            unfinished.append(f"{path}: {len(lost)} ranges are missing, first samples {start} to {stop - 1}")
        elif component is None or missing:
            continue
        elif store.is_complete(path):
            if lacks_numbers(store, component):
                bind_ranges(store, component)
            forget(store.partial, path)
        else:
            there = "" if report.num_images else "every range is there; "
            on_message(f"{path}: {there}reading {store.layout.num_ranges} shards to complete it")
            try:
                report.statistics[path] = complete_component(store, component, options.manifest, reasons)
                report.completed.append(path)
                forget(store.partial, path)
            except JobError as error:
                unfinished.append(str(error))
    if unfinished:
        raise JobError(f"{store.path}: not finished: {'; '.join(unfinished)}. Run the same command again")


def _check_on_disk(store: CacheStore, plan: BuildPlan, options: BuildOptions) -> None:
    """Refuse a component that is on disk with other settings; write metadata that was deleted from it again.

    Weights are compared when a worker loads them for what is missing; where nothing is missing they are loaded for the
    comparison only if a file was named.
    """
    for request in plan.requests:
        found = store.component(request.path)
        if found is not None and request.precision != AUTO:  # else nothing of it is encoded, and nothing is bound
            weights = found.weights
            if request.weights_file is not None and not plan.missing[found.path] and found.derived is None:
                _, weights = load_model(request, options.device or "cpu")
            store.create_component(request.component(weights))
