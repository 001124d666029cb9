"""The direct path from shard files to a batch: few open files, several threads, cold files, damage of every kind."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import CacheError
from repa.cache_specs.shard_index import ABSENT, ALIGNMENT, index_bytes, pack_index
from repa.pipeline.store.shards import ShardWriter
from repa.trainer.reading.reader import CacheReader
from repa.trainer.rows import direct_reads, queued_reads
from repa.trainer.rows.direct_array import DirectArray
from repa.trainer.rows.queued_reads import Requests

ORDER = np.array([22, 0, 7, 7, 13, 5, 4, 21, 10])
VIEWS = np.array([1, 0, 1, 0, 0, 1, 1, 0, 1])


@pytest.fixture(autouse=True)
def small_batches_take_threads_too(monkeypatch):
    monkeypatch.setattr(direct_reads, "WORTH_A_THREAD", 0)
    monkeypatch.setattr(direct_reads, "LEAST_COST", 2**14)


def test_every_row_with_few_open_files(make_cache):
    written = make_cache(num_samples=31, shard_samples=3, num_views=1)
    rows = np.random.default_rng(0).permutation(31)
    for num_threads in (1, 2):
        reader = CacheReader(written.path, num_threads=num_threads)
        files = reader._reads.files
        files.limit = 2
        written.assert_rows(reader.rows(rows), rows, np.zeros_like(rows))
        assert len(files) <= 2
    reader.close()
    assert len(files) == 0
    written.assert_rows(reader.rows(rows), rows, np.zeros_like(rows))


def test_no_more_files_are_open_than_the_process_may_hold(make_cache):
    resource = pytest.importorskip("resource")
    written = make_cache(num_samples=60, shard_samples=1, num_views=1, width=4, grid=2, size=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = np.random.default_rng(0).permutation(60)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:  # 300 files, of which the batch asks for all at once
        reader = CacheReader(written.path)
        written.assert_rows(reader.rows(rows), rows, np.zeros_like(rows))
        assert len(reader._reads.files) <= 50
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_limit_on_open_files_is_not_taken_for_damage(make_cache, monkeypatch):
    reader = CacheReader(make_cache().path)
    reader.rows([0])

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    message = r"/c\.4.*\(samples 20 to 22\) cannot be opened: Too many open files\. This reader holds 5 open; raise"
    with pytest.raises(CacheError, match=message) as caught:
        reader.rows([22])
    assert "delete" not in str(caught.value)


def test_threads_may_share_a_reader(make_cache):
    written = make_cache()
    reader = CacheReader(written.path, num_threads=3)
    failures = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            rows, views = rng.integers(0, 23, 9), rng.integers(0, 2, 9)
            try:
                written.assert_rows(reader.rows(rows, views), rows, views)
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def drop_from_memory(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read_from_disk() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


def test_little_else_is_read_from_a_cold_disk(make_cache):
    if not Path("/proc/self/io").exists():
        pytest.skip("this system does not count what a process reads from disk")
    written = make_cache(
        num_samples=24, shard_samples=12, num_views=1, encoders={"toy": "float16"}, grid=16, width=768, size=32
    )
    files = [file for file in written.path.rglob("c.*") if file.is_file()]
    reader = CacheReader(written.path)
    rows = np.random.default_rng(0).permutation(24)[:8]
    batch = reader.rows(rows)
    drop_from_memory(files)
    before = bytes_read_from_disk()
    reader.rows(rows, out=batch)
    read = bytes_read_from_disk() - before
    returned = sum(tensor.nbytes for tensor in [batch.moments, *batch.features[0].tensors().values()])
    if read < returned:
        pytest.skip(f"{read} of {returned} bytes came from a disk: this file system keeps files in memory (tmpfs?)")
    assert read <= 1.1 * returned
    written.assert_rows(batch, rows, np.zeros_like(rows))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system cannot say what is in memory")
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_rows_that_are_not_in_memory_are_asked_for_and_waited_for(make_cache, monkeypatch, error):
    written = make_cache()
    preadv, advise = os.preadv, os.posix_fadvise
    asked, refused, cut_short = [], [], []

    def refuse_at_once(descriptor, buffers, offset, flags=0):
        if flags and (error == errno.EOPNOTSUPP or offset % (2 * ALIGNMENT)):
            refused.append(offset)
            raise OSError(error, os.strerror(error))
        if flags:  # the last byte has to be waited for
            cut_short.append(offset)
            buffers = [memoryview(buffers[0]).cast("B")[:-1]]
        return preadv(descriptor, buffers, offset)

    def note(descriptor, offset, length, advice):
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((descriptor, offset))
        advise(descriptor, offset, length, advice)

    monkeypatch.setattr(queued_reads, "_NUMBERS", {})
    monkeypatch.setattr(os, "preadv", refuse_at_once)
    monkeypatch.setattr(os, "posix_fadvise", note)
    reader = CacheReader(written.path)
    asked.clear()
    for _ in range(2):
        written.assert_rows(reader.rows(ORDER, VIEWS), ORDER, VIEWS)
    assert refused
    assert cut_short or error == errno.EOPNOTSUPP
    # Each array's rows once a batch, row 7's two views apart from each other: moments, tokens, mean, std, cls.
    assert len(asked) == 2 * 5 * len(ORDER)
    assert len(set(asked)) == 5 * len(ORDER)


def test_batches_are_aligned_as_chunks_in_their_files_are(make_cache):
    batch = CacheReader(make_cache().path).empty_batch(3)
    tensors = [batch.moments, *batch.features[0].tensors().values()]
    assert [tensor.data_ptr() % ALIGNMENT for tensor in tensors] == [0] * len(tensors)
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert batch.features[0].tokens.dtype == torch.float16


def arrays_of(reader: CacheReader) -> list[DirectArray]:
    return [reader._moments, *reader._feature_arrays[0].values()]


def test_the_build_writes_what_is_counted(make_cache, tmp_path):
    written = make_cache(encoders={"toy": "int8"})
    reader = CacheReader(written.path)
    written.assert_rows(reader.rows(ORDER, VIEWS), ORDER, VIEWS, ["toy-int8"])
    assert all(array.counted for array in arrays_of(reader))
    for array in arrays_of(reader):
        rows = written.arrays[str(array.folder).removeprefix(f"{written.path}/")]
        for shard in range(array.layout.num_shards):
            writer = ShardWriter(tmp_path / "shard", array.layout, "none")
            writer.append(rows[shard * 5 :][:5].reshape(-1, *rows.shape[2:]))
            writer.close()
            assert writer.path.read_bytes() == (array.folder / array.layout.shard_file(shard)).read_bytes()


def test_shards_may_be_written_in_several_ways(make_cache):
    written = make_cache(num_samples=43)
    layout = CacheReader(written.path)._moments.layout
    rng = np.random.default_rng(0)
    for shard in (1, 2, 4, 8):  # of nine; the last has 3 samples
        file = written.shard("latents/toy-ae/moments", shard)
        data, entries = file.read_bytes(), entries_of(file, layout)
        packed = b""
        for i in rng.permutation(len(entries)) if shard > 1 else range(len(entries)):
            if entries[i, 0] != ABSENT:
                offset, length = entries[i].tolist()
                entries[i, 0] = len(packed)
                packed += data[offset : offset + length]
        file.write_bytes(packed + pack_index(entries))
    reader = CacheReader(written.path)
    for _ in range(3):
        rows, views = rng.integers(0, 43, 60), rng.integers(0, 2, 60)
        written.assert_rows(reader.rows(rows, views), rows, views)
    assert [array.counted for array in arrays_of(reader)] == [False, True, True, True, True]


def test_a_shard_whose_opening_was_interrupted_is_opened_again(make_cache, monkeypatch):
    written = make_cache(shards="zarr's")
    reader = CacheReader(written.path)
    advise = os.posix_fadvise

    def interrupt(*_: object) -> None:
        monkeypatch.setattr(os, "posix_fadvise", advise)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fadvise", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reader.rows([3, 4])
    written.assert_rows(reader.rows([3, 4]), [3, 4], [0, 0])


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def flip_index(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-30] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 100)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (os.unlink, "cannot be opened: No such file"),
        (cut, "checksum of the shard's index"),
        (grow, "checksum of the shard's index"),
        (flip_index, "checksum of the shard's index"),
        (empty, "0 bytes"),
    ],
)
def test_a_damaged_shard_is_named_with_its_samples(make_cache, damage, message, num_threads):
    written = make_cache()
    damage(written.shard("features/toy/patch_tokens", 2))
    reader = CacheReader(written.path, num_threads=num_threads)
    written.assert_rows(reader.rows([0, 9]), [0, 9], [0, 0])
    for _ in range(2):  # whoever goes on after an error meets it again
        with pytest.raises(CacheError, match=message) as caught:
            reader.rows([0, 14])
    assert "features/toy/patch_tokens/c.2." in str(caught.value)
    assert "(samples 10 to 14)" in str(caught.value)
    written.assert_rows(reader.rows([0, 9]), [0, 9], [0, 0])  # the others are served on


def entries_of(file: Path, layout) -> np.ndarray:
    size = index_bytes(layout)
    return np.frombuffer(file.read_bytes()[-size:-4], dtype=np.uint64).reshape(-1, 2).copy()


def outside(entries: np.ndarray) -> None:
    entries[1, 0] = 10**9


def wrapping_round(entries: np.ndarray) -> None:
    entries[1] = (2**64 - 8, 388)


def too_early(entries: np.ndarray) -> None:
    entries[1, 0] -= 64


def twice(entries: np.ndarray) -> None:
    entries[1] = entries[0]


def of_another_size(entries: np.ndarray) -> None:
    entries[1, 1] -= 2


def half_absent(entries: np.ndarray) -> None:
    entries[1, 0] = ABSENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside, "points outside the file"),
        (wrapping_round, "points outside the file"),
        (too_early, "chunks that overlap"),
        (twice, "chunks that overlap"),
        (of_another_size, "chunks that are not of 388 bytes"),
        (half_absent, "points outside the file"),
    ],
)
def test_an_index_with_a_good_checksum_and_a_bad_entry_is_refused(make_cache, change, message):
    written = make_cache()
    layout = CacheReader(written.path)._moments.layout
    file = written.shard("latents/toy-ae/moments", 1)
    entries = entries_of(file, layout)
    change(entries)
    file.write_bytes(file.read_bytes()[: -index_bytes(layout)] + pack_index(entries))
    reader = CacheReader(written.path)
    for _ in range(2):
        with pytest.raises(CacheError, match=message) as caught:
            reader.rows([5])
    assert "moments/c.1." in str(caught.value)
    assert "(samples 5 to 9)" in str(caught.value)


def test_a_file_that_was_replaced_is_refused(make_cache):
    written = make_cache()
    reader = CacheReader(written.path)
    file = written.shard("latents/toy-ae/moments", 0)
    expected = reader.rows([1]).moments
    other = file.with_name("other")
    other.write_bytes(bytes(100) + file.read_bytes()[100:])
    status = file.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, file)  # of the same size and date
    assert torch.equal(reader.rows([1]).moments, expected)  # the open file is still the old one
    reader.close()
    for _ in range(2):
        with pytest.raises(CacheError, match=r"moments/c\.0.*\(samples 0 to 4\) is not the file that it was"):
            reader.rows([1])


def test_a_file_that_was_written_anew_is_refused(make_cache):
    written = make_cache()
    reader = CacheReader(written.path)
    file = written.shard("latents/toy-ae/moments", 0)
    reader.rows([1])
    reader.close()
    size = index_bytes(reader._moments.layout)
    file.write_bytes(file.read_bytes()[-size:])  # the rows are lost, the index is whole
    with pytest.raises(CacheError, match="is not the file that it was"):
        reader.rows([1])
    with pytest.raises(CacheError, match="points outside the file"):
        CacheReader(written.path).rows([1])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_read_that_ends_early_is_refused(make_cache, num_threads):
    written = make_cache()
    reader = CacheReader(written.path, num_threads=num_threads)
    reader.rows([0])
    # Cut under an open descriptor: the index was good when it was parsed.
    os.truncate(written.shard("latents/toy-ae/moments", 0), 100)
    with pytest.raises(CacheError, match=r"moments/c\.0.*\(samples 0 to 4\) ends at byte 100"):
        reader.rows([0])


def test_a_read_that_the_system_refuses_is_named(make_cache, monkeypatch):
    reader = CacheReader(make_cache().path)
    reader.rows([0])

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    # A queue says of a read that failed that nothing came.
    monkeypatch.setattr(Requests, "missing", lambda self: (np.arange(5), np.zeros(5, np.int64)))
    with pytest.raises(CacheError, match=r"/c\.0.*\(samples 0 to 4\) cannot be read at byte \d+: Input/output"):
        reader.rows([0])


def test_check_reads_finds_a_flipped_byte(make_cache):
    written = make_cache()
    file = written.shard("features/toy/patch_tokens", 0)
    data = bytearray(file.read_bytes())
    data[11] ^= 1
    file.write_bytes(data)
    CacheReader(written.path).rows([0, 1, 2, 3, 4])  # by design: `verify` looks at these
    with pytest.raises(CacheError, match=r"patch_tokens/c\.0.*\(samples 0 to 4\) holds a row.*checksum does not hold"):
        CacheReader(written.path, check_reads=True).rows([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [0, 1] * 5)
    whole = make_cache()
    whole.assert_rows(CacheReader(whole.path, check_reads=True).rows(ORDER, VIEWS), ORDER, VIEWS)


def test_check_reads_finds_a_row_written_while_the_file_is_open(make_cache):
    written = make_cache()
    reader = CacheReader(written.path, check_reads=True)
    file = written.shard("latents/toy-ae/moments", 0)
    reader.rows([0, 1], [1, 1])
    with file.open("r+b") as shard:
        shard.seek(int(entries_of(file, reader._moments.layout)[3, 0]))  # sample 1, view 1
        shard.write(b"\1\2\3")
    with pytest.raises(CacheError, match=r"moments/c\.0.*checksum does not hold"):
        reader.rows([0, 1], [1, 1])
