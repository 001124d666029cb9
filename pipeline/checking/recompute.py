"""Do the images still give what is stored? A few samples are encoded again and compared, every view of them.

Checksums find damaged bytes; this finds a changed image, other weights, another preprocessing. Both sides are
normalised by the stored statistics of their image before the cosine: one outlier channel would make all tokens alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ...cache_specs.derived import FITS, Fit, fit_name, network_spec, read_fit, read_method, same_sources
from ...cache_specs.errors import CacheError, UsageError
from ...cache_specs.layout import layer_array, views_of
from ...cache_specs.schema import FEATURES, TOKENS, ComponentSpec, stored_layers
from ...cache_specs.tables import code_of
from ..building.networks import load_model
from ..building.request import ModelRequest
from ..deriving.choose import transform_of
from ..deriving.derive import derived_tokens
from ..deriving.fit import fit_sources
from ..deriving.method import Derivation
from ..deriving.source import StoredSource
from ..images.decode import decode_batch
from ..images.manifest import ImageSource
from ..store.store import CacheStore
from ..store.token_writer import Tokens, stored_views

BATCH = 8
SEED = 0  # the same samples each time
# Of a sample's mean: float16, int8 and other devices stay above, another picture far below. Of a convolutional network
# bf16 alone goes down to 0.93, and two devices round it each in its own way.
MIN_COSINE = {"fp32": 0.99, "tf32": 0.99, "bf16": 0.85}
MIN_SPREAD = 1e-3  # channels whose std is below this share of their mean drown in float16 rounding


@dataclass(kw_only=True)
class Agreement:
    """How far one component's stored values are from the images': cosines over tokens, `problems` a line a sample.

    Latents count as h * w tokens of M channels. Tokens without any spread (a blank picture) are left out. `left_out`
    is why nothing of the component could be encoded again; `done` what was done again, encoded or derived.
    """

    path: str
    done: str = "encoded"
    left_out: str | None = None
    num_samples: int = 0
    cosines: list[np.ndarray] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return float(np.mean(np.concatenate(self.cosines))) if self.cosines else float("nan")

    @property
    def min(self) -> float:
        return float(np.min(np.concatenate(self.cosines))) if self.cosines else float("nan")


def recompute(
    cache: str | Path,
    source: ImageSource,
    *,
    num: int,
    weights: Mapping[str, Path],
    device: str = "cpu",
    entries: Sequence[Path] = (),
) -> list[Agreement]:
    """Encode `num` samples of every finished component again and compare; say which had to be left out.

    `weights` gives local files by the table's name, as at the build; `entries` are the files of networks of the user's
    own, without which their components are left out. Raises `UsageError` where weights cannot be had
    or are not those that the component was built with, `CacheError` where nothing can be compared.
    """
    if num < 1:
        raise UsageError(f"--recompute {num}: expected 1 or more samples")
    store = CacheStore.open(cache)
    found = [store.component(path) for path in store.components() if store.is_complete(path)]
    components = [component for component in found if component is not None]
    if components and all(component.imported for component in components):
        raise UsageError(
            f"--recompute: {cache} holds imported latents alone, of weights that are not known; nothing can be encoded "
            "again and compared. verify without --recompute checks every stored byte"
        )
    if not components:
        raise CacheError(f"{cache}: no component is complete, so there is nothing to recompute")
    size = store.layout.num_samples
    valid = np.logical_and.reduce([store.read(f"{c.path}/valid", 0, size) for c in components])
    rows = np.flatnonzero(valid)
    if not len(rows):
        raise CacheError(f"{cache}: no sample is valid in every component")
    rows = _some(rows, num)
    return [
        Agreement(path=component.path, left_out=why)
        if (why := _not_from_images(component))
        else _derive_again(store, component, source, rows, weights, device, entries)
        if component.derived is not None
        else _recompute_component(store, component, source, rows, weights, device, entries)
        for component in components
    ]


def compare_tokens(store: CacheStore, component: ComponentSpec, tokens: Tokens, *, num: int) -> Agreement:
    """Compare what is stored of `num` samples of a finished component with what `tokens` gives."""
    if num < 1:
        raise UsageError(f"--num {num}: expected 1 or more samples")
    rows = np.flatnonzero(store.read(f"{component.path}/valid", 0, store.layout.num_samples))
    agreement = Agreement(path=component.path)
    if not len(rows):
        return agreement
    rows = _some(rows, num)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        fresh = stored_views(tokens(part), component.dtype)
        for i, row in enumerate(part.tolist()):
            views = [
                {name: values[i, view] for name, values in fresh.items()} for view in range(store.layout.num_views)
            ]
            _compare(
                agreement, store, component, row, f"{component.path}: sample {row}", views, "the tokens derived again"
            )
    return agreement


def _derive_again(
    store: CacheStore,
    component: ComponentSpec,
    source: ImageSource,
    rows: np.ndarray,
    weights: Mapping[str, Path],
    device: str,
    entries: Sequence[Path],
) -> Agreement:
    """Compare what is stored of a derived component with what its source in the cache gives, or else the images."""
    derived, name = component.derived or {}, fit_name(component.path)
    fit = read_fit(store.path, name)
    sources = [found.spec for path in derived["from"] if (found := store.opened(path)) is not None and found.complete]
    if fit is None or fit.weights != component.weights:
        why = f"the fit that it was made with is not there as {FITS}/{name}"
        return Agreement(path=component.path, done="derived", left_out=why)
    if same_sources(fit.sources, fit_sources(store, sources)):
        derivation = Derivation(transform_of(read_method(derived["method"])), fit)
        tokens = derived_tokens(StoredSource(store, *sources), derivation, store.layout.num_views)
        return replace(compare_tokens(store, component, tokens, num=len(rows)), done="derived")
    if len(derived["from"]) > 1 or TOKENS in derived["spec"]:
        why = f"{' and '.join(derived['from'])}, of which it was made, is not there any more"
        return Agreement(path=component.path, done="derived", left_out=why)
    return _recompute_component(store, component, source, rows, weights, device, entries, fit=fit)


def _some(rows: np.ndarray, num: int) -> np.ndarray:
    return np.sort(np.random.default_rng(SEED).choice(rows, min(num, len(rows)), replace=False))


def _not_from_images(component: ComponentSpec) -> str | None:
    """Return why the images of a component cannot be encoded to it here, None where they can."""
    if component.imported:  # whose weights made it is not known, so that a difference would say nothing
        return "imported, of weights that are not known"
    if component.tokens:
        return (
            f"tokens of a {component.spec['model']}, which only repa-features RUN --cache CACHE --verify derives again"
        )
    return None


def _recompute_component(
    store: CacheStore,
    component: ComponentSpec,
    source: ImageSource,
    rows: np.ndarray,
    weights: Mapping[str, Path],
    device: str,
    entries: Sequence[Path],
    fit: Fit | None = None,
) -> Agreement:
    entry = component.spec["entry"]
    try:
        code = code_of(component.path, network_spec(component.spec), entries)
    except UsageError as error:
        return Agreement(path=component.path, left_out=str(error).removeprefix(component.path).lstrip(": "))
    request = ModelRequest(
        kind=component.kind,
        name=component.name,
        spec=component.spec,
        dtype=component.dtype,
        precision=component.precision,
        compressor=component.compressor,
        weights_file=weights.get(entry),
        code=code,
        fit=fit,
    )
    encode, digest = load_model(request, device)
    if digest != component.weights:
        raise UsageError(
            f"the weights of {entry} ({digest}) are not those that {component.path} was built with "
            f"({component.weights}); give the same file with --weights {entry}=FILE"
        )
    agreement = Agreement(path=component.path)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        ids = [str(store.read("sample_id", row, row + 1)[0]) for row in part.tolist()]
        known = np.array([store.read(f"{component.path}/source_bytes", row, row + 1)[0] for row in part.tolist()])
        batch = decode_batch(source, ids, store.layout.resolution, known)
        images = torch.tensor(batch.images).permute(0, 3, 1, 2)
        views = [images, images.flip(-1)][: len(views_of(component.spec, store.layout))]
        fresh = [{name: values.cpu().numpy() for name, values in encode(view).items()} for view in views]
        for i, row in enumerate(part.tolist()):
            where = f"{component.path}: sample {row} ({ids[i]})"
            if i in batch.bad:
                agreement.problems.append(f"{where}: {batch.bad[i]}")
                continue
            views_of_row = [{name: values[i] for name, values in arrays.items()} for arrays in fresh]
            _compare(agreement, store, component, row, where, views_of_row, "the image's values")
    return agreement


def _compare(
    agreement: Agreement,
    store: CacheStore,
    component: ComponentSpec,
    row: int,
    where: str,
    fresh: Sequence[Mapping[str, np.ndarray]],
    what: str,
) -> None:
    """Compare a sample's stored values with those made again, `fresh` a view; note the cosines and what is wrong."""
    stored, expected = _stored_sample(store, component, row), MIN_COSINE[component.precision]
    for view, arrays in enumerate(fresh):
        cosine = _cosines(component, {name: values[view] for name, values in stored.items()}, arrays)
        agreement.cosines.append(cosine)
        if len(cosine) and cosine.mean() < expected:
            agreement.problems.append(
                f"{where}, view {store.layout.views[view]}: {what} have cosine {cosine.mean():.3f} "
                f"with those stored (expected {expected} or more); the file was changed, or what encodes it"
            )
    agreement.num_samples += 1


