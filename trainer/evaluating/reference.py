"""One vector an image, straight from the cache: what generated images, and SiT's own layers, are compared with.

The mean over patch tokens is stored beside them (channel_mean, float32, from the encoder's own output), so a million
images are read without their tokens.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from ...cache_specs.components import Component
from ...cache_specs.errors import CacheError, UsageError
from ...cache_specs.layout import ArrayLayout, layer_array
from ...cache_specs.schema import FEATURES, stored_layers
from ...cache_specs.storage import Location, location
from ...cache_specs.tables import pick_layer
from ..reading.components import check_ranges, choose_component, finished_component, read_layout, read_whole
from ..reading.reader import CacheReader
from ..rows.row_reads import RowReads
from ..rows.shards import open_array

Pooling = Literal["mean", "cls"]
_ARRAYS: dict[str, str] = {"mean": "channel_mean", "cls": "cls_token"}
_SUBSET = 5  # the word of this use among the streams of one seed; the others: reading/batches.py, sampling/sample.py


class Reference:
    """One encoder's vectors, view 0, of the samples that are valid for it and, with `latents`, for the latents.

    Raises as `CacheReader`, and UsageError for `cls` of an encoder that has no class token.
    """

    def __init__(
        self, cache: str | Path, *, autoencoder: str | None, encoder: str | None, pooling: Pooling, latents: bool = True
    ) -> None:
        path = location(cache)
        layout = read_layout(path)
        if latents:
            reader = CacheReader(cache, autoencoder=autoencoder, encoder=encoder)
            (features,) = reader.features
            name, asked, valid_rows = features.group, features.layer, reader.valid_rows
            reader.close()
        else:
            name, asked = choose_component(path, FEATURES, encoder)
            valid_rows = None
        opened = finished_component(path, layout, FEATURES, name)
        self.component = opened.spec
        group = path / opened.spec.path
        self.layer = pick_layer(str(group), stored_layers(opened.spec.spec), asked)
        layouts = {array.name: array for array in self.component.arrays(layout)}
        array = layer_array(_ARRAYS[pooling], self.layer)
        if array not in layouts:
            raise UsageError(f"{group} has no class token; compare mean-pooled tokens (mean)")
        self.name = name if len(stored_layers(opened.spec.spec)) == 1 else f"{name}:layer={self.layer}"
        self.pooling = pooling
        self.resolution = layout.resolution
        self.width: int = self.component.spec["width"]
        self.valid_rows = self._valid(group, layouts["valid"], opened) if valid_rows is None else valid_rows
        self._reads = RowReads()
        compressor = self.component.compressor
        self._array = open_array(group, layouts[array], reads=self._reads, check_reads=True, compressor=compressor)

    def _valid(self, group: Location, layout: ArrayLayout, opened: Component) -> np.ndarray:
        check_ranges(group / "valid", layout)
        valid = read_whole(group / "valid").astype(bool) if opened.bad_files else np.ones(layout.shape[0], dtype=bool)
        if not valid.any():
            raise CacheError(f"{group}: no image is valid")
        return np.flatnonzero(valid)

    @property
    def space(self) -> str:
        """Which space this is, for the names of figures: `dinov2-vit-b_mean`."""
        return f"{self.name}_{self.pooling}"

    def some_rows(self, num: int, seed: int) -> np.ndarray:
        """Return `num` valid samples drawn at random, or all where there are fewer, ascending int64."""
        if num >= len(self.valid_rows):
            return self.valid_rows
        stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_SUBSET,))))
        return np.sort(stream.choice(self.valid_rows, num, replace=False))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors [n, E] float32 of samples `rows`."""
        layout = self._array.layout
        values = np.empty((len(rows), *layout.shape[2:]), dtype=layout.dtype)
        self._reads.read(self._reads.prepare([(self._array, values)]), rows, np.zeros_like(rows))
        return values.astype(np.float32)
