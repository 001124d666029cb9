"""Queues of reads against plain ones: the same bytes, and every way in which a read falls short."""

import ctypes
import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from repa.trainer.rows import queued_reads
from repa.trainer.rows.queued_reads import MOST_AT_ONCE, QueuedReads, Requests

ROW = 600


@pytest.fixture(params=["queue", "one by one"])
def queue(request, monkeypatch) -> QueuedReads:
    if request.param == "one by one":
        monkeypatch.setattr(queued_reads, "_NUMBERS", {})
        return QueuedReads()
    queue = QueuedReads()
    taken = queue._take_queue()
    if taken is None:
        pytest.skip("this system has no queues of reads, or forbids them")
    queue._idle.append(taken)
    return queue


@pytest.fixture
def file(tmp_path: Path):
    path = tmp_path / "rows"
    data = np.random.default_rng(0).integers(0, 256, 100 * ROW, dtype=np.uint8)
    path.write_bytes(data.tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor, data
    os.close(descriptor)


def read(queue: QueuedReads, files, offsets, *, flags: int = 0) -> tuple[np.ndarray, np.ndarray]:
    out = np.zeros((len(offsets), ROW), dtype=np.uint8)
    lengths = np.full(len(out), ROW)
    requests = Requests(queue, out.ctypes.data + np.arange(len(out)) * ROW, lengths)
    requests.place(np.asarray(files, int), np.asarray(offsets, int), lengths, flags=flags)
    half = len(out) // 2
    for start, stop in ((half, len(out)), (0, half)):  # parts in any order
        requests.read(start, stop)
    got = np.full(len(out), ROW)
    missing = requests.missing()
    if missing is not None:
        assert len(missing[0]) > 0
        got[missing[0]] = missing[1]
        assert (missing[1] < ROW).all()
    return got, out


def test_any_rows_of_any_files(queue, file, tmp_path):
    descriptor, data = file
    other = os.open(tmp_path / "rows", os.O_RDONLY)
    rng = np.random.default_rng(1)
    for num in (1, 2, MOST_AT_ONCE):
        offsets = rng.integers(0, 99 * ROW, num)
        got, out = read(queue, rng.choice([descriptor, other], num), offsets)
        assert (got == ROW).all()
        np.testing.assert_array_equal(out, data[offsets[:, None] + np.arange(ROW)])
    os.close(other)
    assert read(queue, [], [])[0].shape == (0,)


def test_a_read_over_the_end_and_one_that_fails_leave_the_others_whole(queue, file, tmp_path):
    descriptor, data = file
    offsets = np.array([0, 99 * ROW + 500, 200 * ROW, 7])
    got, out = read(queue, [descriptor] * 4, offsets)
    assert got.tolist() == [ROW, 100, 0, ROW]
    np.testing.assert_array_equal(out[1, :100], data[-100:])
    np.testing.assert_array_equal(out[3], data[7 : 7 + ROW])

    # Here the kernel may not even begin those after the one that fails: they count as failed.
    folder = os.open(tmp_path, os.O_RDONLY)
    got, out = read(queue, [descriptor, folder, descriptor], [0, 0, ROW])
    os.close(folder)
    assert got[:2].tolist() == [ROW, 0]
    assert got[2] in (0, ROW)
    got, _ = read(queue, [descriptor, folder], [3, 5])  # closed
    assert got.tolist() == [ROW, 0]
    got, out = read(queue, [descriptor], [11])  # and the queue is as good as new
    assert got.tolist() == [ROW]
    np.testing.assert_array_equal(out[0], data[11 : 11 + ROW])


def test_what_came_the_time_before_does_not_count(queue, file):
    descriptor, data = file
    out = np.zeros((4, ROW), dtype=np.uint8)
    files, lengths, closed = np.full(4, descriptor), np.full(4, ROW), 2**20
    requests = Requests(queue, out.ctypes.data + np.arange(4) * ROW, lengths)
    for refused in (False, True, False):
        requests.place(np.where(refused, closed, files), np.arange(4) * ROW, lengths, flags=0)
        requests.read(2, 4)
        requests.read(0, 2)
        missing = requests.missing()
        if refused:
            assert [part.tolist() for part in missing] == [[0, 1, 2, 3], [0, 0, 0, 0]]
        else:
            assert missing is None
            np.testing.assert_array_equal(out.reshape(-1), data[: 4 * ROW])


@pytest.mark.skipif(not queued_reads.NO_WAIT, reason="this system cannot say what is in memory")
def test_what_is_not_in_memory_is_not_waited_for(queue, file):
    descriptor, data = file
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        got, out = read(queue, [descriptor] * 3, [0, 40 * ROW, ROW], flags=queued_reads.NO_WAIT)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # tmpfs
            raise
        return
    for i, offset in enumerate((0, 40 * ROW, ROW)):
        np.testing.assert_array_equal(out[i, : got[i]], data[offset : offset + got[i]])


def test_threads_take_queues_of_their_own(queue, file):
    descriptor, data = file
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            offsets = rng.integers(0, 99 * ROW, 20)
            got, out = read(queue, [descriptor] * 20, offsets)
            if (got != ROW).any() or (out != data[offsets[:, None] + np.arange(ROW)]).any():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_events_in_any_order_and_number_are_of_their_reads(queue, file, monkeypatch):
    if queue._calls is None:
        pytest.skip("reads one by one have no events")
    descriptor, data = file
    real, returned = queue._calls.events, []

    def some(taken: int, _least: int, most: int, at: int, _timeout: None) -> int:
        num = [0, 1, -1, most // 2, most][len(returned) % 5]  # -1: a signal came
        returned.append(num)
        if num < 0:
            ctypes.set_errno(errno.EINTR)
            return -1
        got = real(taken, num, num, at, None)
        assert got == num
        events = np.ctypeslib.as_array((ctypes.c_int64 * (4 * num)).from_address(at)).reshape(num, 4)
        events[:] = events[::-1].copy()
        return num

    monkeypatch.setattr(queue, "_calls", replace(queue._calls, events=some))
    offsets = np.array([0, 99 * ROW + 500, 3, 200 * ROW, 7, 50 * ROW, 99 * ROW + 599, 9])
    for _ in range(3):
        got, out = read(queue, [descriptor] * 8, offsets)
        assert got.tolist() == [ROW, 100, ROW, 0, ROW, ROW, 1, ROW]
        for row, offset, num in zip(out, offsets, got, strict=True):
            np.testing.assert_array_equal(row[:num], data[offset : offset + num])
    assert set(returned) >= {0, 1, -1, 2}


def test_where_queues_are_forbidden_rows_are_read_one_by_one(file, monkeypatch):
    descriptor, data = file
    queue = QueuedReads()

    if queue._calls is None:
        pytest.skip("this system has no queues of reads")
    tried = []

    def forbidden(*_: object) -> int:
        tried.append(1)
        return -1

    monkeypatch.setattr(queue, "_calls", replace(queue._calls, setup=forbidden))
    for _ in range(2):
        got, out = read(queue, [descriptor, descriptor], [5, 0])
        assert got.tolist() == [ROW, ROW]
        np.testing.assert_array_equal(out[0], data[5 : 5 + ROW])
    assert len(tried) == 1


def test_where_no_more_queues_may_be_had_those_there_go_on(queue, file, monkeypatch):
    if queue._calls is None:
        pytest.skip("reads one by one have no queues")
    descriptor, data = file
    real, submitted = queue._calls.submit, []

    def submit(taken: int, *what: int) -> int:
        submitted.append(taken)
        return real(taken, *what)

    def assert_read() -> None:
        got, out = read(queue, [descriptor, descriptor], [5, 0])
        assert got.tolist() == [ROW, ROW]
        np.testing.assert_array_equal(out[0], data[5 : 5 + ROW])

    monkeypatch.setattr(queue, "_calls", replace(queue._calls, setup=lambda *_: -1, submit=submit))
    there = queue._idle.pop()  # in another thread's hands
    assert_read()
    assert submitted == []
    queue._idle.append(there)
    assert_read()
    assert submitted == [there, there]
