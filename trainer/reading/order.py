"""The order of samples: an endless stream of positions, each a function of (seed, position), in constant memory.

Position p is sample permutation(p % N) of epoch p // N: nothing is dropped or repeated within an epoch, and a resume
needs the position and nothing else. No permutation is ever written down, which would cost every rank 8 bytes a sample
and, for 1,281,167 of them, 50 ms an epoch; 256 positions are computed in 0.15 ms, in blocks 0.5.

    global   any sample may follow any other
    blocks   shards in random order, samples shuffled within a window of a few shards: neighbours in the stream lie in
             few files, which suits spinning disks and object stores

A permutation is a Feistel network on a rectangle (J. Black and P. Rogaway, "Ciphers with arbitrary finite domains",
2002): a number below a * b is a pair (x, y); rounds add to x a random function of y, then to y one of x, modulo a and
b; a number that comes out at N or above goes in again until it is below. It shuffles and keeps no secret.
"""

import math
from typing import Any, Literal, Protocol

import numpy as np

NDArray = np.ndarray[Any, Any]
Shuffle = Literal["global", "blocks"]

# Of 4 arrays a sample (moments, tokens, their mean and standard deviation) two windows keep 128 files open, of the
# 256 that the reader allows; at 256 samples a shard a window is 4,096 samples, 1.6 GB of float16 tokens.
DEFAULT_WINDOW = 16

# Half-rounds, of which each moves x or y. With 24 all orders of up to 8 numbers come equally often (700,000 draws);
# with 16 they do not. Functions of larger sides mix faster: 12 are ample there, and take half the time.
ROUNDS, MOST_ROUNDS, SMALL = 12, 24, 4096

# SeedSequence pads short entropy with zeros: (seed, epoch) and (seed, epoch, 0) would be the same. A spawn key is not
# padded, so each use has its own word there: this one, the next in batches.py.
_ORDER = 0
_SHARDS, _SHORT, _WINDOWS = 0, 1, 2  # of blocks: windows count on from the last

# The two factors of splitmix64's finalizer, as D. Stafford chose them.
_MIX1, _MIX2, _HALF = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(32)


class Order(Protocol):
    """An endless stream of the samples 0 to N - 1."""

    def at(self, start: int, num: int) -> NDArray:
        """Return the samples [num] int64 at positions start .. start + num - 1."""
        ...


class GlobalOrder:
    """Each epoch a permutation of all `num_samples`."""

    def __init__(self, num_samples: int, *, seed: int) -> None:
        self._num = num_samples
        self._seed = seed

    def at(self, start: int, num: int) -> NDArray:
        epochs, places = np.divmod(np.arange(start, start + num), self._num)
        first, last = epochs[[0, -1]].tolist()
        keys = [permutation_keys(self._num, self._seed, _ORDER, epoch) for epoch in range(first, last + 1)]
        return permuted(places, self._num, keys[0] if first == last else np.stack(keys)[epochs - first])


class BlockOrder:
    """Each epoch all shards in random order, `window` of them shuffled together.

    Samples k S to (k + 1) S - 1 are shard k, S = `shard_samples`; the last one may be short, and it comes anywhere.
    """

    def __init__(self, num_samples: int, *, seed: int, shard_samples: int, window: int) -> None:
        self._num = num_samples
        self._seed = seed
        self._shard = shard_samples
        self._window = window
        self._num_shards = -(-num_samples // shard_samples)
        self._missing = self._num_shards * shard_samples - num_samples  # what the short shard lacks

    def at(self, start: int, num: int) -> NDArray:
        epochs, places = np.divmod(np.arange(start, start + num), self._num)
        return np.concatenate([self._in_epoch(epoch, places[epochs == epoch]) for epoch in np.unique(epochs).tolist()])

    def _in_epoch(self, epoch: int, positions: NDArray) -> NDArray:
        """Return the samples at positions [num], each below N, of one epoch."""
        # The short shard's turn is drawn by itself. The others are alike: where each begins is a matter of counting.
        short = self._draw(epoch, _SHORT) % self._num_shards
        windows = self._turns(positions, short) // self._window
        shuffled = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            here = windows == window
            first, end = self._begins(np.array([window, window + 1]) * self._window, short).clip(max=self._num).tolist()
            keys = permutation_keys(end - first, self._seed, _ORDER, epoch, _WINDOWS + window)
            shuffled[here] = first + permuted(positions[here] - first, end - first, keys)

        turns = self._turns(shuffled, short)
        alike = max(1, self._num_shards - 1)
        keys = permutation_keys(alike, self._seed, _ORDER, epoch, _SHARDS)
        shards = permuted(np.minimum(turns - (turns > short), alike - 1), alike, keys)
        shards[turns == short] = self._num_shards - 1
        return shards * self._shard + shuffled - self._begins(turns, short)

    def _draw(self, epoch: int, use: int) -> int:
        return int(np.random.SeedSequence(self._seed, spawn_key=(_ORDER, epoch, use)).generate_state(1, np.uint64)[0])

    def _begins(self, turns: NDArray, short: int) -> NDArray:
        """Return the position at which each turn begins; turn `short` is the short shard's."""
        return turns * self._shard - (turns > short) * self._missing

    def _turns(self, positions: NDArray, short: int) -> NDArray:
        """Return the turn in which each position lies."""
        after = positions >= (short + 1) * self._shard - self._missing
        return (positions + after * self._missing) // self._shard


def permutation_keys(num: int, seed: int, *words: int) -> NDArray:
    """Return the keys, uint64 one a half-round, of the permutation of `num` numbers that belongs to seed and words."""
    rounds = MOST_ROUNDS if num < SMALL else ROUNDS
    return np.random.SeedSequence(seed, spawn_key=words).generate_state(rounds, np.uint64)


def permuted(numbers: NDArray, num: int, keys: NDArray) -> NDArray:
    """Return where a permutation of 0 .. num - 1 takes `numbers` [n], int64.

    keys [rounds], or [n, rounds] where each number has a permutation of its own.
    """
    assert 0 <= numbers.min() <= numbers.max() < num  # from outside it might never come in
    # One side is even, for parity's sake: adding 1 modulo an odd number is an even permutation, and so would all be.
    wide = math.isqrt(num - 1) + 1 if num > 1 else 1
    wide += wide % 2
    high = -(-num // wide)  # so that fewer than `wide` numbers lie at `num` or above
    values = _network(numbers.astype(np.uint64), wide, high, keys)
    while len(outside := np.flatnonzero(values >= num)):
        values[outside] = _network(values[outside], wide, high, keys if keys.ndim == 1 else keys[outside])
    return values.astype(np.int64)


def _network(values: NDArray, wide: int, high: int, keys: NDArray) -> NDArray:
    """Send numbers below wide * high, uint64, once through all rounds."""
    a, b = np.uint64(wide), np.uint64(high)
    x, y = np.divmod(values, b)
    for i in range(0, keys.shape[-1], 2):
        x += _function(y, keys[..., i], a)
        x = np.minimum(x, x - a)  # modulo a: below it, the difference wraps around to something huge
        y += _function(x, keys[..., i + 1], b)
        y = np.minimum(y, y - b)
    return x * b + y


def _function(values: NDArray, key: NDArray, limit: np.uint64) -> NDArray:
    """Return a random number below `limit`, itself below 2^32, for each value: a function that the key picks."""
    mixed = values + key
    mixed *= _MIX1
    mixed ^= mixed >> _HALF
    mixed *= _MIX2
    mixed >>= _HALF
    mixed *= limit
    mixed >>= _HALF
    return mixed
