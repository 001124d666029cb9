"""The library path: the same bytes as the direct one, from compressed shards, buckets and other people's sharding."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from repa.cache_specs.errors import CacheError, UsageError
from repa.cache_specs.layout import ArrayLayout
from repa.cache_specs.storage import location
from repa.trainer import CacheReader
from repa.trainer.rows import library_array
from repa.trainer.rows.direct_array import DirectArray
from repa.trainer.rows.library_array import LibraryArray
from repa.trainer.rows.row_reads import RowReads
from repa.trainer.rows.shards import open_array


def assert_same_rows(reader: CacheReader, other: CacheReader) -> None:
    rng = np.random.default_rng(1)
    every = np.repeat(np.arange(reader.num_samples), 2), np.tile([0, 1], reader.num_samples)  # shard edges too
    drawn = rng.integers(0, reader.num_samples, 40), rng.integers(0, 2, 40)  # unsorted, with repeats
    for rows, views in (every, drawn, (np.empty(0, int), np.empty(0, int))):
        batch, others = reader.rows(rows, views).tensors(), other.rows(rows, views).tensors()
        assert list(batch) == list(others)
        for name, left in batch.items():
            right = others[name]
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left.numpy().view(np.uint8), right.numpy().view(np.uint8), err_msg=name)
    np.testing.assert_array_equal(reader.valid_rows, other.valid_rows)
    assert reader.fingerprints == other.fingerprints


@pytest.mark.parametrize("shards", ["as built", "zarr's", "zarr's, nothing for zeros"])
def test_a_bucket_gives_the_rows_of_the_folder(
    make_cache: Callable[..., Any], upload: Callable[..., str], bucket: str, shards: str
) -> None:
    written = make_cache(
        encoders={"toy": "float16", "toy8": "int8"},
        zero_rows=(1, 7, 22),
        invalid={"features/toy": [3]},
        shards=shards,
    )
    names = sorted(folder.name for folder in (written.path / "features").iterdir() if folder.is_dir())
    there = CacheReader(upload(written.path, f"{bucket}/cache"), encoder=names)
    assert isinstance(there._moments, LibraryArray)
    here = CacheReader(written.path, encoder=names)
    assert isinstance(here._moments, DirectArray)
    assert_same_rows(here, there)
    assert not there.rows([7]).moments.any()


@pytest.mark.parametrize("codec", [ZstdCodec(level=1), BloscCodec(cname="lz4", typesize=2), None])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_other_shards_give_the_same_rows(tmp_path: Path, dtype: str, codec: Any) -> None:
    """Compressed as ours, or not (None) in chunks and shards of another shape, each with rows that are not stored."""
    layout = ArrayLayout(name="x", shape=(11, 2, 3, 5), dtype=dtype, inner=(1, 1, 3, 5), shard=(4, 2, 3, 5))
    values = np.random.default_rng(0).integers(-100, 100, layout.shape).astype(dtype)
    values[[0, 4, 5, 6, 7]] = 0  # of the second shard nothing is stored: where shards are ours it is an error
    values[2, 1] = 0
    if codec is not None:
        values[4, 0, 0, 0] = 1
    ours = {"chunks": layout.inner, "shards": layout.shard, "compressors": [codec, Crc32cCodec()]}
    foreign = {"chunks": (2, 1, 3, 5), "shards": (6, 2, 3, 5), "compressors": [Crc32cCodec()]}
    options = foreign if codec is None else ours
    encoding = {"name": "default", "separator": "."}
    group = zarr.create_group(tmp_path / "group")
    array = group.create_array(
        "x", shape=layout.shape, dtype=dtype, filters=None, chunk_key_encoding=encoding, **options
    )
    array[...] = values
    opened = open_array(location(tmp_path / "group"), layout, reads=RowReads(), check_reads=False)
    assert isinstance(opened, LibraryArray)
    rows, views = np.array([10, 0, 2, 2, 4, 7, 3, 10]), np.array([1, 0, 1, 0, 0, 1, 0, 0])
    out = np.full((8, 3, 5), 77, dtype=dtype)
    opened.begin(rows, views, out)()
    np.testing.assert_array_equal(out, values[rows, views])


def test_what_is_damaged_or_gone_is_named_by_object_and_sample(
    make_cache: Callable[..., Any], upload: Callable[..., str], bucket: str
) -> None:
    written = make_cache(num_samples=23, shard_samples=5)
    cache = location(upload(written.path, f"{bucket}/cache"))
    reader = CacheReader(str(cache))
    before = [tensor.clone() for tensor in reader.rows([5, 12]).tensors().values()]
    shards = cache / "features/toy/patch_tokens"
    whole = (shards / "c.2.0.0.0").read() or b""

    (shards / "c.1.0.0.0").delete()  # while the run has it in use
    with pytest.raises(CacheError, match=rf"^{shards}/c\.1\.0\.0\.0: sample 6, view 0 .*\(it is missing\)") as error:
        reader.rows([0, 6, 12])
    assert "repa-cache verify" in str(error.value)
    assert "\n" not in str(error.value)
    for data, said in (
        (whole[:-100], "."),  # cut
        (whole[:3] + bytes([whole[3] ^ 1]) + whole[4:], "[Dd]igest"),  # a flipped bit in the first row
    ):
        (shards / "c.2.0.0.0").write(data)
        with pytest.raises(CacheError, match=rf"^{shards}/c\.2\.0\.0\.0: sample 10, view 0 cannot be read \(.*{said}"):
            CacheReader(str(cache)).rows([0, 10])
    (shards / "c.2.0.0.0").write(whole)
    (shards / "c.1.0.0.0").write((written.path / "features/toy/patch_tokens/c.1.0.0.0").read_bytes())
    for tensor, old in zip(CacheReader(str(cache)).rows([5, 12]).tensors().values(), before, strict=True):
        assert torch.equal(tensor, old)


def test_what_cannot_be_reached_is_one_line(bucket: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(CacheError, match=rf"^{bucket}/none: no cache here\. .* repa-cache build --cache {bucket}/none"):
        CacheReader(f"{bucket}/none")
    with pytest.raises(CacheError, match=r"bucket does not exist"):
        CacheReader(f"{bucket}-gone/cache")
    with pytest.raises(CacheError, match=r"cannot be read \(.*InvalidAccessKeyId"):
        CacheReader(f"{request.getfixturevalue('refusing_bucket')}/cache")
    layout = ArrayLayout(name="x", shape=(1,), dtype="int8", inner=(1,), shard=(1,))
    refused = LibraryArray(location("az://box/x"), layout, in_shard_files=True)
    with pytest.raises(
        UsageError, match=r"^az://box/x: rows cannot be read from there directly; open what stage_cache"
    ):
        refused.begin(np.zeros(1, int), np.zeros(1, int), np.zeros(1, np.int8))
    with pytest.raises(CacheError, match=r"^s3://\S+ cannot be opened \(.*\)$") as error:
        LibraryArray(location("s3://some-bucket/x"), layout, in_shard_files=True)  # at the server that refuses
    assert len(str(error.value)) < 400


def test_without_tensorstore_it_is_said_what_to_install(
    make_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = make_cache(shards="zstd")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    library_array._shared_context.cache_clear()
    with pytest.raises(UsageError, match=r"moments: .*through tensorstore, which is not installed; pip install"):
        CacheReader(written.path)


def test_samples_that_were_left_out_of_a_compressed_cache(make_cache: Callable[..., Any]) -> None:
    written = make_cache(shards="zstd", invalid={"features/toy": [2, 9]})
    assert CacheReader(written.path).valid_rows.tolist() == [row for row in range(23) if row not in (2, 9)]
    file = written.shard("features/toy/valid", 1)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CacheError, match=r"features/toy/valid cannot be read \(.*the cache is damaged"):
        CacheReader(written.path)


def test_where_rows_cannot_be_read_a_copy_can_be_staged(
    make_cache: Callable[..., Any],
    upload: Callable[..., str],
    bucket: str,
    tmp_path: Path,
    repa_train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = upload(make_cache(invalid={"features/toy": [2, 9]}).path, f"{bucket}/cache")
    monkeypatch.setattr(library_array, "_kvstore", lambda folder: None)  # as of az://, for which no server is at hand
    for more in ((), ("--dry-run",)):
        refused = repa_train(url, tmp_path / "run", "--steps", "2", *more)
        assert refused.code == 2
        assert f"{url}/features/toy/patch_tokens: rows cannot be read from there directly; add --stage" in refused.error
    staged = ("--stage", str(tmp_path / "staged"))
    assert repa_train(url, tmp_path / "run", "--steps", "2", *staged, "--dry-run").code == 0
    outcome = repa_train(url, tmp_path / "run", "--steps", "2", *staged)
    assert outcome.code == 0, outcome.error


def test_a_run_from_a_bucket_is_the_run_from_the_folder(
    make_cache: Callable[..., Any],
    upload: Callable[..., str],
    bucket: str,
    tmp_path: Path,
    repa_train: Callable[..., Any],
) -> None:
    written = make_cache()
    url = upload(written.path, f"{bucket}/cache")
    here = repa_train(written.path, tmp_path / "here", "--steps", "6")
    there = repa_train(url, tmp_path / "there", "--steps", "3")
    assert (here.code, there.code) == (0, 0), there.error
    assert f"{url}" in there.output
    there = repa_train(url, tmp_path / "there", "--steps", "6", "--resume", "auto")
    assert there.code == 0, there.error
    assert there.losses() == here.losses()
    moved = repa_train(written.path, tmp_path / "there", "--steps", "7", "--resume", "auto")
    assert moved.code == 0, moved.error


@pytest.mark.parametrize("shards", ["zstd", "ours"])
def test_a_shard_that_is_no_file_is_named_and_not_waited_for(make_cache: Callable[..., Any], shards: str) -> None:
    written = make_cache(**({"shards": shards} if shards == "zstd" else {}))
    file = written.shard("features/toy/patch_tokens", 1)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CacheError, match=r"is no file|it is a FIFO, not a file"):
        CacheReader(written.path).rows(range(23))
