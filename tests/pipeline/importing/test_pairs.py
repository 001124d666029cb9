"""Latents of other images, or of these in another order, are noticed where labels and counts agree."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from repa.pipeline.importing.pairs import explained

from ..conftest import Outcome
from .latent_layouts import MEAN, STD, draw_moments, write_arrow

Run = Callable[..., Outcome]


def write_pictures(folder: Path, num: int) -> np.ndarray:
    """Write `num` grey pictures of 32 pixels in two classes; return their brightness [num, 4, 4], in [0, 1]."""
    brightness = np.random.default_rng(0).uniform(0, 1, (num, 4, 4))
    for i, picture in enumerate(brightness):
        file = folder / f"class{i * 2 // num}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        grey = np.repeat(np.repeat((picture * 255).round().astype(np.uint8), 8, axis=0), 8, axis=1)
        Image.fromarray(np.stack([grey] * 3, axis=-1)).save(file)
    return brightness


def moments_of(brightness: np.ndarray) -> np.ndarray:
    """Return moments of which two channels follow the brightness, with noise, and two do not."""
    moments = draw_moments(len(brightness), seed=3)
    for channel, share in ((0, 0.8), (1, -0.5)):
        centred = (brightness - 0.5) * np.sqrt(12)
        noise = (moments[:, channel] - MEAN[channel]) / STD[channel]
        moments[:, channel] = MEAN[channel] + STD[channel] * (share * centred + np.sqrt(1 - share**2) * noise)
    return moments


def test_latents_in_another_order_than_their_images_are_doubted(repa_cache: Run, tmp_path: Path) -> None:
    moments = moments_of(write_pictures(tmp_path / "images", 48))
    swapped = np.concatenate([moments[23::-1], moments[:23:-1]])  # each class turned round: every label still agrees
    labels = [0] * 24 + [1] * 24
    options = ["--autoencoder", "sd-vae-ft-mse", "--images", tmp_path / "images"]
    for name, values, doubted in (("right", moments, False), ("wrong", swapped, True)):
        write_arrow(tmp_path / name, values, labels=labels)
        done = repa_cache("import", "--data", tmp_path / name, "--cache", tmp_path / f"{name}-cache", *options)
        assert done.code == 0
        assert ("warning: the latents of 48 samples explain" in done.err) == doubted
        assert ("or not in their order" in done.err) == doubted


def test_the_share_explained_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(1)
    latents, brightness = rng.standard_normal((40, 3, 2, 2)), rng.standard_normal((40, 2, 2))
    brightness += 2 * latents[:, 1]
    design = np.column_stack([np.moveaxis(latents, 1, -1).reshape(-1, 3), np.ones(160)])
    shares = explained(latents, brightness)
    for shift in (0, 1, 7):
        target = np.roll(brightness, shift, axis=0).reshape(-1)
        residual = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
        np.testing.assert_allclose(shares[shift], 1 - residual.var() / target.var(), rtol=1e-9)
    assert shares[0] > 0.4 > max(shares[1:])
    assert explained(latents, np.ones((40, 2, 2)))[0] == 0
