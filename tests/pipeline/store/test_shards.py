"""Shard files written by hand are what zarr-python reads, and what it writes is what our own code reads."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from repa.cache_specs.errors import CacheError
from repa.cache_specs.layout import ArrayLayout
from repa.cache_specs.shard_index import index_bytes, unpack_index
from repa.pipeline.store.shards import ShardWriter, chunk_decoder, chunk_encoder, iter_chunks, read_shard

LAYOUT = ArrayLayout(name="x", shape=(7, 2, 3, 5), dtype="float16", inner=(1, 1, 3, 5), shard=(4, 2, 3, 5))


def empty_array(folder: Path) -> zarr.Array:
    return zarr.create_array(
        folder,
        shape=LAYOUT.shape,
        dtype=LAYOUT.dtype,
        chunks=LAYOUT.inner,
        shards=LAYOUT.shard,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )


@pytest.fixture
def rows() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(LAYOUT.shape).astype(np.float16)
    values[2] = 0
    return values


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_chunks_begin_at_multiples_of_64(tmp_path: Path, rows: np.ndarray, compressor: str) -> None:
    file = tmp_path / "shard"
    writer = ShardWriter(file, LAYOUT, compressor)
    writer.append(rows[:4].reshape(-1, 3, 5))
    writer.close()
    data = file.read_bytes()
    offsets, lengths = unpack_index(data[-index_bytes(LAYOUT) :], LAYOUT, file_bytes=len(data), where=file).T.tolist()
    assert not any(offset % 64 for offset in offsets)
    assert sorted(set(offsets)) == offsets
    assert len(data) == offsets[-1] + lengths[-1] + index_bytes(LAYOUT)
    between = np.ones(len(data) - index_bytes(LAYOUT), dtype=bool)
    for offset, length in zip(offsets, lengths, strict=True):
        between[offset : offset + length] = False
    assert between.any()
    assert not np.frombuffer(data, np.uint8, len(between))[between].any()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_zarr_reads_what_is_written(tmp_path: Path, rows: np.ndarray, batch: int) -> None:
    array = empty_array(tmp_path)
    for shard in range(LAYOUT.num_shards):
        writer = ShardWriter(tmp_path / LAYOUT.shard_file(shard), LAYOUT, "none")
        chunks = rows[4 * shard : 4 * shard + 4].reshape(-1, 3, 5)
        for start in range(0, len(chunks), batch):
            writer.append(chunks[start : start + batch])
        writer.close()
    np.testing.assert_array_equal(array[:], rows)


def test_what_zarr_writes_is_read(tmp_path: Path, rows: np.ndarray) -> None:
    empty_array(tmp_path)[:] = rows
    chunks, problems = read_shard(tmp_path / LAYOUT.shard_file(1), LAYOUT, "none", num_chunks=6)
    assert not problems
    np.testing.assert_array_equal(chunks[:6], rows[4:].reshape(6, 3, 5))


def test_a_shard_without_a_chunk_says_which(tmp_path: Path, rows: np.ndarray) -> None:
    writer = ShardWriter(tmp_path / "shard", LAYOUT, "none")
    writer.append(rows[:3].reshape(-1, 3, 5))
    writer.close()
    _, problems = read_shard(tmp_path / "shard", LAYOUT, "none", num_chunks=8)
    assert problems == dict.fromkeys((6, 7), "it is missing from its shard")


def test_rows_of_another_dtype_are_not_taken(tmp_path: Path, rows: np.ndarray) -> None:
    writer = ShardWriter(tmp_path / "shard", LAYOUT, "none")
    with pytest.raises(AssertionError):
        writer.append(rows.astype(np.float32).reshape(-1, 3, 5))
    writer.abandon()
    assert not (tmp_path / "shard").exists()


@pytest.mark.parametrize("compressor", ["zstd", "blosc"])
def test_a_chunk_that_is_whole_and_not_compressed_is_a_problem_of_its_own(
    tmp_path: Path, rows: np.ndarray, compressor: str
) -> None:
    writer = ShardWriter(tmp_path / "c.0", LAYOUT, "none")
    writer.append(rows[:4].reshape(8, 3, 5))
    writer.close()
    found = dict(iter_chunks(tmp_path / "c.0", LAYOUT, compressor, num_chunks=8))
    assert sorted(found) == list(range(8))
    assert all(isinstance(what, str) and what.startswith("cannot be decompressed (") for what in found.values())


@pytest.mark.parametrize("compressor", ["zstd", "blosc"])
@pytest.mark.parametrize("claimed", [1, 2**31 - 1])
def test_a_chunk_that_claims_another_size_is_refused_before_memory_is_taken_for_it(
    tmp_path: Path, compressor: str, claimed: int
) -> None:
    expected, data = LAYOUT.inner_bytes, np.arange(LAYOUT.inner_bytes, dtype=np.uint8)
    packed = bytearray(chunk_encoder(compressor, "uint8")(data))
    decode = chunk_decoder(compressor, expected)
    assert bytes(decode(bytes(packed))) == data.tobytes()
    if compressor == "blosc":
        packed[4:8] = claimed.to_bytes(4, "little")
    else:  # the same frame with a header of four bytes of size, one segment, no dictionary
        header = 5 + (1 if packed[4] >> 5 & 1 else 0) + (0 if packed[4] >> 5 & 1 else 1)
        assert packed[4] >> 6 == 0
        packed[4:header] = bytes([0b1010_0000]) + claimed.to_bytes(4, "little")
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"it says that it holds {claimed} bytes, expected {expected}"):
        decode(bytes(packed))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("num_bytes", [1, 255, 256, 65_791, 65_792, 1_000_000])
def test_what_zstd_itself_writes_says_its_size(num_bytes: int) -> None:
    data = np.zeros(num_bytes, dtype=np.uint8)
    assert len(chunk_decoder("zstd", num_bytes)(chunk_encoder("zstd", "uint8")(data))) == num_bytes
    with pytest.raises(ValueError, match="it says that it holds"):
        chunk_decoder("zstd", num_bytes + 1)(chunk_encoder("zstd", "uint8")(data))


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"gone: cannot be read \(No such file"):
        read_shard(tmp_path / "gone", LAYOUT, "none", num_chunks=8)


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_a_shard_is_read_in_the_memory_of_a_chunk(tmp_path: Path, compressor: str) -> None:
    layout = ArrayLayout(
        name="x", shape=(64, 1, 64, 512), dtype="float16", inner=(1, 1, 64, 512), shard=(64, 1, 64, 512)
    )
    rows = np.random.default_rng(0).standard_normal((64, 64, 512)).astype(np.float16)
    writer = ShardWriter(tmp_path / "shard", layout, compressor)
    writer.append(rows)
    writer.close()
    list(iter_chunks(tmp_path / "shard", layout, compressor, num_chunks=64))  # what is imported on the way
    tracemalloc.start()
    for i, chunk in iter_chunks(tmp_path / "shard", layout, compressor, num_chunks=64):
        assert isinstance(chunk, np.ndarray)
        assert np.array_equal(chunk, rows[i])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Stored, decoded, the one before while it is replaced, and what the comparison takes: of 64.
    assert peak < 5 * layout.inner_bytes
