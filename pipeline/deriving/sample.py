"""The images that a fit sees: a seeded sample in which every class has its share.

A manifest is ordered by class, so that the first thousand rows know one class alone. Which rows are drawn does not
depend on which of them can be used: those that cannot are left out, and not replaced.
"""

import numpy as np


def sample_rows(labels: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Return about `num` of the rows of `labels` [N], ascending: each class's first, each one's second, and so on.

    Every class is there: where `num` is fewer than the classes, one row of each.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = np.argsort(labels[order], kind="stable")
    _, first, counts = np.unique(labels[order][by_class], return_index=True, return_counts=True)
    turn = np.empty(len(labels), dtype=np.int64)  # of each row of `order`: how many of its class come before it
    turn[by_class] = np.arange(len(labels)) - np.repeat(first, counts)
    return np.sort(order[np.argsort(turn, kind="stable")[: max(num, len(counts))]])
