"""A cache's tokens as an encoder gave them: chosen, decoded from storage, normalised over space.

In: a cache and names of encoders. Out: float32 batches of view 0 for rows chosen once, so that every encoder is
measured on the same images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.components import finish_command
from ...cache_specs.errors import CacheError, UsageError, nearest
from ...cache_specs.layout import layer_array
from ...cache_specs.schema import FEATURES, ComponentSpec, enlarged, stored_layers
from ...cache_specs.tables import pick_layer, stored_encoder
from ..store.binding import check_images
from ..store.quantize import dequantize_int8
from ..store.records import read_whole_record
from ..store.rows import ComponentRows
from ..store.statistics import EPS
from ..store.store import CacheStore

BATCH_BYTES = 2**23  # of float32 tokens at a time: what is done to them one after the other stays in the cache
SAMPLE_SEED = 0  # --num takes the same images in every run and for every encoder


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """b images of one encoder, view 0. `tokens` [b, T, E], `mean` and `std` [b, E] over the image's tokens, float32."""

    rows: np.ndarray
    tokens: Tensor
    mean: Tensor
    std: Tensor

    def constant(self) -> Tensor:
        """Return [b] bool: images whose tokens are all the same, which have no spatial structure to measure."""
        return (self.std == 0).all(1)

    def normalized(self, gamma: float) -> Tensor:
        """Return tokens normalised over space, (f - gamma * mean) / (std + 1e-6), [b, T, E] (iREPA, eq. in sec. 4)."""
        return (self.tokens - gamma * self.mean[:, None]).div_(self.std[:, None] + EPS)


class Features:
    """One encoder's finished component, or one layer of it."""

    def __init__(self, store: CacheStore, component: ComponentSpec, layer: int | None = None) -> None:
        """Read `component`; `layer` is one of its `stored_layers`."""
        self.component = component
        self.name = component.path.removeprefix(f"{FEATURES}/")
        if len(stored_layers(component.spec)) > 1:
            self.name += f":layer={layer}"
        self._layer = layer
        self.grid: tuple[int, int] = tuple(component.spec["grid"])
        self.width: int = component.spec["width"]
        self.random_weights: bool = component.spec["random_weights"]
        self.enlarged = enlarged(component.spec)
        self._store = store
        self._rows = ComponentRows(store, component)

    @property
    def has_cls(self) -> bool:
        return layer_array("cls_token", self._layer) in self._rows

    def valid(self) -> np.ndarray:
        """Return which samples are there, [N] bool."""
        return read_whole_record(self._store, self.component, "valid")

    def batches(self, rows: np.ndarray) -> Iterator[TokenBatch]:
        """Yield the tokens of samples `rows` [n], ascending, a bounded batch at a time.

        Raises `CacheError` naming the sample where a value is not finite.
        """
        size = max(1, BATCH_BYTES // (4 * self.grid[0] * self.grid[1] * self.width))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            mean, std = self._read("channel_mean", part), self._read("channel_std", part)
            tokens = self._read("patch_tokens", part)
            if self.component.dtype == "int8":
                tokens = dequantize_int8(tokens, self._read("token_scale", part), mean, std)
            yield TokenBatch(rows=part, tokens=tokens, mean=mean, std=std)

    def pooled(self, rows: np.ndarray) -> np.ndarray:
        """Return the mean over tokens [n, E] float32, as the encoder gave them: it is stored, before any rounding."""
        return self._read("channel_mean", rows).numpy()

    def cls(self, rows: np.ndarray) -> np.ndarray:
        """Return the class token [n, E] float32, for an encoder that has one."""
        return self._read("cls_token", rows).numpy()

    def _read(self, name: str, rows: np.ndarray) -> Tensor:
        values = torch.from_numpy(self._rows.read(layer_array(name, self._layer), rows)).float()
        # A sum is finite where every value is: one pass, and no table of booleans.
        finite = values.flatten(1).sum(1).isfinite()
        if not finite.all():
            row = int(rows[int(finite.int().argmin())])
            raise CacheError(
                f"{self._store.path}: {self.component.path}/{name} of sample {row} ({sample_id(self._store, row)}) is "
                "not finite, so nothing can be measured on it; repa-cache verify lists all such rows"
            )
        return values


def open_encoders(path: str | Path, names: Sequence[str]) -> tuple[CacheStore, list[Features]]:
    """Open a cache and the encoders `names`, or all of its finished ones, every layer, where none is named.

    Raises `CacheError` where there is no cache, or a named encoder is not finished, and `UsageError` for an unknown
    name, with the nearest known one.
    """
    store = CacheStore.open(path)
    present = [name.partition("/")[2] for name in store.components() if name.startswith(f"{FEATURES}/")]
    if not present:
        imported = [store.component(name) for name in store.components()]
        if any(component and component.imported and not component.imported["images"] for component in imported):
            raise CacheError(f"{path} was imported without images, so it holds no encoder and none can be added")
        raise CacheError(
            f"{path} holds no encoder; add one with repa-cache build --cache {path} --data PATH --encoder E"
        )
    if names:
        opened = [_open(store, name, present) for name in names]
    else:
        whole = [component for name in present if (component := _finished(store, name)) is not None]
        if not whole:
            raise _unfinished(store, present[0])
        opened = [Features(store, spec, layer) for spec in whole for layer in stored_layers(spec.spec)]
    check_images(store, [encoder.component.path for encoder in opened])
    return store, opened


def _open(store: CacheStore, request: str, present: Sequence[str]) -> Features:
    found = stored_encoder(request, present)
    if found is None:
        raise UsageError(f"{store.path} holds no encoder {request!r}; {nearest(request, present)}")
    name, asked = found
    component = _finished(store, name)
    if component is None:
        raise _unfinished(store, name)
    return Features(store, component, pick_layer(component.path, stored_layers(component.spec), asked))


def _finished(store: CacheStore, name: str) -> ComponentSpec | None:
    """Return an encoder's component, None where it is not complete."""
    opened = store.opened(f"{FEATURES}/{name}")
    return opened.spec if opened is not None and opened.complete else None


def _unfinished(store: CacheStore, name: str) -> CacheError:
    component = store.component(f"{FEATURES}/{name}")
    assert component is not None, name
    return CacheError(
        f"{store.path}: {component.path} is not complete; finish it with {finish_command(store.path, component)}"
    )


def choose_rows(encoders: Sequence[Features], num: int | None) -> np.ndarray:
    """Return the samples to measure, ascending: valid in every encoder, `num` of them or all where there are fewer.

    A manifest is ordered by class, so `num` are drawn at random, the same in every run.
    """
    return draw_rows(np.flatnonzero(np.logical_and.reduce([encoder.valid() for encoder in encoders])), num)


def draw_rows(rows: np.ndarray, num: int | None) -> np.ndarray:
    """Return `num` of the valid samples `rows`, ascending, or all where there are fewer; always the same ones."""
    if num is not None and num < 1:
        raise UsageError(f"--num {num}: expected 1 or more images")
    if len(rows) == 0:
        raise CacheError("no sample is valid in every component that was asked for")
    if num is None or num >= len(rows):
        return rows
    return np.sort(np.random.default_rng(SAMPLE_SEED).choice(rows, num, replace=False))


def sample_id(store: CacheStore, row: int) -> str:
    """Return the sample id of one row."""
    return str(store.read("sample_id", row, row + 1)[0])


def labels_of(store: CacheStore, rows: np.ndarray) -> np.ndarray:
    """Return the labels [n] int64 of samples `rows`."""
    return store.read("label", 0, store.layout.num_samples).astype(np.int64)[rows]
