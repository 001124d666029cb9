"""CacheReader against the arrays that zarr-python wrote, and against damage of every kind."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import CacheError, UsageError
from repa.cache_specs.shard_index import index_bytes
from repa.trainer.reader import Batch, CacheReader
from repa.trainer.shards import DirectArray, LibraryArray, OpenFiles

ORDER = np.array([22, 0, 7, 7, 13, 5, 4, 21, 10])
VIEWS = np.array([1, 0, 1, 0, 0, 1, 1, 0, 1])


def assert_rows(batch: Batch, written, rows, views, encoders=("toy",)) -> None:
    """Every tensor of the batch holds exactly the bytes that were written for those rows and views."""
    assert batch.rows.tolist() == list(rows)
    np.testing.assert_array_equal(batch.labels.numpy(), written.arrays["label"][rows])
    np.testing.assert_array_equal(batch.moments.numpy(), written.arrays["latents/toy-ae/moments"][rows, views])
    for features, name in zip(batch.features, encoders, strict=True):
        for array, tensor in (
            ("patch_tokens", features.tokens),
            ("token_scale", features.token_scale),
            ("channel_mean", features.channel_mean),
            ("channel_std", features.channel_std),
            ("cls_token", features.cls_token),
        ):
            expected = written.arrays.get(f"features/{name}/{array}")
            if expected is None:
                assert tensor is None
            else:
                np.testing.assert_array_equal(tensor.numpy(), expected[rows, views])
                assert tensor.numpy().dtype == expected.dtype


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("write_empty_chunks", [False, True])
def test_rows_equal_what_was_written(make_cache, compressed, write_empty_chunks):
    written = make_cache(
        encoders={"toy": "float16", "other": "int8"},
        latents="mean_std",
        zero_rows=(7,),
        compressed=compressed,
        write_empty_chunks=write_empty_chunks,
    )
    reader = CacheReader(written.path, encoder=["toy", "other-int8"])
    kind = LibraryArray if compressed else DirectArray
    assert isinstance(reader._moments, kind)
    assert all(isinstance(array, kind) for arrays in reader._feature_arrays for array in arrays.values())
    # A reused buffer must not let an absent row keep what was there.
    batch = reader.rows(ORDER, VIEWS)
    batch.moments.fill_(5)
    batch = reader.rows(ORDER, VIEWS, out=batch)
    assert_rows(batch, written, ORDER, VIEWS, ("toy", "other-int8"))
    assert not batch.moments[2].any()
    assert batch.features[1].tokens.dtype == torch.int8


def test_default_view_is_the_identity_and_any_integers_will_do(make_cache):
    written = make_cache()
    reader = CacheReader(written.path)
    for indices in ([3, 1], torch.tensor([3, 1]), np.array([3, 1], dtype=np.uint8)):
        assert_rows(reader.rows(indices), written, [3, 1], [0, 0])
    empty = reader.rows([])
    assert empty.moments.shape == (0, 3, 8, 8)


def test_every_row_with_few_open_files(make_cache):
    written = make_cache(num_samples=31, shard_samples=3, num_views=1)
    reader = CacheReader(written.path)
    reader._files._limit = 2
    rows = np.random.default_rng(0).permutation(31)
    assert_rows(reader.rows(rows), written, rows, np.zeros_like(rows))
    assert len(reader._files._open) == 2
    reader.close()
    assert not reader._files._open
    assert_rows(reader.rows(rows), written, rows, np.zeros_like(rows))


def test_describes_the_cache(make_cache):
    written = make_cache(invalid={"latents/toy-ae": [2], "features/toy": [2, 9]})
    reader = CacheReader(written.path)
    assert reader.num_samples == 23
    assert reader.num_classes == 3
    assert reader.views == ("identity", "flip")
    assert reader.valid_rows.tolist() == [row for row in range(23) if row not in (2, 9)]
    assert reader.features[0].grid == (4, 4)
    assert reader.features[0].width == 16
    assert reader.latents.std == (1.0, 2.0, 0.5)
    assert set(reader.fingerprints) == {"dataset", "latents/toy-ae", "features/toy", "valid_rows"}
    # What is not used is not asked for its valid rows.
    assert CacheReader(written.path, encoder=()).valid_rows.tolist() == [row for row in range(23) if row != 2]


def test_rows_outside_the_cache_are_refused(make_cache):
    reader = CacheReader(make_cache().path)
    with pytest.raises(UsageError, match="index 23; the cache has 0 to 22"):
        reader.rows([0, 23])
    with pytest.raises(UsageError, match="index -1"):
        reader.rows([-1])
    with pytest.raises(UsageError, match="view 2; the cache has 0 to 1"):
        reader.rows([0], [2])
    with pytest.raises(UsageError, match="expected integers"):
        reader.rows([0.5])


def test_components_are_chosen_by_name(make_cache, tmp_path):
    written = make_cache(encoders={"dinov2-vit-b": "float16", "hog": "float16"})
    with pytest.raises(UsageError, match=r"holds several: dinov2-vit-b, hog\. Choose with --encoder"):
        CacheReader(written.path)
    assert CacheReader(written.path, encoder="dinov2").features[0].name == "dinov2-vit-b"
    with pytest.raises(UsageError, match="did you mean 'hog'"):
        CacheReader(written.path, encoder="hogg")
    with pytest.raises(UsageError, match="did you mean 'toy-ae'"):
        CacheReader(written.path, autoencoder="toy", encoder="hog")
    with pytest.raises(CacheError, match=r"no cache here\. Make one with repa-cache build"):
        CacheReader(tmp_path / "nowhere")
    without = make_cache(encoders={})
    with pytest.raises(CacheError, match=r"holds no encoder\..*--recipe sit"):
        CacheReader(without.path)


def test_incomplete_is_refused_with_the_command_that_finishes(make_cache):
    written = make_cache(complete=False, encoders={"toy": "int8"})
    with pytest.raises(CacheError, match=r"toy-ae is not complete.*repa-cache build .*--autoencoder pixels"):
        CacheReader(written.path)
    import zarr

    zarr.open_group(written.path / "latents/toy-ae").attrs["complete"] = True
    with pytest.raises(CacheError, match=r"toy-int8 is not complete.*--encoder hog --autoencoder none --dtype int8"):
        CacheReader(written.path)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def flip_index(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-30] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(os.unlink, "cannot be opened"), (cut, "checksum"), (flip_index, "checksum"), (empty, "0 bytes")],
)
def test_a_damaged_shard_is_named_with_its_samples(make_cache, damage, message):
    written = make_cache()
    damage(written.shard("features/toy/patch_tokens", 2))
    reader = CacheReader(written.path)
    reader.rows([0, 9])
    with pytest.raises(CacheError, match=message) as caught:
        reader.rows([0, 14])
    assert "features/toy/patch_tokens/c.2." in str(caught.value)
    assert "(samples 10 to 14)" in str(caught.value)


def test_an_index_outside_the_file_and_a_shrunken_file_are_refused(make_cache):
    written = make_cache()
    reader = CacheReader(written.path)
    array = reader._moments
    file = written.shard("latents/toy-ae/moments", 0)
    reader.rows([1])
    reader.close()
    whole = file.read_bytes()
    # The rows are lost, the index is whole: its entries now point past the end.
    file.write_bytes(whole[-index_bytes(array.layout) :])
    with pytest.raises(CacheError, match="changed while in use"):
        reader.rows([1])
    with pytest.raises(CacheError, match="points outside the file"):
        CacheReader(written.path).rows([1])


def test_a_read_that_ends_early_is_refused(make_cache):
    written = make_cache()
    reader = CacheReader(written.path)
    reader.rows([0])
    # Cut under an open descriptor: the index was good when it was parsed.
    os.truncate(written.shard("latents/toy-ae/moments", 0), 100)
    with pytest.raises(CacheError, match="ends at byte 100"):
        reader.rows([0])


def test_a_read_that_the_system_refuses_is_named(make_cache, monkeypatch):
    reader = CacheReader(make_cache().path)
    reader.rows([0])

    def refuse(_descriptor: int, _buffers: list[memoryview], _offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(CacheError, match=r"moments/c\.0.*\(samples 0 to 4\) cannot be read at byte \d+: Input/output"):
        reader.rows([0])


def test_cls_tokens_are_read_where_they_are_asked_for(make_cache):
    written = make_cache()
    batch = CacheReader(written.path, cls_token=False).rows(ORDER, VIEWS)
    assert batch.features[0].cls_token is None
    whole = CacheReader(written.path).rows(ORDER, VIEWS).features[0].tensors()
    assert list(whole) == [*batch.features[0].tensors(), "cls_token"]
    assert all(torch.equal(whole[name], tensor) for name, tensor in batch.features[0].tensors().items())


def test_check_reads_finds_a_flipped_byte(make_cache):
    written = make_cache()
    file = written.shard("features/toy/patch_tokens", 0)
    data = bytearray(file.read_bytes())
    data[11] ^= 1
    file.write_bytes(data)
    CacheReader(written.path).rows([0, 1, 2, 3, 4])  # by design: `verify` looks at these
    with pytest.raises(CacheError, match="whose checksum does not hold"):
        CacheReader(written.path, check_reads=True).rows([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [0, 1] * 5)
    whole = make_cache()
    assert_rows(CacheReader(whole.path, check_reads=True).rows(ORDER, VIEWS), whole, ORDER, VIEWS)


def test_metadata_that_breaks_the_contract_is_refused(make_cache):
    written = make_cache()
    file = written.path / "features/toy/patch_tokens/zarr.json"
    file.write_text(file.read_text().replace('"float16"', '"float32"'))
    with pytest.raises(CacheError, match=r"is float32 \[23, 2, 16, 16\].*should be float16"):
        CacheReader(written.path)
    (written.path / "zarr.json").write_text("{")
    with pytest.raises(CacheError, match="cannot be read"):
        CacheReader(written.path)


def test_open_files_closes_the_oldest(tmp_path):
    files = OpenFiles(limit=1)
    for name in "ab":
        (tmp_path / name).write_text(name)
    first = files.open(tmp_path / "a")
    files.open(tmp_path / "b")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
    assert files.get(tmp_path / "a") is None
    files.close()
