"""repa-cache derive: what is stored against numpy, what reads it, what refuses it, and what verify makes of it."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from repa.cache_specs.derived import read_fit
from repa.cache_specs.errors import CacheError, JobError
from repa.cache_specs.group import with_digest
from repa.cache_specs.storage import location
from repa.pipeline import BuildOptions, run_build, scan_folder
from repa.pipeline.analysis.features import open_encoders
from repa.pipeline.checking.recompute import recompute
from repa.pipeline.checking.verify_fits import fit_notes, stored_fits
from repa.pipeline.deriving.derive import DeriveOptions, run_derive
from repa.pipeline.images.manifest import FolderSource
from repa.pipeline.store.fits import write_fits_file
from repa.pipeline.store.store import CacheStore
from repa.trainer import CacheReader

from .conftest import SOURCE, principal, stored

DERIVED = f"{SOURCE}-pca6"
VALID = [row for row in range(14) if row != 5]


@pytest.fixture
def derive(repa_cache: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that derives by the command line, which must succeed."""

    def run(cache: Path, *options: object, source: str = SOURCE, method: str = "pca:6") -> Any:
        done = repa_cache("derive", cache, "--from", source, "--with", method, *options)
        assert done.code == 0, done.err
        return done

    return run


def expected(cache: Path, num: int) -> np.ndarray:
    """Return [N, V, T, num] float64: all valid tokens of view 0 decide the axes, every view is projected on them."""
    tokens = stored(cache, "patch_tokens").astype(np.float64)
    mean, axes, _ = principal(tokens[VALID, 0].reshape(-1, tokens.shape[-1]), num)
    return (tokens - mean) @ axes.T


def test_stored_tokens_are_the_projections_of_the_source(cache: Path, derive: Callable[..., Any]) -> None:
    done = derive(cache)
    assert "derived 14 samples; features/hog-grid4-pca6: complete" in done.out
    assert f"{cache}: features/hog-grid4-pca6 is there and complete" in derive(cache).out
    wide = expected(cache, 6)
    tokens = stored(cache, "patch_tokens", DERIVED)
    assert (tokens.dtype, tokens.shape) == (np.float16, (14, 2, 16, 6))
    np.testing.assert_allclose(tokens[VALID], wide[VALID], rtol=2**-11, atol=1e-5)
    np.testing.assert_allclose(stored(cache, "channel_mean", DERIVED)[VALID], wide.mean(axis=2)[VALID], atol=1e-6)
    std = wide.std(axis=2, ddof=1)
    np.testing.assert_allclose(stored(cache, "channel_std", DERIVED)[VALID], std[VALID], rtol=1e-5)
    assert not tokens[5].any()
    for record in ("valid", "source_bytes"):
        np.testing.assert_array_equal(stored(cache, record, DERIVED), stored(cache, record))
    attributes = zarr.open_group(cache / DERIVED, mode="r").attrs
    assert attributes["bad_files"] == zarr.open_group(cache / SOURCE, mode="r").attrs["bad_files"]
    assert attributes["source_bytes_digest"] == zarr.open_group(cache / SOURCE, mode="r").attrs["source_bytes_digest"]


def decoded(cache: Path, source: str) -> np.ndarray:
    """Return tokens [N, V, T, E] float64 of an int8 component."""
    codes, scale, mean, std = (
        stored(cache, name, source).astype(np.float64)
        for name in ("patch_tokens", "token_scale", "channel_mean", "channel_std")
    )
    return codes * scale[..., None] * std[:, :, None] + mean[:, :, None]


def test_int8_in_and_out_keep_the_projections(cache: Path, derive: Callable[..., Any]) -> None:
    derive(cache, "--dtype", "int8")
    found, wide = decoded(cache, f"{DERIVED}-int8"), expected(cache, 6)
    assert np.corrcoef(found[VALID].ravel(), wide[VALID].ravel())[0, 1] > 0.9995
    derive(cache, source=f"{SOURCE}-int8")
    tokens = decoded(cache, f"{SOURCE}-int8")
    mean, axes, _ = principal(tokens[VALID, 0].reshape(-1, 128), 6)
    from_int8 = stored(cache, "patch_tokens", f"{SOURCE}-int8-pca6")
    np.testing.assert_allclose(from_int8[VALID], ((tokens - mean) @ axes.T)[VALID], rtol=2**-11, atol=1e-5)


