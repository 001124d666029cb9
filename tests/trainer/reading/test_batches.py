"""Which samples a step sees, over ranks and epochs, and its random numbers."""

import numpy as np
import pytest
import torch

from repa.trainer.reading.batches import Batches, Place
from repa.trainer.reading.draws import DrawSpec
from repa.trainer.reading.reader import CacheReader

from ..conftest import sit_draws


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_ranks_and_micro_batches_split_the_same_positions(world, accumulation):
    places = [Place(batch_size=12, accumulation=accumulation, rank=rank, world=world) for rank in range(world)]
    starts = sorted(place.start(5, micro) for place in places for micro in range(accumulation))
    width = places[0].micro_batch
    assert [p for start in starts for p in range(start, start + width)] == list(range(60, 72))


def test_draws_are_a_function_of_seed_step_micro_batch_and_rank():
    def flat(spec: DrawSpec, **where: int) -> torch.Tensor:
        draws = spec.draw(6, **where)
        return torch.cat([tensor.double().flatten() for tensor in draws.values()])

    here = {"step": 3, "micro": 1, "rank": 2}
    torch.manual_seed(0)
    first = flat(sit_draws(), **here)
    torch.manual_seed(1)
    assert torch.equal(first, flat(sit_draws(), **here))
    for other in ({"step": 4}, {"micro": 0}, {"rank": 0}):
        assert not torch.equal(first, flat(sit_draws(), **(here | other)))
    assert not torch.equal(first, flat(sit_draws(seed=8), **here))


def test_draws_come_in_the_documented_order_from_one_generator():
    draws = sit_draws().draw(5, step=0, micro=0, rank=0)
    sequence = np.random.SeedSequence(7, spawn_key=(1, 0, 0, 0))
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
    assert torch.equal(draws["views"], torch.randint(2, (5,), generator=generator))
    assert torch.equal(draws["posterior_noise"], torch.randn(5, 3, 8, 8, generator=generator))
    assert torch.equal(draws["t"], torch.rand(5, generator=generator))
    assert torch.equal(draws["noise"], torch.randn(5, 3, 8, 8, generator=generator))
    assert torch.equal(draws["dropped"], torch.rand(5, generator=generator) < 0.25)


def test_draws_have_the_right_shares():
    draws = sit_draws(latent_shape=(1, 1, 1)).draw(20_000, step=0, micro=0, rank=0)
    assert abs(draws["dropped"].double().mean().item() - 0.25) < 0.015
    assert abs(draws["views"].double().mean().item() - 0.5) < 0.015
    assert abs(draws["noise"].var().item() - 1) < 0.05
    assert not sit_draws(num_views=1).draw(9, step=0, micro=0, rank=0)["views"].any()
    assert "posterior_noise" not in sit_draws(posterior=False).draw(9, step=0, micro=0, rank=0)


def test_a_batch_larger_than_the_cache_repeats_rows_evenly(make_cache):
    reader = CacheReader(make_cache(num_samples=3).path)
    batch = Batches(reader, sit_draws(), Place(batch_size=7)).read(0, 0)
    counts = np.bincount(batch.data.rows.numpy(), minlength=3)
    assert counts.min() >= 2
    assert counts.max() <= 3


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_an_epoch_stays_exact_where_the_number_of_ranks_changes_in_it(make_cache, shuffle):
    """21 valid samples, 6 a step: two ranks do the first two steps, one rank of two micro-batches goes on."""
    reader = CacheReader(make_cache(invalid={"features/toy": [4, 11]}).path)
    seen: list[int] = []
    for steps, world, accumulation in ((range(2), 2, 1), (range(2, 14), 1, 2)):
        for step in steps:
            for micro in range(accumulation):
                for rank in range(world):
                    place = Place(batch_size=6, accumulation=accumulation, rank=rank, world=world)
                    batch = Batches(reader, sit_draws(), place, shuffle=shuffle, window=2).read(step, micro)
                    seen += batch.data.rows.tolist()
    epochs = np.array(seen).reshape(4, 21)
    assert all(sorted(epoch) == sorted(reader.valid_rows) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
