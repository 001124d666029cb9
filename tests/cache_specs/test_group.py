"""A group's own file, against zarr, and what a damaged one says."""

import re
from pathlib import Path

import pytest
import zarr

from repa.cache_specs.errors import CacheError
from repa.cache_specs.group import component_names, group_attributes
from repa.cache_specs.storage import location


def test_attributes_are_those_that_zarr_reads(tmp_path: Path) -> None:
    attributes = {"format": "repa-cache", "names": ["ä", "b"], "nested": {"x": 0.1, "y": None}}
    group = zarr.create_group(tmp_path / "cache", attributes=attributes)
    assert group_attributes(location(tmp_path / "cache")) == attributes == dict(group.attrs)
    assert group_attributes(location(tmp_path / "none")) is None
    group.create_group("features")
    for name in ("mae", "clip"):
        group.create_group(f"features/{name}")
    (tmp_path / "cache/features/half-made").mkdir()
    assert component_names(location(tmp_path / "cache"), "features") == ["clip", "mae"]
    assert component_names(location(tmp_path / "cache"), "latents") == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\xff", '{"zarr_format": 2}', '{"zarr_format": 3, "node_type": "array"}']
)
def test_what_is_not_a_groups_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "zarr.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match=re.escape(f"{tmp_path}: zarr.json is damaged (")):
        group_attributes(location(tmp_path))
