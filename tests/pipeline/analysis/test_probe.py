"""Linear probe and k-NN: against what must come out, and a k-NN written out again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from repa.cache_specs.errors import UsageError
from repa.pipeline.analysis.probe import SPLIT_SEED, accuracies, probeable

NAMES = ("a", "b", "c", "d")


def clusters(noise: float, num: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Three classes on their own axes, and a fourth channel that is always the same."""
    rng = np.random.default_rng(0)
    labels = np.arange(num) % 3
    features = np.hstack([np.eye(3)[labels] + noise * rng.standard_normal((num, 3)), np.ones((num, 1))])
    return features.astype(np.float32), labels


def test_separate_classes_are_told_apart_and_random_labels_are_not() -> None:
    features, labels = clusters(0.05)
    for found in accuracies(features, labels, name="mean-pooled", folds=3, neighbours=5):
        assert found.folds == (1.0, 1.0, 1.0)
        assert found.spread == 0
    shuffled = np.random.default_rng(1).permutation(labels)
    for found in accuracies(features, shuffled, name="cls", folds=3, neighbours=5):
        assert 0.15 < found.mean < 0.5
        assert found.metric.endswith("_cls")


def test_neighbours_vote_by_cosine_on_the_other_folds() -> None:
    features, labels = clusters(0.8)
    _, knn = accuracies(features, labels, name="mean-pooled", folds=3, neighbours=5)
    assert (knn.classifier, knn.metric) == ("knn5", "knn5")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = []
    for train, test in StratifiedKFold(3, shuffle=True, random_state=SPLIT_SEED).split(features, labels):
        nearest = np.argsort(-(unit[test] @ unit[train].T), axis=1)[:, :5]
        votes = np.array([np.bincount(labels[train][row], minlength=3).argmax() for row in nearest])
        expected.append(float(np.mean(votes == labels[test])))
    assert knn.folds == pytest.approx(expected)
    assert knn.spread == pytest.approx(np.std(expected, ddof=1))


def test_classes_without_an_image_a_fold_are_left_out_by_name() -> None:
    labels = np.array([0] * 6 + [1] * 5 + [2] * 4 + [3])
    found = probeable(np.arange(16) * 10, labels, NAMES, folds=5)
    assert found.left_out == ("c (4)", "d (1)")
    np.testing.assert_array_equal(found.rows, np.arange(11) * 10)
    assert found.most_frequent == pytest.approx(6 / 11)


@pytest.mark.parametrize(
    ("labels", "folds", "words"),
    [
        ([0] * 9, 5, "needs two classes with at least 5 images each, one a fold; found 1"),
        ([0] * 9 + [1], 5, r"found 1; too few images: b \(1\)"),
        ([0, 1], 1, "--folds 1: expected 2 or more"),
    ],
)
def test_too_little_to_probe_is_refused(labels: list[int], folds: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        probeable(np.arange(len(labels)), np.array(labels), NAMES, folds)


def test_useless_features_and_too_many_neighbours_are_refused() -> None:
    features, labels = clusters(0.1)
    with pytest.raises(UsageError, match="every image has the same features"):
        list(accuracies(np.ones_like(features), labels, name="cls", folds=3, neighbours=5))
    with pytest.raises(UsageError, match="--neighbours 61: expected 1 to 60"):
        list(accuracies(features, labels, name="cls", folds=3, neighbours=61))


def test_the_command_writes_what_correlate_reads(
    make_images: Callable[..., list[Path]], build: Callable[..., Any], repa_cache: Callable[..., Any], tmp_path: Path
) -> None:
    make_images(tmp_path / "images", num=12)
    build(tmp_path / "images", tmp_path / "cache")
    outcome = repa_cache("probe", tmp_path / "cache", "--folds", 3, "--neighbours", 3, "--csv", tmp_path / "p.csv")
    assert outcome.code == 0, outcome.err
    assert "cls: the encoder has none" in outcome.out
    assert "always the largest class: 0.5000" in outcome.out
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert [line.split(",")[:4] for line in lines[1:]] == [
        ["hog-grid4", "", "all", "linear_probe"],
        ["hog-grid4", "", "all", "knn3"],
    ]
