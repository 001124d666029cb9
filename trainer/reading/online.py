"""Encoders computed at each step from the images, not read: what a run from the cache is compared with (`--online`).

Latents, labels, order and draws are those of a cached run, the tokens what a build would round and store. Images are
decoded while the step before runs, and encoded on the training device at the beginning of theirs, as trainers do that
have no cache.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rows.row_batch import Batch, FeatureBatch
from ..rows.row_reads import NDArray
from .reader import CacheReader
from .specs import FeatureSpec


@dataclass(frozen=True, kw_only=True)
class Online:
    """The encoders of a run, as functions.

    stored        those of them that the cache holds too: their invalid samples are left out here as there
    fingerprints  by encoder, what its tokens are a function of beside the images
    crops         rows and views [b] int64 -> images [b,3,R,R] uint8
    encode        images on the device -> by encoder, tensors of a FeatureBatch by name
    """

    features: tuple[FeatureSpec, ...]
    stored: tuple[str, ...]
    fingerprints: Mapping[str, str]
    crops: Callable[[NDArray, NDArray], NDArray]
    encode: Callable[[Tensor], Sequence[Mapping[str, Tensor]]]


class OnlineReader(CacheReader):
    """A reader whose batches hold images instead of tokens; `complete` makes tokens of them. Raises as CacheReader."""

    def __init__(self, path: str, online: Online, *, autoencoder: str | None, check_reads: bool) -> None:
        super().__init__(path, autoencoder=autoencoder, encoder=online.stored, check_reads=check_reads)
        self._online = online
        self._feature_arrays = []
        self.features = online.features
        for name in [name for name in self.fingerprints if name.startswith("features/")]:
            del self.fingerprints[name]
        self.fingerprints |= {f"online/{name}": digest for name, digest in online.fingerprints.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a reader whose encoder runs online cannot be pickled: the network is not in the cache")

    def rows(self, indices: Any, views: Any = None, *, out: Batch | None = None) -> Batch:
        """Read as CacheReader does, and the images; raises CacheError for one that cannot be had, too."""
        batch = super().rows(indices, views, out=out)
        if batch.images is not None:
            numbers = batch.rows.numpy()
            chosen = np.zeros_like(numbers) if views is None else np.asarray(views)
            batch.images.copy_(torch.from_numpy(self._online.crops(numbers, chosen)))
        return batch

    def empty_batch(self, num: int, *, pin_memory: bool = False) -> Batch:
        """Return as CacheReader does, with memory for the images."""
        shape = (num, 3, self.resolution, self.resolution)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
        return dataclasses.replace(super().empty_batch(num, pin_memory=pin_memory), images=images)

    def complete(self, batch: Batch) -> Batch:
        """Return the batch with every encoder's tokens, statistics and class token of its images."""
        if batch.images is None:  # of a step that is not aligned any more
            return batch
        features = [FeatureBatch(**tensors) for tensors in self._online.encode(batch.images)]
        return dataclasses.replace(batch, features=features, images=None)
