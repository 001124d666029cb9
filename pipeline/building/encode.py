"""One worker: the models of a build on one device, and the encoding of one sample range into shards.

A range is the unit of work. Exactly one worker encodes it, whole, in the same sub-batches from its first row, and
appends rows to partial files; one decode feeds every component. Other threads check and write what was encoded while
the device goes on, each component's rows in their order, and others make finished ranges durable: an fsync holds up
neither. Memory is two sub-batches of a component, the one being encoded and the one being written, and of several
components WRITERS that wait to be written.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import torch

from ...cache_specs.layout import CacheLayout, views_of
from ...cache_specs.storage import Location
from ..images.decode import DecodedBatch
from ..store.component_writer import ComponentWriter
from ..store.store import CacheStore
from .memory import give_freed_memory_back, keep_freed_memory
from .networks import load_networks
from .request import ModelRequest
from .staging import Landing, Staging

WRITERS = 4  # components whose rows are written at a time


@dataclass(kw_only=True)
class RangeResult:
    """What became of one range.

    `written` are component paths; `bad` gives the reason by sample row where the image could not be used, and
    `not_finite` by component path and row where what a model made of it could not; `passing` are the rows of `bad`
    that another try may well read.
    """

    index: int
    num_samples: int
    written: list[str] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    passing: set[int] = field(default_factory=set)
    not_finite: dict[str, dict[int, str]] = field(default_factory=dict)


class Worker:
    """The models of a build on one device.

    `threads` sets torch's intra-op threads explicitly: the same number gives the same bits in-process and under Ray,
    which would otherwise set it to 1. Another number may change the last bits of convolutions on a CPU (the SD VAE's
    moments by 3e-6), so that builds which must agree byte for byte name the same one.
    """

    def __init__(
        self, cache: Location, layout: CacheLayout, requests: Sequence[ModelRequest], *, device: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._kept = device == "cpu" and keep_freed_memory()
        self._store = CacheStore(cache, layout)
        self._staging = Staging(device)
        for request in requests:
            request.check_device(device)
        self._networks = load_networks([request.on(device) for request in requests], device)
        by_path = {component.path: component for network in self._networks for component in network.components}
        self.components = [by_path[request.path] for request in requests]
        # A thread each: what is appended to a component, and which of its ranges are committed, keep their order.
        self._lanes = {path: ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") for path in by_path}
        self._commits = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._durable = ThreadPoolExecutor(max_workers=WRITERS, thread_name_prefix="durable")

    def encode_range(
        self, index: int, paths: Sequence[str], batches: Iterable[DecodedBatch], *, skip_bad: bool
    ) -> Future[RangeResult]:
        """Encode one range into the components at `paths`; return the future of its commit, which another thread does.

        A range with a bad image is not written, unless `skip_bad`: then its row is zero and `valid` false. The same
        holds, for one component alone, of a sample whose stored values are not finite. An image that could not be read
        for a reason that passes keeps its range from being written in either case. Every sub-batch is looked at, so
        that every bad file is listed. Raises `CacheError`, here or from the future, where the disk refuses.
        """
        start, stop = self._store.layout.sample_range(index)
        result = RangeResult(index=index, num_samples=stop - start)
        writers = {
            component.path: ComponentWriter(self._store, component, index)
            for component in self.components
            if component.path in paths
        }
        written: dict[str, Future[None]] = {}  # by component path, the one that waits the longest first
        try:
            row = start
            for batch in batches:
                result.bad.update({row + offset: reason for offset, reason in batch.bad.items()})
                result.passing.update(row + offset for offset in batch.passing)
                if not result.passing and (skip_bad or not result.bad):
                    for path, arrays in self._encoded(batch, writers):
                        while path in written or len(written) >= WRITERS:
                            waiting = path if path in written else next(iter(written))
                            written[waiting].result()
                            del written[waiting]  # only now: what is interrupted here is waited for below
                        written[path] = self._lanes[path].submit(
                            _append, writers[path], arrays, batch.bad, batch.source_bytes, row, result
                        )
                row += len(batch.images)
            assert row == stop, (row, stop)
        except BaseException:
            wait(written.values())
            _abandon(writers.values())
            raise
        return self._commits.submit(self._commit, list(writers.values()), list(written.values()), result, skip_bad)

    def close(self) -> None:
        """Wait until what was encoded is written and committed."""
        for lane in (self._commits, *self._lanes.values(), self._durable):
            lane.shutdown(wait=True)
        if self._kept:
            give_freed_memory_back()

    def _encoded(self, batch: DecodedBatch, asked: Container[str]) -> Iterator[tuple[str, Landing]]:
        """Yield the arrays [b, V, ...] of a sub-batch, on their way to the host, by component path."""
        images = self._staging.upload(batch.images)
        for network in self._networks:
            components = [component for component in network.components if component.path in asked]
            if not components:
                continue
            stored = views_of(components[0].spec, self._store.layout)  # of all that one network gives
            views = [network.encode(images if view == "identity" else images.flip(-1), components) for view in stored]
            for path, arrays in views[0].items():
                stacked = {name: torch.stack([view[path][name] for view in views], dim=1) for name in arrays}
                yield path, self._staging.download(stacked)

    def _commit(
        self,
        writers: Sequence[ComponentWriter],
        written: Sequence[Future[None]],
        result: RangeResult,
        skip_bad: bool,
    ) -> RangeResult:
        """Commit what the range's images and values allow, once all of it is written; components side by side."""
        try:
            wait(written)
            for future in written:
                future.result()
            allowed = [
                writer
                for writer in writers
                if not result.passing and (skip_bad or not (result.bad or writer.component.path in result.not_finite))
            ]
            committed = [self._durable.submit(writer.commit) for writer in allowed]
            wait(committed)
            for future, writer in zip(committed, allowed, strict=True):
                future.result()
                result.written.append(writer.component.path)
        finally:
            _abandon(writers)
        return result


# What a component's thread does, in the order in which it was asked.


def _append(
    writer: ComponentWriter,
    arrays: Landing,
    bad: Mapping[int, str],
    source_bytes: np.ndarray,
    row: int,
    result: RangeResult,
) -> None:
    """Append the sub-batch whose first sample is `row`, and list its rows that are not finite."""
    for offset, reason in writer.append(arrays.arrays(), bad=bad, source_bytes=source_bytes).items():
        result.not_finite.setdefault(writer.component.path, {})[row + offset] = reason


def _abandon(writers: Iterable[ComponentWriter]) -> None:
    for writer in writers:
        writer.abandon()
