"""int8 tokens against the float32 ones, in the space where the alignment loss lives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.cache_specs.tables import resolve_encoder
from repa.pipeline.images.decode import decode
from repa.pipeline.models.encoders import load_encoder
from repa.pipeline.store.quantize import channel_statistics, stored_tokens

GAMMAS = (None, 0.0, 0.6, 1.0)


@pytest.fixture(scope="module")
def pictures(make_images: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    files = make_images(tmp_path_factory.mktemp("pictures"), num=6)
    return torch.stack([torch.tensor(decode(file.read_bytes(), 64)).permute(2, 0, 1) for file in files])


def synthetic() -> torch.Tensor:
    """Return [4, 64, 96] tokens with outlier channels (mean, scale) and tokens, constant channels, a black image."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 64, 96, generator=generator)
    tokens[:, :, 10] += 300
    tokens[:, :, 11] *= 200
    tokens[:, :, 12] *= 1e-4
    tokens[:, 5] *= 30
    tokens[:, :, 3] = 7.5
    tokens[:, :, 4] = 0
    tokens[2] = 0
    return tokens


def normalised(tokens: np.ndarray, mean: np.ndarray, std: np.ndarray, gamma: float | None) -> np.ndarray:
    if gamma is None:
        return tokens
    return (tokens - gamma * mean[:, None]) / (std[:, None] + 1e-6)


@pytest.mark.parametrize("name", ["hog", "dinov2-vit-s", "synthetic"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_int8_keeps_the_direction_of_every_token(name: str, pictures: torch.Tensor) -> None:
    if name == "synthetic":
        tokens = synthetic()
    else:
        model = resolve_encoder(f"{name}:grid=6", resolution=64, random_weights=True)
        tokens = load_encoder(model.spec)(pictures)[0]
    stored = {key: value.double().numpy() for key, value in stored_tokens(tokens, "int8").items()}
    mean, std, scale = stored["channel_mean"], stored["channel_std"], stored["token_scale"]
    exact = tokens.double().numpy()
    decoded = std[:, None] * scale[..., None] * stored["patch_tokens"] + mean[:, None]
    for gamma in GAMMAS:
        a, b = normalised(exact, mean, std, gamma), normalised(decoded, mean, std, gamma)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        kept = lengths > 0
        cosine = (a * b).sum(-1)[kept] / lengths[kept]
        print(f"{name}, gamma {gamma}: {np.sum(~kept)} of {kept.size} tokens of norm 0 left out")
        assert kept.mean() > 0.7
        assert cosine.mean() >= 0.9999, (gamma, cosine.mean())
        assert cosine.min() >= 0.999, (gamma, cosine.min())


def test_the_code_is_the_equation_to_the_last_step() -> None:
    tokens = synthetic()
    stored = stored_tokens(tokens, "int8")
    wide = tokens.double().numpy()
    mean, std = wide.mean(1), wide.std(1, ddof=1)
    np.testing.assert_allclose(stored["channel_mean"], mean, rtol=2**-23, atol=0)
    np.testing.assert_allclose(stored["channel_std"], std, rtol=2**-23, atol=0)
    assert (stored["channel_std"][:, [3, 4]] == 0).all()
    assert (stored["patch_tokens"][:, :, [3, 4]] == 0).all()
    assert not stored["patch_tokens"][2].any()
    assert not stored["token_scale"][2].any()

    scale = stored["token_scale"].double().numpy()
    x = np.divide(wide - mean[:, None], std[:, None], out=np.zeros_like(wide), where=std[:, None] > 0)
    np.testing.assert_allclose(scale, (np.abs(x).max(-1) / 127), rtol=2**-11 + 1e-6, atol=0)
    codes = np.divide(x, scale[..., None], out=np.zeros_like(x), where=scale[..., None] > 0).clip(-127, 127)
    # float32 arithmetic may turn a tie the other way, never more.
    assert np.abs(stored["patch_tokens"].numpy() - codes).max() <= 0.5 + 1e-3


def test_statistics_do_not_depend_on_how_tokens_are_stored() -> None:
    a, b = stored_tokens(synthetic(), "int8"), stored_tokens(synthetic(), "float16")
    assert torch.equal(a["channel_mean"], b["channel_mean"])
    assert torch.equal(a["channel_std"], b["channel_std"])
    assert torch.equal(b["patch_tokens"], synthetic().half())


def test_statistics_hold_where_float32_sums_would_not() -> None:
    tokens = (10_000 + torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(0))).float()
    mean, std = channel_statistics(tokens)
    np.testing.assert_allclose(std, tokens.double().std(1), rtol=1e-6)
    np.testing.assert_allclose(mean, tokens.double().mean(1), rtol=1e-7)
