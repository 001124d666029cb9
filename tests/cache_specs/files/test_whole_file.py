"""A file is whole or as it was before, and nothing is written or removed through a link."""

import errno
import os
from pathlib import Path

import pytest

from repa.cache_specs.files import whole_file
from repa.cache_specs.files.whole_file import partial_of, write_whole


def test_it_is_written_again_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for data in (b"", b"one\n", bytes(range(256)) * 999):
        write_whole(file, data)
        assert file.read_bytes() == data
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("refusing", ["write", "fsync", "replace"])
def test_what_the_disk_refuses_leaves_the_file_before(tmp_path: Path, monkeypatch, refusing: str) -> None:
    file = tmp_path / "config.json"
    write_whole(file, b"before")

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, refusing, refuse)
        with pytest.raises(OSError, match="No space left"):
            write_whole(file, b"after")
    assert file.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["config.json"]


def test_an_interrupt_leaves_the_file_before(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "config.json"
    write_whole(file, b"before")

    def half(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_file, "write_all", half)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, b"after")
    assert file.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_under_the_partial_name_is_replaced_and_what_it_names_kept(tmp_path: Path, dangling: bool) -> None:
    others, run = tmp_path / "others.txt", tmp_path / "run"
    run.mkdir()
    if not dangling:
        others.write_text("of somebody else")
    partial_of(run / "config.json").symlink_to(others)
    write_whole(run / "config.json", b"ours")
    assert (run / "config.json").read_bytes() == b"ours"
    assert not (run / "config.json").is_symlink()
    assert os.listdir(run) == ["config.json"]
    assert others.exists() != dangling
    assert dangling or others.read_text() == "of somebody else"
