"""Staging: a copy that is the cache, made once, verified, shared by runs, and gone on with after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa.cache_specs.errors import CacheError, JobError, RepaError, UsageError
from repa.cache_specs.schema import ComponentSpec
from repa.cache_specs.storage import LocalPath, location
from repa.trainer import CacheReader
from repa.trainer.reading import stage
from repa.trainer.reading.stage import stage_cache


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names each shard as its copy begins."""
    names: list[str] = []
    download = stage._download

    def counted(source: Any, partial: Path) -> None:
        names.append(str(source))
        download(source, partial)

    monkeypatch.setattr(stage, "_download", counted)
    return names


@pytest.fixture
def written(make_cache: Callable[..., Any]) -> Any:
    """A cache of three components, 5 shards an array."""
    return make_cache(encoders={"toy": "float16", "toy8": "int8"})


@pytest.fixture(params=["folder", "s3"])
def source(request: pytest.FixtureRequest, written: Any, upload: Callable[..., str]) -> str:
    """The same cache in a folder (a slow mount), or in a bucket."""
    if request.param == "folder":
        return str(written.path)
    return upload(written.path, f"{request.getfixturevalue('bucket')}/cache")


def test_the_copy_is_the_cache_and_is_made_once(
    source: str, written: Any, tmp_path: Path, downloads: list[str]
) -> None:
    progress: list[tuple[int, int]] = []
    messages: list[str] = []
    copy = stage_cache(
        source,
        tmp_path / "stage",
        encoders=["toy"],
        on_progress=lambda done, total: progress.append((done, total)),
        on_message=messages.append,
    )
    expected = {name: data for name, data in files(written.path).items() if "toy8" not in name}
    assert files(copy) == expected
    assert copy.name == written.layout.dataset_fingerprint[:16]
    arrays = 3 + 6  # of the latents, of toy
    assert len(downloads) == len(set(downloads)) == 5 * arrays
    shards = sum(len(data) for name, data in expected.items() if "/c." in name and "checksums" not in name)
    assert sum(total for done, total in progress if done == total) == shards
    assert all(done <= total for done, total in progress)
    assert messages[1] == f"{copy}/features/toy: copying 30 shards, {messages[1].split(', ')[1]}, from {source}"
    assert not (copy / ".partial").exists()

    rows, views = np.arange(23), np.arange(23) % 2
    there, here = CacheReader(source, encoder="toy"), CacheReader(copy)
    np.testing.assert_array_equal(here.rows(rows, views).features[0].tokens, there.rows(rows, views).features[0].tokens)
    assert here.fingerprints == there.fingerprints

    downloads.clear()
    assert stage_cache(source, tmp_path / "stage", encoders=["toy"], on_message=messages.append) == copy
    assert (downloads, len(messages)) == ([], 2)
    assert stage_cache(source, tmp_path / "stage", encoders=["toy", "toy8-int8"]) == copy  # adds one beside it
    assert len(downloads) == 5 * 7
    assert files(copy) == files(written.path)


def test_two_at_once_copy_each_shard_once(written: Any, tmp_path: Path, downloads: list[str]) -> None:
    with ThreadPoolExecutor(3) as threads:  # flock keeps descriptors apart, of one process too
        runs = [threads.submit(stage_cache, written.path, tmp_path / "stage", encoders=["toy"]) for _ in range(3)]
        (copy,) = {run.result() for run in runs}
    assert len(downloads) == len(set(downloads)) == 45
    assert not (copy / ".partial").exists()


DIE = """
import os, signal, sys
from repa.cache_specs.storage import LocalPath
from repa.trainer.reading.stage import stage_cache
point, count, take = int(sys.argv[1]), 0, LocalPath.take
def dying(self, file):
    global count
    count += 1
    if count == point:
        os.kill(os.getpid(), signal.SIGKILL)
    take(self, file)
LocalPath.take = dying
stage_cache(sys.argv[2], sys.argv[3], encoders=["toy"])
"""


