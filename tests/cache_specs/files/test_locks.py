"""One process at a time, and nothing left over: what builds and staging rely on."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from repa.cache_specs.errors import CacheError
from repa.cache_specs.files.locks import locked


def test_who_does_not_wait_is_told_and_nothing_stays(tmp_path: Path) -> None:
    file = tmp_path / ".partial" / "features.hog.lock"
    with locked(file, wait=False) as held:
        assert held
        with locked(file, wait=False) as second:
            assert not second
        assert file.exists()
    assert not file.parent.exists()
    with locked(file, wait=True) as held:
        assert held


def test_who_waits_gets_it_though_the_file_comes_and_goes(tmp_path: Path) -> None:
    """Each holder removes the lock's file and its folder while others wait on the old one."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count(times: int) -> None:
        for _ in range(times):
            with locked(tmp_path / "locks" / "x.lock", wait=True) as held:
                assert held
                counter.write_text(str(int(counter.read_text()) + 1))

    with ThreadPoolExecutor(4) as threads:  # flock keeps descriptors apart, of one process too
        list(threads.map(count, [150] * 4))
    assert counter.read_text() == "600"
    assert not (tmp_path / "locks").exists()


def test_a_place_without_locks_is_named_with_its_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(CacheError, match=r"cannot be written \(Not a directory\); name a --stage that can"),
        locked(tmp_path / "file" / "x" / "lock", wait=True, option="--stage"),
    ):
        pass

    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        pytest.raises(CacheError, match=r"cannot lock files \(Operation not supported\).*name a TMPDIR on another"),
        locked(tmp_path / "a" / "lock", wait=True, option="TMPDIR"),
    ):
        pass
