"""A copy of what a run reads of a cache on a local disk, made once and shared by all runs of the machine (`--stage`).

From a bucket a global shuffle pays a request a row, every epoch; a copy pays for each byte once and is then read at the
speed of the disk. The copy is a cache itself, below DIR in a folder named by the data's fingerprint: other runs find
there what they need, and add components. A shard is copied to a temporary name, every checksum in it is compared, and
its number, which says that it is the one that belongs there (binding.py); a rename makes it one of the copy, so that
after a kill the next run goes on with what is missing.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...cache_specs.binding import shard_number
from ...cache_specs.components import Component, check_array, check_same_images, read_array_metadata
from ...cache_specs.errors import CacheError, JobError, UsageError, option
from ...cache_specs.files.locks import locked
from ...cache_specs.files.partial_files import clear_folder, new_file
from ...cache_specs.group import METADATA
from ...cache_specs.layout import ArrayLayout, CacheLayout
from ...cache_specs.schema import FEATURES, LATENTS
from ...cache_specs.shard_index import stored_chunks
from ...cache_specs.sizes import human_bytes
from ...cache_specs.storage import LocalPath, Location, disk_error, location, write_bytes
from .components import choose_component, finished_component, read_layout
from .staged_records import copy_numbers, copy_record, copy_root, is_copied, numbers_layout

NUM_COPIES = 8  # files at a time: one request alone does not fill a network
PIECE_BYTES = 8 * 2**20
ATTEMPTS = 2  # a copy whose checksums do not hold may be the network's fault; the second time it is the source's


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A shard to copy: its name in the component's group, its size, its array's layout, and its place.

    The place is its range and its array's number among the component's.
    """

    name: str
    num_bytes: int
    layout: ArrayLayout
    place: tuple[int, int]


