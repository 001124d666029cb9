"""Components that are derived straight from an encoder: their fits, before a build encodes, and what then is stored.

The encoder's tokens are taken as a component of it would store them, rounded to float16: what is made of them is what
`repa-cache derive` makes of that component, which need never be stored. The fit wants its sample first: those images
are encoded by this process, the fit is made and stored, and workers get it with their request.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from ...cache_specs.derived import DERIVED, fit_name, read_fit, read_method
from ...cache_specs.errors import JobError
from ..deriving.choose import method_of
from ..deriving.fit import ensure_fit, fit_sources
from ..deriving.method import Inputs
from ..images.decode import DecodedBatch, decode_batch
from ..images.manifest import Manifest
from ..models.encoders import Encoder
from ..store.record import nothing_encoded
from ..store.records import known_bytes
from ..store.store import CacheStore
from .networks import load_source, source_inputs
from .request import ModelRequest


def with_fits(
    store: CacheStore,
    requests: Sequence[ModelRequest],
    manifest: Manifest,
    *,
    batch_size: int,
    device: str,
    threads: int,
    skip_bad: bool,
    on_message: Callable[[str], None],
) -> tuple[ModelRequest, ...]:
    """Return `requests`, each that derives something with its fit: the stored one, or one that is made now.

    The caller holds the fits' locks. Raises `JobError` where an image of the sample cannot be used, unless `skip_bad`:
    then the fit does without it.
    """

    def fitted(request: ModelRequest) -> ModelRequest:
        request = request.on(device)  # the fit is to tokens of one precision: here, wherever they are encoded then
        path = request.path
        derived, name = request.spec[DERIVED], fit_name(path)
        found, on_disk = read_fit(store.path, name), store.component(path)
        kept = found is not None and on_disk is not None and found.weights == on_disk.weights
        if kept and not nothing_encoded(store.path / path):  # else nothing binds this build to those weights
            return replace(request, fit=found)
        torch.set_num_threads(threads)
        encoder = load_source(request, device)
        method = read_method(derived["method"])
        fit = ensure_fit(
            store,
            name,
            method.label,
            method_of(method),
            fit_sources(store, [request.source(encoder.weights)]),
            derived["sample"],
            sample=lambda rows: _sample(store, manifest, encoder, path, rows, batch_size, skip_bad),
            on_message=on_message,
        )
        return replace(request, fit=fit)

    return tuple(fitted(request) if DERIVED in request.spec else request for request in requests)


def _sample(
    store: CacheStore,
    manifest: Manifest,
    encoder: Encoder,
    path: str,
    rows: np.ndarray,
    batch_size: int,
    skip_bad: bool,
) -> Iterator[Inputs]:
    """Yield what the images of `rows` give, view 0; those that cannot be used are left out."""
    for part, batch in _decoded(store, manifest, rows, batch_size):
        if batch.passing or (batch.bad and not skip_bad):
            offset, why = next(iter(batch.bad.items()))
            advice = "" if batch.passing else ", or add --skip-bad to leave them out"
            raise JobError(
                f"{path}: an image of the sample that is fitted to cannot be used: "
                f"{manifest.sample_ids[part[offset]]}: {why}; mend it and run the same command again{advice}"
            )
        tokens = source_inputs(encoder.by_layer(torch.tensor(batch.images).permute(0, 3, 1, 2))).tokens
        usable = tokens.isfinite().flatten(1).all(dim=1).cpu()
        usable[list(batch.bad)] = False
        yield Inputs(tokens=tokens.cpu()[usable])


def _decoded(
    store: CacheStore, manifest: Manifest, rows: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, DecodedBatch]]:
    """Yield the pictures of `rows` in sub-batches, decoded a little ahead."""
    complete = [path for path in store.components() if store.is_complete(path)]
    known = known_bytes(store, complete, 0, store.layout.num_samples)
    num_decoders = os.cpu_count() or 1
    ahead: deque[tuple[np.ndarray, Future[DecodedBatch]]] = deque()
    with ThreadPoolExecutor(num_decoders, thread_name_prefix="decode") as threads:
        try:
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                ids = tuple(manifest.sample_ids[part].tolist())
                ahead.append(
                    (part, threads.submit(decode_batch, manifest.source, ids, store.layout.resolution, known[part]))
                )
                if len(ahead) > num_decoders:
                    of, future = ahead.popleft()
                    yield of, future.result()
            for of, future in ahead:
                yield of, future.result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
