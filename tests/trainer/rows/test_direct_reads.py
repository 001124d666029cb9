"""The reads of a batch, cut into parts; a batch's memory, made out once; threads and queues after a fork."""

import os
import threading
import traceback
from dataclasses import replace

import numpy as np
import pytest

from repa.cache_specs.errors import CacheError, UsageError
from repa.trainer.reading.reader import CacheReader
from repa.trainer.rows import direct_reads
from repa.trainer.rows.direct_array import DirectArray
from repa.trainer.rows.queued_reads import MOST_AT_ONCE


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


def test_a_batch_of_another_reader_is_refused(make_cache):
    written = make_cache(encoders={"toy": "float16", "toy8": "int8"}, width=16)
    reader = CacheReader(written.path, encoder="toy")
    half = make_cache(encoders={"toy": "int8"}, width=32)  # as many bytes a row
    for other, what in (
        (
            CacheReader(half.path),
            r"features\[0\]\.tokens is int8 \[2, 16, 32\]; the reader of .* fills float16 \[2, 16, 16\]",
        ),
        (
            CacheReader(written.path, encoder="toy", cls_token=False),
            r"\.cls_token is missing; .* fills float16 \[2, 16\]",
        ),
        (CacheReader(written.path, encoder="toy8-int8"), r"features\[0\]\.tokens is int8"),
        (CacheReader(written.path, encoder=()), r"features\[0\]\.tokens is missing"),
        (CacheReader(written.path, encoder=["toy", "toy8-int8"]), r"features\[1\]\.tokens is int8 .* fills none"),
    ):
        with pytest.raises(UsageError, match=rf"^out: .*{what}"):
            reader.rows([1, 2], out=other.empty_batch(2))
    odd = replace(reader.empty_batch(2), moments=reader.empty_batch(3).moments)
    with pytest.raises(UsageError, match=r"moments is float16 \[3, 3, 8, 8\]; .* fills float16 \[2, 3, 8, 8\]"):
        reader.rows([1, 2], out=odd)
    written.assert_rows(
        reader.rows([1, 2], out=CacheReader(written.path, encoder="toy").empty_batch(2)), [1, 2], [0, 0]
    )


@pytest.mark.parametrize("check_reads", [False, True])
def test_a_ring_fills_what_is_not_stored_and_reads_what_is(make_cache, monkeypatch, check_reads):
    written = make_cache(zero_rows=(2, 7), shards="zarr's, nothing for zeros")
    reader = CacheReader(written.path, check_reads=check_reads)
    reader.rows(np.arange(23))
    if not check_reads:  # a row that is not stored is not to be waited for, nor those after it
        monkeypatch.delattr(DirectArray, "read_whole")
    batch = reader.empty_batch(3)
    for rows in ([7, 2, 7], [0, 1, 3], [2, 22, 7], [4, 2, 2], [5, 6, 8]):
        written.assert_rows(reader.rows(rows, out=batch), rows, [0, 0, 0])


def test_a_batch_serves_on_after_an_error(make_cache):
    written = make_cache(zero_rows=(2,), shards="zarr's, nothing for zeros")
    lost = written.shard("features/toy/channel_std", 1)
    reader = CacheReader(written.path)
    batch = reader.empty_batch(3)
    for rows in ([0, 1, 2], [12, 2, 14]):
        aside = lost.rename(lost.with_name("aside"))
        with pytest.raises(CacheError, match=r"channel_std/c\.1.*\(samples 5 to 9\) cannot be opened"):
            reader.rows([2, 5, 22], out=batch)
        aside.rename(lost)
        written.assert_rows(reader.rows(rows, out=batch), rows, [0, 0, 0])
    written.assert_rows(reader.rows([2, 5, 22], out=batch), [2, 5, 22], [0, 0, 0])


def test_a_batch_serves_on_after_an_interrupt_while_it_was_placed(make_cache):
    written = make_cache(zero_rows=(2,), shards="zarr's, nothing for zeros")
    reader = CacheReader(written.path)
    batch = reader.rows([0, 1, 3])
    requests = reader._memory[batch].buffers.direct.requests

    class Interrupts(np.ndarray):
        def sum(self, *args, **options):
            raise KeyboardInterrupt

    lengths = requests._lengths.copy()
    lengths[:] = 0  # as if none of the rows were stored
    with pytest.raises(KeyboardInterrupt):
        requests.place(lengths, lengths, lengths.view(Interrupts), flags=0)
    written.assert_rows(reader.rows([5, 6, 8], out=batch), [5, 6, 8], [0, 0, 0])


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
