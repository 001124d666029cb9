"""The cache on disk: create it, add a component, commit a range, finish.

What is there is the only record (DESIGN: no journal). A range of a component is done when every array has its shard,
`valid` last; metadata is rendered by zarr in memory and lands by a rename, so that a kill at any moment leaves either
the old file or the new one. Metadata holds no time, host, path or job state.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from ..cache_specs.errors import CacheError, JobError, UsageError
from ..cache_specs.fingerprint import digest
from ..cache_specs.layout import COMPLETE, METADATA_CHUNK, PARTIAL_FOLDER, ArrayLayout, CacheLayout
from ..cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from .manifest import Manifest
from .shards import COMPRESSOR_CONFIGS, disk_error, sync_folder, write_file

METADATA = "zarr.json"
# What zarr raises on damaged metadata or chunks, as seen by flipping bits: it has no class of its own for them.
ZARR_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError)
DIGEST = "attributes_digest"  # over the other attributes: `verify` finds a changed byte in them


def with_digest(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes with their digest after them."""
    return {**attributes, DIGEST: digest(dict(attributes))}


def _render(
    attributes: Mapping[str, Any],
    arrays: Mapping[str, dict[str, Any]],
    rows: Mapping[str, np.ndarray] | None = None,
) -> dict[str, bytes]:
    """Return every file of a group, by relative path, as zarr writes it; `rows` fills the arrays that it names."""
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=with_digest(attributes))
    for name, options in arrays.items():
        array = group.create_array(name, **options)
        if rows and name in rows:
            array[:] = rows[name]
    return {path: buffer.to_bytes() for path, buffer in files.items()}


def root_files(cache: CacheLayout, rows: Mapping[str, np.ndarray] | None = None) -> dict[str, bytes]:
    """Return the files of a cache that belong to no component, by relative path, the root group's metadata last.

    `rows` are the manifest's `sample_id` and `label`; without them only metadata is returned.
    """
    common = {
        "shape": (cache.num_samples,),
        "chunks": (METADATA_CHUNK,),
        "compressors": [ZstdCodec(level=1, checksum=False), Crc32cCodec()],
        "config": {"write_empty_chunks": True},  # a chunk whose labels are all 0 is written too
    }
    arrays: dict[str, dict[str, Any]] = {
        "sample_id": {"dtype": np.dtypes.StringDType(), **common},
        "label": {"dtype": "int32", **common},
    }
    files = _render(cache.attributes(), arrays, rows)
    root = files.pop(METADATA)
    groups = {f"{group}/{METADATA}": _render({}, {})[METADATA] for group in (LATENTS, FEATURES)}
    return {**groups, **files, METADATA: root}


