"""Token grids and latents: which grid an encoder gets by default, and which models take both.

A SiT of patch p makes (latent side / p)^2 tokens, and is aligned with an encoder's tokens on the same grid.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from ...cache_specs.schema import FEATURES, LATENTS
from .request import ModelRequest

PATCHES = (1, 2, 4, 8, 16)  # of the models that are trained: SiT-B/2 on latents, /16 on pixels


def default_grid(resolution: int, sides: Collection[int]) -> int | None:
    """Return the tokens a side for latents of `sides`, None where those leave it open.

    Of the grids on which a model can be aligned, the one nearest to the study's resolution / 16; which it is, where
    that fits. On the 8 x 8 latents of a 32-fold autoencoder at 256 px it is 8, not 16.
    """
    if len(set(sides)) != 1:
        return None
    (side,) = set(sides)
    grids = [side // patch for patch in PATCHES if side % patch == 0 and side // patch >= 2]
    asked = resolution / 16
    return min(grids, key=lambda grid: max(grid / asked, asked / grid), default=None)


def fit_lines(requests: Sequence[ModelRequest], latents: Mapping[str, int]) -> Iterator[str]:
    """Yield a line an encoder: which models its grid fits, on latents of this side by their path."""
    asked = {one.path: one.spec["latent_size"][0] for one in requests if one.kind == LATENTS}
    for request in requests:
        if request.kind != FEATURES:
            continue
        grid = request.spec["grid"][0]
        for path, side in {**latents, **asked}.items():
            tokens = f"{request.path}: {grid} x {grid} tokens"
            if side % grid:
                fitting = ", ".join(str(side // patch) for patch in PATCHES if side % patch == 0 and side // patch >= 2)
                yield f"{tokens} fit no model on {path} of {side} x {side}; grids that do: {fitting}"
            else:
                yield f"{tokens} fit models with patch {side // grid} (SiT-B/{side // grid}) on {path}"