def stage_cache(
    cache: str | Path,
    folder: str | Path,
    *,
    autoencoder: str | None = None,
    encoders: Sequence[str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_message: Callable[[str], None] = lambda line: None,
) -> Path:
    """Copy the components that a run uses into `folder`, as far as they are not there; return the copy's own folder.

    `autoencoder` and `encoders` choose as `CacheReader` does. `on_progress(bytes done, bytes in all)` counts what this
    process copies of a component. Any processes may call this at once: one copies a component, the others wait for it.

    Raises CacheError where the source cannot be read or a copy is of another build, JobError where the disk has not the
    room for what is missing, UsageError for a name that the cache does not hold and for a `folder` that cannot
    hold a copy of it.
    """
    source = location(cache)
    layout = read_layout(source)
    asked = [(LATENTS, autoencoder), *((FEATURES, name) for name in ([None] if encoders is None else encoders))]
    groups = [(kind, choose_component(source, kind, name)[0]) for kind, name in asked]
    components = [finished_component(source, layout, kind, name) for kind, name in dict.fromkeys(groups)]
    # By their digests; where sizes themselves have to be read, the reader of the copy compares them.
    check_same_images(source, components, lambda path, array: np.zeros(1, dtype=np.int64))
    target = _stage_folder(source, folder) / layout.dataset_fingerprint[:16]
    if not is_copied(source / METADATA, target / METADATA):
        with _alone(target, "cache", on_message):
            copy_root(source, target)
    wanted = [component for component in components if not _is_whole(source, target, layout, component)]
    _check_room(target, [shard for component in wanted for shard in _missing(source, target, layout, component)])
    for component in wanted:
        with _alone(target, component.spec.path, on_message) as partials:
            if not _is_whole(source, target, layout, component):
                _copy_component(source, target, layout, component, partials, on_progress, on_message)
    return target.path


def _stage_folder(source: Location, folder: str | Path) -> LocalPath:
    """Return where copies go; raise UsageError where one would not be local, or would lie in what it is a copy of."""
    target, asked = location(folder), f"{option('--stage', 'folder')} {folder}"
    if not isinstance(target, LocalPath):
        raise UsageError(f"{asked}: expected a folder of this machine; a copy elsewhere would gain nothing")
    if isinstance(source, LocalPath):
        here, there = source.path.resolve(), target.path.resolve()
        if here in (there, *there.parents):
            raise UsageError(f"{asked}: it lies in the cache {source}; name a folder outside, on a local disk")
        if here.parent == there:
            raise UsageError(f"{asked}: {source} is a copy in it already; read that as it is")
    return target.absolute()


@contextlib.contextmanager
def _alone(target: LocalPath, name: str, on_message: Callable[[str], None]) -> Iterator[Path]:
    """Wait for the lock of a component; yield the folder of its unfinished copies, emptied of what a kill left."""
    scratch = target.scratch()
    file = scratch / (name.replace("/", ".") + ".lock")
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(locked(file, wait=False, option="--stage")):
            on_message(f"{target}: waiting for another process, which stages {name}")
            stack.enter_context(locked(file, wait=True, option="--stage"))
        partials = scratch / name.replace("/", ".")
        clear_folder(partials)
        stack.callback(clear_folder, partials)
        yield partials


def _is_whole(source: Location, target: LocalPath, layout: CacheLayout, component: Component) -> bool:
    """Say whether a component is copied and still there: scratch disks remove files that are old; raise as above."""
    path = component.spec.path
    copy = target / path
    arrays = [*component.spec.arrays(layout), *numbers_layout(layout, component)]
    return is_copied(source / path / METADATA, copy / METADATA) and all(
        (copy / array.name).names().issuperset({METADATA, *map(array.shard_file, range(layout.num_ranges))})
        for array in arrays
    )


def _copy_component(
    source: Location,
    target: LocalPath,
    layout: CacheLayout,
    component: Component,
    partials: Path,
    on_progress: Callable[[int, int], None],
    on_message: Callable[[str], None],
) -> None:
    group, copy = source / component.spec.path, target / component.spec.path
    arrays = component.spec.arrays(layout)
    for array in arrays:
        copy_record(group / array.name / METADATA, copy / array.name / METADATA)
    missing = list(_missing(source, target, layout, component))
    total = sum(shard.num_bytes for shard in missing)
    if missing:
        on_message(f"{copy}: copying {len(missing)} shards, {human_bytes(total)}, from {source}")
    try:
        partials.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(partials, error) from error
    done = 0
    on_progress(done, total)
    with ThreadPoolExecutor(NUM_COPIES, thread_name_prefix="stage") as threads:
        try:
            numbers = copy_numbers(group, copy, layout, component, threads)
            copies = threads.map(lambda shard: _copy_shard(group, copy, shard, partials, numbers), missing)
            for shard, _ in zip(missing, copies, strict=True):
                done += shard.num_bytes
                on_progress(done, total)
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    for array in arrays:
        (copy / array.name).sync()
    copy_record(group / METADATA, copy / METADATA)


def _missing(source: Location, target: LocalPath, layout: CacheLayout, component: Component) -> Iterator[_Shard]:
    """Yield the shards of a component that are not in the copy; raise CacheError where the source is not as ours."""
    group, copy = source / component.spec.path, target / component.spec.path
    for column, array in enumerate(component.spec.arrays(layout)):
        folder = group / array.name
        check_array(read_array_metadata(folder, array), folder, array, component.spec.compressor)
        there, sizes = (copy / array.name).names(), folder.sizes()
        for index, name in enumerate(map(array.shard_file, range(layout.num_ranges))):
            if name in there:
                continue
            if name not in sizes:
                raise CacheError(f"{folder / name}: missing; run the build of {group} again")
            yield _Shard(name=f"{array.name}/{name}", num_bytes=sizes[name], layout=array, place=(index, column))


def _check_room(target: LocalPath, shards: Sequence[_Shard]) -> None:
    """Raise JobError where the disk has not the room for all of them; another that copies now may still fill it."""
    num_bytes, free = sum(shard.num_bytes for shard in shards), shutil.disk_usage(target.path).free
    if num_bytes > free:
        raise JobError(
            f"{target}: {human_bytes(num_bytes)} are to be copied and {human_bytes(free)} are free; make room, or name "
            "a folder on another disk"
        )


def _copy_shard(group: Location, copy: LocalPath, shard: _Shard, partials: Path, numbers: np.ndarray | None) -> None:
    """Copy one shard, compare every checksum in it and its number, and rename it into place."""
    source, partial = group / shard.name, partials / shard.name.replace("/", ".")
    try:
        for attempt in range(1, ATTEMPTS + 1):
            _download(source, partial)
            problem = _problem(partial, shard, source, None if numbers is None else int(numbers[shard.place]))
            if problem is None:
                break
            if attempt == ATTEMPTS:
                raise CacheError(
                    f"{source}: {problem}, twice; repa-cache verify on this cache lists everything damaged, and says "
                    "how to mend it"
                )
        (copy / shard.name).take(partial)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _download(source: Location, partial: Path) -> None:
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        descriptor = new_file(partial)
        try:
            with source.open() as opened:
                offset = 0
                while num := opened.read_into(buffer, offset):
                    write_bytes(descriptor, buffer[:num])
                    offset += num
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(partial, error) from error


def _problem(partial: Path, shard: _Shard, source: Location, number: int | None) -> str | None:
    """Return what is wrong with a copied shard, None where every checksum holds, and it has this number."""
    checksums = bytearray()
    with LocalPath(partial).open() as opened:
        if opened.num_bytes != shard.num_bytes:
            return f"{opened.num_bytes} bytes came, {shard.num_bytes} were listed"
        try:
            for i, chunk in stored_chunks(opened, shard.layout, where=source, checksums=checksums):
                if isinstance(chunk, str):
                    return f"chunk {i}: {chunk}"
        except CacheError as error:
            return str(error).removeprefix(f"{source}: ")
    if number is not None and shard_number(checksums) != number:
        return "it is whole, and is not the shard that was written here"
    return None
