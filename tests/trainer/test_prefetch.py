"""The thread that reads micro-batches ahead of the step."""

import threading

import pytest
import torch

from repa.cache_specs.errors import CacheError
from repa.trainer.batches import Batches, DrawSpec, Place
from repa.trainer.interpolant import Interpolant
from repa.trainer.prefetch import ReadAhead, map_tensors
from repa.trainer.reader import CacheReader

SPEC = DrawSpec(
    seed=7, num_views=2, latent_shape=(3, 8, 8), posterior=True, interpolant=Interpolant(), label_dropout=0.25
)


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
                assert torch.equal(got.draws.noise, expected.draws.noise)
                seen += got.data.rows.tolist()
        assert ahead.waited_s >= 0
    # 56 positions from 16 on over 21 valid rows: epoch 1 (21 to 41) is whole among them.
    assert sorted(seen[5:26]) == sorted(batches.reader.valid_rows.tolist())
    assert not {4, 11} & set(seen)


def test_read_ahead_ends_its_thread_wherever_it_stands(batches):
    before = threading.active_count()
    for taken in (0, 1, 6):
        with ReadAhead(batches, first=0, last=1000, depth=2, device=torch.device("cpu")) as ahead:
            for _ in range(taken):
                ahead.next()
        assert threading.active_count() == before


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


def test_map_tensors_reaches_every_tensor(batches):
    batch = batches.read(0, 0)
    doubled = map_tensors(batch, lambda tensor: tensor * 2)
    assert torch.equal(doubled.data.features[0].channel_std, batch.data.features[0].channel_std * 2)
    assert torch.equal(doubled.draws.t, batch.draws.t * 2)
    assert doubled.data.features[0].token_scale is None
