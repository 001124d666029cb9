"""A reference batch is the cache's own pictures, from their files or from stored pixels, and whole or not there."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa.pipeline.analysis import reference
from repa.pipeline.images.decode import decode

SIDE = 16


@pytest.fixture
def built(make_images: Callable[..., list[Path]], tmp_path: Path, build: Callable[..., Any]) -> list[Path]:
    """Return the images of `tmp_path / "cache"`, of which sample 3 is none."""
    files = make_images(tmp_path / "images", num=7)
    files[3].write_text("not a picture")
    assert build(tmp_path / "images", tmp_path / "cache", "--skip-bad").code == 0
    return files


def as_the_evaluator_reads(npz: Path) -> np.ndarray:
    """Read `arr_0` without numpy's own reader of archives: a header of version 1, then rows in C order."""
    with zipfile.ZipFile(npz) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert not fortran
        return np.frombuffer(member.read(), dtype=dtype).reshape(shape)


def test_it_is_the_pictures_that_were_encoded(
    built: list[Path], tmp_path: Path, repa_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BATCH", 2)
    out = tmp_path / "ref.npz"
    done = repa_cache("reference", tmp_path / "cache", "--data", tmp_path / "images", "--out", out)
    assert done.code == 0, done.err
    expected = np.stack([decode(file.read_bytes(), SIDE) for i, file in enumerate(built) if i != 3])
    np.testing.assert_array_equal(as_the_evaluator_reads(out), expected)
    np.testing.assert_array_equal(np.load(out)["arr_0"], expected)
    # The same bytes from the pixels that the cache holds, and from a part of them the same rows each time.
    assert repa_cache("reference", tmp_path / "cache", "--out", tmp_path / "stored.npz").code == 0
    assert (tmp_path / "stored.npz").read_bytes() == out.read_bytes()
    some = [tmp_path / "some.npz", tmp_path / "again.npz"]
    for file in some:
        assert repa_cache("reference", tmp_path / "cache", "--num", 4, "--out", file).code == 0
    assert some[0].read_bytes() == some[1].read_bytes()
    drawn = np.load(some[0])["arr_0"]
    places = [int(np.flatnonzero((expected == picture).all((1, 2, 3)))[0]) for picture in drawn]
    assert len(places) == 4
    assert places == sorted(set(places))


def test_what_is_not_there_or_not_the_same_leaves_the_old_file(
    built: list[Path], tmp_path: Path, repa_cache: Callable[..., Any], build: Callable[..., Any]
) -> None:
    out = tmp_path / "ref.npz"
    out.write_bytes(b"what was there before")
    common = ("reference", tmp_path / "cache", "--out", out)
    other = built[4].read_bytes()
    built[4].write_bytes(other + b"0")
    before = sorted(tmp_path.iterdir())
    for options, code, words in (
        (("--data", tmp_path / "images"), 1, "class 1/004.png: the file has"),
        (("--data", tmp_path), 1, "class 0/000.png: cannot be read (No such file or directory); give the images"),
        (("--num", 0), 2, "--num 0: expected 1 or more"),
        (("--out", tmp_path / "ref.png"), 2, "expected a name that ends in .npz"),
        (("--out", tmp_path / "none/ref.npz"), 2, "no folder"),
    ):
        done = repa_cache(*common, *options)
        assert (done.code, words in done.err) == (code, True), done.err
        assert len(done.err.splitlines()) == 1
    assert out.read_bytes() == b"what was there before"
    assert sorted(tmp_path.iterdir()) == before
    built[4].write_bytes(other)
    assert build(tmp_path / "images", tmp_path / "tokens", "--autoencoder", "none", "--skip-bad").code == 0
    done = repa_cache("reference", tmp_path / "tokens", "--out", out)
    assert (done.code, "holds no pixels; name the images" in done.err) == (2, True)
