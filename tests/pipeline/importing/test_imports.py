"""What an import stores is what the source holds, sample by sample, read back with bare zarr."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr

from repa.cache_specs.errors import CacheError
from repa.pipeline.importing.arrow import ArrowSource
from repa.pipeline.store.store import CacheStore
from repa.trainer import CacheReader
from repa.trainer.commands.train import train_command

from ..conftest import Outcome
from .latent_layouts import (
    MEAN_OF_UNIT_PIXELS,
    draw_moments,
    npy_bytes,
    numbered,
    write_arrow,
    write_edm2,
    write_images_of,
    write_lightningdit,
    write_repa,
)

Run = Callable[..., Outcome]
SD = ("--autoencoder", "sd-vae-ft-mse", "--shard-samples", "4")  # 10 samples: the last range is not full


def stored(cache: Path, component: str) -> tuple[np.ndarray, dict[str, object]]:
    """Return the moments of every sample, and the attributes."""
    group = zarr.open_group(cache / "latents" / component, mode="r")
    assert bool(np.asarray(group["valid"][:]).all())
    return np.asarray(group["moments"][:]), dict(group.attrs)


def ids_and_labels(cache: Path) -> tuple[list[str], list[int]]:
    group = zarr.open_group(cache, mode="r")
    return [str(name) for name in group["sample_id"][:]], np.asarray(group["label"][:]).tolist()


def train(cache: Path, out: Path, *options: str) -> list[dict[str, float]]:
    """Train two steps in this process; return its metrics."""
    settings = ["--model", "SiT-Ti/2", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    train_command.main(["--cache", str(cache), "--out", str(out), *settings, *options], standalone_mode=False)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_repas_folder(repa_cache: Run, tmp_path: Path) -> None:
    moments, labels = write_repa(tmp_path / "repa")
    cache = tmp_path / "cache"
    done = repa_cache("import", "--data", tmp_path / "repa", "--cache", cache, *SD)
    assert (done.code, done.err) == (0, "")
    assert "10 samples in the layout repa, moments [8, 4, 4], 3 classes" in done.unfolded
    found, attributes = stored(cache, "sd-vae-ft-mse")
    np.testing.assert_array_equal(found[:, 0], moments.astype(np.float16))
    assert ids_and_labels(cache) == (numbered("img", "png", 10), labels)
    sizes = zarr.open_array(cache / "latents/sd-vae-ft-mse/source_bytes", mode="r")[:]
    assert list(sizes) == [(tmp_path / "repa/images" / name).stat().st_size for name in numbered("img", "png", 10)]

    assert attributes["complete"] is True
    assert (attributes["weights"], attributes["precision"]) == ("unknown", "unknown")
    spec = attributes["spec"]
    assert isinstance(spec, dict)
    assert (spec["kind"], spec["moment_channels"], spec["latent_size"]) == ("mean_std", 8, [4, 4])
    assert spec["pixel_range"] == [-1.0, 1.0]
    assert (spec["imported"]["layout"], spec["imported"]["images"]) == ("repa", True)
    # Var[z] = Var[mean] + E[std^2] over samples and pixels, of what is stored
    mean, std = found[:, 0, :4].astype(np.float64), found[:, 0, 4:].astype(np.float64)
    np.testing.assert_allclose(attributes["latent_mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-9)
    spread = np.sqrt(mean.var(axis=(0, 2, 3)) + (std**2).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(attributes["latent_std"], spread, rtol=1e-9)

    assert repa_cache("verify", cache).code == 0
    assert "imported from the layout repa, with its images" in repa_cache("info", cache).out


def test_repas_folder_without_its_images(repa_cache: Run, tmp_path: Path) -> None:
    moments, labels = write_repa(tmp_path / "repa")
    shutil.rmtree(tmp_path / "repa/images")
    cache = tmp_path / "cache"
    done = repa_cache("import", "--data", tmp_path / "repa", "--cache", cache, *SD)
    assert (done.code, done.err) == (0, "")
    assert "no images" in done.unfolded
    found, attributes = stored(cache, "sd-vae-ft-mse")
    np.testing.assert_array_equal(found[:, 0], moments.astype(np.float16))
    assert ids_and_labels(cache) == (numbered("img-mean-std-", "npy", 10), labels)
    assert attributes["spec"]["imported"]["images"] is False
    sizes = zarr.open_array(cache / "latents/sd-vae-ft-mse/source_bytes", mode="r")[:]
    assert list(sizes) == [len(npy_bytes(values)) for values in moments]


def test_tokens_are_added_to_an_import_and_both_are_trained_from(repa_cache: Run, tmp_path: Path) -> None:
    write_repa(tmp_path / "repa")
    cache, images = tmp_path / "cache", tmp_path / "repa/images"
    assert repa_cache("import", "--data", tmp_path / "repa", "--cache", cache, *SD).code == 0
    built = repa_cache("build", "--data", images, "--cache", cache, "--encoder", "hog:grid=2", "--workers", 0)
    assert (built.code, built.out.count("complete")) == (0, 1), built.err
    assert repa_cache("verify", cache).code == 0

    records = train(cache, tmp_path / "run", "--recipe", "irepa", "--set", "alignment.encoder_depth=1")
    assert [record["step"] for record in records] == [1, 2]
    assert all(np.isfinite([record["denoising_loss"], record["alignment_loss"]]).all() for record in records)

    again = repa_cache("verify", cache, "--recompute", 3, "--data", images)
    assert again.code == 0
    assert "latents/sd-vae-ft-mse: not encoded again: imported" in again.unfolded
    assert "features/hog-grid2: 3 samples encoded again" in again.unfolded


def test_one_import_at_a_time(repa_cache: Run, tmp_path: Path) -> None:
    write_repa(tmp_path / "repa")
    command = ["import", "--data", tmp_path / "repa", "--cache", tmp_path / "cache", *SD]
    assert repa_cache(*command).code == 0
    with CacheStore.open(tmp_path / "cache").lock("latents/sd-vae-ft-mse"):
        done = repa_cache(*command)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "another build of latents/sd-vae-ft-mse is running; wait for it, then run this again" in done.err
    assert repa_cache(*command).code == 0


def test_an_image_that_changed_since_the_import_is_refused(repa_cache: Run, tmp_path: Path) -> None:
    write_repa(tmp_path / "repa")
    cache, images = tmp_path / "cache", tmp_path / "repa/images"
    assert repa_cache("import", "--data", tmp_path / "repa", "--cache", cache, *SD).code == 0
    with (images / "00001/img00000005.png").open("ab") as file:
        file.write(b"\0")
    done = repa_cache("build", "--data", images, "--cache", cache, "--encoder", "hog:grid=2", "--workers", 0)
    assert done.code == 1
    assert "bad image: 00001/img00000005.png: the file has" in done.err


def test_an_import_into_a_bucket(repa_cache: Run, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    moments, _ = write_repa(tmp_path / "repa")
    cache = f"{bucket}/cache"
    done = repa_cache("import", "--data", tmp_path / "repa", "--cache", cache, *SD)
    assert (done.code, done.err) == (0, "")
    assert repa_cache("verify", cache).code == 0
    batch = CacheReader(cache, encoder=()).rows([9, 0])
    np.testing.assert_array_equal(batch.moments.numpy(), moments[[9, 0]].astype(np.float16))


def test_edm2s_zip_is_kept_apart_as_what_it_is(repa_cache: Run, tmp_path: Path) -> None:
    moments = draw_moments(10)
    names = write_edm2(tmp_path / "img32-sd.zip", moments, [0, 1] * 5)
    cache = tmp_path / "cache"
    done = repa_cache("import", "--data", tmp_path / "img32-sd.zip", "--cache", cache, *SD, "--pixel-range", "0,1")
    assert (done.code, done.err) == (0, "")
    assert "train from it with --recipe sit" in done.unfolded
    found, attributes = stored(cache, "sd-vae-ft-mse-pixels01")
    np.testing.assert_array_equal(found[:, 0], moments.astype(np.float16))
    assert ids_and_labels(cache) == (names, [0, 1] * 5)
    assert attributes["spec"]["pixel_range"] == [0.0, 1.0]
    sizes = zarr.open_array(cache / "latents/sd-vae-ft-mse-pixels01/source_bytes", mode="r")[:]
    assert list(sizes) == [len(npy_bytes(values)) for values in moments]


def test_edm2s_zip_with_its_images(repa_cache: Run, tmp_path: Path) -> None:
    moments, labels = write_repa(tmp_path / "repa")
    write_edm2(tmp_path / "latents.zip", moments, labels)
    options = ["--images", tmp_path / "repa/images", "--pixel-range=-1,1"]
    done = repa_cache("import", "--data", tmp_path / "latents.zip", "--cache", tmp_path / "cache", *SD, *options)
    assert (done.code, done.err) == (0, "")
    found, _ = stored(tmp_path / "cache", "sd-vae-ft-mse")
    np.testing.assert_array_equal(found[:, 0], moments.astype(np.float16))
    assert ids_and_labels(tmp_path / "cache")[0] == numbered("img", "png", 10)


@pytest.mark.parametrize("flip", [True, False])
def test_lightningdits_files_are_samples(repa_cache: Run, tmp_path: Path, flip: bool) -> None:
    latents, labels = write_lightningdit(tmp_path / "latents", flip=flip)
    cache = tmp_path / "cache"
    options = ["--autoencoder", "vavae-f16d32", "--resolution", 64, "--shard-samples", 4]
    done = repa_cache("import", "--data", tmp_path / "latents", "--cache", cache, *options)
    assert (done.code, done.err) == (0, "")
    found, attributes = stored(cache, "vavae-f16d32")
    np.testing.assert_array_equal(found, latents.astype(np.float16))
    ids, found_labels = ids_and_labels(cache)
    assert found_labels == labels.tolist()
    files = [
        f"latents_rank00_shard{shard:03d}.safetensors/{row:08d}" for shard, n in ((0, 6), (1, 4)) for row in range(n)
    ]
    assert ids == files
    assert attributes["spec"]["kind"] == "sample"
    sizes = zarr.open_array(cache / "latents/vavae-f16d32/source_bytes", mode="r")[:]
    assert list(sizes) == [latents[0].nbytes] * 10
    wide = found.astype(np.float64)
    np.testing.assert_allclose(attributes["latent_mean"], wide.mean(axis=(0, 1, 3, 4)), rtol=1e-9)
    np.testing.assert_allclose(attributes["latent_std"], wide.std(axis=(0, 1, 3, 4)), rtol=1e-9)

    reader = CacheReader(cache, encoder=())
    assert (reader.latents.kind, reader.views) == ("sample", ("identity", "flip")[: 1 + flip])
    batch = reader.rows([7, 2])
    np.testing.assert_array_equal(batch.moments.numpy(), latents[[7, 2], 0].astype(np.float16))
    refused = repa_cache("build", "--data", write_images_of(tmp_path), "--cache", cache, "--encoder", "hog:grid=4")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "was imported without images" in refused.err
    with pytest.raises(CacheError, match=r"was imported without images.*encoder=\(\)"):
        CacheReader(cache)
    assert "c was imported without images" in repa_cache("metrics", cache).err.replace(str(cache), "c")


def test_latents_of_an_unknown_scale_are_trained_from_by_their_own_statistics(
    repa_cache: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lightningdit(tmp_path / "latents")
    moments = draw_moments(10, mean=MEAN_OF_UNIT_PIXELS)
    write_edm2(tmp_path / "edm2.zip", moments, [0, 1] * 5)
    imports = {
        "vavae-f16d32": ["--data", tmp_path / "latents", "--resolution", 64],
        "sd-vae-ft-mse": ["--data", tmp_path / "edm2.zip", "--pixel-range", "0,1"],
    }
    for autoencoder, options in imports.items():
        cache = tmp_path / autoencoder
        done = repa_cache("import", *options, "--cache", cache, "--autoencoder", autoencoder)
        assert done.code == 0, done.err
        with pytest.raises(SystemExit):
            train(cache, tmp_path / f"{autoencoder}-fixed", "--recipe", "sit")
        assert "has no published scale in the table of autoencoders. Take --set" in capsys.readouterr().err
        records = train(cache, tmp_path / f"{autoencoder}-run", "--recipe", "sit", "--set", "latent_norm=channel")
        assert [record["step"] for record in records] == [1, 2]
    # E[|x|^2] of a model input with unit variance a channel; the first step's target is noise - x, its output zero.
    assert 1.5 < records[0]["denoising_loss"] < 2.5


def test_an_import_joins_tokens_that_were_built_before(repa_cache: Run, tmp_path: Path) -> None:
    write_repa(tmp_path / "repa")
    cache, images = tmp_path / "cache", tmp_path / "repa/images"
    build = ["build", "--data", images, "--cache", cache, "--encoder", "hog:grid=2", "--autoencoder", "none"]
    assert repa_cache(*build, "--resolution", 32, "--shard-samples", 4, "--workers", 0).code == 0
    (images / "00002/img00000009.png").write_bytes((images / "00002/img00000008.png").read_bytes() + b"\0")
    data = ["--data", tmp_path / "repa", "--cache", cache, "--autoencoder", "sd-vae-ft-mse"]
    done = repa_cache("import", *data)
    assert done.code == 1
    assert "bad latents: 00002/img00000009.png: the file has" in done.err
    write_repa(tmp_path / "repa")
    assert repa_cache("import", *data).code == 0
    assert repa_cache("verify", cache).code == 0
    reader = CacheReader(cache)
    assert (reader.latents.name, reader.features[0].name) == ("sd-vae-ft-mse", "hog-grid2")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_arrow_data_set(repa_cache: Run, tmp_path: Path, dtype: str) -> None:
    moments, labels = draw_moments(10), [2, 0, 1, 1, 0, 2, 2, 2, 0, 1]
    write_arrow(tmp_path / "column", moments, labels=labels, dtype=dtype)
    write_arrow(tmp_path / "file", moments, dtype=dtype)
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    for name, options in (("column", []), ("file", ["--labels", tmp_path / "labels.txt"])):
        cache = tmp_path / f"cache-{name}"
        done = repa_cache("import", "--data", tmp_path / name, "--cache", cache, *SD, *options)
        assert (done.code, done.err) == (0, "")
        found, _ = stored(cache, "sd-vae-ft-mse")
        np.testing.assert_array_equal(found[:, 0], moments.astype(dtype).astype(np.float16))
        assert ids_and_labels(cache) == ([f"{row:08d}" for row in range(10)], labels)


@pytest.mark.parametrize(
    "nested",
    [lambda item, length: pa.list_(item, length), lambda item, length: pa.large_list(item)],
    ids=["fixed size", "large"],
)
def test_lists_of_every_kind_in_arrow(tmp_path: Path, nested: Callable[[pa.DataType, int], pa.DataType]) -> None:
    moments = draw_moments(10)
    write_arrow(tmp_path / "data", moments, labels=[0] * 10, nested=nested)
    source = ArrowSource(tmp_path / "data", None, None)
    for row in range(10):
        stored = source.read(row)
        np.testing.assert_array_equal(stored[0], moments[row])
        assert source.source_bytes(row, stored) == moments[row].nbytes


def test_arrow_rows_follow_torchvisions_order_of_the_images(repa_cache: Run, tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    # Classes are sorted first: `a` before `a-b`, whose paths come the other way round ("-" sorts before "/"). Then the
    # files directly in a class, before those in folders below it.
    files = ["a/2.png", "a/9.png", "a/10/1.png", "a-b/1.png"]
    images = write_images_of(tmp_path, files)
    assert [Path(file).relative_to(images).as_posix() for file, _ in ImageFolder(images).samples] == files
    moments = draw_moments(4)
    write_arrow(tmp_path / "arrow", moments)
    done = repa_cache("import", "--data", tmp_path / "arrow", "--cache", tmp_path / "cache", *SD, "--images", images)
    assert (done.code, done.err) == (0, "")
    ids, labels = ids_and_labels(tmp_path / "cache")
    assert (ids, labels) == (["a-b/1.png", "a/10/1.png", "a/2.png", "a/9.png"], [1, 0, 0, 0])
    found, _ = stored(tmp_path / "cache", "sd-vae-ft-mse")
    np.testing.assert_array_equal(found[:, 0], moments[[3, 2, 0, 1]].astype(np.float16))


def test_stated_conversions(repa_cache: Run, tmp_path: Path) -> None:
    moments = draw_moments(10).astype(np.float64)
    scaled = moments * 0.18215
    scaled[:, 4:] = np.log(scaled[:, 4:] ** 2)  # the logarithm of the scaled variance
    write_edm2(tmp_path / "scaled.zip", (moments * 0.18215).astype(np.float32), [0] * 10)
    log_variance = moments.copy()
    log_variance[:, 4:] = 2 * np.log(moments[:, 4:])
    write_edm2(tmp_path / "log.zip", log_variance.astype(np.float32), [0] * 10)
    write_edm2(tmp_path / "both.zip", scaled.astype(np.float32), [0] * 10)
    statements = {
        "scaled": ["--scaled-by", 0.18215],
        "log": ["--log-variance"],
        "both": ["--scaled-by", 0.18215, "--log-variance"],
    }
    for name, options in statements.items():
        cache = tmp_path / name
        data = ["--data", tmp_path / f"{name}.zip", "--cache", cache, "--pixel-range=-1,1"]
        done = repa_cache("import", *data, *SD, *options)
        assert (done.code, done.err) == (0, ""), name
        found, attributes = stored(cache, "sd-vae-ft-mse")
        np.testing.assert_allclose(found[:, 0].astype(np.float64), moments, rtol=2**-10, atol=1e-6)
        assert attributes["spec"]["imported"]["scaled_by"] == (1 if name == "log" else 0.18215)
        component = CacheStore.open(cache).component("latents/sd-vae-ft-mse")
        assert component is not None
        program, *command = shlex.split(component.build_command(cache).replace("PATH", str(tmp_path / f"{name}.zip")))
        assert program == "repa-cache"
        again = repa_cache(*command)  # what an unfinished import is told to do is the same import
        assert (again.code, "is there and complete" in again.unfolded) == (0, True), again.err


def test_an_import_killed_anywhere_and_run_again_equals_one_never_killed(
    run_and_die: Callable[..., tuple[str, int]],
    tmp_path: Path,
    tree: Callable[[Path], dict[str, bytes]],
) -> None:
    write_repa(tmp_path / "repa")
    command = ["import", "--data", tmp_path / "repa", *SD, "--cache"]
    ended, operations = run_and_die(0, *command, tmp_path / "clean")
    assert ended == "exit 0"
    assert operations > 40  # the points below lie within a real import
    for point in range(2, operations + 1, 11):
        cache = tmp_path / f"cache{point}"
        assert run_and_die(point, *command, cache)[0] == "killed"
        assert run_and_die(0, *command, cache)[0] == "exit 0"
        assert tree(cache) == tree(tmp_path / "clean"), point
