"""The thread that reads micro-batches ahead of the step."""

import contextlib
import threading
from itertools import pairwise

import pytest
import torch

from repa.cache_specs.errors import CacheError
from repa.trainer.reading.batches import Batches, Place
from repa.trainer.reading.prefetch import MOST_AHEAD, READING_BYTES, ReadAhead, batches_ahead, map_tensors
from repa.trainer.reading.reader import CacheReader

from ..conftest import sit_draws

SPEC = sit_draws()


@pytest.fixture
def batches(make_cache) -> Batches:
    reader = CacheReader(make_cache(invalid={"features/toy": [4, 11]}).path)
    return Batches(reader, SPEC, Place(batch_size=8, accumulation=2))


def test_read_ahead_serves_every_micro_batch_in_order(batches):
    with ReadAhead(batches, first=2, last=9, depth=2, device=torch.device("cpu")) as ahead:
        seen = []
        for step in range(2, 9):
            for micro in range(2):
                got, expected = ahead.next(), batches.read(step, micro)
                assert torch.equal(got.data.rows, expected.data.rows)
                assert torch.equal(got.data.moments, expected.data.moments)
                assert torch.equal(got.data.features[0].tokens, expected.data.features[0].tokens)
                assert torch.equal(got.draws["noise"], expected.draws["noise"])
                seen += got.data.rows.tolist()
        assert ahead.waited_s >= 0
        assert ahead.reading_s > 0
    # 56 positions from 16 on over 21 valid rows: epoch 1 (21 to 41) is whole among them.
    assert sorted(seen[5:26]) == sorted(batches.reader.valid_rows.tolist())
    assert not {4, 11} & set(seen)


def test_read_ahead_ends_its_thread_wherever_it_stands(batches):
    for taken in (0, 1, 6):
        with ReadAhead(batches, first=0, last=1000, depth=2, device=torch.device("cpu")) as ahead:
            for _ in range(taken):
                ahead.next()
        assert "read-ahead" not in {thread.name for thread in threading.enumerate()}


def test_the_bound_counts_batches():
    for bound in (1, 99, 100, 199, 200, 999):
        assert batches_ahead(bound, 100) == 1  # nothing is left beside what reading itself takes
    assert [batches_ahead(READING_BYTES + bound, 100) for bound in (0, 99, 100, 199, 200, 999)] == [1, 1, 1, 1, 2, 9]
    assert batches_ahead(10**9, 100) == MOST_AHEAD


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_ring_holds_the_bound_and_one_batch(batches, monkeypatch, taken):
    """Memory is counted where it is asked for; the thread then waits, whether or not a batch is in use."""
    one = batches.num_bytes
    bound = READING_BYTES + 3 * one + 100
    tensors, empty, read = [], batches.empty, batches.read
    rows = iter(range(1000))

    def counted(pin_memory):
        batch = empty()
        map_tensors(batch, tensors.append)
        return batch

    monkeypatch.setattr(batches, "empty", counted)
    monkeypatch.setattr(batches, "read", lambda *args, out: (next(rows), read(*args, out=out))[1])
    depth = batches_ahead(bound, one)
    with ReadAhead(batches, first=0, last=100, depth=depth, device=torch.device("cpu")) as ahead:
        for _ in range(taken):
            ahead.next()
        while ahead._ready.qsize() < depth + (taken == 0):
            assert ahead._thread.is_alive()
    assert next(rows) == max(taken, 1) + depth
    held = sum(tensor.nbytes for tensor in tensors)
    assert held == (depth + 1) * one
    assert held + READING_BYTES <= bound + one


def test_an_error_while_reading_reaches_the_loop(make_cache):
    written = make_cache()
    for index in range(5):
        written.shard("latents/toy-ae/moments", index).unlink()
    batches = Batches(CacheReader(written.path), SPEC, Place(batch_size=4))
    with (
        ReadAhead(batches, first=0, last=3, depth=2, device=torch.device("cpu")) as ahead,
        pytest.raises(CacheError, match="cannot be opened"),
    ):
        ahead.next()