def test_a_killed_copy_goes_on_where_it_was(written: Any, tmp_path: Path, downloads: list[str]) -> None:
    command = [sys.executable, "-c", DIE, "20", str(written.path), str(tmp_path / "stage")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (copy,) = (tmp_path / "stage").iterdir()
    whole = len([name for name in files(copy) if "/c." in name and "checksums" not in name and ".partial" not in name])
    assert 0 < whole < 45
    with pytest.raises(CacheError, match=r"not complete|holds no|damaged"):
        CacheReader(copy, encoder="toy")
    assert stage_cache(written.path, tmp_path / "stage", encoders=["toy"]) == copy
    assert len(downloads) == 45 - whole
    assert files(copy) == {name: data for name, data in files(written.path).items() if "toy8" not in name}


def test_what_was_damaged_on_the_way_is_copied_again_and_at_the_source_named(
    written: Any, tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, spoilt = stage._download, []

    def spoil_once(source: Any, partial: Path) -> None:
        plain(source, partial)
        if not spoilt and "patch_tokens" in str(source):
            spoilt.append(str(source))
            data = bytearray(partial.read_bytes())
            data[5] ^= 1
            partial.write_bytes(bytes(data))

    monkeypatch.setattr(stage, "_download", spoil_once)
    copy = stage_cache(written.path, tmp_path / "one", encoders=["toy"])
    assert len(downloads) == 46
    assert files(copy) == {name: data for name, data in files(written.path).items() if "toy8" not in name}

    bad = tmp_path / "bad"
    shutil.copytree(written.path, bad)
    shard = bad / "features/toy/patch_tokens/c.2.0.0.0"
    for data in (shard.read_bytes()[:-8], bytes([1]) + shard.read_bytes()[1:]):
        shard.write_bytes(data)
        with pytest.raises(CacheError, match=rf"^{shard}: .*, twice; repa-cache verify") as error:
            stage_cache(bad, tmp_path / "two", encoders=["toy"])
        assert "\n" not in str(error.value)
    shard.unlink()
    with pytest.raises(CacheError, match=rf"^{shard}: missing; run the build"):
        stage_cache(bad, tmp_path / "three", encoders=["toy"])


def test_a_disk_that_is_full_is_said_before_the_copy_and_during_it(
    written: Any, tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(JobError, match=r"[\d.]+ kB are to be copied and 1\.0 kB are free; make room"):
            stage_cache(written.path, tmp_path / "stage", encoders=["toy"])
    assert downloads == []
    with monkeypatch.context() as patch:

        def full(descriptor: int, data: Any) -> None:
            raise OSError(28, os.strerror(28))

        patch.setattr(stage, "write_bytes", full)
        with pytest.raises(CacheError, match=r"cannot be written \(No space left on device\); make room") as error:
            stage_cache(written.path, tmp_path / "stage", encoders=["toy"])
        assert "\n" not in str(error.value)
    copy = stage_cache(written.path, tmp_path / "stage", encoders=["toy"])
    assert not list(copy.rglob("*.partial*"))


def test_copies_of_other_builds_and_shards_of_others_are_refused(
    make_cache: Callable[..., Any], written: Any, tmp_path: Path, change_attributes: Callable[..., None]
) -> None:
    copy = stage_cache(written.path, tmp_path / "stage", encoders=["toy"])
    other = tmp_path / "other"
    shutil.copytree(written.path, other)
    record = other / "features/toy/zarr.json"
    attributes = {**json.loads(record.read_text())["attributes"], "weights": "sha256:1"}
    component = ComponentSpec.from_attributes(attributes, "")
    change_attributes(record.parent, weights="sha256:1", fingerprint=component.fingerprint(written.layout))
    with pytest.raises(CacheError, match=rf"^{copy}/features/toy/zarr.json is not what {record} is: .* remove"):
        stage_cache(other, tmp_path / "stage", encoders=["toy"])

    array = other / "features/toy8-int8/patch_tokens/zarr.json"
    metadata = json.loads(array.read_text())
    metadata["codecs"][0]["configuration"]["codecs"].pop()  # the checksum
    array.write_text(json.dumps(metadata))
    with pytest.raises(CacheError, match=rf"^{array}: codecs is not what a component with compressor 'none' has"):
        stage_cache(other, tmp_path / "new", encoders=["toy8-int8"])
    metadata["codecs"][0]["configuration"]["codecs"].append({"name": "crc32c"})
    metadata["chunk_key_encoding"]["configuration"]["separator"] = "/"
    array.write_text(json.dumps(metadata))
    with pytest.raises(CacheError, match=rf"^{array}: chunk_key_encoding is not what a component"):
        stage_cache(other, tmp_path / "new", encoders=["toy8-int8"])
    for error, text, options in (
        (UsageError, "holds several", {}),
        (UsageError, "did you mean 'toy'", {"encoders": ["toi"]}),
        (RepaError, "no cache here", {"cache": tmp_path}),
    ):
        with pytest.raises(error, match=text):
            stage_cache(**{"cache": written.path, "folder": tmp_path / "x", **options})  # type: ignore[arg-type]  # mixed
    assert isinstance(location(copy), LocalPath)


def test_what_was_removed_from_a_copy_is_copied_again(written: Any, tmp_path: Path, downloads: list[str]) -> None:
    """As scratch disks do with files that were not used for long."""
    copy = stage_cache(written.path, tmp_path / "stage", encoders=["toy"])
    whole = files(copy)
    downloads.clear()
    for name in ("patch_tokens/c.2.0.0.0", "valid/c.1", "valid/zarr.json", "shard_checksums/c.3.0"):
        (copy / "features/toy" / name).unlink()
    assert stage_cache(written.path, tmp_path / "stage", encoders=["toy"]) == copy
    assert len(downloads) == 2
    assert files(copy) == whole


def test_a_folder_that_is_no_place_for_a_copy_is_refused(written: Any, tmp_path: Path) -> None:
    copy = stage_cache(written.path, tmp_path / "stage", encoders=[])
    (tmp_path / "link").symlink_to(written.path)
    before = files(written.path)
    for cache, folder, said in (
        (written.path, written.path, "it lies in the cache"),
        (written.path, tmp_path / "link" / "below", "it lies in the cache"),
        (tmp_path / "link", written.path / "below", "it lies in the cache"),
        (copy, tmp_path / "stage", "is a copy in it already; read that as it is"),
        (written.path, "s3://bucket/stage", "expected a folder of this machine"),
    ):
        with pytest.raises(UsageError, match=rf"^folder {folder}: .*{said}"):
            stage_cache(cache, folder, encoders=[])
    assert files(written.path) == before
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        CacheError, match=r"cannot be written \((Not a directory|File exists)\); name a --stage that can"
    ):
        stage_cache(written.path, tmp_path / "file", encoders=[])


def test_a_whole_copy_on_a_disk_that_cannot_be_written_is_used(written: Any, tmp_path: Path) -> None:
    copy = stage_cache(written.path, tmp_path / "stage", encoders=[])
    before = os.stat(copy).st_mtime_ns
    assert stage_cache(written.path, tmp_path / "stage", encoders=[]) == copy
    assert os.stat(copy).st_mtime_ns == before  # no lock, no folder was made in it
