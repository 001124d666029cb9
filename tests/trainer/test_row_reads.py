"""The tasks of a batch, shared out among threads: each runs once, and nothing runs any more after an error."""

import threading
import time

import numpy as np
import pytest

from repa.trainer import row_reads
from repa.trainer.row_reads import RowReads


@pytest.fixture(autouse=True)
def small_batches_take_threads_too(monkeypatch):
    monkeypatch.setattr(row_reads, "WORTH_A_THREAD", 0)


class Tasks:
    """An array of which every row is a task of its own."""

    def __init__(self, task) -> None:
        self.task = task
        self.begun = []

    def begin(self, rows, views, out):
        self.begun.append(rows.tolist())
        return [lambda i=i, row=row: self.task(out, i, int(row)) for i, row in enumerate(rows)]


def copy(out, i, row):
    out[i] = row


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num", [0, 1, 2, 100])
def test_every_task_runs_once(num_threads, num):
    reads = RowReads(num_threads)
    arrays = [Tasks(copy), Tasks(copy)]
    rows = np.random.default_rng(0).permutation(num)
    outs = [np.full(num, -1) for _ in arrays]
    for _ in range(3):
        reads.read(list(zip(arrays, outs, strict=True)), rows, np.zeros_like(rows))
        assert all(out.tolist() == rows.tolist() for out in outs)
        for out in outs:
            out[:] = -1


def test_a_batch_of_more_files_than_may_be_open_is_read_in_parts():
    reads = RowReads(2)
    reads.files.limit = 9
    arrays = [Tasks(copy), Tasks(copy)]
    outs = [np.full(7, -1) for _ in arrays]
    reads.read(list(zip(arrays, outs, strict=True)), np.arange(7), np.zeros(7, dtype=int))
    assert arrays[0].begun == arrays[1].begun == [[0, 1], [2, 3], [4, 5], [6]]
    assert all(out.tolist() == list(range(7)) for out in outs)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_nothing_runs_once_an_error_was_raised(num_threads):
    running = threading.Semaphore(0)

    def fail_at_seven(out, i, row):
        if row == 7:
            raise ValueError("seven")
        time.sleep(0.001)
        out[i] = row
        running.release()

    reads = RowReads(num_threads)
    out = np.full(200, -1)
    with pytest.raises(ValueError, match="seven"):
        reads.read([(Tasks(fail_at_seven), out)], np.arange(200), np.zeros(200, dtype=int))
    left = out.copy()
    assert (left == -1).sum() > 150
    time.sleep(0.02)
    assert np.array_equal(out, left)
    reads.read([(Tasks(copy), out)], np.arange(200), np.zeros(200, dtype=int))  # the threads live on
    assert out.tolist() == list(range(200))


def test_a_buffer_that_is_not_of_this_batch_is_refused():
    reads = RowReads(1)
    for out in (np.zeros(3), np.zeros((2, 4))[:, ::2]):
        with pytest.raises(AssertionError, match="another batch"):
            reads.read([(Tasks(copy), out)], np.arange(2), np.zeros(2, dtype=int))
