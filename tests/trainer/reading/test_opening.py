"""What a reader refuses as it opens a cache, before a row of it is believed; that staging sees a shard out of place."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repa.cache_specs.errors import CacheError
from repa.cache_specs.group import with_digest
from repa.cache_specs.schema import ComponentSpec
from repa.trainer import CacheReader
from repa.trainer.evaluating.reference import Reference
from repa.trainer.reading.stage import stage_cache

Change = Callable[..., None]


def set_in(file: Path, path: tuple[Any, ...], value: Any) -> None:
    metadata = json.loads(file.read_text())
    place = metadata
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(metadata))


SHARDING = ("codecs", 0, "configuration")
ARRAY: dict[str, tuple[tuple[Any, ...], Any]] = {
    # Looked for under another name no shard is found, and all rows would be zeros.
    "chunk_key_encoding": (("chunk_key_encoding", "configuration", "separator"), "/"),
    "chunk_grid": (("chunk_grid", "configuration", "chunk_shape"), [10, 2, 16, 16]),
    "fill_value": (("fill_value",), 1),
    "codecs": ((*SHARDING, "codecs", 0, "configuration", "endian"), "big"),
    "codecs of chunks": ((*SHARDING, "chunk_shape"), [2, 1, 8, 16]),
    "codecs of the index": ((*SHARDING, "index_location"), "start"),
    "codecs that are none": (("codecs",), {"a": 1}),
    "node_type": (("node_type",), "group"),
    "storage_transformers": (("storage_transformers",), [{"name": "reverse"}]),
}


@pytest.mark.parametrize("what", list(ARRAY))
@pytest.mark.parametrize("shards", ["as built", "zstd"])
def test_array_metadata_that_is_not_the_contract_s_is_refused(make_cache: Any, what: str, shards: str) -> None:
    written = make_cache(shards=shards)
    file = written.path / "features/toy/patch_tokens/zarr.json"
    CacheReader(written.path)
    set_in(file, *ARRAY[what])
    with pytest.raises(CacheError, match=rf"^{file}: {what.split()[0]} is not what a component with compressor"):
        CacheReader(written.path)


def test_a_component_whose_compressor_was_changed_is_refused(make_cache: Any, change_attributes: Change) -> None:
    """Not part of the fingerprint; the arrays say otherwise."""
    written = make_cache()
    change_attributes(written.path / "features/toy", compressor="zstd")
    with pytest.raises(CacheError, match=r"zarr.json: codecs is not what a component with compressor 'zstd' has"):
        CacheReader(written.path)


ROWS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "chunk_key_encoding": (("chunk_key_encoding", "configuration", "separator"), "."),
    "chunk_grid": (("chunk_grid", "configuration", "chunk_shape"), [7]),
    "fill_value": (("fill_value",), 2),
    "codecs": (("codecs", 0, "configuration", "endian"), "big"),
}


@pytest.mark.parametrize("what", list(ROWS))
def test_labels_that_would_be_read_as_others_are_refused(make_cache: Any, what: str) -> None:
    written = make_cache()
    set_in(written.path / "label/zarr.json", *ROWS[what])
    with pytest.raises(CacheError, match=rf"/label/zarr\.json: {what} is not what label of a cache has"):
        CacheReader(written.path)


def test_labels_that_are_gone_are_not_class_0(make_cache: Any) -> None:
    written = make_cache()
    (written.path / "label/c/0").unlink()
    with pytest.raises(CacheError, match=rf"^{written.path}/label/c/0: missing"):
        CacheReader(written.path)


def test_fingerprints_must_follow_from_what_they_are_made_of(make_cache: Any, change_attributes: Change) -> None:
    written = make_cache()
    group = written.path / "features/toy"
    change_attributes(group, weights="sha256:1")
    with pytest.raises(CacheError, match=r"toy/zarr\.json: the fingerprint does not match the spec beside it"):
        CacheReader(written.path)
    change_attributes(group, weights="none")
    CacheReader(written.path)
    change_attributes(group, dataset_fingerprint="0")
    with pytest.raises(CacheError, match=rf"^{group} was made from other data than {written.path} says"):
        CacheReader(written.path)
    change_attributes(written.path, class_names=["a", "b", "c"])
    with pytest.raises(CacheError, match=r"zarr\.json: dataset_fingerprint is \w+, and its fields give"):
        CacheReader(written.path)


def test_a_group_without_its_digest_is_refused(make_cache: Any) -> None:
    written = make_cache()
    file = written.path / "features/toy/zarr.json"
    metadata = json.loads(file.read_text())
    del metadata["attributes"]["attributes_digest"]
    file.write_text(json.dumps(metadata))
    for opening in (
        lambda: CacheReader(written.path),
        lambda: Reference(written.path, autoencoder=None, encoder=None, pooling="mean"),
        lambda: stage_cache(written.path, written.path.parent / "staged"),
    ):
        with pytest.raises(CacheError, match=f"^{file}: the attributes do not match their digest"):
            opening()


def test_components_of_other_images_are_refused_by_what_they_recorded(
    make_cache: Any, change_attributes: Change, tmp_path: Path
) -> None:
    """Other bad files, other digests: the sizes are compared. The same bad files, other digests: no array is read."""
    written = make_cache(encoders={"toy": "float16", "toy8": "int8"}, invalid={"features/toy": [2, 9]})
    encoders = ["toy", "toy8-int8"]
    assert len(CacheReader(written.path, encoder=encoders).valid_rows) == 21
    said = "were made from other images under the same names"
    change_attributes(written.path / "features/toy8-int8", source_bytes_digest="0" * 64)
    with pytest.raises(CacheError, match=f"latents/toy-ae and features/toy8-int8 {said}"):
        CacheReader(written.path, encoder=encoders)
    with pytest.raises(CacheError, match=f"latents/toy-ae and features/toy8-int8 {said}"):
        stage_cache(written.path, tmp_path, encoders=encoders)
    assert not list(tmp_path.iterdir())

    other = make_cache(invalid={"features/toy": [2, 9, 11]})
    shard = other.shard("latents/toy-ae/source_bytes", 0)
    CacheReader(other.path)
    strange = make_cache(invalid={"features/toy": [4]}, num_samples=23).shard("features/toy/source_bytes", 1)
    shutil.copy(strange, shard)  # of other sizes
    with pytest.raises(CacheError, match=f"latents/toy-ae and features/toy {said}"):
        CacheReader(other.path)


def test_a_component_of_an_earlier_version_is_read_and_staged_as_before(make_cache: Any, tmp_path: Path) -> None:
    written = make_cache()
    file = written.path / "features/toy/zarr.json"
    metadata = json.loads(file.read_text())
    spec = ComponentSpec.from_attributes(metadata["attributes"], "")
    metadata["attributes"] = with_digest({**spec.attributes(written.layout), "complete": True})
    file.write_text(json.dumps(metadata))
    shutil.rmtree(file.parent / "shard_checksums")
    rows = [22, 0, 7]
    for cache in (written.path, stage_cache(written.path, tmp_path)):
        written.assert_rows(CacheReader(cache).rows(rows), rows, [0, 0, 0])


@pytest.mark.parametrize("array", ["features/toy/patch_tokens", "latents/toy-ae/moments", "features/toy/channel_mean"])
def test_shards_that_changed_places_are_not_staged(make_cache: Any, tmp_path: Path, array: str) -> None:
    written = make_cache()
    first, second = (written.shard(array, shard) for shard in (0, 3))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    said = "it is whole, and is not the shard that was written here, twice; repa-cache verify"
    with pytest.raises(CacheError, match=rf"/c\.[03]\.0[.0]*: {said}"):
        stage_cache(written.path, tmp_path / "stage")


def test_numbers_that_do_not_hold_are_not_staged(make_cache: Any, tmp_path: Path) -> None:
    written = make_cache()
    numbers = written.path / "features/toy/shard_checksums"
    whole = (numbers / "c.2.0").read_bytes()
    (numbers / "c.2.0").write_bytes((numbers / "c.1.0").read_bytes())
    with pytest.raises(CacheError, match=rf"^{numbers}: not what the component was completed with"):
        stage_cache(written.path, tmp_path / "stage")
    (numbers / "c.2.0").write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    with pytest.raises(CacheError, match=rf"^{re.escape(str(numbers))}/c\.2\.0: its checksum does not hold"):
        stage_cache(written.path, tmp_path / "stage")
    (numbers / "c.2.0").unlink()
    with pytest.raises(CacheError, match=rf"^{re.escape(str(numbers))}/c\.2\.0: missing; run the build"):
        stage_cache(written.path, tmp_path / "stage")
    (numbers / "c.2.0").write_bytes(whole)
    stage_cache(written.path, tmp_path / "stage")
