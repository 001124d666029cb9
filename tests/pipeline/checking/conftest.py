"""A cache that other tests damage copies of, and the form that an earlier version gave it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from repa.cache_specs.group import with_digest


@pytest.fixture(scope="session")
def as_before() -> Callable[[Path], None]:
    """Return a function that takes from a cache what earlier versions did not write: numbers of shards, and digests."""

    def strip(cache: Path) -> None:
        for file in [*cache.glob("latents/*/zarr.json"), *cache.glob("features/*/zarr.json")]:
            metadata = json.loads(file.read_text())
            attributes = metadata["attributes"]
            for key in ("source_bytes_digest", "shards_digest", "attributes_digest"):
                attributes.pop(key, None)
            metadata["attributes"] = with_digest(attributes)
            file.write_text(json.dumps(metadata, indent=2))
            shutil.rmtree(file.parent / "shard_checksums", ignore_errors=True)

    return strip
