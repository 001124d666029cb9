"""What a report shows of a cache: real images of asked classes, and the principal components that encoders see in some.

Plain arrays for a caller that draws them itself; `repa-cache show` draws the same components into a figure.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...cache_specs.errors import CacheError, UsageError
from .features import labels_of, open_encoders, sample_id
from .pictures import images_of, spread_rows
from .show import principal_components


def images_by_label(cache: str, labels: Sequence[int], **source: Any) -> np.ndarray:
    """Return real images [n, R, R, 3] uint8, one a label; a label that comes again takes the class's next image.

    `source` is that of `images_of`: data, autoencoder, weights. Raises as it does, `UsageError` where a class has no
    valid image.
    """
    store, (features, *_) = open_encoders(cache, [])
    valid = np.flatnonzero(features.valid())
    known = labels_of(store, valid)
    seen: dict[int, int] = {}
    rows = []
    for label in labels:
        of_class = valid[known == label]
        if not len(of_class):
            raise UsageError(f"{cache} has no image of class {label}")
        rows.append(int(of_class[seen.get(label, 0) % len(of_class)]))
        seen[label] = seen.get(label, 0) + 1
    ascending, places = np.unique(rows, return_inverse=True)
    return images_of(store, features, ascending, **source)[places]


def component_pictures(
    cache: str, encoders: Sequence[str], num: int, *, gamma: float, **source: Any
) -> tuple[np.ndarray | None, list[str], dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Return `num` images, their sample ids, and by encoder its first three components of them as colours, with notes.

    Images are [n, R, R, 3] uint8, None where they cannot be had (the notes say why); an encoder has two maps
    [n, h, w, 3] in [0, 1]: tokens as stored, and normalised over space at `gamma`. An encoder that the cache lacks is
    noted and left out. Raises `CacheError` where there is no cache, or no finished encoder in it.
    """
    store, everything = open_encoders(cache, [])
    notes, opened = [], []
    for name in encoders:
        try:
            opened += open_encoders(cache, [name])[1]
        except (UsageError, CacheError) as error:
            notes.append(str(error))
    opened = opened or everything[:1]
    rows = spread_rows(store, opened[0], min(num, int(opened[0].valid().sum())))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for features in opened:
        stored, normalized = [], []
        for batch in features.batches(rows):
            for tokens, over_space in zip(batch.tokens, batch.normalized(gamma), strict=True):
                stored.append(principal_components(tokens, features.grid))
                normalized.append(principal_components(over_space, features.grid, like=stored[-1]))
        warning = " (UNTRAINED)" if features.random_weights else ""
        found[f"{features.name}{warning}"] = (np.stack(stored), np.stack(normalized))
    images: np.ndarray | None = None
    try:
        images = images_of(store, opened[0], rows, **source)
    except (UsageError, CacheError) as error:
        notes.append(str(error))
    return images, [sample_id(store, int(row)) for row in rows], found, notes
