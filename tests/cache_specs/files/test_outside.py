"""What others supply: whatever is wrong with it is one ValueError or OSError, at once and in little memory."""

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from repa.cache_specs.errors import CacheError, UsageError
from repa.cache_specs.files.outside import (
    MOST_YAML_VALUES,
    UnfitFileError,
    open_regular,
    parse_json,
    parse_yaml,
    read_file,
    read_text,
)
from repa.cache_specs.storage import LocalPath, location
from repa.cache_specs.tables import read_encoder_file


def unfit(folder: Path, kind: str) -> Path:
    """Make what is no file to be read, and return its path."""
    path = folder / "unfit"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 2**42)
    return path


KINDS = ["fifo", "socket", "link to a device", "folder", "sparse"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_of_a_sensible_size_are_read(tmp_path: Path, kind: str) -> None:
    path = unfit(tmp_path, kind)
    with pytest.raises(OSError, match=r"FIFO|No such device|a device|directory|bytes, and at most 1000"):
        read_file(path, most=1000)
    if kind != "sparse":
        with pytest.raises(OSError, match=r"FIFO|No such device|a device|directory"):
            open_regular(path)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_read_of_a_cache(tmp_path: Path, kind: str) -> None:
    found = location(unfit(tmp_path, kind))
    with pytest.raises(CacheError, match="unfit: cannot be read"):
        found.read()
    if kind != "sparse":
        with pytest.raises(CacheError, match="unfit: cannot be read"), found.open():
            pass


@pytest.mark.parametrize("kind", ["fifo", "link to a device"])
def test_zarr_opens_regular_files_only(tmp_path: Path, kind: str) -> None:
    array = zarr.create_array(tmp_path / "label", shape=(9,), chunks=(4,), dtype="int32")
    array[:] = np.arange(1, 10)
    chunk = tmp_path / "label/c/1"
    chunk.unlink()
    unfit(tmp_path, kind).rename(chunk)
    stored = zarr.open_array(LocalPath(tmp_path / "label").zarr_store(), mode="r")
    assert stored[:4].tolist() == [1, 2, 3, 4]
    with pytest.raises(UnfitFileError):
        stored[:]


def test_a_file_that_is_as_large_as_it_may_be_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + "äöü".encode())
    assert read_file(tmp_path / "a", most=9) == b"\xef\xbb\xbf" + "äöü".encode()
    assert read_text(tmp_path / "a", most=9) == "äöü"
    with pytest.raises(UnfitFileError, match="it has 9 bytes, and at most 8 are read"):
        read_file(tmp_path / "a", most=8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10**6, "nested too deeply"),
        ('{"a": Infinity}', "Infinity is no number"),
        ("[NaN]", "NaN is no number"),
        ("[1e999]", "1e999 is too large"),
        ("[" + "9" * 6000 + "]", "a number of 6000 digits"),
        ("[9223372036854775809]", "larger than 64 bits"),
        ("{", "Expecting"),
        (b"\xff\xfe\xff", "codec can't decode"),
    ],
)
def test_json_is_read_or_a_value_error(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_json_of_ours_is_read_as_it_was() -> None:
    assert parse_json('{"a": [1, -2.5e-3, "x", null, true], "b": {}}') == {"a": [1, -2.5e-3, "x", None, True], "b": {}}


def laughs(depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs(30), f"more than {MOST_YAML_VALUES} values"),
        ("a: &a [*a]", "holds itself"),
        ("&a {b: *a}", "holds itself"),
        ("a: 2020-13-45", "month must be in"),
        ("a: !!timestamp x", "cannot be read"),
        ("a: !!int ''", "cannot be read"),
        ("a: !!bool x", "cannot be read"),
        ("a: " + "9" * 6000, "a number of 6000 digits"),
        ("a: 0x" + "f" * 40, "larger than 64 bits"),
        ("[" * 10**5, "nested too deeply"),
        ("{[]: 1}", "unhashable"),
        ("a: b: c", "mapping values"),
        ("!!python/object:os.system {}", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("\0", "special characters"),
    ],
)
def test_yaml_is_read_or_a_value_error(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: {b: 1, c: [1.5, yes, null, 1e-4]}", {"a": {"b": 1, "c": [1.5, True, None, "1e-4"]}}),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a", {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}),
        ("n: -9_000", {"n": -9000}),
    ],
)
def test_yaml_that_a_person_writes_is_read(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize("text", [laughs(30), "[" * 9999, "width: 2020-13-45", "width: " + "9" * 6000])
def test_an_encoders_file_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"mine\.yaml: cannot be read as YAML"):
        read_encoder_file(tmp_path / "mine.yaml")
