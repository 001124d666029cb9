"""Was each derived component made with the fit beside it, and is its source still the one that it was made of?"""

from collections.abc import Iterator, Mapping, Sequence

from ...cache_specs.binding import SHARDS_DIGEST
from ...cache_specs.derived import FITS, Fit, fit_name, read_fit
from ...cache_specs.errors import CacheError
from ...cache_specs.group import METADATA
from ...cache_specs.schema import ComponentSpec
from ..store.store import CacheStore


def stored_fits(store: CacheStore) -> Iterator[tuple[str, Fit | CacheError]]:
    """Yield every fit of a cache with its name, or what is wrong with it."""
    for name in sorted((store.path / FITS).names() - {METADATA}):
        try:
            fit = read_fit(store.path, name)
        except CacheError as error:
            yield name, error
            continue
        group = store.path / FITS / name
        yield name, fit or CacheError(f"{group}: not finished; remove it, or run its repa-cache derive again")


def fit_problems(store: CacheStore, components: Sequence[ComponentSpec], fits: Mapping[str, Fit]) -> Iterator[str]:
    """Yield which derived components have no fit, or were made with another."""
    for component in components:
        if component.derived is None:
            continue
        fit, where = fits.get(fit_name(component.path)), f"{store.path}: {component.path}"
        if fit is None:
            yield (
                f"{where}: its fit, {FITS}/{fit_name(component.path)}, is not there; where its source is, "
                f"{component.build_command(store.path)} makes it again"
            )
        elif fit.weights != component.weights:
            yield (
                f"{where} was made with another fit than {FITS}/{fit_name(component.path)} ({component.weights}, "
                f"found {fit.weights}); remove both and derive it again"
            )


def fit_notes(store: CacheStore, components: Sequence[ComponentSpec], fits: Mapping[str, Fit]) -> Iterator[str]:
    """Yield which fits are of other sources than those that the cache holds by now."""
    present = {component.path: component.fingerprint(store.layout) for component in components}
    for name, fit in fits.items():
        for path, source in fit.sources.items():
            if present.get(path, source.get("fingerprint")) != source.get("fingerprint"):
                yield f"{FITS}/{name} is of another {path} than the one that is there by now (its fingerprint differs)"
                continue
            opened = store.opened(path) if path in present and SHARDS_DIGEST in source else None
            if opened is not None and opened.attributes.get(SHARDS_DIGEST, "") not in ("", source[SHARDS_DIGEST]):
                yield f"{FITS}/{name} is of other values of {path} than are there by now (its shards differ)"
