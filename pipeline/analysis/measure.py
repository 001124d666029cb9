"""Spatial metrics of a whole cache: one pass over the tokens of each encoder, in the memory of one batch.

Out: per-image values, as stored and normalised over space, and from them means with 95 % intervals, over all images
and by class. What cannot be said is said in words: a table never has a NaN in it.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ...cache_specs.errors import JobError, UsageError
from .features import Features
from .intervals import Estimate, mean_estimate
from .masks import FEWEST_SHARE
from .spatial_metrics import srss, undefined_metrics, unmasked_metrics

METRICS = ("lds", "cds", "rmsc", "srss")
ALL_CLASSES = "all"
CSV_HEADER = ("encoder", "gamma", "class", "metric", "mean", "low", "high", "num", "reason")

Mask = Callable[[int, tuple[int, int]], np.ndarray | None]  # (row, grid) -> foreground [T] bool, or none to be used


@dataclass(kw_only=True)
class Measured:
    """The metrics of one encoder, image by image.

    `rows` [n] are the images with values; `values[gamma][metric]` is [n] float64, gamma None for tokens as stored. A
    metric that is not in it has its `reasons`; an image without SRSS has NaN there. `constant` counts images left out
    because all their tokens are the same. `enlarged` says so of tokens whose neighbours are alike by construction.
    """

    encoder: str
    random_weights: bool
    rows: np.ndarray
    values: dict[float | None, dict[str, np.ndarray]]
    constant: int
    enlarged: str = ""
    reasons: dict[str, str] = field(default_factory=dict)


def measure(
    encoder: Features,
    rows: np.ndarray,
    *,
    gamma: float,
    mask: Mask | None = None,
    on_progress: Callable[[int], object] = lambda images: None,
) -> Measured:
    """Measure samples `rows` of an encoder as stored and normalised at `gamma`; `mask` gives SRSS its foreground.

    Raises `UsageError` for a gamma outside 0 to 1, `CacheError` naming the sample for values that are not finite.
    """
    if not 0 <= gamma <= 1:
        raise UsageError(f"--gamma {gamma}: expected 0 to 1")
    reasons = dict(undefined_metrics(encoder.grid))
    if mask is None:
        reasons["srss"] = "no --masks"
    names = [name for name in METRICS if name not in reasons]
    kept: list[np.ndarray] = []
    parts: dict[float | None, dict[str, list[np.ndarray]]] = {
        key: {name: [] for name in names} for key in (None, gamma)
    }
    for batch in encoder.batches(rows):
        varied = ~batch.constant()
        kept.append(batch.rows[varied.numpy()])
        foreground = _foreground(mask, batch.rows, encoder.grid) if mask and "srss" in names else None
        for key, lists in parts.items():
            tokens = batch.tokens if key is None else batch.normalized(key)
            found = unmasked_metrics(tokens, encoder.grid)
            if foreground is not None:
                # An empty mask has no anchor: NaN, which is what an image without a mask is to have.
                found["srss"] = srss(tokens, encoder.grid, foreground)
            for name, values in lists.items():
                values.append(found[name][varied].double().numpy())
        on_progress(len(batch.rows))
    measured = np.concatenate(kept)
    return Measured(
        encoder=encoder.name,
        random_weights=encoder.random_weights,
        rows=measured,
        values={key: {name: np.concatenate(values) for name, values in lists.items()} for key, lists in parts.items()},
        constant=len(rows) - len(measured),
        enlarged=encoder.enlarged,
        reasons=reasons,
    )


def _foreground(mask: Mask, rows: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    foreground = torch.zeros(len(rows), grid[0] * grid[1], dtype=torch.bool)
    for i, row in enumerate(rows.tolist()):
        found = mask(row, grid)
        if found is not None:
            foreground[i] = torch.from_numpy(found)
    return foreground


def estimate(measured: Measured, gamma: float | None, metric: str, chosen: np.ndarray | None = None) -> Estimate:
    """Return the mean of one metric with its interval, over all images or the `chosen` [n] bool."""
    if metric in measured.reasons:
        return Estimate(num=0, reason=measured.reasons[metric])
    values = measured.values[gamma][metric]
    values = values if chosen is None else values[chosen]
    if metric == "srss":
        values = values[np.isfinite(values)]
        if len(values) == 0:
            share = f"{FEWEST_SHARE:.0%} of its tokens on either side"
            return Estimate(num=0, reason=f"no image has a mask with {share} and anchors with pairs")
    if len(values) == 0:
        return Estimate(num=0, reason="no image whose tokens vary")
    return mean_estimate(values)


def table(measured: Measured) -> Iterator[str]:
    """Yield the lines of an encoder's table: one a metric, as stored beside normalised."""
    gamma = next(key for key in measured.values if key is not None)
    yield f"  {'':<6}{'as stored':<28}normalised over space, gamma {gamma:g}"
    for metric in METRICS:
        stored, normalized = estimate(measured, None, metric), estimate(measured, gamma, metric)
        if stored.value is None:
            yield f"  {metric:<6}left out: {stored.reason}"
        else:
            yield f"  {metric:<6}{stored!s:<28}{normalized}"
    if measured.enlarged:
        yield f"  {measured.enlarged}: neighbours are alike by construction, not by what the encoder sees"
    if measured.constant:
        images = "1 image has" if measured.constant == 1 else f"{measured.constant} images have"
        yield f"  {images} the same token everywhere (no spatial structure) and is left out"


def class_table(measured: Measured, labels: np.ndarray, class_names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of an encoder's table by class: means of the tokens as stored, then why any is missing."""
    metrics = [name for name in METRICS if name not in measured.reasons]
    width = max(len(name) for name in class_names)
    yield f"  {'class':<{width}} {'images':>7}" + "".join(f"  {name:<26}" for name in metrics)
    for label, name in enumerate(class_names):
        chosen = labels == label
        cells = [str(estimate(measured, None, metric, chosen)) for metric in metrics]
        yield f"  {name:<{width}} {int(chosen.sum()):>7}" + "".join(f"  {cell:<26}" for cell in cells)


def write_csv(file: Path, measured: Sequence[Measured], labels: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """Write every figure, one a line: encoder, gamma (empty as stored), class, metric, mean, interval, num, reason.

    `reason` says why there is no figure or interval, and of an enlarged map that it is one.
    """
    rows = []
    for one in measured:
        groups: list[tuple[str, np.ndarray | None]] = [(ALL_CLASSES, None)]
        groups += [(name, labels[one.encoder] == label) for label, name in enumerate(names)]
        for gamma in one.values:
            for name, chosen in groups:
                for metric in METRICS:
                    found = estimate(one, gamma, metric, chosen)
                    found = replace(found, reason="; ".join(filter(None, [found.reason, one.enlarged])))
                    rows.append(csv_row(one.encoder, "" if gamma is None else f"{gamma:g}", name, metric, found))
    write_rows(file, rows)


def csv_row(encoder: str, gamma: str, group: str, metric: str, found: Estimate) -> tuple[str, ...]:
    """Return one line of the figures' CSV; numbers to 9 digits, empty where there is none."""
    numbers = ["" if number is None else f"{number:.9g}" for number in (found.value, found.low, found.high)]
    return encoder, gamma, group, metric, *numbers, str(found.num), found.reason


def write_rows(file: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write the figures' CSV; raise `JobError` where the disk refuses."""
    try:
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(CSV_HEADER)
            writer.writerows(rows)
    except OSError as error:
        raise JobError(f"{file} cannot be written ({error.strerror}); name a --csv that can") from error