class FakeCuda:
    """Streams, events and copies of a device that is the CPU; `log` is what was queued and waited for, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple] = []
        self.current = "compute"
        fake, events = self, iter(range(10_000))

        class Stream:
            def __init__(self, _device: torch.device | None = None, name: str = "copies") -> None:
                self.name = name

            def wait_event(self, event: "Event") -> None:
                fake.log.append(("wait", self.name, event.number))

        class Event:
            def __init__(self, blocking: bool) -> None:
                self.number = next(events)

            def record(self, stream: Stream) -> None:
                fake.log.append(("record", stream.name, self.number))

            def synchronize(self) -> None:
                fake.log.append(("synchronize", threading.current_thread().name, self.number))

        @contextlib.contextmanager
        def stream(entered: Stream):
            fake.current = entered.name
            yield
            fake.current = "compute"

        def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
            fake.log.append(("copy", fake.current, tensor.data_ptr()))
            return tensor.clone()

        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "current_stream", lambda _device: Stream(name="compute"))
        patch.setattr(torch.cuda, "current_device", lambda: 3)
        patch.setattr(torch.cuda, "set_device", lambda device: self.log.append(("device", str(device))))
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "record_stream", lambda _, stream: self.log.append(("keep", stream.name)))


@pytest.mark.parametrize("device", ["cuda:3", "cuda"])
def test_copies_run_beside_the_steps(batches, monkeypatch, device):
    """On a device: copies on their own stream, each waited for before use; buffers come back by the copy's event."""
    expected = [batches.read(step, micro) for step in range(6) for micro in range(2)]
    empty, pinned = batches.empty, []
    monkeypatch.setattr(batches, "empty", lambda pin_memory: pinned.append(pin_memory) or empty())
    cuda = FakeCuda(monkeypatch)
    with ReadAhead(batches, first=0, last=6, depth=2, device=torch.device(device)) as ahead:
        for batch in expected:
            got = ahead.next()
            assert torch.equal(got.data.features[0].tokens, batch.data.features[0].tokens)
            assert torch.equal(got.draws["noise"], batch.draws["noise"])
            waited, *kept, begun = [entry for entry in cuda.log if entry[1] == "compute"][-14:]
            copied = waited[2]
            assert waited[0] == "wait"
            assert kept == [("keep", "compute")] * 12  # every tensor of a batch
            assert begun[0] == "record"
            assert cuda.log.index(("record", "copies", copied)) < cuda.log.index(waited)
    assert pinned in ([True] * 2, [True] * 3)  # a third only where the loop is slower than the thread
    log = cuda.log
    assert log[0] == ("device", "cuda:3")
    assert {entry[1] for entry in log if entry[0] == "copy"} == {"copies"}

    # A buffer is copied from again only once the thread has waited for its last copy.
    tokens = [entry[2] for entry in log if entry[0] == "copy"][:1]
    again = [at for at, entry in enumerate(log) if entry[0] == "copy" and entry[2] == tokens[0]]
    for before, after in pairwise(again):
        last_copy = next(entry[2] for entry in log[before:] if entry[:2] == ("record", "copies"))
        assert ("synchronize", "read-ahead", last_copy) in log[before:after]
    # The host keeps within two batches of the device, and waits for nothing else.
    waits = [entry[2] for entry in log if entry[0] == "synchronize" and entry[1] != "read-ahead"]
    begun = [entry[2] for entry in log if entry[:2] == ("record", "compute")]
    assert waits == begun[: len(expected) - 3]


def test_map_tensors_reaches_every_tensor(batches):
    batch = batches.read(0, 0)
    doubled = map_tensors(batch, lambda tensor: tensor * 2)
    assert torch.equal(doubled.data.features[0].channel_std, batch.data.features[0].channel_std * 2)
    assert torch.equal(doubled.draws["t"], batch.draws["t"] * 2)
    assert doubled.data.features[0].token_scale is None
