"""Features that are made from another component of the same cache: range by range, killable, the same bytes again.

What makes them is a function from rows to tokens; `repa-features` gives one that reads latents. Rows that the source
has not are not in them either, for the source's reasons, and the sizes of files are the source's: both are seen to be
of the same images. Memory is one sub-batch.
"""

from collections.abc import Callable

import numpy as np
import torch

from ...cache_specs.components import Component, finish_command
from ...cache_specs.errors import CacheError, JobError
from ...cache_specs.schema import ComponentSpec
from .binding import bind_ranges, lacks_numbers
from .complete import complete_without
from .component_writer import ComponentWriter
from .quantize import stored_tokens
from .records import read_record
from .store import CacheStore

Tokens = Callable[[np.ndarray], torch.Tensor]  # rows [b] int64 -> tokens [b, V, T, E] float32 of every view


def source_of(store: CacheStore, path: str) -> Component:
    """Return the finished component that others are made from; raise `CacheError` where it is not there or not whole.

    What says so also says how it is finished.
    """
    source = store.opened(path)
    if source is None:
        raise CacheError(f"{store.path}: {path} is gone; build it again")
    if not source.complete or store.missing_ranges(source.spec):
        raise CacheError(
            f"{store.path}: {path} is not complete; finish it with {finish_command(store.path, source.spec)}"
        )
    return source


def write_tokens(
    store: CacheStore,
    component: ComponentSpec,
    source: Component,
    tokens: Tokens,
    *,
    batch_size: int,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[int], None] = lambda samples: None,
) -> int:
    """Write what is missing of `component` and complete it; return how many samples this call wrote.

    `tokens` is always asked for the same sub-batches, from a range's first row on. `on_start(done, total)` and
    `on_progress(samples)` count samples. Raises `CacheError` naming the field where another component has this name,
    `JobError` where values are not finite, or another process writes it.
    """
    layout = store.layout
    with store.lock(component.path):
        store.create_component(component)
        store.reopen_component(component)
        missing = store.missing_ranges(component)
        left = sum(stop - start for start, stop in map(layout.sample_range, missing))
        on_start(layout.num_samples - left, layout.num_samples)
        for index in missing:
            _write_range(store, component, source, index, tokens, batch_size, on_progress)
        if lacks_numbers(store, component):
            bind_ranges(store, component)
        if not store.is_complete(component.path):
            complete_without(store, component, source.bad_files)
    return left


def _write_range(
    store: CacheStore,
    component: ComponentSpec,
    source: Component,
    index: int,
    tokens: Tokens,
    batch_size: int,
    on_progress: Callable[[int], None],
) -> None:
    start, stop = store.layout.sample_range(index)
    valid = read_record(store, source.spec, "valid", index)
    sizes = read_record(store, source.spec, "source_bytes", index)
    writer = ComponentWriter(store, component, index)
    try:
        for first in range(0, stop - start, batch_size):
            part = slice(first, min(first + batch_size, stop - start))
            arrays = stored_views(tokens(np.arange(start + part.start, start + part.stop)), component.dtype)
            bad = np.flatnonzero(~valid[part]).tolist()
            reasons = writer.append(arrays, bad=bad, source_bytes=sizes[part])
            if reasons:
                offset, reason = next(iter(reasons.items()))
                raise JobError(f"{store.path}: sample {start + part.start + offset}: {reason}")
            on_progress(part.stop - part.start)
        writer.commit()
    finally:
        writer.abandon()


def stored_views(tokens: torch.Tensor, dtype: str) -> dict[str, np.ndarray]:
    """Return the stored arrays [b, V, ...] of `tokens` [b, V, T, E] float32 by name."""
    views = [stored_tokens(view, dtype) for view in tokens.unbind(1)]
    return {name: torch.stack([view[name] for view in views], dim=1).cpu().numpy() for name in views[0]}
