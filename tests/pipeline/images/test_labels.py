"""Which label an image gets: numbers stay numbers, no class vanishes, nothing is guessed."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa.cache_specs.errors import UsageError
from repa.pipeline.images.formats import FORMATS, IMAGE_SUFFIXES
from repa.pipeline.images.labels import labels_from_csv, whole_number
from repa.pipeline.images.manifest import KnownSamples, Manifest, scan_folder

IMAGES = ["a.png", "b.png", "c.png"]


def table(tmp_path: Path, *labels: str) -> Path:
    file = tmp_path / "labels.csv"
    file.write_text("".join(f"{image},{label}\n" for image, label in zip(IMAGES, labels, strict=True)), "utf-8")
    return file


def touched(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def classes_of(manifest: Manifest) -> dict[str, int]:
    return dict(zip(manifest.sample_ids.tolist(), manifest.labels.tolist(), strict=True))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("0", "2", "10"), [0, 2, 10]),
        (("0.0", "2.0", "10.0"), [0, 2, 10]),
        (("0", "2.0", "1e1"), [0, 2, 10]),
        ((" 007", "+2", "10."), [7, 2, 10]),
    ],
)
def test_numbers_are_numbers_however_they_are_written(
    tmp_path: Path, labels: tuple[str, ...], expected: list[int]
) -> None:
    found, names = labels_from_csv(IMAGES, table(tmp_path, *labels))
    assert found == expected
    assert names == [str(label) for label in range(11)]


@pytest.mark.parametrize(
    ("labels", "line", "words"),
    [
        (("0", "0.7", "1"), 2, "label '0.7' of b.png is no whole number"),
        (("0", "nan", "1"), 2, "label 'nan' of b.png is no whole number"),
        (("0", "1", "inf"), 3, "label 'inf' of c.png is no whole number"),
        (("0", "", "1"), 2, "the label of b.png is empty"),
        (("zebra", "ant", " "), 3, "the label of c.png is empty"),
        (("0", "1", "-1"), 3, "label -1 of c.png"),
        (("0", "1", "1e300"), 3, "of c.png: expected class numbers from 0 to 999999"),
        (("2", "10", "cat"), 3, "label 'cat' of c.png is no whole number"),
        (("9" * 6000, "1", "2"), 1, "is no whole number"),
    ],
)
def test_what_is_no_class_number_is_refused_with_its_line(
    tmp_path: Path, labels: tuple[str, ...], line: int, words: str
) -> None:
    file = table(tmp_path, *labels)
    with pytest.raises(UsageError) as refused:
        labels_from_csv(IMAGES, file)
    assert f"{file}: line {line}: " in str(refused.value)
    assert words in str(refused.value).replace("9" * 6000, "")


def test_names_may_look_like_numbers_where_that_changes_no_order(tmp_path: Path) -> None:
    assert labels_from_csv(IMAGES, table(tmp_path, "Z", "3", "0")) == ([2, 1, 0], ["0", "3", "Z"])


def test_an_image_with_two_labels_is_refused_and_one_said_twice_is_not(tmp_path: Path) -> None:
    file = table(tmp_path, "0", "1", "2")
    file.write_text(file.read_text() + "a.png,2\n")
    with pytest.raises(UsageError, match=r"a\.png has two labels, '0' in line 1 and '2' in line 4"):
        labels_from_csv(IMAGES, file)
    file.write_text(file.read_text().replace("a.png,2", "a.png,0.0"))
    assert labels_from_csv(IMAGES, file)[0] == [0, 1, 2]


def test_a_byte_order_mark_blank_lines_and_decomposed_names_are_read(tmp_path: Path) -> None:
    on_disk = unicodedata.normalize("NFD", "ü.png")
    file = tmp_path / "labels.csv"
    file.write_bytes("\ufeffa.png,0\r\n\r\nü.png,4\r\n   \r\n\r\n".encode())
    assert labels_from_csv(["a.png", on_disk], file)[0] == [0, 4]
    file.write_text(f"a.png,0\nü.png,4\n{on_disk},5\n", "utf-8")  # two names, each its own
    assert labels_from_csv(["a.png", on_disk, "ü.png"], file)[0] == [0, 5, 4]


@pytest.mark.parametrize("rows", [3, 20_000])
def test_an_open_quote_is_one_line_that_names_the_one_it_begins_in(tmp_path: Path, rows: int) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("a.png,0\n" + '"b.png,1\n' + "".join(f"{i:08d}.png,{i % 10}\n" for i in range(rows)))
    with pytest.raises(UsageError) as refused:
        labels_from_csv(IMAGES, file)
    assert str(refused.value).startswith(f"--labels {file}: line 2: cannot be read (")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("label", "expected"), [("2.0", 2), ("3", 3), ('"3"', 3), ("0.7", None), ("true", None), ("null", None)]
)
def test_labels_of_a_dataset_json_are_whole_numbers(tmp_path: Path, label: str, expected: int | None) -> None:
    touched(tmp_path, "00000/img00000000.png", "00000/img00000001.png")
    text = f'{{"labels": [["00000/img00000000.png", 0], ["00000/img00000001.png", {label}]]}}'
    (tmp_path / "dataset.json").write_text(text)
    if expected is not None:
        assert scan_folder(tmp_path).labels.tolist() == [0, expected]
        return
    with pytest.raises(UsageError, match=rf"label {json.loads(label)} of 00000/img00000001\.png is no whole number"):
        scan_folder(tmp_path)


def test_two_labels_of_one_image_in_a_dataset_json_are_refused(tmp_path: Path) -> None:
    touched(tmp_path, "a.png")
    (tmp_path / "dataset.json").write_text('{"labels": [["a.png", 0], ["a.png", 2]]}')
    with pytest.raises(UsageError, match=r"two labels of a\.png, 0 and 2"):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"labels": ' + "[" * 100_000, "5", '{"labels": 5}', '{"labels": [5]}', '{"labels": [["a.png", 1e999]]}']
)
def test_a_dataset_json_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    touched(tmp_path, "a.png")
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UsageError, match=r"dataset\.json: .*expected"):
        scan_folder(tmp_path)


def test_an_empty_class_is_refused_by_name_or_keeps_its_number(tmp_path: Path) -> None:
    touched(tmp_path, "a/x.png", "b/notes.txt", "c/x.png", ".hidden/y.png")
    with pytest.raises(UsageError, match=r"class b holds no image.*--allow-empty"):
        scan_folder(tmp_path)
    manifest = scan_folder(tmp_path, allow_empty=True)
    assert classes_of(manifest) == {"a/x.png": 0, "c/x.png": 2}
    assert manifest.class_names == ("a", "b", "c")


def test_every_format_of_ours_is_found_by_its_endings(tmp_path: Path) -> None:
    asked = {".pgm", ".jfif", ".jpe", ".pbm", ".tga", ".jp2", ".avif", ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".gif"}
    assert asked | {".tif", ".tiff", ".webp"} <= IMAGE_SUFFIXES
    assert "EPS" not in FORMATS
    touched(tmp_path, *(f"class {suffix[1:]}/x{suffix.upper()}" for suffix in IMAGE_SUFFIXES))
    assert len(scan_folder(tmp_path).class_names) == len(IMAGE_SUFFIXES)


def test_names_of_windows_in_a_flat_folder_have_lost_their_classes(tmp_path: Path) -> None:
    touched(tmp_path, "a\\x.png", "b\\x.png")
    with pytest.raises(UsageError, match="as Windows writes it"):
        scan_folder(tmp_path)
    file = tmp_path.with_suffix(".csv")
    file.write_text("a\\x.png,3\nb\\x.png,0\n")
    assert scan_folder(tmp_path, str(file)).labels.tolist() == [3, 0]


def known(manifest: Manifest) -> KnownSamples:
    return KnownSamples(sample_ids=manifest.sample_ids, class_names=manifest.class_names)


def test_a_cache_keeps_its_images_and_classes_when_the_folder_grows(tmp_path: Path) -> None:
    first = scan_folder(touched(tmp_path, "b/x.png", "d/y.png"))
    touched(tmp_path, "a/new.avif", "b/more.png", "c/notes.txt")
    again = scan_folder(tmp_path, known=known(first))
    assert (again.fingerprint, again.class_names, again.further) == (first.fingerprint, ("b", "d"), 2)
    np.testing.assert_array_equal(again.sample_ids, first.sample_ids)
    # An image that is gone is no growth: what is there is compared with the cache, and refused.
    (tmp_path / "b/x.png").unlink()
    (tmp_path / "c/notes.txt").rename(tmp_path / "c/z.png")
    assert len(scan_folder(tmp_path, known=known(first))) == 4


def test_a_cache_with_an_empty_class_goes_on_without_being_told_again(tmp_path: Path) -> None:
    touched(tmp_path, "a/x.png", "b/notes.txt", "c/x.png")
    first = scan_folder(tmp_path, allow_empty=True)
    assert scan_folder(tmp_path, known=known(first)).class_names == ("a", "b", "c")


def test_further_images_are_one_line_of_a_build(
    tmp_path: Path, make_images: Callable[..., Any], build: Callable[..., Any], tree: Callable[..., Any]
) -> None:
    make_images(tmp_path / "images", num=4)
    assert build(tmp_path / "images", tmp_path / "cache").code == 0
    before = tree(tmp_path / "cache")
    for name in ("class 0/zebra.png", "class 1/aaa.png", "class 2/000.png"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "images/class 0/000.png", tmp_path / "images" / name)
    outcome = build(tmp_path / "images", tmp_path / "cache")
    assert outcome.code == 0, outcome.err
    assert "3 further images are not in" in outcome.err
    assert tree(tmp_path / "cache") == before


@pytest.mark.parametrize(("word", "number"), [("12", 12), ("1_0", None), ("１", None), ("0x1", None), (".5e1", 5)])
def test_how_a_whole_number_is_written(word: str, number: int | None) -> None:
    assert whole_number(word) == number
