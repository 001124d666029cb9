"""A fit is made once and stored; whoever asks for the same one finds it."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from ...cache_specs.derived import FITS, SAMPLE_SEED, Fit, read_fit
from ...cache_specs.schema import ComponentSpec
from ..store.fits import write_fit
from ..store.store import CacheStore
from .method import Inputs, Method
from .sample import sample_rows


def fit_sources(store: CacheStore, components: Iterable[ComponentSpec]) -> dict[str, dict[str, str]]:
    """Return what a fit says of its sources, by path."""
    return {
        component.path: {"fingerprint": component.fingerprint(store.layout), "weights": component.weights}
        for component in components
    }


def ensure_fit(
    store: CacheStore,
    name: str,
    label: str,
    method: Method,
    sources: Mapping[str, Mapping[str, str]],
    num: int,
    *,
    sample: Callable[[np.ndarray], Iterable[Inputs]],
    on_message: Callable[[str], None],
) -> Fit:
    """Return the fit `name`: the stored one where it was made by this method, of these sources and sample, else a new.

    `sample` gives the `Inputs` of those of the rows drawn that can be used. The caller holds the lock of what the fit
    is for.
    """
    found = read_fit(store.path, name)
    if found is not None and found.is_of(label, sources, num):
        return found
    rows = sample_rows(store.read("label", 0, store.layout.num_samples), num, SAMPLE_SEED)
    on_message(f"{FITS}/{name}: fitting {label} to {len(rows)} images")
    images = 0

    def counted() -> Iterator[Inputs]:
        nonlocal images
        for inputs in sample(rows):
            images += len(inputs.tokens)
            yield inputs

    arrays = method.fit(counted())
    drawn = {"num": num, "seed": SAMPLE_SEED, "images": images}
    fit = Fit(name=name, method=label, sources=sources, sample=drawn, arrays=arrays)
    write_fit(store, fit)
    return fit
