"""Any rows of a component, read from its shards: what measuring needs, in the memory of the rows asked for.

`read_shard` reads a shard whole, 96 MiB of tokens and more; a sample of 10,000 out of a million is a few rows a shard.
Here the index is read once a shard and each row by its place, its checksum verified: a figure is never computed from
damaged bytes.
"""

import numpy as np

from ...cache_specs.errors import CacheError, reason
from ...cache_specs.layout import ArrayLayout
from ...cache_specs.schema import ComponentSpec
from ...cache_specs.shard_index import ABSENT, CHECKSUM_BYTES, checksum, read_index
from ...cache_specs.storage import Location
from .shards import chunk_decoder
from .store import CacheStore


class ComponentRows:
    """The arrays of one finished component with a row a sample and view."""

    def __init__(self, store: CacheStore, component: ComponentSpec) -> None:
        self._folder = store.path / component.path
        self._arrays = {layout.name: layout for layout in component.arrays(store.layout)}
        self._compressor = component.compressor

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def read(self, name: str, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return array `name` of one view (0: the identity) at samples `rows` [n] int64, ascending.

        [n, ...] in the array's dtype.
        Raises `CacheError` naming the file and the sample where bytes are missing or damaged.
        """
        layout = self._arrays[name]
        values = np.empty((len(rows), *layout.shape[2:]), dtype=layout.dtype)
        shards = rows // layout.shard[0]
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            self._read_shard(layout, shard, rows[places], min(view, layout.num_views - 1), values, places)
        return values if view < layout.num_views else values[..., ::-1].copy()  # of pixels the mirror is not stored

    def _read_shard(
        self, layout: ArrayLayout, shard: int, rows: np.ndarray, view: int, values: np.ndarray, places: np.ndarray
    ) -> None:
        path = self._folder / layout.name / layout.shard_file(shard)
        decode = chunk_decoder(self._compressor, layout.inner_bytes)
        with path.open() as source:
            index = read_index(source, layout, where=path)
            chunks = (rows - shard * layout.shard[0]) * layout.num_views + view
            for place, row, (offset, length) in zip(places, rows, index[chunks].tolist(), strict=True):
                if offset == int(ABSENT):
                    raise CacheError(_damaged(path, row, "it is missing from its shard"))
                stored = np.empty(length, dtype=np.uint8)
                num_read = source.read_into(stored.data, offset)
                raw = stored[:-CHECKSUM_BYTES]
                if num_read != length or checksum(raw) != stored[-CHECKSUM_BYTES:].tobytes():
                    raise CacheError(_damaged(path, row, "its checksum does not hold"))
                try:
                    data = decode(raw)
                except Exception as error:  # the decompressors' own classes
                    raise CacheError(_damaged(path, row, f"it cannot be decompressed ({reason(error)})")) from error
                if len(data) != layout.inner_bytes:
                    raise CacheError(_damaged(path, row, f"{len(data)} bytes, expected {layout.inner_bytes}"))
                values[place] = np.frombuffer(data, dtype=layout.dtype).reshape(values.shape[1:])


def _damaged(path: Location, row: int, what: str) -> str:
    return f"{path}: sample {row}: {what}; repa-cache verify lists everything damaged, and says how to mend it"
