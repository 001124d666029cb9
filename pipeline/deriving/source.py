"""The rows that a derived component is made of, from shards that are there: any of them, any view, a bounded batch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.layout import LEVEL_BIAS, LEVEL_SCALE, layer_array
from ...cache_specs.schema import ComponentSpec, stored_layers
from ..store.quantize import dequantize_int8
from ..store.records import read_whole_record
from ..store.rows import ComponentRows
from ..store.store import CacheStore
from .method import Inputs

BATCH_BYTES = 2**23  # of float32 tokens at a time


class StoredSource:
    """A finished features component as `Inputs`, with the latents of the same images where they are named."""

    def __init__(self, store: CacheStore, component: ComponentSpec, latents: ComponentSpec | None = None) -> None:
        self._store = store
        self._component = component
        self._rows = ComponentRows(store, component)
        spec = component.spec
        layers = stored_layers(spec)
        tokens = spec["grid"][0] * spec["grid"][1]
        self.batch_size: int = max(1, BATCH_BYTES // (4 * tokens * spec["width"] * len(layers)))
        self._layers = layers
        self._grid: tuple[int, int] = tuple(spec["grid"])
        self._moments = None if latents is None else ComponentRows(store, latents)
        self._channels = 0 if latents is None else int(latents.spec["latent_channels"])

    def usable(self, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` that are there."""
        return rows[read_whole_record(self._store, self._component, "valid")[rows]]

    def read(self, rows: np.ndarray, view: int = 0) -> Inputs:
        """Return `rows` [n], ascending, of one view; raise `CacheError` naming what is damaged."""
        latents = None
        if self._moments is not None:
            moments = torch.from_numpy(self._moments.read("moments", rows, view))
            moments = moments.float() * LEVEL_SCALE + LEVEL_BIAS if moments.dtype == torch.uint8 else moments.float()
            latents = patches(moments[:, : self._channels], self._grid)  # a posterior's mean comes before its std
        tokens = torch.cat([self._tokens(rows, view, layer) for layer in self._layers], dim=2)
        return Inputs(tokens=tokens, latents=latents)

    def batches(self, rows: np.ndarray, num_views: int = 1) -> Iterator[Inputs]:
        """Yield the first views of `rows`, ascending, in batches."""
        for start in range(0, len(rows), self.batch_size):
            for view in range(num_views):
                yield self.read(rows[start : start + self.batch_size], view)

    def _tokens(self, rows: np.ndarray, view: int, layer: int | None) -> Tensor:
        def stored(name: str) -> Tensor:
            return torch.from_numpy(self._rows.read(layer_array(name, layer), rows, view)).float()

        tokens = stored("patch_tokens")
        if self._component.dtype == "int8":
            return dequantize_int8(tokens, stored("token_scale"), stored("channel_mean"), stored("channel_std"))
        return tokens


def patches(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return latents [b, C, h, w] as [b, T, C p p]: of each place of the grid its patch, channel by channel."""
    height, width = grid
    patch = latents.shape[-1] // width
    cut = latents.unfold(2, patch, patch).unfold(3, patch, patch)  # [b, C, height, width, p, p]
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(len(latents), height * width, -1)
