"""Where ranges are encoded: in this process, or by Ray (ray_pool.py) on a machine or a cluster.

Both pools offer the same two things: `components`, the specs with the digests of the weights that were loaded, and
`run`, which takes ranges and yields results as they finish. Decoding is apart from encoding: threads here, CPU tasks
under Ray, an actor for each device.
"""

import itertools
import operator
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch

from ...cache_specs.layout import CacheLayout
from ...cache_specs.schema import ComponentSpec
from ...cache_specs.storage import Location
from ..images.decode import DecodedBatch, decode_batch
from ..images.manifest import ImageSource
from .encode import RangeResult, Worker
from .request import ModelRequest
from .resources import GPU_THREADS, images_a_pass


@dataclass(frozen=True, kw_only=True, eq=False)
class RangeWork:
    """One range still to be encoded: into which components, from which samples, of which known file sizes."""

    index: int
    paths: tuple[str, ...]
    sample_ids: tuple[str, ...]
    expected_bytes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What every worker of a build is told. `device` None leaves the choice to the pool: cuda where it has one."""

    cache: Location
    layout: CacheLayout
    requests: tuple[ModelRequest, ...]
    source: ImageSource
    batch_size: int | None  # None: by the device's memory
    device: str | None
    threads: int
    gpu_threads: int = GPU_THREADS  # instead of `threads`, where there is a GPU
    skip_bad: bool

    def threads_on(self, device: str) -> int:
        """Return torch's threads of a worker."""
        return self.threads if device == "cpu" else self.gpu_threads

    def batches(
        self, work: RangeWork, batch_size: int
    ) -> Iterator[tuple[ImageSource, tuple[str, ...], int, np.ndarray]]:
        """Yield the arguments of `decode_batch` for each sub-batch: always the same ones, from the first row."""
        for start in range(0, len(work.sample_ids), batch_size):
            part = slice(start, start + batch_size)
            yield self.source, work.sample_ids[part], self.layout.resolution, work.expected_bytes[part]


class Pool(Protocol):
    """Workers that encode ranges, in sub-batches of `batch_size`; a context manager."""

    components: list[ComponentSpec]
    batch_size: int

    def run(self, work: Iterable[RangeWork]) -> Iterator[RangeResult]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class InProcessPool:
    """One worker in this process, with threads that decode a little ahead, over the ends of ranges too."""

    def __init__(self, options: JobOptions) -> None:
        self._options = options
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        threads = options.threads_on(device)
        self._worker = Worker(options.cache, options.layout, options.requests, device=device, threads=threads)
        self.components = self._worker.components
        self.batch_size = options.batch_size or images_a_pass(device, options.layout.resolution)
        self._num_decoders = os.cpu_count() or 1
        self._decoders = ThreadPoolExecutor(max_workers=self._num_decoders, thread_name_prefix="decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._decoders.shutdown(wait=True, cancel_futures=True)
        finally:  # a second Ctrl-C ends the wait: the writing threads must be told all the same, or they are waited for
            self._worker.close()

    def run(self, work: Iterable[RangeWork]) -> Iterator[RangeResult]:
        committing: Future[RangeResult] | None = None
        try:
            for item, decoded in itertools.groupby(self._decoded(work), key=operator.itemgetter(0)):
                batches = (batch for _, batch in decoded)
                before, committing = (
                    committing,
                    self._worker.encode_range(item.index, item.paths, batches, skip_bad=self._options.skip_bad),
                )
                if before is not None:  # it was made durable while the next one was encoded
                    yield before.result()
        except Exception:
            if committing is not None:
                yield committing.result()
            raise
        if committing is not None:
            yield committing.result()

    def _decoded(self, work: Iterable[RangeWork]) -> Iterator[tuple[RangeWork, DecodedBatch]]:
        ahead: deque[tuple[RangeWork, Future[DecodedBatch]]] = deque()
        for item in work:
            for arguments in self._options.batches(item, self.batch_size):
                ahead.append((item, self._decoders.submit(decode_batch, *arguments)))
                if len(ahead) > self._num_decoders:
                    of, future = ahead.popleft()
                    yield of, future.result()
        for of, future in ahead:
            yield of, future.result()
