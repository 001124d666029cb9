"""One interface, two storages: the same calls give the same answers in a folder and in a bucket."""

import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from repa.cache_specs.errors import CacheError, UsageError
from repa.cache_specs.remote.object_store import READ_AHEAD_BYTES, ObjectPath
from repa.cache_specs.storage import LocalPath, Location, location


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return location(tmp_path / "cache" if request.param == "local" else f"{request.getfixturevalue('bucket')}/a/cache")


def test_what_is_written_is_read_listed_and_deleted(root: Location) -> None:
    file = root / "features" / "hog" / "zarr.json"
    assert (file.read(), file.exists(), root.exists(), root.names()) == (None, False, False, set())
    file.write(b"one")
    file.write(b"two")
    (root / "zarr.json").write(b"")
    assert (file.read(), (root / "zarr.json").read()) == (b"two", b"")
    assert root.names() == {"features", "zarr.json"}
    assert (root.sizes(), file.parent.sizes(), (root / "no").sizes()) == ({"zarr.json": 0}, {"zarr.json": 3}, {})
    assert (file.size(), (root / "features").size(), (root / "no").size()) == (3, None, None)
    assert (root / "features").names() == {"hog"}
    assert file.exists()
    assert (root / "features").exists()
    assert not (root / "feat").exists()
    assert (file.name, str(file.parent)) == ("zarr.json", f"{root}/features/hog")
    (root / "features").delete_tree()
    (root / "features").delete_tree()
    assert root.names() == {"zarr.json"}
    (root / "zarr.json").delete()
    assert not (root / "zarr.json").exists()


def test_a_finished_file_is_taken_whole_and_read_in_ranges(root: Location, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, READ_AHEAD_BYTES + 12_345, dtype=np.uint8).tobytes()
    (tmp_path / "partial").write_bytes(data)
    shard = root / "moments" / "c.0.0"
    (shard.parent / "zarr.json").write(b"{}")
    shard.take(tmp_path / "partial")
    shard.parent.sync()
    assert not (tmp_path / "partial").exists()
    buffer = bytearray(5000)
    with shard.open() as source:
        assert source.num_bytes == len(data)
        size = len(data)
        # the tail, the start, what follows it, over the end of a piece fetched ahead, backwards, over the end
        for offset in (size - 5000, 0, 5000, 9000, READ_AHEAD_BYTES + 3000, 17, size - 7, size, size + 9):
            got = source.read_into(memoryview(buffer), offset)
            assert bytes(buffer[:got]) == data[offset : offset + 5000], offset


def test_a_location_crosses_processes_and_is_opened_by_zarr(root: Location) -> None:
    there = pickle.loads(pickle.dumps(root))
    assert there == root
    assert str(location(str(root))) == str(root)
    array = zarr.create_array({}, name="label", data=np.arange(5))
    for name, buffer in array.store_path.store._store_dict.items():  # type: ignore[attr-defined]  # of a MemoryStore
        (there / name).write(buffer.to_bytes())
    np.testing.assert_array_equal(zarr.open_array((root / "label").zarr_store(), mode="r")[:], np.arange(5))


def test_paths_and_urls(tmp_path: Path) -> None:
    assert location(tmp_path) == location(str(tmp_path)) == location(f"file://{tmp_path}") == LocalPath(tmp_path)
    assert location("s3://bucket/a/b/") == ObjectPath("s3://bucket", "a/b")
    assert location(location("gs://bucket/a")) == ObjectPath("gs://bucket", "a")
    for url in ("http://host/a", "s3://bucket", "s3://bucket/", "s3:///a"):
        with pytest.raises(UsageError, match=re.escape(f"{url}: expected a folder, or one of s3://BUCKET/PREFIX")):
            location(url)
    for where in (Path("s3://bucket/a"), "s3:/bucket/a"):  # no folder of that name is made
        with pytest.raises(UsageError, match=r"s3:/bucket/a: a URL has two slashes, .*\(a Path drops one"):
            location(where)
    scratch = location("s3://bucket/a").scratch()
    assert scratch != location("s3://bucket/b").scratch()
    assert f"repa-cache-{os.getuid()}" in scratch.parts


def test_what_a_bucket_refuses_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = location(f"{bucket}-gone/cache")
    for call in (nowhere.read, nowhere.names, nowhere.exists, lambda: nowhere.write(b"data")):
        with pytest.raises(
            CacheError, match=r"^s3://bucket-\w+-gone/cache: cannot be .*bucket does not exist"
        ) as found:
            call()
        assert "\n" not in str(found.value)
        assert "endpoint, region and credentials" in str(found.value)
    with pytest.raises(CacheError, match=r"none: cannot be read \(no such object\)"), location(f"{bucket}/none").open():
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CacheError, match=r"cannot be read \(.*127\.0\.0\.1:9/") as found:
        location("s3://unreachable/cache").read()
    assert "\n" not in str(found.value)


def test_without_obstore_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"object stores need obstore, which is not installed; pip install obstore"):
        location("s3://anywhere/cache").read()


def test_wrong_credentials_are_one_line(refusing_bucket: str) -> None:
    file = location(f"{refusing_bucket}/cache/zarr.json")
    for call in (file.read, file.names, lambda: file.write(b"data"), file.delete):
        with pytest.raises(
            CacheError, match=r"^s3://refusing-\w+/cache/zarr.json: cannot be \w+ \(.*AccessKey"
        ) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(CacheError, match=r"cannot be read \("):  # a HEAD, which has no body to say more
        file.exists()


def test_a_folder_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    below = location(tmp_path / "file") / "cache"
    assert below.read() is None
    with pytest.raises(CacheError, match=r"file/cache: cannot be written \("):
        below.write(b"data")
    with pytest.raises(CacheError, match=r"none: cannot be read \(No such file"), location(tmp_path / "none").open():
        pass
    with pytest.raises(CacheError, match=r"cannot be read \(Is a directory"):
        location(tmp_path).read()
    long = location(tmp_path / ("x" * 300))
    for look in (long.exists, long.size, long.names, long.sizes, long.read):
        with pytest.raises(CacheError, match=r"cannot be read \(File name too long\)"):
            look()
