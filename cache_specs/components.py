"""A cache and its components as they are opened: nothing is believed before it agrees with what it was written with.

Attributes must have their digest, fingerprints must follow from what they are made of, a component must lie in the
folder that its attributes name, and its arrays' metadata must be what the contract makes of its spec. It costs some
hundred microseconds a component, most of them for opening the files.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .binding import SOURCE_DIGEST
from .errors import CacheError
from .files.asked import asked
from .files.outside import parse_json
from .fingerprint import transform_fingerprint
from .group import METADATA, check_digest, group_attributes
from .layout import BAD_FILES, COMPLETE, FORMAT, METADATA_CHUNK, ArrayLayout, CacheLayout
from .schema import ComponentSpec
from .storage import Location

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}
KEY_ENCODING = {"name": "default", "configuration": {"separator": "."}}


@dataclass(frozen=True)
class Component:
    """A component of a cache whose attributes hold: what it is, and all that its group says."""

    spec: ComponentSpec
    attributes: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        return self.attributes.get(COMPLETE) is True

    @property
    def bad_files(self) -> Mapping[str, str]:
        """The reason by sample id of every row that is not valid."""
        found: Mapping[str, str] = self.attributes.get(BAD_FILES) or {}
        return found


def read_layout(cache: Location) -> CacheLayout | None:
    """Return which samples a cache holds and how they are cut, None where there is no cache.

    Raises `CacheError` where its record is damaged, or that of something else.
    """
    attributes = group_attributes(cache)
    if attributes is None:
        return None
    if attributes.get("format") == FORMAT:  # else it is said what it is not
        check_digest(attributes, cache)
    layout = CacheLayout.from_attributes(attributes, str(cache))
    expected = transform_fingerprint(
        layout.manifest_fingerprint,
        resolution=layout.resolution,
        crop=layout.crop,
        views=layout.views,
        class_names=layout.class_names,
    )
    if layout.dataset_fingerprint != expected:
        raise CacheError(
            f"{cache / METADATA}: dataset_fingerprint is {layout.dataset_fingerprint}, and its fields give {expected}; "
            "the file was changed. Restore it, or delete this file and run the build again"
        )
    return layout


def read_component(cache: Location, layout: CacheLayout, path: str) -> Component | None:
    """Return the component at `path` (`features/hog`), None where there is none; raise `CacheError` unless it holds."""
    group = cache / path
    attributes = group_attributes(group)
    if attributes is None:
        return None
    check_digest(attributes, group)
    spec = ComponentSpec.from_attributes(attributes, str(group))
    check_place(spec, cache, path)
    check_fingerprint(spec, attributes, cache, layout)
    return Component(spec, attributes)


def check_place(spec: ComponentSpec, cache: Location, path: str) -> None:
    """Raise `CacheError` unless a component lies in the folder that its attributes name."""
    if spec.path != path:
        raise CacheError(
            f"{cache / path}: its attributes are those of {spec.path}, so it was copied or renamed. Rename it to "
            f"{cache / spec.path}, or remove it"
        )


def check_fingerprint(spec: ComponentSpec, attributes: Mapping[str, Any], cache: Location, layout: CacheLayout) -> None:
    """Raise `CacheError` unless a component is of this cache's data, and its fingerprint of its spec."""
    group = cache / spec.path
    if attributes.get("dataset_fingerprint") != layout.dataset_fingerprint:
        raise CacheError(f"{group} was made from other data than {cache} says; remove it and build it again")
    if attributes.get("fingerprint") != spec.fingerprint(layout):
        raise CacheError(
            f"{group / METADATA}: the fingerprint does not match the spec beside it; the file was changed. Restore it, "
            "or delete this file and run the build again"
        )


def finish_command(cache: Location, spec: ComponentSpec) -> str:
    """Return the command that finishes a component: the one that began it where that is known (files/asked.py)."""
    return asked(cache.scratch(), spec.path) or spec.build_command(cache)


def read_array_metadata(folder: Location, layout: ArrayLayout) -> dict[str, Any]:
    """Return an array's metadata; raise `CacheError` where it is missing, damaged, or of another shape or dtype."""
    try:
        metadata = parse_json((folder / METADATA).read() or b"")
        found = (tuple(metadata["shape"]), metadata["data_type"])
    except (ValueError, LookupError, TypeError) as error:
        raise CacheError(f"{folder / METADATA} cannot be read ({error}); the cache is damaged") from error
    if found != (layout.shape, layout.dtype):
        raise CacheError(
            f"{folder} is {found[1]} {list(found[0])}; by the cache's attributes it should be {layout.dtype} "
            f"{list(layout.shape)}: the cache is damaged"
        )
    return dict(metadata)


