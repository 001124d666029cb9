"""A Zarr group's own file, read without a Zarr library: the attributes of a cache and of its components."""

from typing import Any

from .errors import CacheError
from .outside import parse_json
from .storage import Location

METADATA = "zarr.json"


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
