"""CacheReader against the arrays that zarr-python wrote. Damage: rows/test_direct_array.py."""

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import CacheError, UsageError
from repa.trainer.diffusion.latents import draw_latents
from repa.trainer.reading.reader import CacheReader
from repa.trainer.rows.direct_array import DirectArray
from repa.trainer.rows.library_array import LibraryArray
from repa.trainer.rows.open_files import OpenFiles

ORDER = np.array([22, 0, 7, 7, 13, 5, 4, 21, 10])
VIEWS = np.array([1, 0, 1, 0, 0, 1, 1, 0, 1])


@pytest.mark.parametrize("shards", ["as built", "zarr's", "zarr's, nothing for zeros", "zstd"])
def test_rows_equal_what_was_written(make_cache, shards):
    written = make_cache(
        encoders={"toy": "float16", "other": "int8"},
        latents="mean_std",
        zero_rows=(7,),
        shards=shards,
    )
    reader = CacheReader(written.path, encoder=["toy", "other-int8"])
    kind = LibraryArray if shards == "zstd" else DirectArray
    assert isinstance(reader._moments, kind)
    assert all(isinstance(array, kind) for arrays in reader._feature_arrays for array in arrays.values())
    # A reused buffer must not let an absent row keep what was there.
    batch = reader.rows(ORDER, VIEWS)
    batch.moments.fill_(5)
    batch = reader.rows(ORDER, VIEWS, out=batch)
    written.assert_rows(batch, ORDER, VIEWS, ("toy", "other-int8"))
    assert not batch.moments[2].any()
    assert batch.features[1].tokens.dtype == torch.int8


@pytest.mark.parametrize("shards", ["as built", "zarr's, nothing for zeros", "zstd"])
def test_pixels_as_uint8_are_mirrored_where_the_view_is_the_mirror(make_cache, shards):
    written = make_cache(latents="uint8", encoders={"toy": "int8"}, zero_rows=(7,), shards=shards)
    stored = written.arrays["latents/pixels-uint8/moments"]
    assert stored.shape == (23, 1, 3, 8, 8)
    reader = CacheReader(written.path, autoencoder="pixels")
    assert (reader.latents.name, reader.latents.kind, reader.views) == ("pixels-uint8", "sample", ("identity", "flip"))
    batch = reader.rows(ORDER, 1 - VIEWS)
    for views in (VIEWS, 1 - VIEWS):  # into the same memory
        batch = reader.rows(ORDER, views, out=batch)
        assert batch.moments.dtype == torch.uint8
        for row, view, found in zip(ORDER, views, batch.moments.numpy(), strict=True):
            np.testing.assert_array_equal(found, stored[row, 0, :, :, ::-1] if view else stored[row, 0])
        tokens = written.arrays["features/toy-int8/patch_tokens"][ORDER, views]
        np.testing.assert_array_equal(batch.features[0].tokens.numpy(), tokens)
        assert not batch.moments[2].any()
    plain = make_cache(latents="uint8", num_views=1, encoders={})
    assert CacheReader(plain.path, encoder=()).views == ("identity",)
    latents = draw_latents(torch.tensor([0, 51, 255], dtype=torch.uint8), None, "sample")
    torch.testing.assert_close(latents, torch.tensor([-1, -0.6, 1]), rtol=0, atol=1e-7)


def test_default_view_is_the_identity_and_any_integers_will_do(make_cache):
    written = make_cache()
    reader = CacheReader(written.path)
    for indices in ([3, 1], torch.tensor([3, 1]), np.array([3, 1], dtype=np.uint8)):
        written.assert_rows(reader.rows(indices), [3, 1], [0, 0])
    empty = reader.rows([])
    assert empty.moments.shape == (0, 3, 8, 8)


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


