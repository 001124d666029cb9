"""The cache as training sees it: any rows, by global index, as one batch of torch tensors.

In: a cache's folder or URL and the components to use. Out: `rows(indices, views)` -> `Batch`. Nothing a sample is held
in Python objects; labels and the valid rows are two integer arrays. From a local cache bytes go from the file into the
batch's tensors with no copy between (rows/shards.py).
"""

import hashlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cache_specs.components import Component, check_same_images
from ...cache_specs.errors import CacheError, UsageError, option
from ...cache_specs.layout import ArrayLayout, layer_array
from ...cache_specs.schema import FEATURES, LATENTS, ComponentSpec, stored_layers
from ...cache_specs.storage import location
from ...cache_specs.tables import pick_layer
from ..rows.direct_array import DirectArray
from ..rows.row_batch import Batch, FeatureBatch, described, mirror
from ..rows.row_reads import NUM_THREADS, Buffers, NDArray, RowArray, RowReads
from ..rows.shards import open_array
from .components import check_ranges, choose_component, finished_component, read_labels, read_layout, read_whole
from .specs import FeatureSpec, LatentSpec


@dataclass(frozen=True)
class _Memory:
    """A batch's memory as it is filled; holds its tensors, not the batch."""

    rows: NDArray
    labels: NDArray
    buffers: Buffers


# Names in a component's group and in a FeatureBatch
_FEATURE_FIELDS = {
    "patch_tokens": "tokens",
    "token_scale": "token_scale",
    "channel_mean": "channel_mean",
    "channel_std": "channel_std",
    "cls_token": "cls_token",
}