def check_array(metadata: Mapping[str, Any], folder: Location, layout: ArrayLayout, compressor: str) -> None:
    """Raise `CacheError` where metadata is not what the contract makes of a component's array, naming what differs.

    A reader that went by it would take other bytes for the rows, or find no file and return zeros. How a compressor was
    set is not looked at: the compressed bytes say it.
    """
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(layout.shard)}},
        "chunk_key_encoding": KEY_ENCODING,
        "fill_value": 0,
        "codecs": _codecs(layout, compressor),
    }
    found = {**metadata, "codecs": _plain_codecs(metadata.get("codecs"), layout)}
    wrong = [key for key, value in expected.items() if found.get(key) != value]
    if not wrong and metadata.get("storage_transformers"):
        wrong = ["storage_transformers"]
    if wrong:
        raise CacheError(
            f"{folder / METADATA}: {wrong[0]} is not what a component with compressor {compressor!r} has; the file was "
            "changed or is damaged. Restore it, or delete this file and run the build again"
        )


def _codecs(layout: ArrayLayout, compressor: str) -> list[dict[str, Any]]:
    compressors = [] if compressor == "none" else [{"name": compressor}]
    configuration = {
        "chunk_shape": list(layout.inner),
        "codecs": [LITTLE, *compressors, CRC32C],
        "index_codecs": [LITTLE, CRC32C],
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


def _plain_codecs(codecs: Any, layout: ArrayLayout) -> Any:
    """Return the codecs with what may be written in several ways written in one; anything else as it is."""
    one_byte = np.dtype(layout.dtype).itemsize == 1

    def plain(codec: Mapping[str, Any]) -> Mapping[str, Any]:
        if codec["name"] != "bytes":
            return {"name": codec["name"]}
        return LITTLE if one_byte and codec in ({"name": "bytes"}, {"name": "bytes", "configuration": {}}) else codec

    try:
        (sharding,) = codecs
        configuration = {"index_location": "end", **sharding["configuration"]}
        configuration["codecs"] = [plain(codec) for codec in configuration["codecs"]]
        return [{"name": sharding["name"], "configuration": configuration}]
    except (TypeError, ValueError, LookupError, AttributeError):
        return codecs


def check_rows(folder: Location, layout: CacheLayout) -> None:
    """Raise `CacheError` unless `sample_id` or `label` is as the contract says, with every chunk.

    Zarr returns zeros for a chunk that is missing, or is looked for under another name.
    """
    text = folder.name == "sample_id"
    serializer = {"name": "vlen-utf8"} if text else LITTLE
    dtype = "string" if text else "int32"
    shape = (layout.num_samples,)
    metadata = read_array_metadata(
        folder, ArrayLayout(name=folder.name, shape=shape, dtype=dtype, inner=shape, shard=shape)
    )
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [METADATA_CHUNK]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "" if text else 0,
    }
    wrong = [key for key, value in expected.items() if metadata.get(key) != value]
    try:
        first, *others = metadata["codecs"]
        plain = first if first.get("configuration") else {"name": first["name"]}
        if (plain, [codec["name"] for codec in others]) != (serializer, ["zstd", "crc32c"]):
            wrong.append("codecs")
    except (LookupError, TypeError, ValueError, AttributeError):
        wrong.append("codecs")
    if wrong:
        raise CacheError(
            f"{folder / METADATA}: {wrong[0]} is not what {folder.name} of a cache has; the file was changed or is "
            "damaged. Restore it, or delete this file and run the build again"
        )
    names = (folder / "c").names()
    for chunk in range(-(-layout.num_samples // METADATA_CHUNK)):
        if str(chunk) not in names:
            raise CacheError(f"{folder / 'c' / str(chunk)}: missing; restore it, or run the build again")


def check_same_images(cache: Location, components: Sequence[Component], read: Callable[[str, str], np.ndarray]) -> None:
    """Raise `CacheError` where two of these components were made from other files under the same names.

    Their digests of `source_bytes` are compared. Only where they differ and so do their bad files, whose sizes are not
    known, `read(path, array)` is asked for `source_bytes` [N] of both.
    """
    sizes = functools.cache(lambda path: read(path, "source_bytes"))
    known = [component for component in components if SOURCE_DIGEST in component.attributes]
    for one, other in itertools.combinations(known, 2):
        if one.attributes[SOURCE_DIGEST] == other.attributes[SOURCE_DIGEST]:
            continue
        if (
            one.bad_files.keys() != other.bad_files.keys()
            and not other_sizes(sizes(one.spec.path), sizes(other.spec.path)).any()
        ):
            continue
        raise CacheError(
            f"{cache}: {one.spec.path} and {other.spec.path} were made from other images under the same names (their "
            "source_bytes differ). repa-cache verify with --recompute says which is of the images at hand; remove the "
            "other and build it again"
        )


def other_sizes(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return where two components' `source_bytes` [n] are of other files, bool; 0 is of a row that is not valid."""
    differs: np.ndarray = (one != other) & (one != 0) & (other != 0)
    return differs
