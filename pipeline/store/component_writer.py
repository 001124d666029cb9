"""One range of one component becomes shards: rows are appended, the range is committed whole, or nothing of it is.

Models (building/encode.py) and imports (importing/latents.py) write through here, so that what is stored obeys one
rule: rows that cannot be used are zeros with `valid` false, no stored value is NaN or infinite, and memory is one
sub-batch.
"""

import contextlib
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ...cache_specs.layout import ArrayLayout
from ...cache_specs.schema import FEATURES, ComponentSpec
from ...cache_specs.storage import disk_error
from .shards import ShardWriter
from .store import CacheStore

# The bits of a float's exponent, by its dtype.
EXPONENTS: dict[str, np.unsignedinteger[Any]] = {"f2": np.uint16(0x7C00), "f4": np.uint32(0x7F800000)}


class ComponentWriter:
    """The partial shards of one range of one component, filled from its first row in sub-batches."""

    def __init__(self, store: CacheStore, component: ComponentSpec, index: int) -> None:
        self.component = component
        self._store = store
        self._index = index
        self._arrays = {layout.name: layout for layout in component.arrays(store.layout)}
        self._writers: dict[str, ShardWriter] = {}
        self._records: dict[str, list[np.ndarray]] = {"valid": [], "source_bytes": []}
        # A name of its own: a worker of a killed build that still runs never shares a file with this one.
        self._folder = store.partial_folder(component.path) / f"{index}-{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise disk_error(self._folder, error) from error

    def append(
        self, arrays: Mapping[str, np.ndarray], *, bad: Collection[int], source_bytes: np.ndarray
    ) -> dict[int, str]:
        """Append a sub-batch: `arrays` [b, V, ...] in the stored dtypes, `source_bytes` [b] int64, all without records.

        Rows of the offsets `bad` become zeros, in place; so do rows that are not finite: return their reasons by
        offset.
        """
        not_finite: dict[int, str] = {}
        for name, values in arrays.items():
            if values.dtype.kind != "f":
                continue
            for offset in rows_not_finite(values):
                if offset not in bad:
                    not_finite.setdefault(offset, self._not_finite(name, values.dtype))
        unusable = [*bad, *not_finite]
        for name, values in arrays.items():
            values[unusable] = 0
            # chunks lie in C order over (sample, view)
            self._writer(name).append(values.reshape(-1, *values.shape[2:]))
        valid = np.ones(len(source_bytes), dtype=bool)
        valid[unusable] = False
        self._records["valid"].append(valid)
        self._records["source_bytes"].append(np.where(valid, source_bytes, 0))
        return not_finite

    def commit(self) -> None:
        for name, pieces in self._records.items():
            layout = self._arrays[name]
            record = np.zeros((1, *layout.inner), dtype=layout.dtype)
            values = np.concatenate(pieces)
            record[0, : len(values)] = values
            self._writer(name).append(record)
        for writer in self._writers.values():
            writer.close()
        paths = {name: writer.path for name, writer in self._writers.items()}
        numbers = {name: writer.number for name, writer in self._writers.items()}
        self._store.commit_range(self.component, self._index, paths, numbers)

    def abandon(self) -> None:
        """Remove what was not committed."""
        for writer in self._writers.values():
            writer.abandon()
        with contextlib.suppress(OSError):  # a newer build of this component has cleared it, or a file stays: no matter
            self._folder.rmdir()

    def _writer(self, name: str) -> ShardWriter:
        if name not in self._writers:
            layout: ArrayLayout = self._arrays[name]
            self._writers[name] = ShardWriter(self._folder / name, layout, self.component.compressor)
        return self._writers[name]

    def _not_finite(self, name: str, dtype: np.dtype[Any]) -> str:
        # Statistics of the unrounded tokens come first among the arrays: where they are finite, rounding it was.
        rounded = self.component.kind == FEATURES and name.startswith("patch_tokens")
        advice = "; --dtype int8 can store it" if rounded else ""
        return f"{self.component.path}: its {name} is not finite as {dtype}{advice}"


def rows_not_finite(values: np.ndarray) -> list[int]:
    """Return the offsets of the rows of `values` [b, ...] that hold a NaN or an infinity.

    By the bits of the exponent, all of them set in both: numpy converts float16 to find out, which takes ten times as
    long. Row by row, so that what is compared stays in a core's cache.
    """
    exponent = EXPONENTS[values.dtype.str[1:]]
    bits = np.ascontiguousarray(values).view(exponent.dtype)
    return [offset for offset, row in enumerate(bits) if row.size and (row & exponent).max() == exponent]
