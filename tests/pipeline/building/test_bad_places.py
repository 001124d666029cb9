"""Disks and folders that refuse what a build asks of them: one line, an exit code that is not 0, nothing lost."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

import repa.cache_specs.storage
import repa.pipeline.store.shards

from .conftest import refuse


@pytest.mark.parametrize("where", ["first write", "a shard", "fsync"])
def test_a_full_disk_loses_nothing(
    images: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    tree: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    assert build(images, tmp_path / "clean").code == 0
    calls = 0
    plain_write, plain_fsync = repa.cache_specs.storage.write_bytes, os.fsync

    def write_bytes(descriptor: int, data: bytes | memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls == {"first write": 1, "a shard": 5}.get(where):
            plain_write(descriptor, bytes(data)[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain_write(descriptor, data)

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += where == "fsync"
        if where == "fsync" and stat.S_ISREG(os.fstat(descriptor).st_mode) and calls > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain_fsync(descriptor)

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        metadata, shards = repa.cache_specs.storage, repa.pipeline.store.shards
        patch.setattr(shards if where == "a shard" else metadata, "write_bytes", write_bytes)
        patch.setattr(os, "fsync", fsync)
        refuse(build(images, cache), 1, "No space left on device", "make room", "finished ranges are kept")
    assert all(name.endswith((".partial", ".asked")) for name in tree(cache) if "partial" in name)
    assert build(images, cache).code == 0
    assert tree(cache) == tree(tmp_path / "clean")


def test_a_place_where_no_cache_can_be(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("x")
    refuse(build(images, tmp_path / "file"), 1, str(tmp_path / "file"), "cannot be written")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    refuse(build(images, tmp_path / "full"), 2, "the folder holds other things (thesis.tex)", "name a new one")
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    refuse(build(images, tmp_path / "other.zarr"), 1, "not a cache")


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="a file system in which no folder can be made: Linux's /proc"
)
def test_a_folder_that_can_never_be_made_is_no_race(images: Path, build: Callable[..., Any]) -> None:
    done = build(images, Path("/proc/caches/small"))
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "/proc/caches/small: cannot be written (No such file or directory); name a --cache that can" in done.err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ESTALE])
def test_a_file_system_without_locks(
    images: Path, tmp_path: Path, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tried: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        tried.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    refuse(build(images, tmp_path / "cache"), 1, str(tmp_path / "cache"), os.strerror(number), "cannot lock files")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tried[0])


AS_ANOTHER = """
import json, os, sys
# Now: the other user may not read the interpreter's folders.
import repa.pipeline.building.build, repa.cache_specs.tables
from repa.pipeline.commands.cache import main
repa.cache_specs.tables.encoder_table(), repa.cache_specs.tables.autoencoder_table()
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["repa-cache", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert stop.code in (1, 2)
    else:
        raise AssertionError(arguments)
"""


def test_what_another_user_may_not_read_or_write(
    make_images: Callable[..., list[Path]], small_options: list[str]
) -> None:
    # Not below pytest's folders: every session that starts takes back what others may do there.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        images, partly, hidden, readonly = (folder / part for part in ("images", "partly", "hidden", "readonly"))
        make_images(images, num=2)
        make_images(partly, num=2)
        (partly / "class 1").chmod(0)
        make_images(hidden / "images", num=2)
        hidden.chmod(0o600)
        readonly.mkdir(mode=0o555)
        cases = (
            (partly, folder / "cache", f"--data {partly / 'class 1'}: cannot be read (Permission denied)"),
            (hidden / "images", folder / "cache", f"--data {hidden / 'images'}: cannot be read (Permission denied)"),
            (images, readonly / "cache", f"{readonly / 'cache'}: cannot be written (Permission denied)"),
        )
        commands = [["build", "--data", str(data), "--cache", str(cache), *small_options] for data, cache, _ in cases]
        done = subprocess.run(
            [sys.executable, "-c", AS_ANOTHER], input=json.dumps(commands), capture_output=True, text=True, cwd="/"
        )
        for private in (partly / "class 1", hidden):
            private.chmod(0o755)  # for their removal
        assert done.returncode == 0, done
        lines = done.stderr.splitlines()
        assert len(lines) == len(cases), lines
        for line, (_, _, said) in zip(lines, cases, strict=True):
            assert said in line
