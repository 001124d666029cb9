"""Which components of a cache a run uses: names as the command line gives them, resolved to finished groups."""

from collections.abc import Sequence

import numpy as np

from ...cache_specs import components
from ...cache_specs.components import Component, check_rows
from ...cache_specs.errors import CacheError, UsageError, nearest, option
from ...cache_specs.group import METADATA, component_names
from ...cache_specs.layout import ArrayLayout, CacheLayout
from ...cache_specs.schema import FEATURES, LATENTS
from ...cache_specs.storage import Location
from ...cache_specs.tables import stored_encoder


def read_layout(cache: Location) -> CacheLayout:
    """Return which samples a cache holds and how they are cut; raise CacheError where there is no cache."""
    layout = components.read_layout(cache)
    if layout is None:
        raise CacheError(
            f"{cache}: no cache here. Make one with "
            f"repa-cache build --cache {cache} --data PATH --encoder NAME --autoencoder NAME"
        )
    return layout


def choose_component(
    cache: Location, kind: str, name: str | None, *, without_images: bool = False
) -> tuple[str, int | None]:
    """Return the name of the group to use in latents/ or features/, and the layer where one was asked for.

    None is the only one. `without_images` says that the cache was imported without them, so that nothing can be added.
    """
    flag, what = ("--autoencoder", "autoencoder") if kind == LATENTS else ("--encoder", "encoder")
    without = option("--recipe sit", "encoder=()")
    present = component_names(cache, kind)
    if not present:
        if kind == FEATURES and without_images:
            raise CacheError(
                f"{cache} was imported without images, so no {what} can be added to it; train without "
                f"alignment ({without})"
            )
        raise CacheError(
            f"{cache} holds no {what}. Add one with repa-cache build --cache {cache} --data PATH "
            f"{flag} NAME" + ("" if kind == LATENTS else f", or train without alignment ({without})")
        )
    if name is None:
        if len(present) > 1:
            raise UsageError(f"{cache} holds several: {', '.join(present)}. Choose with {option(flag)}")
        return present[0], None
    if kind == FEATURES:
        found = stored_encoder(name, present)
    else:  # `pixels` as they are asked of a build, however they are stored
        found = next(((group, None) for group in (name, f"{name}-uint8") if group in present), None)
    if found is not None:
        return found
    raise UsageError(
        f"{cache} holds no {what} {name!r}; {nearest(name, present)}. Add it with repa-cache build "
        f"--cache {cache} --data PATH {flag} {name}"
    )


def preferred_latents(cache: Location, names: Sequence[str]) -> str | None:
    """Return the first of these latents that a cache has, None where it has none of them."""
    present = component_names(cache, LATENTS) if names else []
    return next((name for name in names if name in present), None)


def finished_component(cache: Location, layout: CacheLayout, kind: str, name: str) -> Component:
    """Return a component; raise CacheError where it is not finished, or does not hold (`read_component`)."""
    group = cache / kind / name
    component = components.read_component(cache, layout, f"{kind}/{name}")
    if component is None:
        raise CacheError(f"{group} is gone; build it again")
    if not component.complete:
        raise CacheError(
            f"{group} is not complete: its build has not finished. Finish it with "
            f"{components.finish_command(cache, component.spec)}"
        )
    return component


def check_ranges(valid: Location, layout: ArrayLayout) -> None:
    """Raise CacheError where a finished component lacks a range: a copy was interrupted, or a file deleted.

    One listing, of the folder of `valid`: its shard is a range's last file, for the build and for who copies in order
    of names. Does nothing where it is stored under other names than ours.
    """
    names = valid.names() - {METADATA}
    missing = [index for index in range(layout.num_shards) if layout.shard_file(index) not in names]
    if missing and (not names or any(name.startswith("c.") for name in names)):
        first = missing[0] * layout.shard[0]
        last = min(first + layout.shard[0], layout.shape[0]) - 1
        raise CacheError(
            f"{valid / layout.shard_file(missing[0])} (samples {first} to {last}) is missing, and with it "
            f"{len(missing)} of {layout.num_shards} ranges of a component that says it is complete. Copy it again from "
            f"where it came from, or delete {valid.parent} and build it again"
        )


def read_labels(cache: Location, layout: CacheLayout) -> np.ndarray:
    """Return the label of every sample [N] int64; raise CacheError where they are not as the layout says."""
    stored, num_classes = cache / "label", len(layout.class_names)
    check_rows(stored, layout)
    labels = read_whole(stored).astype(np.int64)
    if labels.shape != (layout.num_samples,) or labels.min() < 0 or labels.max() >= num_classes:
        raise CacheError(
            f"{stored} is {list(labels.shape)} with labels up to {labels.max()}; expected "
            f"[{layout.num_samples}] below {num_classes}: the cache is damaged"
        )
    return labels


def read_whole(stored: Location) -> np.ndarray:
    """Return all of a small array, wherever and however it is stored; raise CacheError where it cannot be read."""
    import zarr

    try:
        with stored.reading():
            return np.asarray(zarr.open_array(stored.zarr_store(), mode="r")[:])
    except (OSError, ValueError, RuntimeError) as error:
        raise CacheError(f"{stored} cannot be read ({error}); the cache is damaged") from error
