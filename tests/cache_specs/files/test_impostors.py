"""Files that stand where weights should are known by their first bytes; weights are not mistaken for them."""

from pathlib import Path

import pytest

from repa.cache_specs.files.impostors import impostor

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2702012345\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            LFS,
            "a Git LFS pointer, not the file of 2,702,012,345 bytes that it stands for. Fetch that with git lfs pull",
        ),
        (LFS.replace(b"2702012345", b"many"), "a Git LFS pointer, not the file that it stands for"),
        (LFS[:40], "a Git LFS pointer"),
        (b"/annex/objects/SHA256E-s12--ab.pt\n", "a git-annex pointer"),
        (b"\xef\xbb\xbf\r\n<!doctype HTML>\n<title>Google Drive</title>", "a web page"),
        (b"<html><body>404", "a web page"),
    ],
)
def test_what_is_no_weights_is_named_with_the_way_to_them(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(data)
    said = impostor(tmp_path / "file")
    assert said is not None
    assert words in said
    assert "Fetch" in said


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00", b'\x10\0\0\0\0\0\0\0{"a":{}}', bytes(9), b"<"])
def test_what_may_be_weights_is_left_to_their_parser(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    assert impostor(tmp_path / "file") is None