def component_files(
    component: ComponentSpec, cache: CacheLayout, results: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Return the metadata files of a component, by path relative to its group, the group's own last."""
    arrays = {layout.name: _array_options(layout, component.compressor) for layout in component.arrays(cache)}
    # Beside the group's own record: whose shards these are is still known where that one was deleted.
    arrays["valid"]["attributes"] = {"component_fingerprint": component.fingerprint(cache)}
    files = _render({**component.attributes(cache), **(results or {})}, arrays)
    group = files.pop(METADATA)
    return {**files, METADATA: group}


def _array_options(layout: ArrayLayout, compressor: str) -> dict[str, Any]:
    compressors: list[Any] = []
    if compressor == "zstd":
        compressors.append(ZstdCodec(**COMPRESSOR_CONFIGS["zstd"]))
    elif compressor == "blosc":
        itemsize = np.dtype(layout.dtype).itemsize
        config = {**COMPRESSOR_CONFIGS["blosc"], "shuffle": "shuffle" if itemsize > 1 else "noshuffle"}
        compressors.append(BloscCodec(typesize=itemsize, **config))
    compressors.append(Crc32cCodec())
    endian = "little" if np.dtype(layout.dtype).itemsize > 1 else None
    return {
        "shape": layout.shape,
        "dtype": layout.dtype,
        "chunks": layout.inner,
        "shards": layout.shard,
        "filters": None,
        "serializer": BytesCodec(endian=endian),
        "compressors": compressors,
        "fill_value": 0,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }


class CacheStore:
    """One cache directory, open for building or checking."""

    def __init__(self, path: Path, layout: CacheLayout) -> None:
        self.path = path
        self.layout = layout

    # Creation and opening

    @classmethod
    def open(cls, path: Path) -> "CacheStore":
        """Open an existing cache; raise `CacheError` where there is none."""
        attributes = read_attributes(path)
        if attributes is None:
            raise CacheError(f"{path}: no cache here; make one with repa-cache build --cache {path} --data FOLDER")
        return cls(path, CacheLayout.from_attributes(attributes, path))

    @classmethod
    def create_or_open(cls, path: Path, layout: CacheLayout, manifest: Manifest) -> "CacheStore":
        """Create the cache of `manifest`, or open the one that is there if it holds exactly that data.

        Metadata that was deleted from it is written again. Raises `CacheError` naming the first field in which the
        cache on disk differs, and `UsageError` for a folder that holds something else.
        """
        with cls(path, layout).lock("cache", wait=True):
            attributes = read_attributes(path)
            if attributes is None:
                foreign = _foreign_entries(path)
                if foreign:
                    raise UsageError(
                        f"--cache {path}: the folder holds other things ({foreign[0]}) and no cache; name a new one"
                    )
            else:
                _check_same_cache(path, CacheLayout.from_attributes(attributes, path), layout)
            store = cls(path, layout)
            rows = {"sample_id": manifest.sample_ids, "label": manifest.labels}
            store._write_missing(path, root_files(layout, rows))
            return store

    def _write_missing(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Write, in their order, those files that are not there."""
        for name, data in files.items():
            if not (folder / name).exists():
                write_file(folder / name, data)

    # Components

    def component(self, path: str) -> ComponentSpec | None:
        """Return the spec on disk of the component at `path` (`features/hog`), or None."""
        attributes = read_attributes(self.path / path)
        return None if attributes is None else ComponentSpec.from_attributes(attributes, self.path / path)

    def components(self) -> list[str]:
        """Return the paths of all components, latents first, by name."""
        found = []
        for kind in (LATENTS, FEATURES):
            folder = self.path / kind
            if folder.is_dir():
                found += [f"{kind}/{entry.name}" for entry in sorted(folder.iterdir()) if (entry / METADATA).exists()]
        return found

    def create_component(self, spec: ComponentSpec) -> None:
        """Add the empty component, or check that the one on disk is the same; raise `CacheError` naming the field.

        Metadata that was deleted from it is written again. Shards without the component's own record are kept where
        `valid` says that they are this component's, and removed where not: they would pass as its own.
        """
        files = component_files(spec, self.layout)
        found = self.component(spec.path)
        if found is not None:
            difference = found.difference(spec)
            if difference:
                raise CacheError(
                    f"{self.path}: {spec.path} on disk differs from what is asked: {difference}; "
                    "build it in another cache, or ask for what is there"
                )
            if found.fingerprint(self.layout) != (read_attributes(self.path / spec.path) or {}).get("fingerprint"):
                raise CacheError(
                    f"{self.path}: {spec.path}: the fingerprint does not match its spec; run repa-cache verify"
                )
        elif not self._owns_shards(self.path / spec.path, files):
            try:
                shutil.rmtree(self.path / spec.path)
            except FileNotFoundError:
                pass  # nothing was ever there
            except OSError as error:
                raise disk_error(self.path / spec.path, error) from error
        self._write_missing(self.path / spec.path, files)

    def _owns_shards(self, folder: Path, files: Mapping[str, bytes]) -> bool:
        name = f"valid/{METADATA}"  # its fingerprint, and its codecs: a compressor is no part of that
        try:
            return bool(json.loads((folder / name).read_bytes()) == json.loads(files[name]))
        except (OSError, ValueError):
            return False

    def reopen_component(self, spec: ComponentSpec) -> None:
        """Take back `complete` and its results from a component that has lost a range: both will be made anew."""
        if self.is_complete(spec.path) and self.missing_ranges(spec):
            write_file(self.path / spec.path / METADATA, component_files(spec, self.layout)[METADATA])

    def complete_component(self, spec: ComponentSpec, results: Mapping[str, Any]) -> None:
        """Write `results` and, last, `complete` into the component's attributes, by one rename."""
        files = component_files(spec, self.layout, {**results, COMPLETE: True})
        write_file(self.path / spec.path / METADATA, files[METADATA])

    def take_back(self, spec: ComponentSpec, ranges: Iterable[int]) -> None:
        """Make `ranges` missing again, by the shards of `valid` that record them as done."""
        layout = spec.arrays(self.layout)[-1]
        for index in ranges:
            (self.path / spec.path / layout.name / layout.shard_file(index)).unlink()

    def is_complete(self, path: str) -> bool:
        return bool((read_attributes(self.path / path) or {}).get(COMPLETE))

    def missing_ranges(self, spec: ComponentSpec) -> list[int]:
        """Return the sample ranges of which some array has no shard."""
        done = set(range(self.layout.num_ranges))
        for layout in spec.arrays(self.layout):
            folder = self.path / spec.path / layout.name
            names = set(os.listdir(folder)) if folder.is_dir() else set()
            done = {k for k in done if layout.shard_file(k) in names}
        return [k for k in range(self.layout.num_ranges) if k not in done]

    def read(self, array: str, start: int, stop: int) -> np.ndarray:
        """Return rows of `array` (`features/hog/valid`) through zarr, every checksum checked."""
        try:
            return np.asarray(zarr.open_array(self.path / array, mode="r")[start:stop])
        except ZARR_ERRORS as error:
            raise CacheError(f"{self.path / array}: samples {start} to {stop - 1} cannot be read ({error})") from error

    # Partial files and locks

    @property
    def partial(self) -> Path:
        return self.path / PARTIAL_FOLDER

    def partial_folder(self, spec_path: str) -> Path:
        """Return where half-written shards of a component lie."""
        return self.partial / spec_path.replace("/", ".")

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the lock of a component (or of the cache's creation) and clear what a killed build left half-written.

        flock: the lock dies with the process. Raises `JobError` where another process holds it and `wait` is false.
        """
        file = self.partial / (name.replace("/", ".") + ".lock")
        descriptor = _acquire(file, wait=wait)
        if descriptor is None:
            without = ", or leave it to that build with --autoencoder none" if name.startswith(LATENTS) else ""
            raise JobError(
                f"{self.path}: another build of {name} is running; wait for it, then run this again if needed{without}"
            )
        try:
            _remove_partials(self.partial_folder(name))
            yield
        finally:
            with contextlib.suppress(OSError):
                _remove_partials(self.partial_folder(name))
                file.unlink()  # while it is held: who waits on the old file sees that it is gone and opens the new one
            os.close(descriptor)
            with contextlib.suppress(OSError):
                self.partial.rmdir()

    def commit_range(self, spec: ComponentSpec, index: int, partials: Mapping[str, Path]) -> None:
        """Rename finished partial files of one range into place, `valid` last, each folder made durable first."""
        arrays = spec.arrays(self.layout)
        try:
            for layout in arrays:
                folder = self.path / spec.path / layout.name
                if layout is arrays[-1]:
                    for earlier in arrays[:-1]:
                        sync_folder(self.path / spec.path / earlier.name)
                os.replace(partials[layout.name], folder / layout.shard_file(index))
            sync_folder(self.path / spec.path / arrays[-1].name)
        except OSError as error:
            raise disk_error(self.path / spec.path, error) from error


def read_attributes(path: Path) -> dict[str, Any] | None:
    """Return a group's attributes, None where there is no group; raise `CacheError` where its metadata is damaged."""
    try:
        return dict(zarr.open_group(path, mode="r", use_consolidated=False).attrs)
    except FileNotFoundError:
        return None
    except ZARR_ERRORS as error:
        raise CacheError(
            f"{path}: {METADATA} is damaged ({error!r}); delete this file and run the build again"
        ) from error


def _acquire(file: Path, *, wait: bool) -> int | None:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # another build removed the empty folder between the two calls
        except OSError as error:
            raise CacheError(
                f"{file.parent.parent}: cannot be written ({error.strerror}); name a --cache that can"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise CacheError(
                f"{file.parent.parent}: the file system cannot lock files ({error.strerror}), so two builds could not "
                "be kept apart; mount it with locks (flock), or name a --cache on another"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _remove_partials(folder: Path) -> None:
    # A worker of a killed build may write on for a moment; what it adds now is cleared when this build ends.
    shutil.rmtree(folder, ignore_errors=True)


def _check_same_cache(path: Path, found: CacheLayout, asked: CacheLayout) -> None:
    hints = {
        "manifest_fingerprint": " (other file names or labels)",
        "views": " (--flip)",
        "num_samples": " (images were added or removed)",
    }
    fields = ("num_samples", "manifest_fingerprint", "resolution", "crop", "views", "class_names", "shard_samples")
    for field in fields:
        old, new = getattr(found, field), getattr(asked, field)
        if old != new:
            raise CacheError(
                f"{path}: the cache on disk differs from what is asked: {field}{hints.get(field, '')}: "
                f"found {_brief(old)}, asked {_brief(new)}; use another --cache, or the options it was made with"
            )


def _foreign_entries(path: Path) -> list[str]:
    own = {PARTIAL_FOLDER, LATENTS, FEATURES, "sample_id", "label", METADATA + ".partial"}
    return sorted(entry.name for entry in path.iterdir() if entry.name not in own)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