def test_a_derived_component_is_a_features_component_like_any_other(
    cache: Path, sources: Path, derive: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    derive(cache)
    info = repa_cache("info", cache)
    assert "derived pca:6 of features/hog-grid4, fp32" in info.out
    assert "fits/hog-grid4-pca6: pca:6, fitted to 13 images\n  of features/hog-grid4\n" in info.out
    done = repa_cache("verify", cache, "--recompute", 20, "--data", sources / "images", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    assert f"{DERIVED}: 13 samples derived again, cosine to what is stored:\n  mean 1.000000, min 1.000000" in done.out
    (encoder,) = open_encoders(cache, ["hog-grid4-pca6"])[1]
    assert (encoder.width, encoder.grid, encoder.has_cls) == (6, (4, 4), False)
    assert "hog-grid4-pca6, 13 of 14 images, 4 x 4 tokens of 6" in repa_cache("metrics", cache).out
    reader = CacheReader(cache, encoder="hog-grid4-pca6")
    batch = reader.rows([3, 1], [1, 0])
    tokens = stored(cache, "patch_tokens", DERIVED)
    np.testing.assert_array_equal(batch.features[0].tokens.numpy(), np.stack([tokens[3, 1], tokens[1, 0]]))
    assert len(reader.valid_rows) == 13


def test_any_reader_of_zarr_opens_the_fit_and_finds_what_was_fitted(cache: Path, derive: Callable[..., Any]) -> None:
    derive(cache)
    tokens = stored(cache, "patch_tokens").astype(np.float64)
    mean, axes, variance = principal(tokens[VALID, 0].reshape(-1, 128), 6)
    group = zarr.open_group(cache / "fits/hog-grid4-pca6", mode="r")
    np.testing.assert_allclose(group["components"][:], axes, atol=1e-5)
    np.testing.assert_allclose(group["mean"][:], mean, atol=1e-6)
    np.testing.assert_allclose(group["variance"][:], variance, atol=1e-6 * variance[0])
    fit = read_fit(location(cache), "hog-grid4-pca6")
    assert fit is not None
    assert fit.weights == zarr.open_group(cache / DERIVED, mode="r").attrs["weights"]
    assert fit.sources[SOURCE]["fingerprint"] == zarr.open_group(cache / SOURCE, mode="r").attrs["fingerprint"]


def test_a_smaller_sample_is_another_component(
    cache: Path, derive: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    derive(cache, "--sample", 5)
    whole = stored(cache, "patch_tokens", DERIVED)
    done = repa_cache("derive", cache, "--from", SOURCE, "--with", "pca:6")
    assert done.code == 1
    assert "differs from what is asked: spec.derived.sample: found 5, asked 4096" in done.err
    assert "--with pca:6 --sample 5" in CacheStore.open(cache).component(DERIVED).build_command(cache)  # type: ignore[union-attr]
    shutil.rmtree(cache / DERIVED)  # the fit that stays is of the other sample, and is made anew
    derive(cache)
    assert not np.array_equal(stored(cache, "patch_tokens", DERIVED), whole)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--from features/hog --with pca:6", 2, "no such component; did you mean 'features/hog-grid4'?"),
        ("--from hog-grid4:layer=2 --with pca:6", 2, "--from hog-grid4:layer=2: "),
        ("--from hog:grid=4 --with pca:129", 2, "pca:129: features/hog-grid4 has 128 channels; ask for at most 128"),
        ("--from hog-grid4 --with pca:0", 2, "--with pca:0: '0' channels, expected a whole number from 1"),
        ("--from hog-grid4 --with pca:six", 2, "'six' channels"),
        ("--from hog-grid4 --with pca", 2, "expected pca:K, as in pca:16"),
        ("--from hog-grid4 --with pac:6", 2, "unknown method 'pac'; did you mean 'pca'?"),
        ("--from hog-grid4-pca6 --with pca:2", 2, "pca:6 of features/hog-grid4; derive from features/hog-grid4 itself"),
        ("--from hog-grid4 --with pca:6 --sample 0", 2, "--sample is 0; expected 1 or more"),
        ("--from hog-grid4 --with pca:6 --dtype float32", 2, "'float32' is not one of"),
        ("--from hog-grid4 --with pca:6 --compressor zstd", 1, "compressor: found none, asked zstd"),
    ],
)
def test_what_cannot_be_derived_is_one_line(
    derived: Path, repa_cache: Callable[..., Any], tree: Callable[[Path], Any], arguments: str, code: int, said: str
) -> None:
    before = tree(derived)
    done = repa_cache("derive", derived, *arguments.split())
    assert (done.code, len(done.err.splitlines())) == (code, 1), done.err
    assert said in done.err
    assert tree(derived) == before


@pytest.fixture(scope="module")
def derived(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache with the derived component, to look at."""
    cache = tmp_path_factory.mktemp("derived") / "c"
    shutil.copytree(sources / "c", cache)
    run(cache)
    return cache


def run(cache: Path, **asked: Any) -> int:
    options = DeriveOptions(cache=cache, source=SOURCE, method="pca:6", **asked)
    return run_derive(options, on_start=lambda done, total: None, on_progress=lambda samples: None)


def test_a_source_that_is_not_whole_is_refused_with_its_command(cache: Path, repa_cache: Callable[..., Any]) -> None:
    (cache / SOURCE / "patch_tokens/c.1.0.0.0").unlink()
    done = repa_cache("derive", cache, "--from", SOURCE, "--with", "pca:6")
    assert done.code == 1
    assert "features/hog-grid4 is not complete; finish it with repa-cache build --data PATH" in done.err
    assert not (cache / "fits").exists()


def test_a_damaged_source_is_named_and_stops_its_component(cache: Path, repa_cache: Callable[..., Any]) -> None:
    file = cache / SOURCE / "patch_tokens/c.2.0.0.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    done = repa_cache("derive", cache, "--from", SOURCE, "--with", "pca:6")
    assert done.code == 1
    assert f"{file}: sample 8: its checksum does not hold" in done.err.splitlines()[-1]


def test_two_derivations_of_one_component_exclude_each_other(cache: Path) -> None:
    with (
        CacheStore.open(cache).lock("fits/hog-grid4-pca6"),
        pytest.raises(JobError, match="another build of fits/hog-grid4-pca6 is running"),
    ):
        run(cache)
    assert run(cache) == 14


def test_verify_names_a_damaged_or_missing_fit_and_deriving_again_mends_it(
    derived: Path, tmp_path: Path, verified: Callable[[Path], list[str]], derive: Callable[..., Any], tree: Any
) -> None:
    cache = Path(shutil.copytree(derived, tmp_path / "d"))
    assert verified(cache) == []
    group = cache / "fits/hog-grid4-pca6"
    chunk = group / "components/c.0.0"
    chunk.write_bytes(chunk.read_bytes()[:40] + b"x" + chunk.read_bytes()[41:])
    assert any("components is missing, cut, or not what its checksum says" in line for line in verified(cache))
    shutil.rmtree(group)
    (line,) = verified(cache)
    assert "its fit, fits/hog-grid4-pca6, is not there" in line
    derive(cache)
    assert verified(cache) == []
    assert tree(cache) == tree(derived)
    metadata = json.loads((group / "mean/zarr.json").read_text())
    (group / "mean/zarr.json").write_text(json.dumps(metadata | {"fill_value": 1}))
    assert any("mean/zarr.json: not the metadata of this array" in line for line in verified(cache))


def test_a_fit_whose_claims_are_false_is_refused(derived: Path, tmp_path: Path, repa_cache: Callable[..., Any]) -> None:
    cache = Path(shutil.copytree(derived, tmp_path / "d"))
    file = cache / "fits/hog-grid4-pca6/zarr.json"
    for claim in ({"shape": [2**29, 128]}, {"dtype": "object"}, {"shape": ["6", 128]}, {"sha256": "0"}):
        metadata = json.loads(file.read_text())
        attributes = {key: value for key, value in metadata["attributes"].items() if key != "attributes_digest"}
        attributes["arrays"]["components"] |= claim
        file.write_text(json.dumps(metadata | {"attributes": with_digest(attributes)}))
        done = repa_cache("info", cache)
        assert (done.code, len(done.err.splitlines())) == (1, 1), claim
        assert "fits/hog-grid4-pca6: a damaged fit (" in done.err
        shutil.copy(derived / "fits/hog-grid4-pca6/zarr.json", file)


def test_recompute_leaves_out_what_it_cannot_derive_again(derived: Path, sources: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(derived, tmp_path / "d"))
    shutil.rmtree(cache / "fits")
    found = {one.path: one for one in recompute(cache, FolderSource(sources / "images"), num=9, weights={})}
    assert found[DERIVED].left_out == "the fit that it was made with is not there as fits/hog-grid4-pca6"
    assert found[SOURCE].num_samples == 9


def test_a_mended_image_makes_the_fit_anew_and_names_what_was_made_of_the_old(
    derived: Path, sources: Path, tmp_path: Path, verified: Callable[[Path], list[str]], derive: Callable[..., Any]
) -> None:
    cache = Path(shutil.copytree(derived, tmp_path / "d"))
    images = Path(shutil.copytree(sources / "images", tmp_path / "images"))
    derive(cache, method="standardise")
    before = read_fit(location(str(cache)), "hog-grid4-standardise")
    files = sorted(file for file in images.rglob("*") if file.is_file())
    (bad,) = [file for file in files if file.read_bytes() == b"no picture"]
    shutil.copy(next(file for file in files if file != bad), bad)
    for component in (SOURCE, "latents/pixels"):
        (next((cache / component).glob("*/c.1.*"))).unlink()
    options = BuildOptions(
        manifest=scan_folder(images),
        cache=cache,
        encoders=("hog:grid=4",),
        autoencoder="pixels",
        resolution=16,
        flip=True,
        shard_samples=4,
        batch_size=3,
        dtype="float16",
        workers=0,
        skip_bad=True,
    )
    run_build(options, on_start=lambda done, total: None, on_progress=lambda samples: None)
    assert stored(cache, "patch_tokens")[5].any()
    store = CacheStore.open(cache)
    fits = {name: fit for name, fit in stored_fits(store) if not isinstance(fit, CacheError)}
    specs = [store.component(path) for path in store.components()]
    notes = list(fit_notes(store, [spec for spec in specs if spec is not None], fits))
    assert len(notes) == 2
    assert all(f"is of other values of {SOURCE} than" in note for note in notes)
    with pytest.raises(CacheError, match="hog-grid4-pca6 was made of another features/hog-grid4 than is there by now"):
        run(cache)
    derive(cache, method="standardise")
    after = read_fit(location(str(cache)), "hog-grid4-standardise")
    assert before is not None
    assert after is not None
    assert after.sample["images"] == before.sample["images"] + 1


def test_a_fit_of_an_earlier_version_is_taken_as_it_was(derived: Path, tmp_path: Path, tree: Any) -> None:
    cache = Path(shutil.copytree(derived, tmp_path / "d"))
    file = cache / "fits/hog-grid4-pca6/zarr.json"
    metadata = json.loads(file.read_text())
    attributes = {key: value for key, value in metadata["attributes"].items() if key != "attributes_digest"}
    del attributes["sources"][SOURCE]["shards_digest"]
    file.write_text(json.dumps(metadata | {"attributes": with_digest(attributes)}))
    before = tree(cache)
    assert run(cache) == 0
    assert tree(cache) == before


def test_the_record_of_all_fits_is_mended_and_written_by_one_at_a_time(
    derived: Path, tmp_path: Path, verified: Callable[[Path], list[str]], tree: Any
) -> None:
    cache = Path(shutil.copytree(derived, tmp_path / "d"))
    (cache / "fits/zarr.json").write_bytes(b"")
    assert any("fits/zarr.json: cannot be read" in line for line in verified(cache))
    stores = [CacheStore.open(cache) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write_fits_file, stores))
    assert tree(cache) == tree(derived)
