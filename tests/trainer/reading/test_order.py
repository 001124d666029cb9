"""The order of samples: every epoch exact, every order equally likely, blocks within their shards.

Counts are held to chi-squared, within 4 standard deviations of its mean; seeds are fixed, so a test passes always or
never. The same checks refuse a network of too few rounds.
"""

import math

import numpy as np
import pytest

from repa.trainer.reading.order import MOST_ROUNDS, ROUNDS, SMALL, BlockOrder, GlobalOrder, permutation_keys, permuted

SIZES = (1, 2, 3, 4, 5, 6, 7, 9, 16, 23, 64, 97, 100, 997, 4095, 4096, 4097, 10_000)


def is_uniform(counts: np.ndarray, expected: np.ndarray | float) -> bool:
    free = counts.size - 1
    return bool(((counts - expected) ** 2 / expected).sum() < free + 4 * math.sqrt(2 * free))


def images(numbers: list[int], num: int, times: int, *, rounds: int | None = None) -> np.ndarray:
    """Return where `times` permutations of 0 .. num - 1 take `numbers`, [times, numbers]."""
    keys = np.stack([permutation_keys(num, 0, epoch)[:rounds] for epoch in range(times)])
    flat = permuted(np.tile(numbers, times), num, keys.repeat(len(numbers), axis=0))
    return flat.reshape(times, len(numbers))


@pytest.mark.parametrize("num", SIZES)
def test_every_epoch_holds_every_sample_once(num):
    epochs = GlobalOrder(num, seed=4).at(0, 3 * num).reshape(3, num)
    assert (np.sort(epochs, axis=1) == np.arange(num)).all()
    if num > 6:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
        assert not np.array_equal(epochs[0], GlobalOrder(num, seed=5).at(0, num))


def test_a_million_samples_are_permuted():
    assert (np.bincount(GlobalOrder(1_281_167, seed=0).at(1_281_167, 1_281_167)) == 1).all()


@pytest.mark.parametrize("order", [GlobalOrder(7, seed=4), BlockOrder(7, seed=4, shard_samples=2, window=2)])
def test_an_order_is_a_function_of_the_position(order):
    whole = order.at(0, 100)
    for start, num in ((90, 10), (0, 3), (5, 17), (33, 1), (6, 2)):
        np.testing.assert_array_equal(order.at(start, num), whole[start : start + num])


@pytest.mark.parametrize(("num", "times"), [(2, 1000), (3, 3000), (4, 6000), (5, 12_000), (6, 15_000)])
def test_all_orders_of_a_few_samples_come_equally_often(num, times):
    epochs = GlobalOrder(num, seed=0).at(0, num * times).reshape(times, num)
    _, counts = np.unique(epochs, axis=0, return_counts=True)
    assert len(counts) == math.factorial(num)
    assert is_uniform(counts, times / len(counts))


def test_too_few_rounds_are_noticed():
    _, counts = np.unique(images([0, 1, 2, 3, 4], 5, 6000, rounds=8), axis=0, return_counts=True)
    assert not is_uniform(counts, 6000 / 120)


@pytest.mark.parametrize("num", [97, SMALL - 1, SMALL + 907])
def test_places_pairs_and_differences_are_uniform(num):
    """Of neighbours, of samples a row of the network's rectangle apart, and of any two."""
    row, times, bins = -(-num // math.isqrt(num)), 6000, 10
    found = images([0, 1, row, num // 2, num - 1], num, times)
    for column in found.T:
        expected = np.bincount(np.arange(num) * bins // num) * times / num
        assert is_uniform(np.bincount(column * bins // num, minlength=bins), expected)
    for i, j in ((0, 1), (0, 2), (1, 2), (3, 4), (0, 4)):
        x, y = found[:, i], found[:, j]
        sizes = np.bincount(np.arange(num) * bins // num).astype(float)
        expected = times * (np.outer(sizes, sizes) - np.diag(sizes)) / (num * (num - 1))  # no sample comes twice
        assert is_uniform(np.bincount(x * bins // num * bins + y * bins // num, minlength=bins**2), expected.ravel())
        differences = (y - x) % num - 1
        expected = np.bincount(np.arange(num - 1) * bins // (num - 1)) * times / (num - 1)
        assert is_uniform(np.bincount(differences * bins // (num - 1), minlength=bins), expected)


def test_successive_differences_of_one_epoch_are_uniform():
    num, bins = 200_003, 100
    epoch = GlobalOrder(num, seed=1).at(0, num)
    for apart in (1, 2, 448, 449):  # 448 and 449 are the sides of the network's rectangle
        differences = (epoch[apart:] - epoch[:-apart]) % num
        assert is_uniform(np.bincount(differences * bins // num, minlength=bins), len(differences) / bins)


@pytest.mark.parametrize(("num", "times"), [(100, 3000), (SMALL + 5, 400)])
def test_fixed_points_follow_poisson(num, times):
    numbers = list(range(num))
    fixed = (images(numbers, num, times) == numbers).sum(axis=1)
    expected = np.array([math.exp(-1) / math.factorial(k) for k in range(4)])
    expected = times * np.append(expected, 1 - expected.sum())
    assert is_uniform(np.bincount(fixed.clip(max=4), minlength=5), expected)


def test_small_permutations_take_more_rounds():
    assert len(permutation_keys(SMALL - 1, 0)) == MOST_ROUNDS
    assert len(permutation_keys(SMALL, 0)) == ROUNDS


@pytest.mark.parametrize("num", [1, 2, 5, 23, 24, 25, 200])
@pytest.mark.parametrize(("shard", "window"), [(1, 1), (5, 1), (5, 3), (8, 2), (300, 4)])
def test_windows_hold_their_shards_and_an_epoch_is_exact(num, shard, window):
    order = BlockOrder(num, seed=2, shard_samples=shard, window=window)
    sizes = np.bincount(np.arange(num) // shard)
    for epoch in order.at(0, 3 * num).reshape(3, num):
        assert sorted(epoch) == list(range(num))
        left, seen = epoch, set()
        while len(left):
            touched, place = [], 0
            while len(touched) < window and place < len(left):  # shards in the order in which they are first met
                touched, place = list(dict.fromkeys((left[: place + 1] // shard).tolist())), place + 1
            size = sizes[touched].sum()
            assert set((left[:size] // shard).tolist()) == set(touched)
            assert not seen & set(touched)
            seen |= set(touched)
            left = left[size:]
        assert len(seen) == len(sizes)


def test_shards_come_in_any_order_and_samples_of_a_window_mix():
    """11 samples in shards of 3: the short shard, of 2, takes every turn equally often, like any other."""
    order, times = BlockOrder(11, seed=0, shard_samples=3, window=1), 400
    epochs = order.at(0, 11 * times).reshape(times, 11) // 3
    turns = np.array([[*dict.fromkeys(epoch)] for epoch in epochs.tolist()])
    _, counts = np.unique(turns, axis=0, return_counts=True)
    assert len(counts) == 24
    assert is_uniform(counts, times / 24)

    together = BlockOrder(11, seed=0, shard_samples=3, window=4).at(0, 11 * times).reshape(times, 11)
    for place in (0, 4, 10):
        assert is_uniform(np.bincount(together[:, place], minlength=11), times / 11)
