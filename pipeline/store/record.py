"""A cache's own record: whether one may be written, is that of what is asked, or is all that a failed build left.

A build with a misspelt option, or without its weights, fails after the record was written. It binds no one: the
corrected command may differ in what the record says (resolution, flips, images), and is not refused for nothing's sake.
"""

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import Any

from ...cache_specs.derived import FITS
from ...cache_specs.errors import CacheError, UsageError
from ...cache_specs.files.locks import locked
from ...cache_specs.group import METADATA, component_names, group_attributes
from ...cache_specs.layout import COMPLETE, PARTIAL_FOLDER, CacheLayout
from ...cache_specs.schema import FEATURES, LATENTS
from ...cache_specs.storage import LocalPath, Location

SHARD = re.compile(r"c(\.\d+)+")  # a file's name; what a kill leaves of metadata beside them is `zarr.json.partial`


def nothing_encoded(component: Location) -> bool:
    """Return whether no range of a component is recorded as done, and it was never whole."""
    try:
        attributes = group_attributes(component) or {}
    except CacheError:
        return False  # damaged: that is said where it is opened
    return attributes.get(COMPLETE) is not True and not any(map(SHARD.fullmatch, (component / "valid").names()))


def never_begun(cache: Location) -> bool:
    """Return whether no component of a cache has a range, or lost its own record alone."""
    return all(
        nothing_encoded(cache / kind / name)
        for kind in (LATENTS, FEATURES)
        for name in (cache / kind).names() - {METADATA}
    )


def remove_leftovers(cache: Location) -> None:
    """Remove all of a cache that was never begun, its record last: killed in between, it is one still."""
    for kind in (LATENTS, FEATURES, FITS):
        (cache / kind).delete_tree()
    for name in ("sample_id", "label"):
        (cache / name).delete_tree()
    with contextlib.suppress(CacheError):  # nothing to remove: then it is written again
        (cache / METADATA).delete()


def check_no_record(cache: Location, layout: CacheLayout) -> None:
    """Raise `UsageError` where no cache of `layout` can be begun, for what lies there.

    `CacheError` where the root's own record is gone and a component is of other data than is asked.
    """
    foreign = _foreign_entries(cache)
    if foreign:
        raise UsageError(f"--cache {cache}: the folder holds other things ({foreign[0]}) and no cache; name a new one")
    for path in (f"{kind}/{name}" for kind in (LATENTS, FEATURES) for name in component_names(cache, kind)):
        attributes = group_attributes(cache / path) or {}
        if attributes.get("dataset_fingerprint") != layout.dataset_fingerprint:
            raise CacheError(
                f"{cache / METADATA}: missing, and {path} was made with other options or of other images than "
                "are asked: give those of the cache's first build (--resolution, --flip, --labels, "
                "--shard-samples), and it is written again"
            )


def check_writable(cache: Location) -> None:
    """Raise `CacheError` where it is plain without a write that none is possible; a bucket says so at the first put."""
    if isinstance(cache, LocalPath):
        path = cache.path.absolute()
        place = next(place for place in (path, *path.parents) if place.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            why = errno.EACCES if place.is_dir() else errno.ENOTDIR
            raise CacheError(f"{cache}: cannot be written ({os.strerror(why)}); name a --cache that can")


def is_being_built(partial: Path) -> bool:
    """Return whether another process holds the lock of a component, in the folder of a cache's locks.

    Under the cache's own lock: who locks a component after this looks at the record again (`check_record`).
    """
    names = {file.name for file in partial.glob("*.lock")} - {"cache.lock"}
    for name in sorted(names):
        with locked(partial / name, wait=False) as held:
            if not held:
                return True
    return False


def check_same_record(path: Location, found: CacheLayout, asked: CacheLayout) -> None:
    """Raise `CacheError` naming the first field in which the record on disk is not the one asked."""
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


def _foreign_entries(path: Location) -> list[str]:
    own = {PARTIAL_FOLDER, LATENTS, FEATURES, FITS, "sample_id", "label", METADATA + ".partial"}
    return sorted(path.names() - own)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