class CacheReader:
    """Reads the finished components of a cache.

    autoencoder  name of a group in latents/; None where there is only one
    encoder      names of groups in features/, or one; None for the only one. () reads no tokens. A name may end in
                 :layer=9, which picks one layer of a group that holds several: its arrays then stand for the group's
    cls_token    read it too, where the encoder has one
    check_reads  also verify each row's crc32c, as ours all carry one; `repa-cache verify` otherwise does
    num_threads  that read a batch, the caller's among them

    Raises CacheError for what is missing, incomplete, damaged or of another format, and UsageError for a name that
    the cache does not hold. Any threads may call `rows`; one call runs at a time. A forked child may go on with it,
    unless a call was under way. A pickled reader opens the cache again where it is loaded (workers that are spawned).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        autoencoder: str | None = None,
        encoder: str | Sequence[str] | None = None,
        cls_token: bool = True,
        check_reads: bool = False,
        num_threads: int = NUM_THREADS,
    ) -> None:
        if num_threads < 1:
            raise UsageError(f"num_threads is {num_threads}; expected 1 or more, the caller's thread among them")
        self.path = location(path)
        self.layout = read_layout(self.path)
        self._reads = RowReads(num_threads)
        self._fields = {k: v for k, v in _FEATURE_FIELDS.items() if cls_token or k != "cls_token"}
        self._check_reads = check_reads
        self._lock = threading.Lock()
        self._memory: weakref.WeakKeyDictionary[Batch, _Memory] = weakref.WeakKeyDictionary()

        self.fingerprints: dict[str, str] = {"dataset": self.layout.dataset_fingerprint}
        self._valid = np.ones(self.num_samples, dtype=bool)
        self._components: list[Component] = []
        self.latents, self._moments = self._open_latents(choose_component(self.path, LATENTS, autoencoder)[0])
        names = [encoder] if encoder is None or isinstance(encoder, str) else list(encoder)
        if len(set(names)) != len(names):
            raise UsageError(f"{option('--encoder')} names one encoder twice: {', '.join(map(str, names))}")
        imported = self.latents.without_images
        groups = [choose_component(self.path, FEATURES, name, without_images=imported) for name in names]
        opened = [self._open_features(*group) for group in groups]
        check_same_images(self.path, self._components, self._read_record)
        self.features = tuple(spec for spec, _ in opened)
        self._feature_arrays = [arrays for _, arrays in opened]

        self.valid_rows: NDArray = np.flatnonzero(self._valid)
        if len(self.valid_rows) == 0:
            raise CacheError(f"{self.path}: no sample is valid in every component that was asked for")
        # The order of the data is a permutation of these rows: another image that failed to decode is other data.
        self.fingerprints["valid_rows"] = f"sha256:{hashlib.sha256(np.packbits(self._valid).tobytes()).hexdigest()}"
        self.labels = read_labels(self.path, self.layout)
        self._options = {"cls_token": cls_token, "check_reads": check_reads, "num_threads": num_threads}

    def __repr__(self) -> str:
        names = ", ".join([f"{self.num_classes} classes", self.latents.name, *(f.name for f in self.features)])
        return f"CacheReader({str(self.path)!r}: {len(self.valid_rows)} of {self.num_samples} samples, {names})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what is opened, not what is open: another process opens the cache anew."""
        chosen = {"autoencoder": self.latents.name, "encoder": tuple(f.name for f in self.features), **self._options}
        return _reopened, (str(self.path), chosen, self.fingerprints)

    @property
    def num_samples(self) -> int:
        """N, the rows of the cache, the invalid ones included."""
        return self.layout.num_samples

    @property
    def num_classes(self) -> int:
        return len(self.layout.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.layout.class_names

    @property
    def views(self) -> tuple[str, ...]:
        """identity, or identity and flip, of which `rows` reads what is asked for; of pixels as uint8 it makes flip."""
        return self.layout.views

    @property
    def resolution(self) -> int:
        """Pixels a side of the images behind the cache."""
        return self.layout.resolution

    def rows(self, indices: Any, views: Any = None, *, out: Batch | None = None) -> Batch:
        """Read samples `indices` (any integers in [0, N), any order, repeats allowed) in views [B] (default: 0).

        Returns CPU tensors; with `out`, an earlier batch of this reader's and of the same size, its tensors are filled
        and returned. After an error they hold nothing that may be used. Raises UsageError for an index or view that the
        cache does not have and for another `out`, CacheError for rows that cannot be read.
        """
        rows = self._within(_integers(indices, "indices"), self.num_samples, "index")
        if views is None:
            chosen = np.zeros(len(rows), dtype=np.int64)
        else:
            chosen = self._within(_integers(views, "views"), len(self.views), "view")
            if chosen.shape != rows.shape:
                raise UsageError(f"views is {list(chosen.shape)}, indices {list(rows.shape)}; expected one view a row")
        batch = self.empty_batch(len(rows)) if out is None else out
        with self._lock:
            memory = self._memory.get(batch) or self._memory_of(batch)
            if len(memory.rows) != len(rows):
                raise UsageError(f"out is a batch of {len(memory.rows)}, and {len(rows)} rows are to be read into it")

            def fill_rest() -> None:
                memory.rows[:] = rows
                np.take(self.labels, rows, out=memory.labels, mode="clip")

            self._reads.read(memory.buffers, rows, chosen, meanwhile=fill_rest)
            if self._moments.layout.num_views < len(self.views):
                mirror(batch.moments.numpy(), chosen)
        return batch

    def empty_batch(self, num: int, *, pin_memory: bool = False) -> Batch:
        """Return a batch of `num` rows whose tensors are allocated and not filled."""

        def allocate(layout: ArrayLayout) -> torch.Tensor:
            return torch.empty((num, *layout.shape[2:]), dtype=getattr(torch, layout.dtype), pin_memory=pin_memory)

        return Batch(
            rows=torch.empty(num, dtype=torch.int64, pin_memory=pin_memory),
            labels=torch.empty(num, dtype=torch.int64, pin_memory=pin_memory),
            moments=allocate(self._moments.layout),
            features=[
                FeatureBatch(**{_FEATURE_FIELDS[name]: allocate(array.layout) for name, array in arrays.items()})
                for arrays in self._feature_arrays
            ],
            encoders=tuple(spec.name for spec in self.features),
        )

    def complete(self, batch: Batch) -> Batch:
        """Return a batch with what is left to compute once it is on its device: here nothing."""
        return batch

    def close(self) -> None:
        """Close the open shard files; a later `rows` opens them again."""
        with self._lock:
            self._reads.files.close()

    def _within(self, values: NDArray, limit: int, name: str) -> NDArray:
        """Return `values` int64; raise UsageError unless they are in [0, limit)."""
        # One look: as unsigned numbers, negative ones are beyond any limit.
        if len(values) and np.maximum.reduce(values.view(np.uint64)) >= limit:
            value = values[(values < 0) | (values >= limit)][0]
            raise UsageError(f"{self.path}: {name} {value}; the cache has 0 to {limit - 1}")
        return values

    def _memory_of(self, batch: Batch) -> _Memory:
        """Make out once what a batch is read into: in a ring it is read into again and again.

        Raises UsageError where it is not as `empty_batch` makes them: its tensors would take a row for another.
        """
        found = {name: described(tensor, len(tensor)) for name, tensor in batch.tensors().items()}
        ours = {name: described(tensor, len(batch.rows)) for name, tensor in self.empty_batch(0).tensors().items()}
        for name in ours | found:
            if found.get(name) != ours.get(name):
                raise UsageError(
                    f"out: {name} is {found.get(name, 'missing')}; the reader of {self.path} fills "
                    f"{ours.get(name, 'none')}. Give it a batch that it has made: empty_batch, or an earlier result"
                )
        reads = [(self._moments, batch.moments)]
        for arrays, features in zip(self._feature_arrays, batch.features, strict=True):
            reads += [(array, getattr(features, _FEATURE_FIELDS[name])) for name, array in arrays.items()]
        buffers = self._reads.prepare([(array, tensor.numpy()) for array, tensor in reads])
        return self._memory.setdefault(batch, _Memory(batch.rows.numpy(), batch.labels.numpy(), buffers))

    def _open(self, kind: str, name: str) -> tuple[Component, dict[str, RowArray]]:
        """Open a finished component, AND its `valid` into ours and note its fingerprint."""
        component = finished_component(self.path, self.layout, kind, name)
        self._components.append(component)
        arrays = {
            layout.name: self._open_array(component.spec, layout)
            for layout in component.spec.arrays(self.layout)
            if layout.name != "source_bytes"
        }
        valid = arrays.pop("valid")
        check_ranges(self.path / kind / name / "valid", valid.layout)
        if component.bad_files:  # else every row is valid, and thousands of small files need not be opened
            self._valid &= self._read_record(component.spec.path, "valid")
        self.fingerprints[f"{kind}/{name}"] = str(component.attributes["fingerprint"])
        return component, arrays

    def _open_array(self, component: ComponentSpec, layout: ArrayLayout) -> RowArray:
        group, compressor = self.path / component.path, component.compressor
        return open_array(group, layout, reads=self._reads, check_reads=self._check_reads, compressor=compressor)

    def _open_latents(self, name: str) -> tuple[LatentSpec, RowArray]:
        opened, arrays = self._open(LATENTS, name)
        component = opened.spec
        mean, std = opened.attributes.get("latent_mean"), opened.attributes.get("latent_std")
        spec = LatentSpec(
            name=name,
            spec=component.spec,
            weights=component.weights,
            kind=component.spec["kind"],
            channels=component.spec["latent_channels"],
            size=tuple(component.spec["latent_size"]),
            mean=None if mean is None else tuple(mean),
            std=None if std is None else tuple(std),
        )
        return spec, arrays["moments"]

    def _open_features(self, group: str, asked: int | None) -> tuple[FeatureSpec, dict[str, RowArray]]:
        opened, arrays = self._open(FEATURES, group)
        component = opened.spec
        stored = stored_layers(component.spec)
        layer = pick_layer(f"{self.path}/{FEATURES}/{group}", stored, asked)
        spec = FeatureSpec(
            name=group if len(stored) == 1 else f"{group}:layer={layer}",
            grid=tuple(component.spec["grid"]),
            width=component.spec["width"],
            dtype=component.dtype,  # type: ignore[arg-type]  # of tokens it is never uint8
            group=group,
            layer=layer,
            cls_token=layer_array("cls_token", layer) in arrays,
        )
        picked = {name: arrays.get(layer_array(name, layer)) for name in self._fields}
        return spec, {name: array for name, array in picked.items() if array is not None}

    def _read_record(self, path: str, name: str) -> NDArray:
        """Return `valid` [N] bool or `source_bytes` [N] int64 of an opened component."""
        (component,) = [opened.spec for opened in self._components if opened.spec.path == path]
        (layout,) = [layout for layout in component.arrays(self.layout) if layout.name == name]
        array = self._open_array(component, layout)
        if not isinstance(array, DirectArray):
            return read_whole(self.path / path / name).astype(layout.dtype)
        (num,), (shard,) = array.layout.shape, array.layout.shard  # a shard is one inner chunk
        starts = np.arange(0, num, shard)
        out = np.zeros((len(starts), shard), dtype=layout.dtype)
        self._reads.read(self._reads.prepare([(array, out)]), starts, np.zeros_like(starts))
        return out.reshape(-1)[:num]


def _reopened(path: str, options: dict[str, Any], fingerprints: dict[str, str]) -> CacheReader:
    if (reader := CacheReader(path, **options)).fingerprints != fingerprints:
        raise CacheError(f"{path} is not the cache that its reader was pickled with: it was built anew; open it again")
    return reader


def _integers(values: Any, name: str) -> NDArray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"{name} is {array.dtype} {list(array.shape)}; expected integers [B]")
    return array.astype(np.int64)
