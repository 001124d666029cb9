"""Fits as a build writes and reads them: whole, or not there (cache_specs/derived.py says what they are)."""

from ...cache_specs.derived import FITS, Fit
from ...cache_specs.group import METADATA
from .metadata import fit_files, fits_file
from .store import CacheStore


def write_fit(store: CacheStore, fit: Fit) -> None:
    """Write a fit, durably, in the place of the one that has its name. Killed at any moment, it is not there yet.

    The caller holds the lock of what the fit is for: its component, or the fit itself.
    """
    folder = store.path / FITS
    if (folder / METADATA).size() is None:
        (folder / METADATA).write(fits_file())
    group = folder / fit.name
    if (group / METADATA).size() is not None:
        (group / METADATA).delete()
        group.delete_tree()
    for name, data in fit_files(fit).items():
        (group / name).write(data)
