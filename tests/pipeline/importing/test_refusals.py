"""An import whose data are not what it takes them for stops with one line, and writes nothing."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from repa.pipeline.importing import checks as import_checks

from ..conftest import Outcome
from .latent_layouts import (
    MEAN_OF_UNIT_PIXELS,
    draw_moments,
    labels_json,
    npy_bytes,
    numbered,
    write_arrow,
    write_edm2,
    write_images_of,
    write_lightningdit,
    write_repa,
)

Run = Callable[..., Outcome]
SD = ["--autoencoder", "sd-vae-ft-mse", "--shard-samples", "4"]
LATENT = "vae-sd/00001/img-mean-std-00000005.npy"


def refused(repa_cache: Run, folder: Path, *options: object, code: int = 2) -> str:
    """Run the import of folder/data; check that it wrote nothing and said one line, and return that."""
    done = repa_cache("import", "--data", folder / "data", "--cache", folder / "cache", *options)
    assert (done.code, done.err.count("\n")) == (code, 1), done.err
    assert not (folder / "cache").exists()
    return done.err


def rewrite_latents(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for file in (root / "vae-sd").rglob("*.npy"):
        file.write_bytes(npy_bytes(change(np.load(file))))


def scaled(moments: np.ndarray) -> np.ndarray:
    return moments * np.float32(0.18215)


def of_unit_pixels(moments: np.ndarray) -> np.ndarray:
    shift = np.concatenate([MEAN_OF_UNIT_PIXELS - [0.865, -0.278, 0.216, 0.374], np.zeros(4)])
    return moments + shift.astype(np.float32)[:, None, None]


def log_variances(moments: np.ndarray) -> np.ndarray:
    return np.concatenate([moments[:4], 2 * np.log(moments[4:])])


def not_finite(moments: np.ndarray) -> np.ndarray:
    return np.where(moments == moments[0, 0, 0], np.float32(np.nan), moments)


@pytest.mark.parametrize(
    ("change", "said", "code", "statement"),
    [
        (scaled, "look multiplied by 0.18215 already. Say what they were multiplied by", 2, "--scaled-by=1"),
        (of_unit_pixels, "are those of pixels in [0, 1]", 2, "--pixel-range=-1,1"),
        (log_variances, "no standard deviations; say --log-variance", 1, "--log-variance"),
        (
            not_finite,
            "vae-sd: 10 of 10 samples looked at cannot be used, the first is 00000/img00000000.png: not",
            1,
            None,
        ),
        (lambda moments: moments.astype(np.int32), "int32 [8, 4, 4], expected floating-point", 1, None),
        (lambda moments: moments[:4], "has moments of 2 channels; sd-vae-ft-mse gives moments of 4", 2, None),
        (lambda moments: moments[:, :, :3], "is [8, 4, 3]; expected [2C, h, h]", 2, None),
        (lambda moments: moments[None], "is [1, 8, 4, 4]; expected [2C, h, h]", 2, None),
    ],
)
def test_numbers_that_are_not_raw_moments(
    repa_cache: Run,
    tmp_path: Path,
    change: Callable[[np.ndarray], np.ndarray],
    said: str,
    code: int,
    statement: str | None,
) -> None:
    write_repa(tmp_path / "data")
    rewrite_latents(tmp_path / "data", change)
    assert said in refused(repa_cache, tmp_path, *SD, code=code)
    if statement is not None:  # what the user states outright is believed
        done = repa_cache("import", "--data", tmp_path / "data", "--cache", tmp_path / "cache", *SD, statement)
        assert done.code == 0, done.err


def test_edm2s_moments_need_a_statement(repa_cache: Run, tmp_path: Path) -> None:
    write_edm2(tmp_path / "data.zip", draw_moments(4, mean=MEAN_OF_UNIT_PIXELS), [0] * 4)
    (tmp_path / "data.zip").rename(tmp_path / "data")
    line = refused(repa_cache, tmp_path, "--from", "edm2", *SD)
    assert (
        "data in the layout edm2 are of pixels in [0, 1], as its tool encodes them; the channel means of 4 samples"
        in line
    )
    assert "or say --pixel-range 0,1 to keep them as sd-vae-ft-mse-pixels01" in line


def one_label_more(root: Path) -> None:
    names = [*numbered("img-mean-std-", "npy", 10), "00002/img-mean-std-00000010.npy"]
    (root / "vae-sd/dataset.json").write_text(labels_json(names, [0] * 11))


def two_labels_of_one(root: Path) -> None:
    names = [*numbered("img-mean-std-", "npy", 10), "00000/img-mean-std-00000000.npy"]
    (root / "vae-sd/dataset.json").write_text(labels_json(names, [0] * 11))


def other_labels(root: Path) -> None:
    (root / "vae-sd/dataset.json").write_text(labels_json(numbered("img-mean-std-", "npy", 10), [0] * 5 + [1] * 5))


def larger_images(root: Path) -> None:
    for file in (root / "images").rglob("*.png"):
        Image.open(file).resize((64, 64)).save(file)


@pytest.mark.parametrize(
    ("spoil", "said", "code"),
    [
        (lambda root: (root / LATENT).unlink(), "10 labels for 9 latents", 2),
        (
            lambda root: (root / "images/00001/img00000005.png").unlink(),
            "1 numbers have no images, the first is 00000005",
            2,
        ),
        (lambda root: (root / "images/00001/img00000005.png").rename(root / "images/5.png"), "the first is 5.png", 2),
        (lambda root: (root / "vae-sd/dataset.json").unlink(), "dataset.json: missing", 2),
        (lambda root: (root / "vae-sd/dataset.json").write_text('{"labels": [["a", "b"]]}'), "label 'b' of a", 2),
        (
            lambda root: (root / "vae-sd/dataset.json").write_text(f'{{"labels": [["a", {2**70}]]}}'),
            f"{2**70} is larger than 64 bits hold",
            2,
        ),
        (one_label_more, "11 labels for 10 latents", 2),
        (two_labels_of_one, "two labels of 00000/img-mean-std-00000000.npy", 2),
        (other_labels, "the labels differ for 4 samples, the first is 00000004: 1 of the image, 0 of its latents", 2),
        (larger_images, "64 x 64 pixels, and the latents are of 32 x 32", 2),
        (lambda root: (root / LATENT).write_bytes((root / LATENT).read_bytes()[:-1]), "not a whole .npy file", 1),
        (lambda root: (root / LATENT).write_bytes(b""), "img00000005.png: not a whole .npy file", 1),
        (lambda root: (root / LATENT).write_bytes(pickle.dumps([1])), "not a whole .npy file", 1),
        (lambda root: (root / LATENT).write_bytes(npy_bytes(np.array([{}]))), "Object arrays cannot be loaded", 1),
        (lambda root: (root / "vae-sd/latents.npy").write_bytes(b""), "latents.npy among its files", 2),
        (lambda root: (root / LATENT).rename(root / "vae-sd/img-mean-std-00000004.npy"), "are one sample", 2),
    ],
)
def test_a_folder_of_repas_that_is_not_whole(
    repa_cache: Run, tmp_path: Path, spoil: Callable[[Path], object], said: str, code: int
) -> None:
    write_repa(tmp_path / "data")
    spoil(tmp_path / "data")
    assert said in refused(repa_cache, tmp_path, *SD, code=code)


def add_member(file: Path, name: str) -> None:
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings(action="ignore"):  # of a name given twice
        archive.writestr(name, b"")


def flip_a_byte_of_a_member(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(b"\x93NUMPY") + 500] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("spoil", "said", "code"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-30]), "not a whole zip file", 2),
        (flip_a_byte_of_a_member, "img-mean-std-00000000.npy: cannot be read from the zip (Bad CRC-32", 1),
        (lambda file: add_member(file, "../img-mean-std-00000011.npy"), "which leads out of the zip", 2),
        (lambda file: add_member(file, "/etc/img-mean-std-00000011.npy"), "which leads out of the zip", 2),
        (lambda file: add_member(file, numbered("img-mean-std-", "npy", 2)[1]), "two members are called", 2),
    ],
)
def test_a_zip_that_is_not_whole(
    repa_cache: Run, tmp_path: Path, spoil: Callable[[Path], object], said: str, code: int
) -> None:
    write_edm2(tmp_path / "data.zip", draw_moments(4), [0] * 4)
    spoil(tmp_path / "data.zip")
    (tmp_path / "data.zip").rename(tmp_path / "data")
    assert said in refused(repa_cache, tmp_path, "--from", "edm2", "--pixel-range=-1,1", *SD, code=code)


def save_tensors(folder: Path, **tensors: np.ndarray) -> None:
    arrays = {name: torch.from_numpy(values) for name, values in tensors.items()}
    save_file(arrays, folder / "latents_rank01_shard000.safetensors")


LATENTS = np.ones((2, 4, 4, 4), dtype=np.float32)
NUMBERS = np.zeros(2, dtype=np.int64)
STATISTICS = torch.zeros(1, 4, 1, 1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: save_tensors(folder, latents=LATENTS, labels=NUMBERS), "some files have latents_flip and some"),
        (lambda folder: save_tensors(folder, latents=LATENTS), "expected latents, labels and"),
        (lambda folder: save_tensors(folder, latents=LATENTS, labels=NUMBERS[:1]), "[2, 4, 4, 4] for 1 labels"),
        (
            lambda folder: save_tensors(folder, latents=LATENTS, labels=LATENTS[:, 0, 0, 0].copy()),
            "labels are torch.float",
        ),
        (lambda folder: (folder / "latents_stats.pt").write_bytes(b"1"), "expected mean and std"),
        (
            lambda folder: torch.save({"mean": STATISTICS, "std": STATISTICS + 1}, folder / "latents_stats.pt"),
            "its statistics say mean 0 and std 1 of channel 0",
        ),
        (
            lambda folder: torch.save(
                {"mean": STATISTICS[:, :2], "std": STATISTICS[:, :2]}, folder / "latents_stats.pt"
            ),
            "its statistics are of 2 channels, its latents have 4",
        ),
        (
            lambda folder: (folder / "latents_rank00_shard001.safetensors").write_bytes(b"x" * 99),
            "not a whole safetens",
        ),
    ],
)
def test_safetensors_that_are_not_lightningdits(
    repa_cache: Run, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    write_lightningdit(tmp_path / "data")
    spoil(tmp_path / "data")
    assert said in refused(repa_cache, tmp_path, "--autoencoder", "vavae-f16d32", "--resolution", 64)


def change_state(folder: Path, **values: object) -> None:
    file = folder / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write_ragged(folder: Path) -> None:
    table = pa.table({"data": [[[[1.0, 2.0], [3.0]]]], "label": [0]})
    with (
        pa.OSFile(str(folder / "data-00000-of-00002.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)


@pytest.mark.parametrize(
    ("spoil", "said", "code"),
    [
        (
            lambda folder: change_state(folder, _data_files=[{"filename": "../x.arrow"}]),
            "which leads out of the folder",
            2,
        ),
        (lambda folder: change_state(folder, _indices_data_files=[{"filename": "i"}]), "flatten_indices()", 2),
        (lambda folder: (folder / "state.json").write_text("{"), "expected a data set as save_to_disk", 2),
        (lambda folder: (folder / "data-00001-of-00002.arrow").write_bytes(b"1234"), "not a whole Arrow file", 2),
        (lambda folder: (folder / "dataset_dict.json").write_text("{}"), "holds several splits", 2),
        (write_ragged, "nested lists are not of one length", 1),
        (lambda folder: write_arrow(folder, draw_moments(10)), "name the labels with --labels FILE.txt", 2),
    ],
)
def test_an_arrow_data_set_that_is_none(
    repa_cache: Run, tmp_path: Path, spoil: Callable[[Path], object], said: str, code: int
) -> None:
    write_arrow(tmp_path / "data", draw_moments(10), labels=[0] * 10)
    spoil(tmp_path / "data")
    assert said in refused(repa_cache, tmp_path, *SD, code=code)


def test_arrow_rows_that_are_not_the_images(repa_cache: Run, tmp_path: Path) -> None:
    write_arrow(tmp_path / "data", draw_moments(2), labels=[1, 0])
    images = write_images_of(tmp_path)
    assert "the labels differ from those of" in refused(repa_cache, tmp_path, *SD, "--images", images)
    write_arrow(tmp_path / "data", draw_moments(3))
    assert "3 rows, and 2 images" in refused(repa_cache, tmp_path, *SD, "--images", images)
    (tmp_path / "labels.txt").write_text("0\n1\n")
    assert "2 labels for 3 samples" in refused(repa_cache, tmp_path, *SD, "--labels", tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("0\ncat\n1\n")
    assert "expected one whole number a line" in refused(repa_cache, tmp_path, *SD, "--labels", tmp_path / "labels.txt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--autoencoder", "sd-vae-ft-mes", "--resolution", "32"], "did you mean 'sd-vae-ft-mse'?"),
        (["--autoencoder", "ours"], "give a name of your own and --resolution"),
        (["--autoencoder", "", "--resolution", "32"], "--autoencoder: an empty value follows"),
        (["--autoencoder", "../ours", "--resolution", "32"], "becomes a folder's name"),
        (["--autoencoder", "taesd"], "has moments of 4 channels; taesd gives a sample of 4"),
        (["--autoencoder", "flux-vae"], "has moments of 4 channels; flux-vae gives moments of 16"),
        ([*SD, "--resolution", "256"], "latents of 4 x 4 are of 32 pixels by sd-vae-ft-mse"),
        ([*SD, "--scaled-by", "0"], "--scaled-by 0.0: expected a number above 0"),
        ([*SD, "--scaled-by", "0.01"], "are too large"),
        ([*SD, "--labels", "x.csv"], "the layout repa has its own labels"),
        ([*SD, "--from", "edm2"], "data/dataset.json: missing"),
        ([*SD, "--from", "arrow"], "state.json cannot be read (No such file or directory)"),
        ([*SD, "--images", "nowhere"], "--images nowhere: no such folder"),
        ([*SD, "--resolution", "0"], "--resolution 0: expected at least 1 pixel"),
    ],
)
def test_requests_that_do_not_fit_the_data(repa_cache: Run, tmp_path: Path, options: list[str], said: str) -> None:
    write_repa(tmp_path / "data")
    assert said in refused(repa_cache, tmp_path, *options)


def test_a_zip_of_images(repa_cache: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data", "w") as archive:
        archive.writestr("00000/img00000000.png", b"")
    assert "holds images, and no latents; unpack it" in refused(repa_cache, tmp_path, "--from", "edm2", *SD)


def test_a_layout_that_cannot_be_told(repa_cache: Run, tmp_path: Path) -> None:
    for options in ([], ["--from", "edm2"]):
        assert "data: no such file or folder" in refused(repa_cache, tmp_path, *SD, *options)
    (tmp_path / "data").mkdir()
    assert "looks like no known layout; say which with --from" in refused(repa_cache, tmp_path, *SD)
    write_repa(tmp_path / "data")
    write_lightningdit(tmp_path / "data")
    assert "looks like repa and lightningdit" in refused(repa_cache, tmp_path, *SD)
    (tmp_path / "data").rename(tmp_path / "both")
    (tmp_path / "both/vae-sd").rename(tmp_path / "data")
    assert "the latents of EDM2's tool, or of REPA's?" in refused(repa_cache, tmp_path, *SD)


def test_another_source_does_not_continue_an_import(repa_cache: Run, tmp_path: Path) -> None:
    write_repa(tmp_path / "one")
    write_repa(tmp_path / "two")
    rewrite_latents(tmp_path / "two", lambda moments: moments + np.float32(0.001))
    cache = ["--cache", tmp_path / "cache", *SD]
    assert repa_cache("import", "--data", tmp_path / "one", *cache).code == 0
    done = repa_cache("import", "--data", tmp_path / "two", *cache)
    assert done.code == 1
    assert "differs from what is asked: spec.imported.looked_at: found sha256:" in done.err
    build = ["build", "--data", tmp_path / "one/images", *cache[:2], "--encoder", "hog:grid=2", "--workers", 0]
    done = repa_cache(*build, "--autoencoder", "sd-vae-ft-mse")
    assert (done.code, "leave out --autoencoder sd-vae-ft-mse to keep it" in done.err) == (2, True)


def test_samples_that_cannot_be_used_are_listed_and_leave_their_ranges_out(
    repa_cache: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    monkeypatch.setattr(import_checks, "LOOKED_AT", 2)  # the first and the last: what follows is found on the way
    write_repa(tmp_path / "data")
    data = ["--data", tmp_path / "data"]
    assert repa_cache("import", *data, "--cache", tmp_path / "clean", *SD).code == 0
    whole = (tmp_path / "data" / LATENT).read_bytes()
    (tmp_path / "data" / LATENT).write_bytes(whole[:-1])
    large = np.load(tmp_path / "data/vae-sd/00001/img-mean-std-00000007.npy")
    (tmp_path / "data/vae-sd/00001/img-mean-std-00000007.npy").write_bytes(npy_bytes(large * 1e5))
    done = repa_cache("import", *data, "--cache", tmp_path / "cache", *SD)
    assert done.code == 1
    assert "bad latents: 00001/img00000005.png: not a whole .npy file" in done.err
    (tmp_path / "data" / LATENT).write_bytes(whole)
    done = repa_cache("import", *data, "--cache", tmp_path / "cache", *SD)
    assert done.code == 1
    assert "bad latents: 00001/img00000007.png: latents/sd-vae-ft-mse: its moments is not finite as float16" in done.err
    assert "1 of 10 samples could not be used" in done.err
    info = repa_cache("info", tmp_path / "cache").unfolded
    assert "1 of 3 ranges missing: samples 4-7" in info
    assert "finish it: repa-cache import --data " in info
    build = ["build", "--data", tmp_path / "data/images", "--cache", tmp_path / "cache", "--encoder", "hog:grid=2"]
    done = repa_cache(*build)
    assert (done.code, "was imported and is not whole; finish it with repa-cache import" in done.err) == (2, True)
    (tmp_path / "data/vae-sd/00001/img-mean-std-00000007.npy").write_bytes(npy_bytes(large))
    assert repa_cache("import", *data, "--cache", tmp_path / "cache", *SD).code == 0
    assert tree(tmp_path / "cache") == tree(tmp_path / "clean")
