"""The pictures behind rows of a cache: read again from their files, or decoded from the cache's latents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...cache_specs.errors import CacheError, UsageError, nearest
from ...cache_specs.layout import LEVEL_BIAS, LEVEL_SCALE
from ...cache_specs.schema import LATENTS
from ...cache_specs.tables import code_of
from ..store.binding import check_images
from ..store.rows import ComponentRows
from ..store.store import CacheStore
from .features import Features, sample_id


def spread_rows(store: CacheStore, features: Features, num: int) -> np.ndarray:
    """Return `num` valid samples, ascending, spread evenly over the manifest and so over its classes."""
    valid = np.flatnonzero(features.valid())
    if not 1 <= num <= len(valid):
        raise UsageError(f"--samples {num}: {store.path} has 1 to {len(valid)} to show")
    places = (np.arange(num) + 0.5) * len(valid) / num
    return valid[places.astype(np.int64)]


def images_of(
    store: CacheStore,
    features: Features,
    rows: np.ndarray,
    *,
    data: str | None = None,
    autoencoder: str | None = None,
    weights: Path | None = None,
    entries: Sequence[Path] = (),
) -> np.ndarray:
    """Return the pictures [n, R, R, 3] uint8 of samples `rows`: of `data` where given, else decoded latents.

    Raises `UsageError` where the autoencoder's weights cannot be had (name the images with --data then), `CacheError`
    where a picture of `data` is missing or not the one that `features` saw.
    """
    if data is not None:
        return _from_files(store, features, rows, data)
    present = [name for name in store.components() if name.startswith(f"{LATENTS}/") and store.is_complete(name)]
    names = [name.partition("/")[2] for name in present]
    if autoencoder is None and len(names) != 1:
        found = f"several latents: {', '.join(names)}; choose with --autoencoder" if names else "no latents"
        raise UsageError(f"{store.path} has {found}{'' if names else '; name the images with --data PATH'}")
    name = autoencoder or names[0]
    if name not in names:
        raise UsageError(f"{store.path} has no finished latents {name!r}; {nearest(name, names)}")
    component = store.component(f"{LATENTS}/{name}")
    assert component is not None, name
    check_images(store, [features.component.path, component.path])
    from ..models.autoencoders import load_autoencoder

    moments = torch.from_numpy(ComponentRows(store, component).read("moments", rows)).float()
    if component.dtype == "uint8":
        moments = moments * LEVEL_SCALE + LEVEL_BIAS
    try:
        code = code_of(component.path, component.spec, entries)
        decoder = load_autoencoder(component.spec, weights=weights, code=code)
    except UsageError as error:
        raise UsageError(f"{error} Or name the images with --data PATH: they are then not decoded") from error
    latents = moments[:, : component.spec["latent_channels"]]  # the posterior's mean
    return decoder.decode(latents).numpy()


def _from_files(store: CacheStore, features: Features, rows: np.ndarray, data: str) -> np.ndarray:
    from ..images.decode import decode_batch
    from ..images.demo_data import demo_manifest
    from ..images.manifest import scan_folder

    manifest = demo_manifest() if data == "demo" else scan_folder(Path(data), allow_empty=True)
    ids = [sample_id(store, int(row)) for row in rows]
    way_out = "give the images that the cache was built from"
    strangers = sorted(set(ids) - set(manifest.sample_ids.tolist()))
    if strangers:
        raise CacheError(f"--data {data}: {strangers[0]} is not among its {len(manifest)} images; {way_out}")
    expected = store.read(f"{features.component.path}/source_bytes", 0, store.layout.num_samples)[rows]
    batch = decode_batch(manifest.source, ids, store.layout.resolution, expected)
    for place, reason in batch.bad.items():
        raise CacheError(f"--data {data}: {ids[place]}: {reason}")
    return batch.images
