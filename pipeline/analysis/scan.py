"""Tokens measured as they are made and never stored: at which block and time of a model they represent best.

In: batches of tokens of images in one order. Kept of a place (block, time) are a number an image and metric, and its
mean token for the probe: n * E float32, and no tokens.
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from ...cache_specs.errors import JobError, UsageError
from .figures import new_figure, save
from .intervals import Estimate, mean_estimate
from .measure import ALL_CLASSES, csv_row, write_rows
from .probe import accuracies, probeable
from .spatial_metrics import undefined_metrics, unmasked_metrics

_DRAWN = {"linear_probe": "linear probe, accuracy", "lds": "LDS"}


class Measures:
    """What is kept of the tokens of one place, over a `grid`."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.lds: list[np.ndarray] = []
        self.means: list[np.ndarray] = []

    def add(self, tokens: Tensor) -> None:
        """Take up tokens [b, T, E] float32."""
        if "lds" not in undefined_metrics(self.grid):
            self.lds.append(unmasked_metrics(tokens, self.grid)["lds"].double().cpu().numpy())
        self.means.append(tokens.mean(1).cpu().numpy())


class TokenScan:
    """The figures of every place: linear probe and k-NN on mean tokens, as `repa-cache probe` has them, and LDS.

    `labels` [n] are of the images in the order of their tokens; where they cannot be probed, `reason` says why.
    """

    def __init__(
        self, title: str, *, labels: np.ndarray, class_names: tuple[str, ...], folds: int, neighbours: int
    ) -> None:
        self._title, self._folds, self._neighbours = title, folds, neighbours
        self.places: dict[tuple[int, float], dict[str, Estimate]] = {}
        self._names: list[str] = []
        self.reason, self.chance = "", 0.0
        self.left_out: tuple[str, ...] = ()
        self._rows, self._labels = np.arange(len(labels)), labels
        try:
            usable = probeable(self._rows, labels, class_names, folds)
        except UsageError as error:
            if folds < 2:
                raise
            self.reason = str(error)  # LDS needs no labels
            return
        self._rows, self._labels = usable.rows, usable.labels
        self.left_out, self.chance = usable.left_out, usable.most_frequent

    def finish(self, block: int, t: float, name: str, measures: Measures) -> dict[str, Estimate]:
        """Return the figures of a place, by metric; `name` is what a component of its tokens would be called."""
        found = self._probed(name, np.concatenate(measures.means))
        undefined = undefined_metrics(measures.grid)
        if "lds" in undefined:
            found["lds"] = Estimate(num=0, reason=undefined["lds"])
        else:
            found["lds"] = mean_estimate(np.concatenate(measures.lds))
        self.places[block, t] = found
        self._names.append(name)
        return found

    def _probed(self, name: str, means: np.ndarray) -> dict[str, Estimate]:
        if self.reason:
            return dict.fromkeys(("linear_probe", f"knn{self._neighbours}"), Estimate(num=0, reason=self.reason))
        scores = accuracies(means[self._rows], self._labels, name=name, folds=self._folds, neighbours=self._neighbours)
        return {one.metric: one.estimate() for one in scores}

    def best(self, metric: str) -> tuple[int, float] | None:
        """Return the place where a metric is highest, None where it has no figure."""
        known = {place: value for place, found in self.places.items() if (value := found[metric].value) is not None}
        return max(known, key=known.__getitem__) if known else None

    def write(self, file: Path) -> Path:
        """Draw the figure and write its table beside it, as `repa-cache probe` writes one; return the table's file."""
        table = file.with_suffix(".csv")
        lines = [
            csv_row(name, "", ALL_CLASSES, metric, estimate)
            for name, found in zip(self._names, self.places.values(), strict=True)
            for metric, estimate in found.items()
        ]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobError(f"{file.parent} cannot be made ({error.strerror}); name an --out that can") from error
        write_rows(table, lines)
        self._draw(file)
        return table

    def _draw(self, file: Path) -> None:
        drawn = [metric for metric in _DRAWN if self.best(metric) is not None]
        times = sorted({t for _, t in self.places})
        figure = new_figure(figsize=(4.2 * max(1, len(drawn)), 3.2), layout="constrained")
        figure.suptitle(self._title, fontsize=9)
        for axis, metric in zip(figure.subplots(1, max(1, len(drawn)), squeeze=False)[0], drawn, strict=False):
            for order, t in enumerate(times):
                blocks = sorted(block for block, time in self.places if time == t)
                values = [self.places[block, t][metric].value for block in blocks]
                shade = str(0.8 * order / max(1, len(times) - 1))  # black at data, lighter towards noise
                axis.plot(blocks, values, color=shade, marker="o", markersize=3, linewidth=1, label=f"t {t:g}")
            if metric == "linear_probe":
                axis.axhline(self.chance, color="tab:red", linewidth=0.8, linestyle=":")
                axis.text(0, self.chance, "always the largest class", fontsize=7, va="bottom")
            axis.set_xlabel("after block (0: before the first)", fontsize=8)
            axis.set_title(_DRAWN[metric], fontsize=9)
            axis.tick_params(labelsize=8)
        figure.axes[-1].legend(frameon=False, fontsize=7)
        save(figure, file)
