"""The numbers between a cache's latents and a model's input, by the name of the convention."""

from typing import Literal

from ...cache_specs.errors import UsageError, option
from ...cache_specs.tables import autoencoder_table
from ..diffusion.latents import LatentNorm, resolve_latent_norm
from .reader import CacheReader

NORMS = ("fixed", "channel")


def reader_norm(reader: CacheReader, mode: Literal["fixed", "channel"]) -> LatentNorm:
    """Return a run's numbers for the reader's latents: x = (z - bias) * scale.

    fixed: the autoencoder's published scale and bias; channel: the cache's statistics, to mean 0 and deviation 1.

    Raises UsageError or CacheError where the cache has not what the mode asks for.
    """
    latents = reader.latents
    entry = autoencoder_table().get(latents.spec["entry"])
    # Imported moments may be of other pixels than the published scale is for.
    published = entry.published if entry and list(entry.pixel_range) == latents.spec["pixel_range"] else None
    if entry is None and latents.spec.get("scale") is not None:  # an autoencoder of one's own, whose file said so
        published = (latents.spec["scale"], latents.spec["bias"])
    if mode == "fixed" and published is None:
        raise UsageError(
            f"latent_norm=fixed: {latents.name} has no published scale in the table of autoencoders. "
            f"Take {option('--set latent_norm=channel', 'latent_norm=channel')}"
        )
    return resolve_latent_norm(
        mode,
        channels=latents.channels,
        published=published or (1.0, 0.0),
        mean=latents.mean,
        std=latents.std,
        where=f"{reader.path}/latents/{latents.name}",
    )
