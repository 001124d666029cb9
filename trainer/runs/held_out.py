"""Which samples a run trains on, and which it is only judged by: a share of its cache's, or another cache's.

Every row has a number of its own, a hash of (split_seed, row) alone. Those with the least are held out, those with the
greatest are a subset: whatever else is valid or asked for, on any number of ranks and at a resume. A larger share holds
what a smaller one does, a larger subset too, and runs of several seeds share both.
"""

from dataclasses import dataclass

import numpy as np

from ...cache_specs.errors import UsageError
from ..objectives.choose import objective_class
from ..reading.reader import CacheReader
from ..rows.row_reads import NDArray
from .config import RunConfig

_SPLIT = 6  # the word of this use among the streams of one seed; the last one before: evaluating/reference.py
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of splitmix64's finalizer, as D. Stafford's
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of a cache, ascending int64: those trained on, and those held out."""

    training: NDArray
    held_out: NDArray


@dataclass(frozen=True, kw_only=True)
class ValidationData:
    """Rows [n] int64 of a reader's cache that the run never trains on; `chosen_of` so many are n of them."""

    reader: CacheReader
    rows: NDArray
    chosen_of: int


def split(config: RunConfig, reader: CacheReader) -> Split:
    """Return the valid rows that a run trains on, and those that it holds out.

    Raises UsageError where nothing is left to train on, nothing is held out, or a subset wants more than there are.
    """
    rows, fraction = reader.valid_rows, config.validation.fraction
    if fraction == 0 and config.subset is None:
        return Split(training=rows, held_out=rows[:0])
    numbers = row_numbers(rows, config.split_seed)
    out = numbers < np.uint64(int(fraction * 2**64))
    training, held_out = rows[~out], rows[out]
    for name, found in (("held out", held_out if fraction > 0 else training), ("to train on", training)):
        if len(found) == 0:
            raise UsageError(
                f"validation.fraction is {fraction}: of {len(rows)} samples of {reader.path} none is {name}; "
                f"choose another share, or another split_seed"
            )
    if config.subset is not None:
        if config.subset > len(training):
            raise UsageError(f"subset is {config.subset}; {reader.path} has {len(training)} samples to train on")
        greatest = np.argsort(numbers[~out], kind="stable")[len(training) - config.subset :]
        training = np.sort(training[greatest])
    return Split(training=training, held_out=held_out)


def row_numbers(rows: NDArray, seed: int) -> NDArray:
    """Return a number of each row [n] int64, uint64: as good as random, and a function of seed and row alone."""
    numbers = rows.astype(np.uint64)
    for key in np.random.SeedSequence(seed, spawn_key=(_SPLIT,)).generate_state(2, np.uint64):
        numbers = numbers + key
        for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
            numbers = (numbers ^ (numbers >> shift)) * factor
        numbers ^= numbers >> _SHIFTS[2]
    return numbers


def validation_data(config: RunConfig, reader: CacheReader) -> ValidationData | None:
    """Return what a run of a resolved configuration is judged by, None where it asks for no validation.

    Raises as `split` and `CacheReader`, and UsageError where the other cache is not of the same networks and classes,
    or holds the very images that are trained on.
    """
    settings = config.validation
    if not settings.acts:
        return None
    if settings.cache is None:
        rows = split(config, reader).held_out
    else:
        reader = _other_cache(settings.cache, config, reader)
        rows = reader.valid_rows
    least = np.argsort(row_numbers(rows, config.split_seed), kind="stable")[: settings.num]
    return ValidationData(reader=reader, rows=np.sort(rows[least]), chosen_of=len(rows))


def _other_cache(cache: str, config: RunConfig, reader: CacheReader) -> CacheReader:
    encoders = tuple(features.name for features in reader.features)
    other = CacheReader(
        cache,
        autoencoder=config.autoencoder,
        encoder=encoders,
        cls_token=objective_class(config.objective).reads(config.alignment).cls_token,
        check_reads=config.check_reads,
    )
    if other.fingerprints["dataset"] == reader.fingerprints["dataset"]:
        raise UsageError(
            f"validation.cache: {cache} holds the images of {config.cache}, which are trained on; hold a share of them "
            f"out with validation.fraction"
        )
    shapes = [[(f.name, f.grid, f.width) for f in one.features] for one in (reader, other)]
    for what, ours, theirs in (
        ("classes", reader.class_names, other.class_names),
        ("latents", (reader.latents.spec, reader.latents.weights), (other.latents.spec, other.latents.weights)),
        ("tokens", *shapes),
    ):
        if ours != theirs:
            raise UsageError(
                f"validation.cache: the {what} of {cache} are not as those of {config.cache}; build it with the same "
                f"classes, networks and resolution, or hold a share out with validation.fraction"
            )
    return other
