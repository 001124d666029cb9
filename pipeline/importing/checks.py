"""What imported numbers mean: each row is checked and converted, and a wrong assumption stops the import with a reason.

The field's files do not say what they hold. "Moments" are mean and standard deviation here, mean and log-variance
there; some are scaled already; EDM2 feeds the autoencoder pixels in [0, 1]. What can be seen in the numbers is looked
for in samples spread over the whole data set, before anything is written; what the user states outright is believed.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cache_specs.errors import JobError, UsageError
from ...cache_specs.fingerprint import canonical_json
from ...cache_specs.tables import AutoencoderEntry
from .source import BadLatent, Kind, LatentSource, spread_rows

LOOKED_AT = 1024  # samples, evenly spread: the mean of a channel to about 0.02 of its std
# Channel means over ImageNet of stabilityai/sd-vae-ft-mse (-ema has the same encoder): of pixels in [-1, 1] as
# Inductive Moment Matching normalises by (arXiv 2503.07565), of pixels in [0, 1] as EDM2 does (arXiv 2312.02696).
SD_VAES = ("sd-vae-ft-mse", "sd-vae-ft-ema")
SD_MEAN = np.array([0.865, -0.278, 0.216, 0.374])
SD_MEAN_01 = np.array([5.81, 3.25, 0.12, -2.15])
STATISTICS_TOLERANCE = 0.15  # of a channel's std: published statistics are of other draws than ours


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source's rows become what a cache stores: [V, M, h, w] = `shape`, of `channels` channels a latent.

    `scaled_by` is what the source's latents were multiplied by, their standard deviations with them; `log_variance`:
    the second half of moments is the logarithm of the variance, not the standard deviation.
    """

    shape: tuple[int, ...]
    kind: Kind
    scaled_by: float = 1.0
    log_variance: bool = False

    @property
    def channels(self) -> int:
        return self.shape[1] // 2 if self.kind == "moments" else self.shape[1]

    def convert(self, values: np.ndarray) -> np.ndarray:
        """Return a row as raw latents or moments; raise `BadLatent` where it cannot be one.

        Numbers that need no conversion are returned as they are, the others in float64.
        """
        if values.shape != self.shape or values.dtype.kind != "f":
            found, wanted = list(values.shape[1:]), list(self.shape[1:])
            raise BadLatent(f"{values.dtype} {found}, expected floating-point {wanted}")
        if not np.isfinite(values).all():
            raise BadLatent("not all of its numbers are finite")
        if self.scaled_by != 1 or self.log_variance:
            values = values.astype(np.float64)
            if self.log_variance:
                # diffusers clamps the same way before it takes the root
                values[:, self.channels :] = np.exp(0.5 * values[:, self.channels :].clip(-30.0, 20.0))
            values /= self.scaled_by
        if self.kind == "moments" and (least := values[:, self.channels :].min()) < 0:
            raise BadLatent(
                f"planes {self.channels} to {2 * self.channels - 1} go down to {least:.3g} and are no standard "
                "deviations; say --log-variance if they are log-variances, as diffusers' own parameters"
            )
        return values


@dataclass(frozen=True, kw_only=True)
class Look:
    """What samples spread over a source show: per-channel `mean` and `std` [C] of sampled latents, float64.

    `digest` is of the numbers as they lie in the source: an import from another source has another one.
    """

    num: int
    mean: np.ndarray
    std: np.ndarray
    digest: str

    @property
    def overall_std(self) -> float:
        return float(np.sqrt((self.std**2).mean()))


def look_at(source: LatentSource, reading: Reading) -> Look:
    """Read up to `LOOKED_AT` samples; raise `JobError` where one of them cannot be used."""
    rows = spread_rows(len(source.manifest), LOOKED_AT)
    digest = hashlib.sha256()
    bad: dict[int, str] = {}
    count, total, squares = 0, np.zeros(reading.channels), np.zeros(reading.channels)
    for row in rows:
        try:
            stored = source.read(row)
            values = reading.convert(stored).astype(np.float64)
        except BadLatent as error:
            bad[row] = str(error)
            continue
        name = canonical_json([str(source.manifest.sample_ids[row]), str(stored.dtype), list(stored.shape)])
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(stored).tobytes())
        mean = values[:, : reading.channels]
        count += mean.size // reading.channels
        total += mean.sum(axis=(0, 2, 3))
        squares += (mean**2).sum(axis=(0, 2, 3))
        if reading.kind == "moments":
            squares += (values[:, reading.channels :] ** 2).sum(axis=(0, 2, 3))
    if bad:
        row, reason = next(iter(bad.items()))
        raise JobError(
            f"{source.where}: {len(bad)} of {len(rows)} samples looked at cannot be used, the first is "
            f"{source.manifest.sample_ids[row]}: {reason}"
        )
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return Look(num=len(rows), mean=mean, std=std, digest=digest.hexdigest())


