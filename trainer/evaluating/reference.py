"""One vector an image, straight from the cache: what generated images, and SiT's own layers, are compared with.

The mean over patch tokens is stored beside them (channel_mean, float32, from the encoder's own output), so a million
images are read without their tokens.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from ...cache_specs.errors import UsageError
from ...cache_specs.layout import layer_array
from ...cache_specs.schema import FEATURES
from ..reading.components import finished_component
from ..reading.reader import CacheReader
from ..rows.row_reads import RowReads
from ..rows.shards import open_array

Pooling = Literal["mean", "cls"]
_ARRAYS: dict[str, str] = {"mean": "channel_mean", "cls": "cls_token"}
_SUBSET = 5  # the word of this use among the streams of one seed; the others: reading/batches.py, sampling/sample.py


class Reference:
    """One encoder's vectors, view 0, of the samples that are valid for it and for the latents.

    Raises as `CacheReader`, and UsageError for `cls` of an encoder that has no class token.
    """

    def __init__(self, cache: str | Path, *, autoencoder: str | None, encoder: str | None, pooling: Pooling) -> None:
        reader = CacheReader(cache, autoencoder=autoencoder, encoder=encoder)
        (features,) = reader.features
        group = reader.path / FEATURES / features.group
        self.component = finished_component(reader.path, reader.layout, FEATURES, features.group).spec
        layouts = {layout.name: layout for layout in self.component.arrays(reader.layout)}
        array = layer_array(_ARRAYS[pooling], features.layer)
        if array not in layouts:
            raise UsageError(f"{group} has no class token; compare mean-pooled tokens (mean)")
        self.name = features.name
        self.layer = features.layer
        self.pooling = pooling
        self.width = features.width
        self.valid_rows = reader.valid_rows
        self._reads = RowReads()
        compressor = self.component.compressor
        self._array = open_array(group, layouts[array], reads=self._reads, check_reads=True, compressor=compressor)
        reader.close()

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
