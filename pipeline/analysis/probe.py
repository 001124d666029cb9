"""How well an encoder's features tell classes apart: linear probe and nearest neighbours, cross-validated.

The study's finding is that this figure does not predict generation quality, so it stands beside those that do. For
the regression features are standardised on the training folds; scikit-learn, imported here and nowhere else, does it.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cache_specs.errors import UsageError
from .intervals import Estimate

SPLIT_SEED = 0
MAX_ITERATIONS = 2000


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracies of one classifier on one kind of features, a fold each; `words` is what its solver had to say."""

    features: str
    classifier: str
    folds: tuple[float, ...]
    words: str = ""

    @property
    def mean(self) -> float:
        return float(np.mean(self.folds))

    @property
    def spread(self) -> float:
        """Standard deviation over folds, unbiased."""
        return float(np.std(self.folds, ddof=1))

    @property
    def metric(self) -> str:
        """The figure's name: `linear_probe` on mean-pooled tokens, `linear_probe_cls` on the class token."""
        return self.classifier + ("_cls" if self.features == "cls" else "")

    def estimate(self) -> Estimate:
        """Return the mean over folds; folds share their training images, so their spread is no interval."""
        return Estimate(num=len(self.folds), value=self.mean, reason=f"std over folds {self.spread:.4f}")


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Rows that can be probed: `rows` and `labels` [n]; `left_out` says which classes are too small."""

    rows: np.ndarray
    labels: np.ndarray
    left_out: tuple[str, ...]

    @property
    def most_frequent(self) -> float:
        """Accuracy of always naming the largest class."""
        return float(np.bincount(self.labels).max() / len(self.labels))


def probeable(rows: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], folds: int) -> LabelledRows:
    """Return the rows of classes that have an image for every fold.

    Raises `UsageError` where fewer than two classes are left, or for fewer than two folds.
    """
    if folds < 2:
        raise UsageError(f"--folds {folds}: expected 2 or more, or there is nothing to test on")
    counts = np.bincount(labels, minlength=len(class_names))
    left_out = tuple(
        f"{class_names[label]} ({counts[label]})" for label in np.flatnonzero((counts > 0) & (counts < folds))
    )
    kept = counts[labels] >= folds
    if len(np.unique(labels[kept])) < 2:
        few = f"; too few images: {', '.join(left_out)}" if left_out else ""
        raise UsageError(
            f"probing needs two classes with at least {folds} images each, one a fold; found "
            f"{len(np.unique(labels[kept]))}{few}. Take more images (--num) or fewer --folds"
        )
    return LabelledRows(rows=rows[kept], labels=labels[kept], left_out=left_out)


def accuracies(
    features: np.ndarray, labels: np.ndarray, *, name: str, folds: int, neighbours: int
) -> Iterator[Accuracy]:
    """Yield the accuracy of a logistic regression and of k nearest neighbours on `features` [n, E], `labels` [n].

    The regression is scikit-learn's, L2 with C = 1; neighbours are by cosine, majority of k. Folds are stratified and
    the same for every encoder. Raises `UsageError` for constant features or more neighbours than a training fold has.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not np.ptp(features, axis=0).any():
        raise UsageError(f"{name}: every image has the same features; there is nothing to learn from")
    smallest = len(labels) - -(-len(labels) // folds)
    if not 1 <= neighbours <= smallest:
        raise UsageError(f"--neighbours {neighbours}: expected 1 to {smallest}, the images of a training fold")
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    yield _cross_validated(linear, features, labels, folds, name, "linear_probe")
    nearest = KNeighborsClassifier(n_neighbors=neighbours, metric="cosine")
    yield _cross_validated(nearest, features, labels, folds, name, f"knn{neighbours}")


def _cross_validated(
    classifier: Any, features: np.ndarray, labels: np.ndarray, folds: int, name: str, label: str
) -> Accuracy:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    split = StratifiedKFold(folds, shuffle=True, random_state=SPLIT_SEED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        scores = cross_val_score(classifier, features, labels, cv=split)
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    words = f"the solver stopped at {MAX_ITERATIONS} iterations" if stopped else ""
    return Accuracy(features=name, classifier=label, folds=tuple(map(float, scores)), words=words)
