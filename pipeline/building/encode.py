"""One worker: the models of a build on one device, and the encoding of one sample range into shards.

A range is the unit of work. Exactly one worker encodes it, whole, in the same sub-batches from its first row, and
appends rows to partial files; one decode feeds every component. A thread checks and writes what was encoded while the
device goes on, so that memory is two sub-batches: the one being encoded and the one being written.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from ...cache_specs.layout import CacheLayout
from ...cache_specs.schema import ComponentSpec
from ...cache_specs.storage import Location
from ..images.decode import DecodedBatch
from ..store.component_writer import ComponentWriter
from ..store.store import CacheStore
from .networks import ModelRequest, Network, load_networks


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
        self._store = CacheStore(cache, layout)
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._networks = load_networks(requests, device)
        by_path = {component.path: component for network in self._networks for component in network.components}
        self.components = [by_path[request.component("").path] for request in requests]

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
        written: Future[None] | None = None
        try:
            row = start
            for batch in batches:
                result.bad.update({row + offset: reason for offset, reason in batch.bad.items()})
                result.passing.update(row + offset for offset in batch.passing)
                if not result.passing and (skip_bad or not result.bad):
                    for network in self._networks:
                        asked = [component for component in network.components if component.path in writers]
                        for path, arrays in (self._views(batch, network, asked) if asked else {}).items():
                            if written is not None:
                                written.result()
                            written = self._disk.submit(
                                _append, writers[path], arrays, batch.bad, batch.source_bytes, row, result
                            )
                row += len(batch.images)
            assert row == stop, (row, stop)
        except BaseException:
            self._disk.submit(_abandon, list(writers.values())).result()
            raise
        return self._disk.submit(_commit, list(writers.values()), written, result, skip_bad)

    def close(self) -> None:
        """Wait until what was encoded is written."""
        self._disk.shutdown(wait=True)

    def _views(
        self, batch: DecodedBatch, network: Network, components: Sequence[ComponentSpec]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Return the arrays [b, V, ...] of a sub-batch by component path, on the device."""
        images = torch.tensor(batch.images).permute(0, 3, 1, 2)
        pictures = [images, *(images.flip(-1) for _ in range(self._store.layout.num_views - 1))]
        views = [network.encode(pixels, components) for pixels in pictures]
        return {
            path: {name: torch.stack([view[path][name] for view in views], dim=1) for name in arrays}
            for path, arrays in views[0].items()
        }


# What the writing thread does, in the order in which it was asked.


def _append(
    writer: ComponentWriter,
    arrays: Mapping[str, torch.Tensor],
    bad: Mapping[int, str],
    source_bytes: np.ndarray,
    row: int,
    result: RangeResult,
) -> None:
    """Append the sub-batch whose first sample is `row`, and list its rows that are not finite."""
    on_host = {name: values.cpu().numpy() for name, values in arrays.items()}  # on a GPU, waits for the forward
    for offset, reason in writer.append(on_host, bad=bad, source_bytes=source_bytes).items():
        result.not_finite.setdefault(writer.component.path, {})[row + offset] = reason


def _commit(
    writers: Sequence[ComponentWriter], written: Future[None] | None, result: RangeResult, skip_bad: bool
) -> RangeResult:
    """Commit what the range's images and values allow."""
    try:
        if written is not None:
            written.result()
        for writer in writers:
            path = writer.component.path
            if not result.passing and (skip_bad or not (result.bad or path in result.not_finite)):
                writer.commit()
                result.written.append(path)
    finally:
        _abandon(writers)
    return result


def _abandon(writers: Sequence[ComponentWriter]) -> None:
    for writer in writers:
        writer.abandon()
