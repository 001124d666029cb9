"""The reads of a batch, cut into parts; a batch's memory, made out once; threads and queues after a fork."""

import os
import threading
import traceback

import numpy as np
import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer import direct_reads
from repa.trainer.direct_array import DirectArray
from repa.trainer.queued_reads import MOST_AT_ONCE
from repa.trainer.reader import CacheReader


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_and_queues_of_its_own(make_cache, monkeypatch):
    monkeypatch.setattr(direct_reads, "WORTH_A_THREAD", 0)
    written = make_cache()
    reader = CacheReader(written.path, num_threads=2)
    batch = reader.rows([3, 22])
    child = os.fork()
    if child == 0:
        try:
            both = threading.Barrier(2, timeout=20)
            reader._reads._direct._helpers.share([(0, 1), (1, 2)], lambda *_: both.wait())
            for i in range(2):
                rows = [i, 21 - i]
                written.assert_rows(reader.rows(rows, out=batch), rows, [0, 0])
                # A queue of the parent's fails, and its rows are waited for one by one; once.
                monkeypatch.delattr(DirectArray, "read_whole", raising=False)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    written.assert_rows(reader.rows([4, 5], out=batch), [4, 5], [0, 0])


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("num", [1, 9, 700])
def test_parts_cover_the_requests_in_order(make_cache, monkeypatch, num_threads, num):
    monkeypatch.setattr(direct_reads, "LEAST_COST", 2**14)
    reader = CacheReader(make_cache().path, num_threads=num_threads)
    batch = reader.rows(np.arange(num) % 23)
    buffers = reader._memory[batch].buffers.direct
    assert [len(rows) for rows in buffers.rows] == [num] * 5  # moments, tokens, mean, std, cls
    starts, stops = zip(*buffers.parts, strict=True)
    assert (starts[0], stops[-1]) == (0, 5 * num)
    assert starts[1:] == stops[:-1]
    assert all(start < stop <= start + MOST_AT_ONCE for start, stop in buffers.parts)
    sizes = [sum(buffers.lengths[start:stop]) for start, stop in buffers.parts]
    assert len(sizes) >= 2 if num == 700 else sizes == sorted(sizes, reverse=True)


def test_a_batch_of_another_size_is_refused(make_cache):
    reader = CacheReader(make_cache().path)
    for rows in ([3], [1, 2, 3]):
        with pytest.raises(UsageError, match=rf"out is a batch of 2, and {len(rows)} rows"):
            reader.rows(rows, out=reader.empty_batch(2))


def test_a_ring_of_batches_is_made_out_once_and_let_go(make_cache):
    written = make_cache()
    reader = CacheReader(written.path)
    ring = [reader.empty_batch(3) for _ in range(2)]
    tables = []
    for rows in ([0, 1, 2], [22, 21, 7], [2, 0, 5], [9, 9, 9]):
        batch = ring.pop(0)
        ring.append(batch)
        written.assert_rows(reader.rows(rows, out=batch), rows, [0, 0, 0])
        tables.append(reader._memory[batch].buffers)
    assert tables[:2] == tables[2:]
    del batch, ring
    assert len(reader._memory) == 0
