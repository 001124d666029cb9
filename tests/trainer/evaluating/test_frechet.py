"""Frechet distance, precision and recall against closed forms, scipy's matrix square root and a double loop."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from repa.cache_specs.errors import UsageError
from repa.trainer.evaluating.frechet import frechet_distance, precision_recall


def cloud(num: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((num, width)) @ rng.standard_normal((width, width))
    return (mixed + rng.standard_normal(width)).astype(np.float32)


def test_the_distance_is_the_formulas():
    a, b = cloud(200, 12, 0), cloud(90, 12, 1)
    wide = [x.astype(np.float64) for x in (a, b)]
    (m, c), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in wide)
    expected = np.sum((m - m2) ** 2) + np.trace(c + c2 - 2 * sqrtm(c @ c2).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_scaled_and_shifted_clouds_have_known_distances():
    a = cloud(300, 8, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    shift = np.arange(8, dtype=np.float32)
    assert frechet_distance(a, a + shift) == pytest.approx(np.sum(shift**2), rel=1e-5)
    centred = (a - a.mean(0)).astype(np.float64)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(
        4 * np.trace(np.cov(centred, rowvar=False)), rel=1e-9
    )


def test_a_covariance_without_full_rank_is_fine_if_the_data_are_so():
    a = np.hstack([cloud(100, 6, 0), np.zeros((100, 2), np.float32)])  # two channels are constant
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert np.isfinite(frechet_distance(a, np.hstack([cloud(100, 6, 1), np.zeros((100, 2), np.float32)])))


@pytest.mark.parametrize(
    ("real", "generated", "words"),
    [
        (cloud(50, 8, 0), cloud(8, 8, 1), "generated images: 8 for features of 8 channels. A covariance of no more"),
        (cloud(8, 8, 0), cloud(50, 8, 1), "real images: 8 for features of 8 channels"),
        (cloud(50, 8, 0), cloud(50, 7, 1), r"generated features are \[50, 7\]; expected \[N, 8\]"),
        (cloud(50, 8, 0), np.full((50, 8), np.nan), "generated features: a value is not finite"),
    ],
)
def test_what_has_no_distance_is_refused(real, generated, words):
    with pytest.raises(UsageError, match=words):
        frechet_distance(real, generated)


def test_precision_and_recall_are_shares_of_points_in_balls(monkeypatch):
    monkeypatch.setattr("repa.trainer.evaluating.frechet._BLOCK_BYTES", 8 * 40 * 7)
    real, generated = cloud(40, 3, 0), cloud(30, 3, 0)[:30] * 1.3 + 0.4

    def covered(points, by):
        distances = np.linalg.norm(by[:, None].astype(float) - by[None], axis=-1)
        radii = np.sort(distances, axis=1)[:, 3]
        return np.mean(
            [any(np.linalg.norm(p.astype(float) - q) <= r for q, r in zip(by, radii, strict=True)) for p in points]
        )

    found = precision_recall(real, generated, 3)
    assert found == pytest.approx((covered(generated, real), covered(real, generated)))
    assert 0 < found[0] < 1
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, generated + 1000) == (0, 0)
    with pytest.raises(UsageError, match="generated images: 3; expected more than the 3 neighbours"):
        precision_recall(real, generated[:3])
