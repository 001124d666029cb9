"""A cache's own pictures as the file that evaluators of samples compare with: `arr_0` [N, R, R, 3] uint8 in an .npz.

ADM's evaluator (Dhariwal and Nichol, arXiv 2105.05233) reads its reference batch so, a few pictures at a time, from a
member that is stored as it is. Pictures are decoded and cropped as for a build, or taken from a component that holds
their pixels; view 0, in row order. The reference that is published for ImageNet at 256 is another file, and papers'
figures are against that one.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ...cache_specs.errors import CacheError, UsageError, writing
from ...cache_specs.files.npz import write_rows
from ...cache_specs.schema import LATENTS, ComponentSpec
from ..images.decode import decode_batch
from ..images.manifest import ImageSource
from ..store.binding import check_images
from ..store.records import read_whole_record
from ..store.rows import ComponentRows
from ..store.store import CacheStore
from .features import draw_rows

BATCH = 64  # pictures decoded at a time, by each core


def write_reference(
    cache: str | Path,
    out: Path,
    *,
    source: ImageSource | None,
    num: int | None,
    on_progress: Callable[[int, int], None],
) -> int:
    """Write the pictures that every finished component could use, or `num` of them, to `out`; return how many.

    They are read from `source`, where that is None from a component of pixels. `on_progress(pictures, of all)` counts.
    Memory is a few batches of pictures. Raises `UsageError` where there are no pictures to be had, `CacheError` where
    one of `source` is missing, or not the one that the cache was built from, `JobError` where `out` cannot be written.
    """
    store = CacheStore.open(cache)
    specs = [spec for path in store.components() if store.is_complete(path) and (spec := store.component(path))]
    if not specs:
        raise CacheError(f"{cache}: no component is complete; repa-cache info says how to finish one")
    check_images(store, [spec.path for spec in specs])
    valid = np.logical_and.reduce([read_whole_record(store, spec, "valid") for spec in specs])
    rows = draw_rows(np.flatnonzero(valid), num)
    pictures = _stored(store, specs, rows) if source is None else _decoded(store, specs, rows, source)
    side = store.layout.resolution

    def counted() -> Iterator[np.ndarray]:
        done = 0
        on_progress(0, len(rows))
        for batch in pictures:
            yield batch
            done += len(batch)
            on_progress(done, len(rows))

    with writing(out, then="give the same command again"):
        write_rows(out, (len(rows), side, side, 3), np.dtype(np.uint8), counted())
    return len(rows)


def _decoded(
    store: CacheStore, specs: list[ComponentSpec], rows: np.ndarray, source: ImageSource
) -> Iterator[np.ndarray]:
    """Yield batches of the pictures [n, R, R, 3] of samples `rows`, decoded on every core."""
    ids = store.read("sample_id", 0, store.layout.num_samples)
    sizes = read_whole_record(store, specs[0], "source_bytes")  # the same of all: `check_images`
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=cores) as threads:
        ahead: deque[tuple[np.ndarray, Future]] = deque()

        def first() -> np.ndarray:
            part, future = ahead.popleft()
            batch = future.result()
            for place, why in batch.bad.items():
                raise CacheError(f"{ids[part[place]]}: {why}; give the images that {store.path} was built from")
            return batch.images

        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            names = ids[part].tolist()
            ahead.append((part, threads.submit(decode_batch, source, names, store.layout.resolution, sizes[part])))
            if len(ahead) > cores:
                yield first()
        while ahead:
            yield first()


def _stored(store: CacheStore, specs: list[ComponentSpec], rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield batches of the pictures of samples `rows` from the pixels that a component holds."""
    from ..models.autoencoders import load_autoencoder

    pixels = next((spec for spec in specs if spec.kind == LATENTS and spec.spec["loader"] == "builtin"), None)
    if pixels is None:
        raise UsageError(f"{store.path} holds no pixels; name the images that it was built from with --data PATH")
    stored, decoder = ComponentRows(store, pixels), load_autoencoder(pixels.spec)
    for start in range(0, len(rows), BATCH):
        moments = stored.read("moments", rows[start : start + BATCH])
        yield (
            moments.transpose(0, 2, 3, 1)
            if pixels.dtype == "uint8"
            else decoder.decode(torch.from_numpy(moments)).numpy()
        )
