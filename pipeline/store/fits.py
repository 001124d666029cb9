"""Fits as a build writes and reads them: whole, or not there (cache_specs/derived.py says what they are)."""

from ...cache_specs.derived import FITS, Fit
from ...cache_specs.errors import CacheError
from ...cache_specs.group import METADATA, group_attributes
from .metadata import fit_files, fits_file
from .store import CacheStore


def write_fits_file(store: CacheStore) -> None:
    """Write the record of the group of all fits where it is missing or damaged; fits are made side by side."""
    folder = store.path / FITS
    with store.lock("cache", wait=True):
        try:
            whole = group_attributes(folder) is not None
        except CacheError:
            whole = False
        if not whole:
            (folder / METADATA).write(fits_file())


def write_fit(store: CacheStore, fit: Fit) -> None:
    """Write a fit, durably, in the place of the one that has its name. Killed at any moment, it is not there yet.

    The caller holds the lock of what the fit is for: its component, or the fit itself.
    """
    folder = store.path / FITS
    write_fits_file(store)
    group = folder / fit.name
    if (group / METADATA).size() is not None:
        (group / METADATA).delete()
        group.delete_tree()
    for name, data in fit_files(fit).items():
        (group / name).write(data)