def _stored_sample(store: CacheStore, component: ComponentSpec, row: int) -> dict[str, np.ndarray]:
    names = [array.name for array in component.arrays(store.layout) if len(array.shape) > 1]
    return {name: store.read(f"{component.path}/{name}", row, row + 1)[0] for name in names}


def _cosines(component: ComponentSpec, stored: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the cosine of each token of one view, of every layer, normalised by the stored statistics."""
    layers: Sequence[int | None] = stored_layers(component.spec) if component.kind == FEATURES else (None,)
    cosines = []
    for layer in layers:
        (old, mean, std), (new, _, _) = (_tokens(component, arrays, layer) for arrays in (stored, fresh))
        varies = std > MIN_SPREAD * np.abs(mean)
        a, b = ((tokens[:, varies] - mean[varies]) / std[varies] for tokens in (old, new))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append((a * b).sum(axis=1)[norms > 0] / norms[norms > 0])
    return np.concatenate(cosines)


def _tokens(
    component: ComponentSpec, arrays: Mapping[str, np.ndarray], layer: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens [T, E] and their channels' mean and std [E], float64, of one view as it is stored."""
    if component.kind != FEATURES:
        tokens = arrays["moments"].reshape(len(arrays["moments"]), -1).T.astype(np.float64)
        return tokens, tokens.mean(axis=0), tokens.std(axis=0)
    tokens, mean, std = (
        arrays[layer_array(name, layer)].astype(np.float64) for name in ("patch_tokens", "channel_mean", "channel_std")
    )
    if component.dtype == "int8":
        tokens = tokens * arrays[layer_array("token_scale", layer)].astype(np.float64)[:, None] * std + mean
    return tokens, mean, std
