"""A cache as a data set of PyTorch's: the trainer's rows and draws, shared among ranks, resumed exactly."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from repa.cache_specs.errors import UsageError
from repa.trainer import CacheDataset, CacheReader
from repa.trainer.diffusion.latents import LatentNorm
from repa.trainer.reading.batches import Batches, Place
from repa.trainer.reading.norm import reader_norm

from ..conftest import sit_draws


def loader(dataset: CacheDataset) -> DataLoader:
    return DataLoader(dataset, batch_size=None, num_workers=0)


def rows(batches) -> list[list[int]]:
    return [batch["rows"].tolist() for batch in batches]


def flat(shares) -> list[int]:
    return [row for share in shares for row in share]


@pytest.fixture(scope="module")
def cache(make_cache):
    encoders = {"toy": "float16", "small": "int8"}
    return make_cache(latents="mean_std", encoders=encoders, invalid={"features/toy": [4, 11]})  # 21 of 23 are valid


@pytest.fixture
def reader(cache) -> CacheReader:
    return CacheReader(cache.path, encoder=["toy", "small-int8"], cls_token=False)


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_are_those_of_the_trainer(cache, reader, world, shuffle):
    """Three epochs against what a run's method is given: rows, views and draws from the posterior, to the bit."""
    for rank in range(world):
        place = Place(batch_size=8, rank=rank, world=world)
        run = Batches(reader, sit_draws(), place, shuffle=shuffle, window=2)
        dataset = CacheDataset(reader, batch_size=8, seed=7, rank=rank, world=world, shuffle=shuffle, window=2)
        seen = [batch for _ in range(3) for batch in loader(dataset)]
        assert len(seen) == 8  # steps that begin below position 63
        for step, batch in enumerate(seen):
            expected = run.read(step, 0)
            at, views = batch["rows"].tolist(), batch["views"].tolist()
            assert at == expected.data.rows.tolist()
            assert views == expected.draws["views"].tolist()
            np.testing.assert_array_equal(batch["labels"], cache.arrays["label"][at])
            mean, std = np.split(cache.arrays["latents/toy-ae/moments"][at, views].astype(np.float32), 2, axis=1)
            latents = mean + std * expected.draws["posterior_noise"].numpy()
            np.testing.assert_allclose(batch["latents"].numpy(), latents, rtol=1e-6, atol=1e-6)
            assert set(batch["features"]) == {"toy", "small-int8"}
            for name, features in batch["features"].items():
                scaled = {"token_scale"} if name == "small-int8" else set()
                assert set(features) == {"tokens", "channel_mean", "channel_std"} | scaled
                for key, tensor in features.items():
                    stored = cache.arrays[f"features/{name}/{'patch_tokens' if key == 'tokens' else key}"]
                    np.testing.assert_array_equal(tensor.numpy(), stored[at, views])


def test_moments_and_class_tokens_come_as_stored(cache):
    dataset = CacheDataset(CacheReader(cache.path, encoder="toy"), batch_size=5, posterior=False, flip=False)
    for batch in dataset:
        assert "latents" not in batch
        at = batch["rows"].tolist()
        assert not batch["views"].any()
        np.testing.assert_array_equal(batch["moments"].numpy(), cache.arrays["latents/toy-ae/moments"][at, 0])
        stored = cache.arrays["features/toy/cls_token"][at, 0]
        np.testing.assert_array_equal(batch["features"]["toy"]["cls_token"].numpy(), stored)


def test_latents_are_normalised_on_request(reader):
    plain = next(iter(CacheDataset(reader, batch_size=8)))["latents"]
    norm = LatentNorm(scale=(2.0, 0.5, 1.0), bias=(1.0, -1.0, 0.0))
    got = next(iter(CacheDataset(reader, batch_size=8, latent_norm=norm)))["latents"]
    scale, bias = (torch.tensor(numbers)[:, None, None] for numbers in (norm.scale, norm.bias))
    torch.testing.assert_close(got, (plain - bias) * scale)


def test_norms_by_name_are_those_of_a_run(make_cache):
    """The cache's own statistics, mean (0.1, -0.2, 0.3) and deviation (1, 2, 0.5), or the published 1 and 0."""
    reader = CacheReader(make_cache().path)
    assert reader_norm(reader, "channel") == LatentNorm(scale=(1.0, 0.5, 2.0), bias=(0.1, -0.2, 0.3))
    assert reader_norm(reader, "fixed") == LatentNorm(scale=(1.0,) * 3, bias=(0.0,) * 3)


