"""CKNNA against dense kernels and masks, as the paper's own code computes it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.pipeline.analysis import cknna as module
from repa.pipeline.analysis.cknna import cknna


def dense(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """The definition with N x N matrices: masked kernels, unbiased HSIC with one of them transposed."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return x @ x.T

    def nearest(kernel: np.ndarray) -> np.ndarray:
        mask = np.zeros(kernel.shape)
        for i, row in enumerate(kernel):
            others = [j for j in np.argsort(-row) if j != i]
            mask[i, others[:k]] = 1
        return mask

    def hsic(x: np.ndarray, y: np.ndarray) -> float:
        n = len(x)
        return (
            np.trace(x @ y) + x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 * (np.ones(n) @ x @ y @ np.ones(n)) / (n - 2)
        ) / (n * (n - 3))

    K, L = kernel(a), kernel(b)
    near_K, near_L = nearest(K), nearest(L)
    both = near_K * near_L
    across = hsic(both * K, both * L)
    return across / math.sqrt(hsic(near_K * K, near_K * K) * hsic(near_L * L, near_L * L))


def pair(num: int = 60, noise: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((num, 12))
    b = np.hstack([a[:, :9], rng.standard_normal((num, 20)) * noise])
    return a, b


@pytest.mark.parametrize("k", [2, 10, 59])
def test_equals_the_dense_computation(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8 * 60 * 7)  # blocks of 7 rows
    a, b = pair()
    assert cknna(torch.from_numpy(a), torch.from_numpy(b), k) == pytest.approx(dense(a, b, k), rel=1e-9)


def test_one_for_the_same_neighbourhoods_and_near_zero_for_unrelated_ones() -> None:
    a, _ = pair(300)
    other = np.random.default_rng(5).standard_normal((300, 12))
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))
    x = torch.from_numpy(a)
    assert cknna(x, torch.from_numpy(3 * a @ rotation)) == pytest.approx(1, abs=1e-9)
    assert abs(cknna(x, torch.from_numpy(other))) < 0.1


def test_bad_features_are_named() -> None:
    x = torch.from_numpy(pair()[0])
    with pytest.raises(UsageError, match=r"\[60, 12\] and \[59, 12\]"):
        cknna(x, x[1:])
    with pytest.raises(UsageError, match="CKNNA of 10 images with k = 10"):
        cknna(x[:10], x[:10])
    with pytest.raises(UsageError, match="not finite"):
        cknna(x, torch.full_like(x, torch.nan))
    with pytest.raises(UsageError, match="the second representation is the same for every image"):
        cknna(x, torch.ones_like(x))


def test_the_command_compares_every_two_encoders(
    make_images: Callable[..., list[Path]], repa_cache: Callable[..., Any], tmp_path: Path
) -> None:
    make_images(tmp_path / "images", num=30)
    options = ["--autoencoder", "none", "--resolution", 16, "--workers", 0]
    encoders = ["--encoder", "hog:grid=4", "--encoder", "hog:grid=2"]
    cache = tmp_path / "cache"
    assert repa_cache("build", "--data", tmp_path / "images", "--cache", cache, *encoders, *options).code == 0
    outcome = repa_cache("cknna", cache, "--k", 5)
    assert outcome.code == 0, outcome.err
    assert "hog-grid2 and hog-grid4: 0." in outcome.out
    assert "between two encoders; found only hog-grid4" in repa_cache("cknna", cache, "--encoder", "hog:grid=4").err
