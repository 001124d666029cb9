"""What is written under a temporary name is made anew: no link that lies there is followed, nothing beyond removed."""

import os
from pathlib import Path

import pytest

from repa.cache_specs.errors import CacheError
from repa.cache_specs.files.locks import locked
from repa.cache_specs.files.partial_files import clear_folder, new_file
from repa.cache_specs.storage import location


@pytest.mark.parametrize("what", ["a file", "a link", "a broken link", "a FIFO"])
def test_a_new_file_is_no_other(tmp_path: Path, what: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "zarr.json.partial"
    if what != "a broken link":
        victim.write_text("precious")
    if what == "a file":
        path.write_text("left over by a killed process, and longer than what is written now")
    elif what == "a FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(victim)
    location(tmp_path / "zarr.json").write(b"data")
    assert (tmp_path / "zarr.json").read_bytes() == b"data"
    assert not path.is_symlink()
    assert (victim.read_text() == "precious") if what != "a broken link" else not victim.exists()


def test_a_name_that_comes_back_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "partial").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # as if another had put it there again
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "partial")
    assert (tmp_path / "victim").read_text() == "precious"


def test_clearing_removes_links_and_not_what_they_name(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "features.hog").mkdir(parents=True)
    (victim / "features.hog/precious").touch()
    own = tmp_path / "cache/.partial"
    (own / "features.hog/3-abc").mkdir(parents=True)
    (own / "features.hog/3-abc/moments").touch()
    (own / "features.hog/link").symlink_to(victim)
    clear_folder(own / "features.hog")
    assert list(own.iterdir()) == []
    (own / "features.hog").symlink_to(victim)
    clear_folder(own / "features.hog")
    assert list(own.iterdir()) == []
    own.rmdir()
    own.symlink_to(victim)  # the folder above is a link
    clear_folder(own / "features.hog")
    clear_folder(tmp_path / "nothing/there")
    assert (victim / "features.hog/precious").exists()


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/.partial").symlink_to(tmp_path / "victim")
    with (
        pytest.raises(CacheError, match=r"\.partial: a link, where our own half-written files lie; remove it"),
        locked(tmp_path / "cache/.partial/cache.lock", wait=False),
    ):
        pass
    assert list((tmp_path / "victim").iterdir()) == []
    (tmp_path / "cache/.partial").unlink()
    (tmp_path / "cache/.partial").mkdir()
    (tmp_path / "cache/.partial/cache.lock").symlink_to(tmp_path / "victim/new")
    with pytest.raises(CacheError), locked(tmp_path / "cache/.partial/cache.lock", wait=False):
        pass
    assert list((tmp_path / "victim").iterdir()) == []
