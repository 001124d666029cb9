"""Encoders computed from the images whenever rows are asked for: what a build would store, before any rounding.

A trainer that wants to know what its cache costs or loses takes this in the cache's place: the same decoding, crop,
preprocessing, weights and precision, tokens float32 with the statistics that a build keeps beside them.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...cache_specs.components import check_same_images
from ...cache_specs.entries import is_file
from ...cache_specs.errors import CacheError, UsageError
from ...cache_specs.fingerprint import digest
from ...cache_specs.schema import FEATURES, LATENTS, ComponentSpec, stored_layers
from ...cache_specs.tables import code_of, pick_layer, resolve_encoder, stored_encoder
from ..images.decode import decode_batch
from ..images.manifest import ImageSource
from ..models.encoders import Encoder, load_encoder
from ..store.quantize import channel_statistics
from ..store.store import CacheStore
from .grids import default_grid


@dataclass(frozen=True, kw_only=True)
class OnlineEncoder:
    """One encoder of a run: `layer` of what `encoder` gives, at `place` among its layers.

    `stored` says whether the cache holds it too. `name` is what a reader of the cache would call it.
    """

    name: str
    encoder: Encoder
    layer: int | None
    place: int
    stored: bool
    fingerprint: str

    def arrays(self, images: torch.Tensor, *, cls_token: bool) -> dict[str, torch.Tensor]:
        """Return tokens [b, T, E], channel_mean, channel_std [b, E] and, where asked and there, cls_token, float32."""
        tokens, cls = self.encoder.by_layer(images)[self.place]
        mean, std = channel_statistics(tokens)
        # Copies: what inference mode made cannot be kept for a backward pass.
        arrays = {"tokens": tokens.clone(), "channel_mean": mean, "channel_std": std}
        return arrays | ({"cls_token": cls.clone()} if cls_token and cls is not None else {})


class OnlineImages:
    """The pictures of a cache's samples, read from `source` again; threads decode them, a core each."""

    def __init__(self, store: CacheStore, latents: str, source: ImageSource, where: str) -> None:
        num = store.layout.num_samples
        self._ids = store.read("sample_id", 0, num)
        self._sizes = store.read(f"{LATENTS}/{latents}/source_bytes", 0, num)
        self._source, self._where = source, where
        self._resolution = store.layout.resolution
        self._cores = len(os.sched_getaffinity(0))
        self._threads = ThreadPoolExecutor(max_workers=self._cores, thread_name_prefix="decode")

    def crops(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return [b, 3, R, R] uint8 of samples `rows` in `views`; raise `CacheError` naming one that cannot be had.

        A file of another size than that which the latents were made from is refused.
        """
        parts = [part for part in np.array_split(np.arange(len(rows)), self._cores) if len(part)]
        crops = np.concatenate(list(self._threads.map(lambda part: self._decode(rows[part]), parts)))
        flipped = views == 1  # view 0 is the crop itself
        crops[flipped] = crops[flipped][:, :, ::-1]
        return np.ascontiguousarray(crops.transpose(0, 3, 1, 2))

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        ids = [str(self._ids[row]) for row in rows.tolist()]
        batch = decode_batch(self._source, ids, self._resolution, self._sizes[rows])
        for offset, why in batch.bad.items():
            raise CacheError(f"--data {self._where}: {ids[offset]}: {why}")
        return batch.images


def open_images(cache: str, latents: str, source: ImageSource, *, where: str) -> OnlineImages:
    """Return the pictures behind a cache's samples; raise `CacheError` where there is no cache."""
    return OnlineImages(CacheStore.open(cache), latents, source, where)


def open_encoders(
    cache: str,
    latents: str,
    names: Sequence[str],
    *,
    weights: dict[str, Path],
    device: str,
    entries: Sequence[str | Path] = (),
) -> list[OnlineEncoder]:
    """Load the encoders `names`: as a finished component of the cache has them, else as a build would take them.

    `weights` gives local files by the table's name, `entries` are files of encoders of one's own. Raises `UsageError`
    where one cannot be had, or its weights are not those of the component, `CacheError` where the component was made
    from other images than the latents.
    """
    store = CacheStore.open(cache)
    moments = store.component(f"{LATENTS}/{latents}")
    assert moments is not None, latents
    if moments.imported is not None and not moments.imported["images"]:
        raise UsageError(f"{cache} was imported without images: there is nothing to compute {', '.join(names)} from")
    return [_open(store, moments, name, weights, device, entries) for name in names]


def _open(
    store: CacheStore,
    latents: ComponentSpec,
    name: str,
    weights: dict[str, Path],
    device: str,
    entries: Sequence[str | Path],
) -> OnlineEncoder:
    request, _, layer = name.partition(":layer=")
    features = [path for path in store.components() if path.startswith(f"{FEATURES}/")]
    present = [path.partition("/")[2] for path in features if store.is_complete(path)]
    found = stored_encoder(name, present)
    component = None if found is None else store.component(f"{FEATURES}/{found[0]}")
    if component is not None:
        opened = [one for one in map(store.opened, (latents.path, component.path)) if one is not None]
        num = store.layout.num_samples
        check_same_images(store.path, opened, lambda path, array: store.read(f"{path}/{array}", 0, num))
        own = request.partition(":")[0]
        code = code_of(component.path, component.spec, [*entries, *([own] if is_file(own) else [])])
        group, spec, precision = component.path.partition("/")[2], component.spec, component.precision
    else:
        grid = default_grid(store.layout.resolution, [latents.spec["latent_size"][0]])
        model = resolve_encoder(request, resolution=store.layout.resolution, default_grid=grid)
        group, spec, precision, code = model.name, model.spec, "fp32", model.code
    stored = stored_layers(spec)
    picked = pick_layer(f"{store.path}/{FEATURES}/{group}", stored, int(layer) if layer else None)
    file = weights.get(spec["entry"])
    encoder = load_encoder(spec, weights=file, precision=precision, device=device, code=code)
    if component is not None and encoder.weights != component.weights:
        raise UsageError(
            f"the weights of {spec['entry']} ({encoder.weights}) are not those that {component.path} was built with "
            f"({component.weights}); give the same ones, --set online.weights={spec['entry']}=FILE"
        )
    identity = {"spec": dict(spec), "weights": encoder.weights, "precision": encoder.precision, "layer": picked}
    return OnlineEncoder(
        name=group if len(stored) == 1 else f"{group}:layer={picked}",
        encoder=encoder,
        layer=picked,
        place=stored.index(picked),
        stored=component is not None,
        fingerprint=digest(identity),
    )
