"""A Zarr group's own file, read without a Zarr library: the attributes of a cache and of its components."""

from collections.abc import Mapping
from typing import Any

from .errors import CacheError
from .files.outside import parse_json
from .fingerprint import digest
from .storage import Location

METADATA = "zarr.json"
DIGEST = "attributes_digest"  # over the other attributes: a changed byte in them is found


def with_digest(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes with their digest after them."""
    return {**attributes, DIGEST: digest(dict(attributes))}


def check_digest(attributes: Mapping[str, Any], group: Location) -> None:
    """Raise `CacheError` unless `attributes` are those that their digest was taken of."""
    try:
        holds = digest({key: value for key, value in attributes.items() if key != DIGEST}) == attributes.get(DIGEST)
    except ValueError:  # NaN, which JSON has not and Python's reader takes
        holds = False
    if not holds:
        raise CacheError(
            f"{group / METADATA}: the attributes do not match their digest; the file was changed or is damaged. "
            "Restore it, or delete this file and run the build again"
        )


def group_attributes(group: Location) -> dict[str, Any] | None:
    """Return the attributes of a Zarr v3 group, None where there is none; raise `CacheError` where it is damaged."""
    data = (group / METADATA).read()
    if data is None:
        return None
    try:
        metadata = parse_json(data)
        if (metadata["zarr_format"], metadata["node_type"]) != (3, "group"):
            raise ValueError("not a Zarr v3 group")
        return dict(metadata["attributes"])
    except (ValueError, LookupError, TypeError) as error:
        raise CacheError(
            f"{group}: {METADATA} is damaged ({error!r}); delete this file and run the build again"
        ) from error


def component_names(cache: Location, kind: str) -> list[str]:
    """Return the names of the components in `latents` or `features`, sorted."""
    folder = cache / kind
    return sorted(name for name in folder.names() if (folder / name / METADATA).size() is not None)
