"""After verify's own `rm` line the build goes on, whatever was named in it, and gives the same bytes."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from .conftest import refuse

SHARD = "features/hog-grid4/patch_tokens/c.0.0.0.0"
OTHER = ("--encoder", "hog:grid=3", "--autoencoder", "none")


def without(cache: Path, copy: Path, *names: str) -> Path:
    """Return a copy of `cache` that lacks some files."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    for name in names:
        (copy / name).unlink()
    return copy


def test_metadata_and_a_shard_are_both_made_again(
    images: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
    tree: Callable[[Path], dict[str, bytes]],
) -> None:
    cache, copy = tmp_path / "cache", tmp_path / "copy"
    assert build(images, cache).code == 0
    whole = tree(cache)
    metadata = [name for name in whole if name.endswith("zarr.json")]
    assert len(metadata) > 12
    for name in metadata:
        assert build(images, without(cache, copy, name, SHARD)).code == 0, name
        assert tree(copy) == whole, name
    # An encoder is added to a cache whose other components wait for builds of their own.
    for name in ("latents/pixels/source_bytes/zarr.json", "features/hog-grid4/source_bytes/zarr.json"):
        without(cache, copy, name, SHARD)
        assert repa_cache("build", "--data", images, "--cache", copy, *OTHER, "--workers", 0).code == 0, name
        assert not (copy / name).exists()


def test_a_root_that_is_gone_is_not_made_anew_as_something_else(
    images: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
    tree: Callable[[Path], dict[str, bytes]],
) -> None:
    cache, copy = tmp_path / "cache", tmp_path / "copy"
    assert build(images, cache).code == 0
    without(cache, copy, "zarr.json")
    before = tree(copy)
    outcome = repa_cache("build", "--data", images, "--cache", copy, *OTHER, "--workers", 0)
    refuse(outcome, 1, "zarr.json: missing, and latents/pixels was made with other options", "--resolution, --flip")
    assert tree(copy) == before
    assert build(images, copy).code == 0
    assert tree(copy) == tree(cache)


@pytest.mark.parametrize("group", ["", "features/hog-grid4"])
def test_consolidated_metadata_is_said_to_be_that_and_a_rebuild_heals_it(
    images: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    repa_cache: Callable[..., Any],
    tree: Callable[[Path], dict[str, bytes]],
    group: str,
) -> None:
    cache = tmp_path / "cache"
    assert build(images, cache).code == 0
    whole = tree(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(cache / group)
    outcome = repa_cache("verify", cache)
    refuse(outcome, 1, f"run the build again: rm {cache / group / 'zarr.json'}")
    assert "holds a copy of all other metadata, by zarr.consolidate_metadata" in outcome.err
    (cache / group / "zarr.json").unlink()
    assert build(images, cache).code == 0
    assert tree(cache) == whole