def test_a_range_that_is_missing_is_refused_before_the_first_row(make_cache):
    written = make_cache()
    written.shard("features/toy/valid", 4).unlink()
    with pytest.raises(CacheError, match=r"valid/c\.4 \(samples 20 to 22\) is missing, and with it 1 of 5 ranges"):
        CacheReader(written.path)
    for shard in range(4):
        written.shard("features/toy/valid", shard).unlink()
    with pytest.raises(CacheError, match="with it 5 of 5 ranges"):
        CacheReader(written.path)
    assert len(CacheReader(written.path, encoder=()).valid_rows) == 23


def test_opening_reads_no_shard_unless_rows_were_left_out(make_cache, monkeypatch):
    files = []
    opened = OpenFiles.open

    def count(self, number, path, **options):
        files.append(path)
        opened(self, number, path, **options)

    monkeypatch.setattr(OpenFiles, "open", count)
    CacheReader(make_cache().path)
    assert files == []
    written = make_cache(invalid={"features/toy": [2, 9]})
    CacheReader(written.path)
    # Which images were left out differs, so that the digests of their sizes say nothing: the sizes are compared.
    read = ("features/toy/valid", "features/toy/source_bytes", "latents/toy-ae/source_bytes")
    assert sorted(files) == sorted(written.shard(array, shard) for array in read for shard in range(5))
    files.clear()
    CacheReader(make_cache(invalid={"features/toy": [2, 9], "latents/toy-ae": [2, 9]}).path)
    assert len(files) == 2 * 5


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


def test_no_threads_are_refused(make_cache):
    with pytest.raises(UsageError, match="num_threads is 0; expected 1 or more"):
        CacheReader(make_cache().path, num_threads=0)


def test_components_are_chosen_by_name(make_cache, tmp_path):
    written = make_cache(encoders={"dinov2-vit-b": "float16", "hog": "float16"})
    with pytest.raises(UsageError, match=r"holds several: dinov2-vit-b, hog\. Choose with encoder="):
        CacheReader(written.path)
    assert CacheReader(written.path, encoder="dinov2").features[0].name == "dinov2-vit-b"
    with pytest.raises(UsageError, match="did you mean 'hog'"):
        CacheReader(written.path, encoder="hogg")
    with pytest.raises(UsageError, match="did you mean 'toy-ae'"):
        CacheReader(written.path, autoencoder="toy", encoder="hog")
    with pytest.raises(CacheError, match=r"no cache here\. Make one with repa-cache build"):
        CacheReader(tmp_path / "nowhere")
    without = make_cache(encoders={})
    with pytest.raises(CacheError, match=r"holds no encoder\..*encoder=\(\)"):
        CacheReader(without.path)


def test_incomplete_is_refused_with_the_command_that_finishes(make_cache, change_attributes):
    written = make_cache(complete=False, encoders={"toy": "int8"})
    with pytest.raises(CacheError, match=r"toy-ae is not complete.*repa-cache build .*--autoencoder pixels"):
        CacheReader(written.path)
    change_attributes(written.path / "latents/toy-ae", complete=True)
    with pytest.raises(CacheError, match=r"toy-int8 is not complete.*--encoder hog --autoencoder none --dtype int8"):
        CacheReader(written.path)


def test_cls_tokens_are_read_where_they_are_asked_for(make_cache):
    written = make_cache()
    batch = CacheReader(written.path, cls_token=False).rows(ORDER, VIEWS)
    assert batch.features[0].cls_token is None
    whole = CacheReader(written.path).rows(ORDER, VIEWS).features[0].tensors()
    assert list(whole) == [*batch.features[0].tensors(), "cls_token"]
    assert all(torch.equal(whole[name], tensor) for name, tensor in batch.features[0].tensors().items())


def test_metadata_that_breaks_the_contract_is_refused(make_cache):
    written = make_cache()
    file = written.path / "features/toy/patch_tokens/zarr.json"
    file.write_text(file.read_text().replace('"float16"', '"float32"'))
    with pytest.raises(CacheError, match=r"is float32 \[23, 2, 16, 16\].*should be float16"):
        CacheReader(written.path)
    (written.path / "zarr.json").write_text("{")
    with pytest.raises(CacheError, match=r"zarr\.json is damaged"):
        CacheReader(written.path)
