"""LDS, CDS, RMSC and SRSS against loops over pairs in float64, for grids of every shape."""

import itertools
import math

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.pipeline.analysis.spatial_metrics import cds, lds, rmsc, srss, undefined_metrics, unmasked_metrics

GRIDS = [(16, 16), (8, 8), (3, 11), (11, 3), (1, 12), (12, 1), (5, 70), (37, 4), (7, 6)]
METRICS = {"lds": lds, "cds": cds, "rmsc": rmsc}


def smooth_tokens(images: int, grid: tuple[int, int], width: int = 24, seed: int = 0) -> torch.Tensor:
    """Tokens that resemble their neighbours, around a common mean, of lengths far apart."""
    rng = np.random.default_rng(seed)
    field = rng.standard_normal((images, *grid, width))
    for axis in (1, 2):
        field = field + np.roll(field, 1, axis) + np.roll(field, 2, axis)
    lengths = np.exp(rng.standard_normal((images, *grid, 1)))
    return torch.tensor((field + 2.0) * lengths, dtype=torch.float32).flatten(1, 2)


def apart_and_cosine(tokens: torch.Tensor, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Distance and cosine of every two tokens of one image, [T, T] each, the whole Gram matrix in float64."""
    x = tokens.double().numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    places = np.array(list(itertools.product(range(grid[0]), range(grid[1]))))
    return np.abs(places[:, None] - places[None]).sum(-1), x @ x.T


def slow(tokens: torch.Tensor, grid: tuple[int, int], mask: np.ndarray | None = None) -> dict[str, float]:
    """The metrics of one image from their definitions."""
    apart, cosine = apart_and_cosine(tokens, grid)
    anchors = []
    for i in np.flatnonzero(mask) if mask is not None else []:
        like = [cosine[i, j] for j in np.flatnonzero(mask) if apart[i, j] == 1]
        unlike = [cosine[i, j] for j in np.flatnonzero(~mask) if apart[i, j] >= 6]
        if like and unlike:
            anchors.append(np.mean(like) - np.mean(unlike))
    decay = [cosine[apart == d].mean() for d in range(1, min(8, apart.max()) + 1)]
    x = tokens.double().numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return {
        "lds": cosine[apart == 1].mean() - cosine[apart >= 6].mean() if apart.max() >= 6 else math.nan,
        "cds": -np.polyfit(np.arange(1, len(decay) + 1), decay, 1)[0],
        "rmsc": math.sqrt(np.mean(np.sum((x - x.mean(0)) ** 2, axis=1))),
        "srss": float(np.mean(anchors)) if anchors else math.nan,
    }


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_agrees_with_a_loop_over_pairs(grid: tuple[int, int]) -> None:
    tokens = smooth_tokens(2, grid)
    mask = np.random.default_rng(1).random((2, grid[0] * grid[1])) < 0.5
    found = {name: metric(tokens, grid) for name, metric in METRICS.items()}
    found["srss"] = srss(tokens, grid, torch.tensor(mask))
    for image in range(2):
        expected = slow(tokens[image], grid, mask[image])
        for name, values in found.items():
            assert values.dtype == torch.float32
            assert values.shape == (2,)
            assert values[image].item() == pytest.approx(expected[name], abs=1e-5, nan_ok=True), name


def test_one_pass_gives_the_same_numbers_as_the_metrics_alone() -> None:
    tokens = smooth_tokens(5, (9, 7)).half()
    together = unmasked_metrics(tokens, (9, 7))
    assert list(together) == ["lds", "cds", "rmsc"]
    for name, metric in METRICS.items():
        torch.testing.assert_close(together[name], metric(tokens, (9, 7)), rtol=0, atol=1e-6)


def test_an_image_has_its_value_whatever_comes_beside_it() -> None:
    tokens = smooth_tokens(70, (8, 8), width=512)  # more than are worked on at once
    alone = torch.cat([lds(tokens[i : i + 1], (8, 8)) for i in range(70)])
    torch.testing.assert_close(lds(tokens, (8, 8)), alone, rtol=0, atol=1e-6)


def test_nearly_equal_tokens_keep_five_digits_of_contrast() -> None:
    tokens = torch.ones(1, 64, 32) + 1e-4 * torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    expected = slow(tokens[0], (8, 8))["rmsc"]
    assert expected < 1e-3
    assert rmsc(tokens, (8, 8)).item() == pytest.approx(expected, rel=1e-3)
    beside = torch.cat([smooth_tokens(1, (8, 8), width=32), tokens])
    assert unmasked_metrics(beside, (8, 8))["rmsc"][1].item() == pytest.approx(expected, rel=1e-3)


def test_equal_tokens_have_no_structure_and_zero_tokens_no_direction() -> None:
    constant = torch.full((1, 64, 8), 3.0)
    for metric in METRICS.values():
        assert metric(constant, (8, 8)).item() == pytest.approx(0, abs=1e-6)
    some_zero = smooth_tokens(1, (8, 8))
    some_zero[0, 10:30] = 0
    expected = slow(some_zero[0], (8, 8))
    for name, metric in METRICS.items():
        assert metric(some_zero, (8, 8)).item() == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("case", ["all foreground", "all background", "one token", "background near only"])
def test_srss_without_pairs_is_nan_and_spoils_no_other_image(case: str) -> None:
    grid = (3, 6)
    mask = torch.zeros(2, *grid, dtype=torch.bool)
    mask[1, :, :3] = True
    if case == "all foreground":
        mask[0] = True
    elif case == "one token":
        mask[0, 0, 0] = True
    elif case == "background near only":
        mask[0] = True
        mask[0, 1, 3] = False  # at most 4 from any other token
    tokens = smooth_tokens(2, grid)
    values = srss(tokens, grid, mask.flatten(1))
    assert math.isnan(values[0])
    expected = slow(tokens[1], grid, mask[1].flatten().numpy())["srss"]
    assert math.isfinite(expected)
    assert values[1].item() == pytest.approx(expected, abs=1e-5)


def test_a_grid_too_small_for_a_metric_is_refused_and_named() -> None:
    tokens = smooth_tokens(1, (3, 3))
    with pytest.raises(UsageError, match="no two tokens of a 3 x 3 grid are 6 apart"):
        lds(tokens, (3, 3))
    assert cds(tokens, (3, 3)).item() == pytest.approx(slow(tokens[0], (3, 3))["cds"], abs=1e-5)
    assert list(unmasked_metrics(tokens, (3, 3))) == ["cds", "rmsc"]
    assert set(undefined_metrics((1, 2))) == {"lds", "srss", "cds"}
    with pytest.raises(UsageError, match="fewer than two distances"):
        cds(tokens[:, :2], (1, 2))


def test_bad_arguments_are_named() -> None:
    tokens = smooth_tokens(2, (4, 5))
    with pytest.raises(UsageError, match=r"\[2, 20, 24\] but the grid is 4 x 4; expected T = 4 \* 4 = 16"):
        lds(tokens, (4, 4))
    with pytest.raises(UsageError, match=r"torch.int64 .*expected floats \[B, T, E\]"):
        rmsc(tokens.long(), (4, 5))
    with pytest.raises(UsageError, match=r"torch.float32 \[2, 20\]; expected torch.bool \[2, 20\]"):
        srss(tokens, (4, 5), torch.ones(2, 20))
    with pytest.raises(UsageError, match=r"torch.bool \[2, 19\]; expected torch.bool \[2, 20\]"):
        srss(tokens, (4, 5), torch.ones(2, 19, dtype=torch.bool))


def test_no_image_at_all_gives_no_value() -> None:
    empty = torch.empty(0, 64, 8)
    for metric in METRICS.values():
        assert metric(empty, (8, 8)).shape == (0,)
    assert srss(empty, (8, 8), torch.empty(0, 64, dtype=torch.bool)).shape == (0,)
