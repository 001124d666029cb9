"""Whatever a user gets wrong is one line that names it and the way out, an exit code that is not 0, nothing lost."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from PIL import Image

from .conftest import refuse

# Files that are no pictures


def spoil(images: Path, how: str) -> tuple[str, str]:
    """Spoil the fifth picture; return its sample id and what the build should say of it."""
    file = images / "class 1/004.png"
    if how == "truncated JPEG":
        Image.new("RGB", (64, 64), (200, 10, 10)).save(file.with_suffix(".jpg"))
        data = file.with_suffix(".jpg").read_bytes()
        file.with_suffix(".jpg").unlink()
        file.write_bytes(data[: len(data) // 2])
        return "class 1/004.png", "cannot be decoded"
    if how == "zero bytes":
        file.write_bytes(b"")
        return "class 1/004.png", "an empty file"
    if how == "text":
        file.write_text("not a picture")
        return "class 1/004.png", "not an image"
    file.unlink()
    file.symlink_to(images / "gone.png")
    return "class 1/004.png", "cannot be read (No such file or directory)"


@pytest.mark.parametrize("how", ["truncated JPEG", "zero bytes", "text", "broken link"])
def test_a_bad_file_stops_its_range_alone_and_mending_it_gives_a_clean_build(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]], how: str
) -> None:
    assert build(images, tmp_path / "clean").code == 0
    good = (images / "class 1/004.png").read_bytes()
    sample_id, reason = spoil(images, how)
    cache = tmp_path / "cache"
    outcome = build(images, cache)
    refuse(outcome, 1, "1 of 6 images could not be used", "--skip-bad", "run the same command again")
    assert f"bad image: {sample_id}: " in outcome.err
    assert reason in outcome.err
    assert (cache / "features/hog-grid4/valid/c.0").exists()  # the other range is kept
    assert not (cache / "features/hog-grid4/valid/c.1").exists()
    assert "complete" not in zarr.open_group(cache, mode="r")["features/hog-grid4"].attrs

    (images / "class 1/004.png").unlink()
    (images / "class 1/004.png").write_bytes(good)
    assert build(images, cache).code == 0
    assert tree(cache) == tree(tmp_path / "clean")


def test_skip_bad_leaves_the_row_zero_not_valid_and_gives_the_reason(
    images: Path, tmp_path: Path, build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    (images / "class 0/001.png").write_text("not a picture")
    (images / "class 1/005.png").write_bytes(b"")
    outcome = build(images, tmp_path / "cache", "--skip-bad")
    assert outcome.code == 0, outcome.err
    assert "2 bad images were left out" in outcome.out
    root = zarr.open_group(tmp_path / "cache", mode="r")
    reasons = {"class 0/001.png": "not an image", "class 1/005.png": "an empty file"}
    for path, array in (("latents/pixels", "moments"), ("features/hog-grid4", "patch_tokens")):
        group = root[path]
        assert group["valid"][:].tolist() == [True, False, True, True, True, False]
        assert not group[array][[1, 5]].any()
        assert group[array][[0, 2, 3, 4]].any(axis=(1, 2, 3)).all()
        assert not group["source_bytes"][[1, 5]].any()
        assert group.attrs["bad_files"] == reasons
        assert group.attrs["complete"] is True
    # The zeros of the bad rows are no part of the statistics.
    valid = root["latents/pixels/moments"][[0, 2, 3, 4]].astype(float)
    assert root["latents/pixels"].attrs["latent_mean"] == pytest.approx(valid.mean((0, 1, 3, 4)), rel=1e-9)
    assert "class 1/005.png: an empty file" in repa_cache("info", tmp_path / "cache").out
    assert repa_cache("verify", tmp_path / "cache").code == 0
    # A component that comes later meets the same two bad files.
    assert build(images, tmp_path / "cache", "--encoder", "hog:grid=3").code == 1
    assert build(images, tmp_path / "cache", "--encoder", "hog:grid=3", "--skip-bad").code == 0


def test_a_file_that_changed_between_two_components_is_bad_by_name(
    images: Path, tmp_path: Path, build: Callable[..., Any]
) -> None:
    assert build(images, tmp_path / "cache").code == 0
    file = images / "class 0/002.png"
    size = file.stat().st_size
    Image.new("RGB", (50, 50), (1, 2, 3)).save(file)
    outcome = build(images, tmp_path / "cache", "--encoder", "hog:grid=3")
    refuse(outcome, 1, "1 of 6 images")
    assert (
        f"bad image: class 0/002.png: the file has {file.stat().st_size} bytes now, and had {size} when an earlier "
        "component of this cache was built; put the old file back, or build a new cache"
    ) in outcome.err


# Folders and labels


def test_folders_that_hold_no_data_set(
    tmp_path: Path, make_images: Callable[..., Any], build: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    refuse(build(tmp_path / "gone", cache), 2, "gone: no such folder", "demo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("x")
    refuse(build(tmp_path / "empty", cache), 2, "no images below it (1 files with other endings)", ".png")
    make_images(tmp_path / "mixed", num=2)
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed/loose.png")
    refuse(build(tmp_path / "mixed", cache), 2, "directly in it (loose.png) and in folders", "--labels FILE.csv")
    make_images(tmp_path / "bytes", num=2)
    os.rename(os.fsencode(tmp_path / "bytes/class 0/000.png"), os.fsencode(tmp_path / "bytes/class 0") + b"/\xff.png")
    refuse(build(tmp_path / "bytes", cache), 2, r"b'class 0/\xff.png' is not UTF-8", "rename it")
    assert not cache.exists()


def test_five_digit_folders_are_a_question(
    tmp_path: Path, make_images: Callable[..., list[Path]], build: Callable[..., Any]
) -> None:
    root = tmp_path / "edm"
    files = make_images(root, num=4)
    (root / "class 0").rename(root / "00000")
    (root / "class 1").rename(root / "00001")
    refuse(build(root, tmp_path / "cache"), 2, "are 00000 .. 00001 classes", "dataset.json", "--labels folders")
    assert build(root, tmp_path / "cache", "--labels", "folders").code == 0
    assert zarr.open_group(tmp_path / "cache", mode="r").attrs["class_names"] == ["00000", "00001"]

    names = [f"0000{i // 2}/{file.name}" for i, file in enumerate(files)]
    (root / "dataset.json").write_text(json.dumps({"labels": [[name, 3 - i] for i, name in enumerate(names)]}))
    assert build(root, tmp_path / "edm cache").code == 0
    group = zarr.open_group(tmp_path / "edm cache", mode="r")
    assert group["label"][:].tolist() == [3, 2, 1, 0]
    assert group.attrs["class_names"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", 'expected {"labels": [["00000/img00000000.png", 0], ...]}'),
        ('{"labels": [["class 0/000.png"]]}', "expected"),
        ('{"labels": [["class 0/000.png", 0]]}', "5 of 6 images have no label, the first is class 0/001.png"),
        ('{"labels": [["class 0/%03d.png", -1]]}', "label -1 of class 0/000.png"),
        ('{"labels": [["class 0/%03d.png", 5000000]]}', "expected class numbers from 0 to 999999"),
    ],
)
def test_a_damaged_dataset_json(images: Path, tmp_path: Path, build: Callable[..., Any], text: str, part: str) -> None:
    if "%" in text:
        label = json.loads(text)["labels"][0][1]
        text = json.dumps({"labels": [[f"class {i // 3}/{i:03d}.png", label] for i in range(6)]})
    (images / "dataset.json").write_text(text)
    refuse(build(images, tmp_path / "cache"), 2, "dataset.json", part)


def test_labels_from_a_table(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    table = tmp_path / "labels.csv"
    ids = [f"class {i // 3}/{i:03d}.png" for i in range(6)]
    refuse(build(images, tmp_path / "cache", "--labels", table), 2, "cannot be read", "sample id,label")
    table.write_text("".join(f"{name},zebra\n" for name in ids[:4]))
    refuse(build(images, tmp_path / "cache", "--labels", table), 2, "2 of 6 images have no label", "class 1/004.png")
    table.write_text("".join(f"{name};3\n" for name in ids))
    refuse(build(images, tmp_path / "cache", "--labels", table), 2, "expected two columns")
    words = ["zebra", "ant", "Öl", "ant", "zebra", "Öl"]
    table.write_text("".join(f"{name},{word}\n" for name, word in zip(ids, words, strict=True)), encoding="utf-8")
    assert build(images, tmp_path / "cache", "--labels", table).code == 0
    group = zarr.open_group(tmp_path / "cache", mode="r")
    assert group.attrs["class_names"] == ["ant", "zebra", "Öl"]  # bytewise
    assert group["label"][:].tolist() == [1, 0, 2, 0, 1, 2]


def test_names_with_spaces_and_other_letters_are_kept(tmp_path: Path, build: Callable[..., Any]) -> None:
    names = ["Äpfel und Birnen/grün 1.png", "b/名前.png", "b/ü.PNG", "c'\"$/(x).jpeg"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "images" / name)
    assert build(tmp_path / "images", tmp_path / "cache dir ü").code == 0
    found = zarr.open_group(tmp_path / "cache dir ü", mode="r")["sample_id"][:].tolist()
    assert found == sorted(names, key=str.encode)


def test_links_are_followed_but_not_in_a_circle(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    (images / "class 0/up").symlink_to(images)
    (images / "class 2").symlink_to(images / "class 1")
    assert build(images, tmp_path / "cache").code == 0
    found = zarr.open_group(tmp_path / "cache", mode="r")["sample_id"][:].tolist()
    assert found == [
        f"class {c}/{i:03d}.png" for c, i in ((0, 0), (0, 1), (0, 2), *((c, i) for c in (1, 2) for i in (3, 4, 5)))
    ]


def test_a_link_to_itself_is_named(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    (images / "class 0/loop").symlink_to("loop")
    refuse(build(images, tmp_path / "cache"), 2, "class 0/loop cannot be followed (Too many levels of symbolic links)")


# Requests


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--encoder", "dinov3-vit-b"], ["unknown encoder 'dinov3-vit-b'", "did you mean 'dino"]),
        (["--encoder", "hog:gird=4"], ["unknown option 'gird'", "did you mean 'grid'"]),
        (["--encoder", "hog:grid=0"], ["grid is '0'"]),
        (["--encoder", "hog:grid=1"], ["at least 2 x 2"]),
        (
            ["--encoder", "hog", "--autoencoder", "none", "--resolution", "40"],
            ["resolution / 16 is not whole", "--encoder hog:grid=2"],
        ),
        (["--autoencoder", "pixel"], ["unknown autoencoder 'pixel'", "did you mean 'pixels'"]),
        (["--autoencoder", "sd-vae-ft-mse", "--resolution", "20"], ["multiple of 8, not 20", "--resolution"]),
        (["--resolution", "4"], ["expected at least 8"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--workers", "-1"], ["--workers -1"]),
        (["--threads", "0"], ["--threads 0: expected at least 1"]),
        (["--shard-samples", "0"], ["--shard-samples 0"]),
        (["--workers", "0", "--address", "auto"], ["leave out --address"]),
        (["--weights", "hog"], ["expected NAME=FILE"]),
        (["--weights", "dinov2=x.pth"], ["dinov2-vit-b is not asked for"]),
        (["--weights", "hog=x.pth"], ["hog has no weights"]),
        (["--dtype", "int4"], ["'int4' is not one of 'float16', 'int8'"]),
        (
            ["--dtype", "uint8", "--autoencoder", "sd-vae-ft-mse"],
            ["--dtype uint8 is for pixels", "sd-vae-ft-mse gives"],
        ),
        (["--dtype", "uint8", "--autoencoder", "none"], ["--dtype uint8 is for pixels; name --autoencoder pixels too"]),
        (["--skipbad"], ["No such option", "--skip-bad", "see repa-cache build --help"]),
    ],
)
def test_requests_that_make_no_sense(
    images: Path, tmp_path: Path, build: Callable[..., Any], options: list[str], parts: list[str]
) -> None:
    refuse(build(images, tmp_path / "cache", *options), 2, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--resolution", "32"], ["resolution: found 16, asked 32"]),
        (["--no-flip"], ["views (--flip): found ('identity', 'flip'), asked ('identity',)"]),
        (["--shard-samples", "5"], ["shard_samples: found 4, asked 5"]),
        (["--precision", "bf16"], ["latents/pixels", "precision: found fp32, asked bf16"]),
        (["--compressor", "zstd"], ["compressor: found none, asked zstd"]),
    ],
)
def test_a_cache_made_with_other_options_is_left_alone(
    images: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    tree: Callable[[Path], dict[str, bytes]],
    options: list[str],
    parts: list[str],
) -> None:
    cache = tmp_path / "cache"
    build(images, cache)
    before = tree(cache)
    refuse(build(images, cache, *options), 1, str(cache), *parts)
    assert tree(cache) == before


def test_a_cache_of_other_data_is_left_alone(
    images: Path,
    tmp_path: Path,
    make_images: Callable[..., Any],
    build: Callable[..., Any],
    tree: Callable[[Path], dict[str, bytes]],
) -> None:
    cache = tmp_path / "cache"
    build(images, cache)
    before = tree(cache)
    (images / "class 1/004.png").rename(images / "class 1/renamed.png")
    refuse(build(images, cache), 1, "manifest_fingerprint (other file names or labels): found", "use another --cache")
    make_images(tmp_path / "more", num=7)
    refuse(build(tmp_path / "more", cache), 1, "num_samples (images were added or removed): found 6, asked 7")
    assert tree(cache) == before


# Weights

VIT = ("--encoder", "dinov2-vit-s:grid=2", "--autoencoder", "none")


def test_weights_that_cannot_be_had(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    cache = tmp_path / "cache"
    refuse(
        build(images, cache, *VIT),
        2,
        "dinov2-vit-s: the pretrained weights of vit_small_patch14_dinov2.lvd142m could not be had",
        "--weights dinov2-vit-s=FILE",
        "--random-weights",
    )
    for name, part in (("gone.pth", "no such file"), ("weights.txt", "expected .safetensors, .pth")):
        (tmp_path / "weights.txt").write_text("x")
        refuse(build(images, cache, *VIT, "--weights", f"dinov2={tmp_path / name}"), 2, "dinov2-vit-b is not asked")
        refuse(build(images, cache, *VIT, "--weights", f"dinov2-vit-s={tmp_path / name}"), 2, name, part)
    assert not list(cache.glob("features/*/")), "a component without weights was begun"
