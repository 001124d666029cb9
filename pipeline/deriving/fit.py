"""A fit is made once and stored; whoever asks for the same one finds it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ...cache_specs.binding import SHARDS_DIGEST
from ...cache_specs.components import Component
from ...cache_specs.derived import FITS, SAMPLE_SEED, Fit, read_fit
from ...cache_specs.errors import CacheError
from ...cache_specs.schema import FEATURES, ComponentSpec
from ..store.fits import write_fit, write_fits_file
from ..store.record import nothing_encoded
from ..store.store import CacheStore
from .method import Fitting, Inputs
from .sample import sample_rows


def fit_sources(store: CacheStore, components: Iterable[ComponentSpec]) -> dict[str, dict[str, str]]:
    """Return what a fit says of its sources, by path."""
    return {
        component.path: {"fingerprint": component.fingerprint(store.layout), "weights": component.weights}
        for component in components
    }


def stored_sources(store: CacheStore, components: Sequence[Component]) -> dict[str, dict[str, str]]:
    """Return what a fit to stored values says of its sources: also which values, which a mended image changes."""
    found = {component.spec.path: component.attributes for component in components}
    sources = fit_sources(store, [component.spec for component in components])
    for path, attributes in found.items():
        if SHARDS_DIGEST in attributes:  # else completed by an earlier version
            sources[path][SHARDS_DIGEST] = attributes[SHARDS_DIGEST]
    return sources


def ensure_fit(
    store: CacheStore,
    name: str,
    label: str,
    method: Fitting,
    sources: Mapping[str, Mapping[str, str]],
    num: int,
    *,
    sample: Callable[[np.ndarray], Iterable[Inputs]],
    on_message: Callable[[str], None] = lambda line: None,
    on_images: Callable[[int], None] = lambda num: None,
) -> Fit:
    """Return the fit `name`: the stored one where it was made by this method, of these sources and sample, else a new.

    `sample` gives the `Inputs` of those of the rows that can be used: of about `num`, each class with its share, or of
    all where the method wants them. The caller holds the lock of what the fit is for. Raises `CacheError` rather than
    to replace the fit of a component that is there.
    """
    found = read_fit(store.path, name)
    asked = {"views": store.layout.num_views} if method.whole else {"num": num, "seed": SAMPLE_SEED}
    if found is not None and found.is_of(label, sources, asked):
        write_fits_file(store)
        return found
    made = store.component(f"{FEATURES}/{name}")
    if found is not None and made is not None and not nothing_encoded(store.path / made.path):
        raise CacheError(
            f"{store.path}: {made.path} was made of another {' or '.join(found.sources)} than is there by now; remove "
            "it to derive it again"
        )
    labels = store.read("label", 0, store.layout.num_samples)
    rows = np.arange(len(labels)) if method.whole else sample_rows(labels, num, SAMPLE_SEED)
    on_message(f"{FITS}/{name}: fitting {label} to {len(rows)} images")
    images = 0

    def counted() -> Iterator[Inputs]:
        nonlocal images
        for inputs in sample(rows):
            images += len(inputs.tokens)
            on_images(len(inputs.tokens))
            yield inputs

    arrays = method.fit(counted())
    views = asked.get("views", 1)
    fit = Fit(name=name, method=label, sources=sources, sample={**asked, "images": images // views}, arrays=arrays)
    write_fit(store, fit)
    return fit
