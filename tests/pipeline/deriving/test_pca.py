"""Principal components against the singular values of all tokens at once, and the images that a fit sees."""

import numpy as np
import pytest
import torch

from repa.cache_specs.derived import METHODS, Fit, MethodRequest
from repa.cache_specs.errors import UsageError
from repa.pipeline.deriving.choose import method_of
from repa.pipeline.deriving.method import Derivation, Inputs
from repa.pipeline.deriving.pca import Pca
from repa.pipeline.deriving.sample import sample_rows

from .conftest import principal


def tokens_of(num: int, offset: float = 0.0) -> torch.Tensor:
    """Return [num, 9, 12] float32: channels of unlike spread, mixed, around `offset`."""
    generator = np.random.default_rng(3)
    mixed = generator.normal(size=(num, 9, 12)) * 1.5 ** np.arange(12) @ generator.normal(size=(12, 12))
    return torch.from_numpy(mixed + offset).float()


def batched(tokens: torch.Tensor, size: int) -> list[Inputs]:
    return [Inputs(tokens=part) for part in tokens.split(size)]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_axes_are_the_singular_vectors_of_all_tokens(offset: float) -> None:
    tokens = tokens_of(20, offset)
    state = Pca(5).fit(batched(tokens, 7))
    mean, axes, variance = principal(tokens.double().numpy().reshape(-1, 12), 5)
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state["components"], axes, atol=2e-6)
    np.testing.assert_allclose(state["variance"], variance, rtol=1e-5)
    fit = Fit(name="x", method="pca:5", sources={}, sample={}, arrays=state)
    projected = Derivation(Pca(5), fit)(Inputs(tokens=tokens[:3])).numpy()
    spread = np.sqrt(variance[0])
    expected = (tokens[:3].double().numpy() - mean) @ axes.T
    np.testing.assert_allclose(projected, expected, atol=1e-5 * spread + 1e-6 * offset)
    assert projected.dtype == np.float32


def test_scaled_axes_are_the_singular_vectors_of_standardised_tokens() -> None:
    tokens = tokens_of(20) * torch.logspace(-2, 2, 12)
    tokens[..., 3] = 0.5  # never varies
    state = Pca(5, scaled=True).fit(batched(tokens, 7))
    flat = tokens.double().numpy().reshape(-1, 12)
    std = flat.std(axis=0)
    std[3] = 1.0
    mean, axes, variance = principal((flat - flat.mean(axis=0)) / std, 5)
    np.testing.assert_allclose(mean, 0, atol=1e-9)
    np.testing.assert_allclose(state["components"] * std, axes, atol=2e-6)
    np.testing.assert_allclose(state["variance"], variance, atol=1e-5)
    assert variance.sum() == pytest.approx(11)  # of correlations: one a channel that varies
    fit = Fit(name="x", method="pca-scaled:5", sources={}, sample={}, arrays=state)
    projected = Derivation(Pca(5, scaled=True), fit)(Inputs(tokens=tokens[:3])).numpy()
    expected = (tokens[:3].double().numpy() - flat.mean(axis=0)) / std @ axes.T
    np.testing.assert_allclose(projected, expected, atol=1e-4)


def test_a_fit_does_not_depend_on_how_its_images_are_batched() -> None:
    tokens = tokens_of(20)
    whole, single = Pca(4).fit(batched(tokens, 20)), Pca(4).fit(batched(tokens, 1))
    assert all(np.array_equal(whole[name], single[name]) for name in whole)
    assert not np.array_equal(whole["mean"], Pca(4).fit(batched(tokens[:19], 20))["mean"])


def test_directions_in_which_nothing_varies_are_not_made_up() -> None:
    flat = tokens_of(20)
    flat[..., 6:] = 3.0
    assert Pca(6).fit(batched(flat, 5))["components"].shape == (6, 12)
    with pytest.raises(UsageError, match="vary in 6 directions alone; ask for at most 6"):
        Pca(7).fit(batched(flat, 5))
    with pytest.raises(UsageError, match="all tokens of the sample are the same"):
        Pca(1).fit([Inputs(tokens=torch.ones(2, 4, 3))])
    with pytest.raises(UsageError, match="no image of the sample can be used"):
        Pca(1).fit([])


def test_every_method_that_can_be_asked_for_is_there() -> None:
    for name, has_width in METHODS.items():
        assert method_of(MethodRequest(name=name, width=3 if has_width else 0)) is not None


@pytest.mark.parametrize("num", [1, 7, 40, 300, 5000])
def test_a_sample_gives_every_class_its_share(num: int) -> None:
    counts = [3, 500, 90, 1, 60]
    labels = np.repeat([4, 0, 7, 2, 1], counts)
    rows = sample_rows(labels, num, 0)
    assert len(set(rows.tolist())) == len(rows) == min(max(num, 5), len(labels))
    assert (np.diff(rows) > 0).all() or len(rows) == 1
    drawn = [int((labels[rows] == label).sum()) for label in (4, 0, 7, 2, 1)]
    most = max(drawn)
    assert all(found >= min(count, most - 1) and found >= 1 for found, count in zip(drawn, counts, strict=True))
    assert np.array_equal(rows, sample_rows(labels, num, 0))
    if 5 < num < 600:
        assert not np.array_equal(rows, sample_rows(labels, num, 1))
