"""Open files: the least recently used are closed, between batches, and no more stay open than the limit."""

import gc
import os

import numpy as np
import pytest

from repa.trainer.rows.open_files import CLOSED, OpenFiles, default_limit, raise_limit


@pytest.fixture
def files(tmp_path):
    files = OpenFiles(limit=2)
    assert files.add(3) == 0
    assert files.add(2) == 3
    yield files
    files.close()


def open_one(files: OpenFiles, number: int, folder) -> int:
    path = folder / str(number)
    path.write_text(str(number))
    files.open(number, path, check=lambda _: None)
    (descriptor,) = files.get(np.array([number])).tolist()
    assert os.pread(descriptor, 9, 0) == str(number).encode()
    return descriptor


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_the_least_recently_used_are_closed_between_batches(files, tmp_path):
    first = [open_one(files, number, tmp_path) for number in (0, 4)]
    files.get(np.array([0, 4]))
    files.end_batch()
    assert all(is_open(descriptor) for descriptor in first)
    files.get(np.array([4, 2]))
    second = open_one(files, 2, tmp_path)
    assert is_open(first[0])  # more than the limit, but a read may be under way
    assert len(files) == 3
    files.end_batch()
    assert len(files) == 2
    assert files.get(np.arange(5)).tolist() == [CLOSED, CLOSED, second, CLOSED, first[1]]
    assert not is_open(first[0])


def test_all_can_be_closed(files, tmp_path):
    descriptor = open_one(files, 4, tmp_path)
    files.close()
    assert len(files) == 0
    assert files.get(np.array([4])).tolist() == [CLOSED]
    assert not is_open(descriptor)


def test_what_is_open_is_closed_with_the_object(tmp_path):
    files = OpenFiles()
    files.add(1)
    descriptor = open_one(files, 0, tmp_path)
    del files
    gc.collect()
    assert not is_open(descriptor)


def test_the_default_leaves_the_process_most_of_its_files():
    resource = pytest.importorskip("resource")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 1 <= default_limit() <= (soft if soft > 0 else 2**20) // 4


def test_the_limit_is_raised_as_far_as_the_system_allows():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