def test_ranks_split_the_positions_of_one(reader):
    whole = rows(CacheDataset(reader, batch_size=8, seed=3))
    first, second = (rows(CacheDataset(reader, batch_size=8, seed=3, rank=rank, world=2)) for rank in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def test_epochs_differ_and_each_holds_every_sample_once(reader):
    dataset = CacheDataset(reader, batch_size=7)
    epochs = [flat(rows(loader(dataset))) for _ in range(3)]
    assert all(sorted(epoch) == reader.valid_rows.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert flat(rows(CacheDataset(reader, batch_size=7, epoch=2))) == epochs[2]
    dataset.set_epoch(1)
    assert flat(rows(dataset)) == epochs[1]
    assert flat(rows(CacheDataset(reader, batch_size=7, seed=1))) != epochs[0]


def test_epochs_join_where_a_batch_straddles_them(reader):
    """21 samples in batches of 8: 3, 3 and 2 a turn, and every 21 positions a permutation."""
    dataset = CacheDataset(reader, batch_size=8)
    counts, stream = [], []
    for epoch in range(8):
        assert dataset.epoch == epoch
        seen = rows(loader(dataset))
        counts.append(len(seen))
        stream += flat(seen)
    assert sum(counts) == 21
    assert set(counts) == {2, 3}
    assert len(dataset) == len(loader(dataset)) == 3
    for start in range(0, len(stream), 21):
        assert sorted(stream[start : start + 21]) == reader.valid_rows.tolist()


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_a_state_gives_exactly_the_rest(cache, reader, taken, world):
    """Stopped anywhere, amid an epoch or between two, and by another number of ranks."""
    whole = CacheDataset(reader, batch_size=8)
    expected = rows(batch for _ in range(2) for batch in whole)

    stopped = CacheDataset(reader, batch_size=8)
    given = (batch for _ in range(2) for batch in loader(stopped))
    assert rows(next(given) for _ in range(taken)) == expected[:taken]
    state = json.loads(json.dumps(stopped.state_dict()))

    again = CacheReader(cache.path, encoder=["toy", "small-int8"], cls_token=False)
    rest = []
    for rank in range(world):
        resumed = CacheDataset(again, batch_size=8, rank=rank, world=world)
        resumed.load_state_dict(state)
        epochs = []
        while resumed.epoch < 2:
            resumed.set_epoch(resumed.epoch)  # as loops over epochs do
            epochs += rows(loader(resumed))
        rest.append(epochs)
    assert [flat(shares) for shares in zip(*rest, strict=True)] == expected[taken:]


def test_draws_go_on_too(reader):
    whole = [batch["latents"] for batch in CacheDataset(reader, batch_size=8)]
    stopped = CacheDataset(reader, batch_size=8)
    next(iter(stopped))
    resumed = CacheDataset(reader, batch_size=8)
    resumed.load_state_dict(stopped.state_dict())
    assert all(torch.equal(a["latents"], b) for a, b in zip(resumed, whole[1:], strict=True))


def test_batches_are_the_callers_to_keep(reader):
    one_ahead = CacheDataset(reader, batch_size=3, prefetch_bytes=1)  # a ring of two
    kept = list(one_ahead)
    one_ahead.set_epoch(0)
    for batch, later in zip(kept, one_ahead, strict=True):
        assert torch.equal(batch["rows"], later["rows"])
        for name in ("toy", "small-int8"):
            assert torch.equal(batch["features"][name]["tokens"], later["features"][name]["tokens"])


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 4}, {"shuffle": "blocks"}, {"flip": False}])
def test_a_state_of_another_stream_is_refused_by_name(reader, change):
    stored = CacheDataset(reader, batch_size=8).state_dict()
    dataset = CacheDataset(reader, **{"batch_size": 8} | change)
    before = dataset.state_dict()
    with pytest.raises(UsageError, match=f"state_dict: ({next(iter(change))}|window) is"):
        dataset.load_state_dict(stored)
    assert dataset.state_dict() == before


def test_a_state_of_another_cache_is_refused(make_cache, reader):
    other = CacheDataset(CacheReader(make_cache(seed=1).path), batch_size=8)
    with pytest.raises(UsageError, match="dataset is"):
        other.load_state_dict(CacheDataset(reader, batch_size=8).state_dict())
    for step in (-1, 1.5, None, True):
        with pytest.raises(UsageError, match="step is"):
            other.load_state_dict(other.state_dict() | {"step": step})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 22}, "21 valid samples"),
        ({"batch_size": 9, "rank": 0, "world": 2}, "multiple of world=2"),
        ({"batch_size": 8, "rank": 2, "world": 2}, "expected 0 to 1"),
        ({"batch_size": 8, "rank": 1}, "both, or neither"),
        ({"batch_size": 8, "epoch": -1}, "epoch is -1"),
        ({"batch_size": 8, "seed": -1}, "seed is -1"),
        ({"batch_size": 8, "shuffle": "all"}, "shuffle is 'all'"),
        ({"batch_size": 8, "window": 0}, "window is 0"),
        ({"batch_size": 8, "latent_norm": "channels"}, "latent_norm is 'channels'"),
        ({"batch_size": 8, "latent_norm": "fixed", "posterior": False}, "moments are given as stored"),
        ({"batch_size": 8, "latent_norm": LatentNorm(scale=(1.0,), bias=(0.0,))}, "the latents have 3"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(reader, arguments, reason):
    with pytest.raises(UsageError, match=reason) as caught:
        CacheDataset(reader, **arguments)
    assert "\n" not in str(caught.value)


def test_an_iteration_ends_where_another_begins(reader):
    dataset = CacheDataset(reader, batch_size=8)
    first = iter(dataset)
    seen = rows([next(first)])
    assert seen + rows(dataset) == rows(CacheDataset(reader, batch_size=8))
    with pytest.raises(UsageError, match="has ended"):
        next(first)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_are_refused(reader):
    dataset = CacheDataset(reader, batch_size=8)
    with pytest.raises(UsageError, match="num_workers=0"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")))
    with pytest.raises(UsageError, match="num_workers=0"):
        pickle.dumps(dataset)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("amid", [False, True])
def test_a_forked_process_goes_on_only_where_no_iteration_was_under_way(reader, amid):
    dataset = CacheDataset(reader, batch_size=8)
    running = iter(dataset)
    if amid:
        next(running)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if amid:
                for attempt in (lambda: next(running), lambda: iter(dataset)):
                    with pytest.raises(UsageError, match="forked amid an iteration"):
                        attempt()
            else:
                assert rows(dataset) == rows(CacheDataset(reader, batch_size=8))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_reader_of_latents_alone_gives_no_features(cache):
    dataset = CacheDataset(CacheReader(cache.path, encoder=()), batch_size=8)
    assert all(batch["features"] == {} for batch in dataset)
