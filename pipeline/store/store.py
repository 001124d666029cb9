"""The cache as a build sees it: create it, add a component, commit a range, finish.

What is there is the only record (DESIGN: no journal). A range of a component is done when every array has its shard,
`valid` last; what ties them to their places (binding.py) is written before that. A shard comes in by a rename on disk,
by a put in an object store: a kill at any moment leaves either the old file or the new one.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ...cache_specs.binding import SHARD_CHECKSUMS, SHARDS_DIGEST, checksums_layout, pack_numbers
from ...cache_specs.components import (
    Component,
    check_array,
    check_rows,
    read_array_metadata,
    read_component,
    read_layout,
)
from ...cache_specs.errors import CacheError, JobError
from ...cache_specs.files.asked import forget, forget_all
from ...cache_specs.files.locks import locked
from ...cache_specs.files.outside import parse_json
from ...cache_specs.files.partial_files import clear_folder
from ...cache_specs.group import METADATA, component_names
from ...cache_specs.layout import COMPLETE, CacheLayout
from ...cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from ...cache_specs.storage import LocalPath, Location, location
from ..images.manifest import KnownSamples, Manifest
from .metadata import component_files, root_files
from .record import (
    check_no_record,
    check_same_record,
    check_writable,
    is_being_built,
    never_begun,
    nothing_encoded,
    remove_leftovers,
)

# What zarr raises on damaged metadata or chunks, as seen by flipping bits: it has no class of its own for them.
ZARR_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError)


class CacheStore:
    """One cache, in a folder or below a URL, open for building or checking.

    `leftover`: what lies there was never begun and of other options, and is seen as nothing until it is replaced.
    """

    def __init__(self, path: str | Path | Location, layout: CacheLayout, *, leftover: bool = False) -> None:
        self.path = location(path)
        self.layout = layout
        self.leftover = leftover

    # Creation and opening

    @classmethod
    def open(cls, path: str | Path | Location) -> "CacheStore":
        """Open an existing cache; raise `CacheError` where there is none, or its record does not hold."""
        layout = read_layout(location(path))
        if layout is None:
            raise CacheError(f"{path}: no cache here; make one with repa-cache build --cache {path} --data FOLDER")
        return cls(path, layout)

    @classmethod
    def planned(cls, path: str | Path | Location, layout: CacheLayout) -> "CacheStore":
        """Return the cache as `create_or_open` will find it; raise as that would, and write nothing."""
        store = cls(path, layout)
        found = read_layout(store.path)
        if found is None:
            check_no_record(store.path, layout)
        elif found != layout and never_begun(store.path):
            store.leftover = True
        else:
            check_same_record(store.path, found, layout)
        check_writable(store.path)
        return store

    @classmethod
    def create_or_open(cls, path: str | Path | Location, layout: CacheLayout, manifest: Manifest) -> "CacheStore":
        """Create the cache of `manifest`, or open the one that is there if it holds exactly that data.

        Metadata that was deleted from it is written again. Raises `CacheError` naming the first field in which the
        cache on disk differs, and `UsageError` for a folder that holds something else.
        """
        store = cls(path, layout)
        with store.lock("cache", wait=True):
            found = read_layout(store.path)
            if found is not None and found != layout and never_begun(store.path) and not is_being_built(store.partial):
                remove_leftovers(store.path)
                forget_all(store.partial)
                found = None
            if found is None:
                check_no_record(store.path, layout)
            else:
                check_same_record(store.path, found, layout)
            rows = {"sample_id": manifest.sample_ids, "label": manifest.labels}
            store._write_missing(store.path, root_files(layout, rows))
            return store

    def check_record(self) -> None:
        """Raise `JobError` where another build put its own record in the place of this one: locks are held by now."""
        with self.lock("cache", wait=True):
            if read_layout(self.path) != self.layout:
                raise JobError(f"{self.path}: another build with other options began here; run this again when it ends")

    def _write_missing(self, folder: Location, files: Mapping[str, bytes]) -> None:
        """Write, in their order, those files that are not there."""
        for name, data in files.items():
            if (folder / name).size() is None:
                (folder / name).write(data)

    # Components

    def opened(self, path: str) -> Component | None:
        """Return the component at `path` (`features/hog`) as it is on disk, or None; raise where it does not hold."""
        if self.leftover:
            return None
        return read_component(self.path, self.layout, path)

    def component(self, path: str) -> ComponentSpec | None:
        """Return the spec on disk of the component at `path`, or None; raise as `opened` does."""
        found = self.opened(path)
        return None if found is None else found.spec

    def components(self) -> list[str]:
        """Return the paths of all components, latents first, by name."""
        if self.leftover:
            return []
        return [f"{kind}/{name}" for kind in (LATENTS, FEATURES) for name in component_names(self.path, kind)]

    def create_component(self, spec: ComponentSpec) -> None:
        """Add the empty component, or check that the one on disk is the same; raise `CacheError` naming the field.

        Metadata that was deleted from it is written again. Shards without the component's own record are kept where
        `valid` says that they are this component's, and removed where not: they would pass as its own.
        """
        files = component_files(spec, self.layout)
        found = self.opened(spec.path)
        if found is not None and found.spec.difference(spec) and nothing_encoded(self.path / spec.path):
            (self.path / spec.path).delete_tree()
            forget(self.partial, spec.path)
        elif found is not None:
            self.check_component(found.spec, spec)
            if found.complete and SHARDS_DIGEST not in found.attributes:
                del files[f"{SHARD_CHECKSUMS}/{METADATA}"]  # completed by an earlier version: `bind` adds it
        elif not self.owns_shards(spec):
            (self.path / spec.path).delete_tree()
        self._write_missing(self.path / spec.path, files)

    def check_component(self, found: ComponentSpec, asked: ComponentSpec) -> None:
        """Raise `CacheError` where a component on disk, of which something is encoded, is not what is asked."""
        difference = found.difference(asked)
        if difference and not nothing_encoded(self.path / asked.path):
            raise CacheError(
                f"{self.path}: {asked.path} on disk differs from what is asked: {difference}; "
                "build it in another cache, or ask for what is there"
            )

    def owns_shards(self, spec: ComponentSpec) -> bool:
        """Return whether the shards at a component's place are its own, by what lies beside those of `valid`."""
        name = f"valid/{METADATA}"  # its fingerprint, and its codecs: a compressor is no part of that
        expected = component_files(spec, self.layout)[name]
        try:
            return bool(parse_json((self.path / spec.path / name).read() or b"") == parse_json(expected))
        except (CacheError, ValueError):
            return False

    def reopen_component(self, spec: ComponentSpec) -> None:
        """Take back `complete` and its results from a component that has lost a range: both will be made anew."""
        if self.is_complete(spec.path) and self.missing_ranges(spec):
            (self.path / spec.path / METADATA).write(component_files(spec, self.layout)[METADATA])

    def complete_component(self, spec: ComponentSpec, results: Mapping[str, Any]) -> None:
        """Write `results` and, last, `complete` into the component's attributes, at once."""
        files = component_files(spec, self.layout, {**results, COMPLETE: True})
        self._write_missing(self.path / spec.path, files)
        (self.path / spec.path / METADATA).write(files[METADATA])

    def take_back(self, spec: ComponentSpec, ranges: Iterable[int]) -> None:
        """Make `ranges` missing again, by the shards of `valid` that record them as done."""
        layout = spec.arrays(self.layout)[-1]
        for index in ranges:
            (self.path / spec.path / layout.name / layout.shard_file(index)).delete()

    def is_complete(self, path: str) -> bool:
        found = self.opened(path)
        return found is not None and found.complete

    def missing_ranges(self, spec: ComponentSpec) -> list[int]:
        """Return the sample ranges of which some array has no shard."""
        done = set(range(self.layout.num_ranges))
        for layout in spec.arrays(self.layout):
            names = (self.path / spec.path / layout.name).names()
            done = {k for k in done if layout.shard_file(k) in names}
        return [k for k in range(self.layout.num_ranges) if k not in done]

    def read(self, array: str, start: int, stop: int) -> np.ndarray:
        """Return rows of `array` (`features/hog/valid`) through zarr, its metadata and every checksum checked."""
        stored = self.path / array
        self._check_metadata(array)
        try:
            with stored.reading():
                return np.asarray(zarr.open_array(stored.zarr_store(), mode="r")[start:stop])
        except ZARR_ERRORS as error:
            raise CacheError(f"{self.path / array}: samples {start} to {stop - 1} cannot be read ({error})") from error

    def _check_metadata(self, array: str) -> None:
        path, _, name = array.rpartition("/")
        if not path:
            check_rows(self.path / array, self.layout)
            return
        component = self.component(path)
        if component is None:
            return  # zarr says that it is missing
        for layout in component.arrays(self.layout):
            if layout.name == name:
                folder = self.path / array
                check_array(read_array_metadata(folder, layout), folder, layout, component.compressor)

    # Partial files and locks

    @property
    def partial(self) -> Path:
        """The folder on this machine for half-written shards and locks."""
        return self.path.scratch()

    def partial_folder(self, spec_path: str) -> Path:
        """Return where half-written shards of a component lie."""
        return self.partial / spec_path.replace("/", ".")

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the lock of a component (or of the cache's creation) and clear what a killed build left half-written.

        flock: the lock dies with the process. Raises `JobError` where another process holds it and `wait` is false.
        """
        file = self.partial / (name.replace("/", ".") + ".lock")
        option = "--cache" if isinstance(self.path, LocalPath) else "TMPDIR"
        with locked(file, wait=wait, option=option) as held:
            if not held:
                alone = "; encoders alone are built beside it with --autoencoder none"
                without = alone if name.startswith(LATENTS) else ""
                raise JobError(
                    f"{self.path}: another build of {name} is running; wait for it, then run this again if needed"
                    f"{without}"
                )
            try:
                clear_folder(self.partial_folder(name))
                yield
            finally:
                # A worker of a killed build may write on for a moment; what it adds now is cleared here.
                clear_folder(self.partial_folder(name))

    def write_numbers(self, spec: ComponentSpec, index: int, numbers: Sequence[int]) -> None:
        """Record what ties the shards of one range to their places, durably: a number an array, in their order."""
        file = checksums_layout(self.layout, len(numbers)).shard_file(index)
        (self.path / spec.path / SHARD_CHECKSUMS / file).write(pack_numbers(numbers))

    def commit_range(
        self, spec: ComponentSpec, index: int, partials: Mapping[str, Path], numbers: Mapping[str, int]
    ) -> None:
        """Bring finished partial files of one range into place, `valid` last, all else made durable first."""
        *values, valid = spec.arrays(self.layout)
        group = self.path / spec.path
        for layout in values:
            (group / layout.name / layout.shard_file(index)).take(partials[layout.name])
        for layout in values:
            (group / layout.name).sync()
        self.write_numbers(spec, index, [numbers[layout.name] for layout in (*values, valid)])
        (group / valid.name / valid.shard_file(index)).take(partials[valid.name])
        (group / valid.name).sync()


def known_samples(path: str | Path | Location) -> KnownSamples | None:
    """Return the samples of the cache at `path`, None where there is none, or none whose ids can be read.

    One that was never begun has none that count.
    """
    try:
        store = CacheStore.open(path)
        if never_begun(store.path):
            return None
        ids = store.read("sample_id", 0, store.layout.num_samples)
    except CacheError:
        return None
    return KnownSamples(sample_ids=ids, class_names=store.layout.class_names)