def check_scale(entry: AutoencoderEntry, look: Look, *, stated: float | None) -> None:
    """Raise `UsageError` where latents do not spread as raw ones of this autoencoder do.

    Its published scale brings the std of raw latents to 1. Half way between the two, on a logarithmic scale, parts
    raw from scaled; data of little contrast may lie on the wrong side, and is let in by a stated `--scaled-by 1`.
    """
    if entry.published is None or entry.published[0] == 1 or stated == 1:
        return
    scale = entry.published[0]
    raw, found = 1 / scale, look.overall_std
    if abs(math.log(max(found, 1e-30) / raw)) > abs(math.log(scale)) / 2:
        what = f"look multiplied by {scale:g} already" if found < raw else "are too large"
        raise UsageError(
            f"the latents of {look.num} samples have std {found:.3g} where raw ones of {entry.name} have about "
            f"{raw:.3g}; they {what}. Say what they were multiplied by, --scaled-by {scale:g}, and it is divided out; "
            "or --scaled-by 1 if they are raw"
        )


def looks_like_unit_pixels(entry: AutoencoderEntry | None, look: Look) -> bool | None:
    """Return whether the channel means are those of pixels in [0, 1], not [-1, 1]; None where that is not known."""
    if entry is None or entry.name not in SD_VAES:
        return None
    apart = SD_MEAN_01 - SD_MEAN
    return bool((look.mean - SD_MEAN) @ apart > 0.5 * (apart @ apart))


def check_pixel_range(entry: AutoencoderEntry, source: LatentSource, look: Look) -> None:
    """Raise `UsageError` where moments are of other pixels than the autoencoder expects, or look so."""
    told = source.pixel_range not in (None, entry.pixel_range)
    seen = looks_like_unit_pixels(entry, look)
    if not told and not seen:
        return
    low, high = entry.pixel_range
    what = [f"data in the layout {source.layout} are of pixels in [0, 1], as its tool encodes them"] if told else []
    if seen is not None:
        unit = "[0, 1]" if seen else "[-1, 1]"
        what.append(f"the channel means of {look.num} samples, {numbers(look.mean)}, are those of pixels in {unit}")
    raise UsageError(
        f"{entry.name} expects pixels in [{low:g}, {high:g}], and {'; '.join(what)}. The one's moments cannot be "
        f"computed from the other's: encode the images with repa-cache build --autoencoder {entry.name}; or say "
        f"--pixel-range 0,1 to keep them as {entry.name}-pixels01, with statistics and a decoder's range of their "
        "own; or --pixel-range -1,1 if they are of pixels in [-1, 1] after all"
    )


def check_statistics(source: LatentSource, look: Look) -> None:
    """Raise `UsageError` where the statistics that lie beside the latents are not theirs."""
    published = source.published_statistics()
    if published is None:
        return
    mean, std = published
    if mean.shape != look.mean.shape or std.shape != look.std.shape:
        raise UsageError(
            f"--data {source.where}: its statistics are of {len(mean)} channels, its latents have {len(look.mean)}"
        )
    off = np.maximum(np.abs(mean - look.mean), np.abs(std - look.std)) > STATISTICS_TOLERANCE * look.std
    if off.any():
        channel = int(np.flatnonzero(off)[0])
        raise UsageError(
            f"--data {source.where}: its statistics say mean {mean[channel]:.4g} and std {std[channel]:.4g} "
            f"of channel {channel}, and {look.num} samples have {look.mean[channel]:.4g} and {look.std[channel]:.4g}; "
            "remove the statistics' file if it belongs to other latents (the cache computes its own)"
        )


def numbers(values: Any) -> str:
    """Return numbers as text: `[0.86, -0.28]`."""
    return "[" + ", ".join(f"{value:.3g}" for value in values) + "]"
