"""What a staged copy holds beside shards: metadata, ids, labels, and what ties shards to their places.

Small files, each written whole. What is there already must be what the source has.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...cache_specs.binding import (
    SHARDS_DIGEST,
    checksums_layout,
    numbers_digest,
    pack_numbers,
    read_numbers,
)
from ...cache_specs.components import Component
from ...cache_specs.errors import CacheError
from ...cache_specs.group import METADATA
from ...cache_specs.layout import ArrayLayout, CacheLayout
from ...cache_specs.schema import FEATURES, LATENTS
from ...cache_specs.storage import LocalPath, Location


def copy_root(source: Location, target: LocalPath) -> None:
    """Copy what belongs to no component, the root's own record last."""
    for name in ("sample_id", "label"):
        _copy_small(source / name, target / name)
    for kind in (LATENTS, FEATURES):
        copy_record(source / kind / METADATA, target / kind / METADATA)
    copy_record(source / METADATA, target / METADATA)


def _copy_small(source: Location, target: LocalPath) -> None:
    for name in sorted(source.names()):
        data = (source / name).read() if (source / name).size() is not None else None
        if data is None:
            _copy_small(source / name, target / name)
        elif not (target / name).exists():
            (target / name).write(data)


def copy_record(source: Location, target: LocalPath) -> None:
    """Copy a metadata file, or see that the one there is the same."""
    data, there = source.read(), target.read()
    if there is None and data is not None:
        target.write(data)
    elif there != data:
        raise CacheError(
            f"{target} is not what {source} is: the copy is of another build; remove {target.parent}, or name another "
            "folder for copies"
        )


def is_copied(source: Location, target: LocalPath) -> bool:
    """Say whether a record is there, and so all that is copied before it; raise where it is another build's."""
    if not target.exists():
        return False
    copy_record(source, target)
    return True


def numbers_layout(layout: CacheLayout, component: Component) -> list[ArrayLayout]:
    """Return where the numbers of a component's shards lie; nowhere where an earlier version completed it."""
    bound = SHARDS_DIGEST in component.attributes
    return [checksums_layout(layout, len(component.spec.arrays(layout)))] if bound else []


def copy_numbers(
    group: Location, copy: LocalPath, layout: CacheLayout, component: Component, threads: ThreadPoolExecutor
) -> np.ndarray | None:
    """Copy the numbers of a component's shards, as far as they are not there; return them [ranges, arrays].

    None where it has none. Raises CacheError where they are not those that it was completed with.
    """
    for array in numbers_layout(layout, component):
        numbers = _copy_array(group / array.name, copy / array.name, array, threads)
        if numbers_digest(numbers) != component.attributes[SHARDS_DIGEST]:
            raise CacheError(
                f"{group / array.name}: not what the component was completed with; repa-cache verify on this cache "
                "says how to mend it"
            )
        return numbers
    return None


def _copy_array(folder: Location, copy: LocalPath, array: ArrayLayout, threads: ThreadPoolExecutor) -> np.ndarray:
    copy_record(folder / METADATA, copy / METADATA)
    there = copy.names()

    def numbers_of(name: str) -> np.ndarray:
        found = read_numbers(folder / name, array.shape[1])
        if found is None:
            raise CacheError(f"{folder / name}: missing; run the build of {folder.parent} again")
        if name not in there:
            (copy / name).write(pack_numbers(found.tolist()))
        return found

    return np.stack(list(threads.map(numbers_of, map(array.shard_file, range(array.num_shards)))))
