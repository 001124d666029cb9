"""Which rows are trained on and which held out: a function of seed and row, whatever else a run is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.distributed import World
from repa.trainer.reading.reader import CacheReader
from repa.trainer.runs.held_out import row_numbers, split, validation_data
from repa.trainer.runs.parts import make_batches
from repa.trainer.runs.run import Run, prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve, set_layer


def config_of(cache, *assignments: str):
    flags = {"cache": str(cache), "out": "unused", "model": "SiT-Ti/2", "batch_size": 8}
    return resolve([recipe_layer("sit", "SiT-Ti/2"), Layer(source="flags", values=flags), set_layer(assignments)])


def run_of(cache, *assignments: str, rank: int = 0, size: int = 1) -> Run:
    """Return a run whose batches are those of a rank of `size`; nothing is wrapped."""
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    run = prepare(config_of(cache, *assignments), alone)
    if size > 1:
        run.batches = make_batches(run.config, run.reader, replace(alone, rank=rank, size=size), run.objective)
    return run


def test_a_rows_number_is_splitmix64_of_seed_and_row():
    mask = 2**64 - 1
    keys = [int(key) for key in np.random.SeedSequence(5, spawn_key=(6,)).generate_state(2, np.uint64)]

    def number(row: int) -> int:
        for key in keys:
            row = (row + key) & mask
            row = ((row ^ row >> 30) * 0xBF58476D1CE4E5B9) & mask
            row = ((row ^ row >> 27) * 0x94D049BB133111EB) & mask
            row ^= row >> 31
        return row

    rows = np.array([7, 0, 1_281_166, 3])
    assert row_numbers(rows, 5).tolist() == [number(row) for row in rows.tolist()]
    assert not np.array_equal(row_numbers(rows, 5), row_numbers(rows, 6))
    numbers = row_numbers(np.arange(100_000), 0) / 2.0**64
    assert abs((numbers < 0.05).mean() - 0.05) < 0.003  # four standard deviations
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02


def test_held_out_rows_and_subsets(make_cache):
    """Disjoint and whole; larger ones hold smaller ones; neither the run's seed nor an image that is gone matters."""
    reader = CacheReader(make_cache(num_samples=400, shard_samples=64).path)
    gone = CacheReader(make_cache(num_samples=400, shard_samples=64, invalid={"latents/toy-ae": [3, 5, 8, 13]}).path)

    def of(reader, *assignments):
        return split(config_of(reader.path, *assignments), reader)

    whole = of(reader)
    assert whole.training is reader.valid_rows
    assert len(whole.held_out) == 0
    few, many = of(reader, "validation.fraction=0.1"), of(reader, "validation.fraction=0.3", "seed=4")
    for one, share in ((few, 40), (many, 120)):
        assert np.array_equal(np.sort(np.concatenate([one.training, one.held_out])), np.arange(400))
        assert abs(len(one.held_out) - share) < 30
    assert set(few.held_out) < set(many.held_out)
    assert set(of(gone, "validation.fraction=0.3").held_out) == set(many.held_out) - {3, 5, 8, 13}
    assert set(of(reader, "validation.fraction=0.3", "split_seed=1").held_out) != set(many.held_out)

    small, large = (of(reader, f"subset={num}").training for num in (50, 200))
    assert len(small) == 50
    assert set(small) < set(large)
    assert np.array_equal(of(reader, "subset=50", "validation.fraction=0.3").training, small)


def test_no_batch_holds_what_is_held_out(make_cache):
    """Two ranks, three epochs, both orders: together exactly the rows that are trained on, and no other."""
    cache = make_cache(num_samples=64, shard_samples=16, invalid={"latents/toy-ae": [3]}).path
    for settings in (("validation.fraction=0.3",), ("subset=40", "shuffle=blocks", "shuffle_window=2")):
        runs = [run_of(cache, *settings, rank=rank, size=2) for rank in range(2)]
        expected = split(runs[0].config, runs[0].reader).training
        steps = range(3 * len(expected) // 8)
        seen = np.concatenate([run.batches.rows(step, 0) for step in steps for run in runs])
        assert set(seen) == set(expected)
        alone = run_of(cache, *settings)
        assert np.array_equal(np.concatenate([alone.batches.rows(step, 0) for step in steps]), seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["validation.fraction=1"], r"validation.fraction is 1.0; expected a share from 0 to below 1"),
        (["validation.fraction=1e-9"], r"of 23 samples of .* none is held out"),
        (["validation.fraction=0.9999999"], r"of 23 samples of .* none is to train on"),
        (["subset=24"], r"subset is 24; .* has 23 samples to train on"),
        (["validation.fraction=0.1", "validation.cache=x"], "choose one of them"),
        (["validation.cache=''"], "validation.cache is empty"),
    ],
)
def test_what_cannot_be_split_is_refused(make_cache, settings, message):
    cache = make_cache().path
    with pytest.raises(UsageError, match=message):
        split(config_of(cache, *settings), CacheReader(cache))


def test_another_cache_must_be_of_other_images_and_the_same_networks(make_cache):
    cache = make_cache().path
    reader = CacheReader(cache)
    for other, message in (
        (make_cache(), "holds the images of .*, which are trained on; hold a share"),
        (make_cache(seed=1, num_classes=4), "the classes of .* are not as those of"),
        (make_cache(seed=1, latents="mean_std"), "the latents of .* are not as those of"),
        (make_cache(seed=1, grid=2), "the tokens of .* are not as those of"),
    ):
        with pytest.raises(UsageError, match=message):
            validation_data(config_of(cache, f"validation.cache={other.path}"), reader)
    data = validation_data(config_of(cache, f"validation.cache={make_cache(seed=1).path}", "validation.num=9"), reader)
    assert data is not None
    assert (len(data.rows), data.chosen_of) == (9, 23)
