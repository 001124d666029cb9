"""Fingerprints: sha256 of canonical JSON, chained from the manifest to each component.

    manifest  = sha256 over sample ids and labels, in row order
    transform = sha256({manifest, resolution, crop, views, class names})
    component = sha256({transform, spec, precision, dtype, weights})

`weights` is a digest of names, dtypes, shapes and bytes in name order, so that the same weights give the same digest
from the hub, a .pth or a .safetensors. Batch size, device and workers are not part of any of them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def manifest_fingerprint(sample_ids: Sequence[str], labels: Sequence[int]) -> str:
    """Return the sha256 (hex) over one canonical `[id,label]` line a sample, in row order.

    Hashed line by line: a list of 1,281,167 ids is never joined into one text.
    """
    if len(sample_ids) != len(labels):
        raise ValueError(f"{len(sample_ids)} sample ids but {len(labels)} labels")
    sha = hashlib.sha256()
    for sample_id, label in zip(sample_ids, labels, strict=True):
        sha.update(canonical_json([sample_id, int(label)]).encode() + b"\n")
    return sha.hexdigest()


def transform_fingerprint(
    manifest: str, *, resolution: int, crop: str, views: Sequence[str], class_names: Sequence[str]
) -> str:
    """Return the fingerprint of the decoded, labelled pictures: the manifest, the crop, the views, the class names."""
    fields = {"manifest": manifest, "resolution": resolution, "crop": crop}
    return digest({**fields, "views": list(views), "class_names": list(class_names)})


def weights_digest(tensors: Iterable[tuple[str, str, Sequence[int], bytes | memoryview]]) -> str:
    """Return the sha256 (hex) over `(name, dtype, shape, little-endian bytes)` of tensors that come in name order."""
    sha = hashlib.sha256()
    last = ""
    for name, dtype, shape, data in tensors:
        if name <= last and last:
            raise ValueError(f"tensor {name!r} comes after {last!r}; sort by name first")
        last = name
        sha.update(canonical_json([name, dtype, list(shape)]).encode() + b"\n")
        sha.update(data)
    return sha.hexdigest()
