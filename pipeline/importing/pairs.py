"""Are these latents of these images? Labels and counts agree as well when the rows of a class are in another order.

Whatever made them, latents keep their image's layout: its brightness, pixel by pixel, is close to linear in the
channels (of Stable Diffusion's, previews are drawn that way). So the images' brightness is regressed on the latents,
once as they are paired and once for each of some wrong pairings; where the first explains no more than the others, a
warning says so. It is no error: an untrained autoencoder keeps as little of its images as another's latents do.
"""

import numpy as np

from ..images.decode import BadImage, decode
from .checks import Reading
from .source import BadLatent, LatentSource, spread_rows

MOST_PAIRS = 256  # a second or two of decoding
FEWEST_PAIRS = 32  # below, chance decides
WRONG_PAIRINGS = 19  # images shifted against latents by 1, 2, ... of those looked at
MARGIN = 0.1  # of the variance explained; right pairs are far above it, and wrong ones differ by hundredths


def doubt_of_pairs(source: LatentSource, reading: Reading, *, resolution: int) -> str | None:
    """Return a warning where the latents of evenly spread samples explain their images hardly better than others'.

    None where they do, or where there are too few images to tell.
    """
    rows = spread_rows(len(source.manifest), MOST_PAIRS)
    side = reading.shape[-1]
    if source.image_root is None or len(rows) < FEWEST_PAIRS or resolution % side:
        return None
    latents, brightness = [], []
    for row in rows:
        try:
            values = reading.convert(source.read(row))[0, : reading.channels]
            image = decode(source.manifest.source.read(str(source.manifest.sample_ids[row])), resolution)
        except (BadLatent, BadImage, OSError):
            continue  # named when it is imported, or when a build reads it
        latents.append(values.astype(np.float64))
        grey = image.astype(np.float64).mean(axis=2)
        brightness.append(grey.reshape(side, resolution // side, side, resolution // side).mean(axis=(1, 3)))
    if len(latents) < FEWEST_PAIRS:
        return None
    right, *wrong = explained(np.stack(latents), np.stack(brightness))
    if right > max(wrong) + MARGIN:
        return None
    return (
        f"the latents of {len(latents)} samples explain {right:.0%} of their images' brightness, and up to "
        f"{max(wrong):.0%} of other images'; unless their autoencoder was untrained, they are not those of the images "
        f"in {source.image_root}, or not in their order"
    )


def explained(latents: np.ndarray, brightness: np.ndarray) -> list[float]:
    """Return the share of brightness [n, h, w] that a linear function of latents [n, C, h, w] explains.

    First as they are paired, then with the images shifted by 1 to `WRONG_PAIRINGS`; 0 where nothing varies.
    """
    predictors = np.moveaxis(latents, 1, -1).reshape(-1, latents.shape[1])
    predictors = predictors - predictors.mean(axis=0)
    gram = np.linalg.pinv(predictors.T @ predictors)
    shares = []
    for shift in range(1 + WRONG_PAIRINGS):
        target = np.roll(brightness, shift, axis=0).reshape(-1)
        target = target - target.mean()
        cross = predictors.T @ target
        shares.append(float(cross @ gram @ cross / max(float(target @ target), 1e-30)))
    return shares
