"""Tokens without what the clean latent says of them already: the residual of a linear prediction.

    y' = y - (m_y + (x - m_x) W)      W [D, E] by least squares over a sample's tokens, whatever their place

y is a token, x the latent's patch at its place (D = C p p channels: those of the posterior's mean). "Purify before you
align" (LAP) trains against y': where a teacher repeats what the latent holds, aligning with it teaches nothing. Its own
linear form solves for W in every micro-batch; here it is solved once, over images of every class, so that the target of
an image does not depend on which others are beside it. The prediction has a constant term, so that the mean of y' is 0.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from .method import Inputs

CONSTANT = 1e-10  # of the largest variance: directions of x below it predict nothing


class PurifyLinear:
    """`purify-linear`. State: `latent_mean` [D], `token_mean` [E], `matrix` [D, E]."""

    latents = True
    whole = False

    def width(self, source: int) -> int:
        return source

    def fit(self, sample: Iterable[Inputs]) -> dict[str, np.ndarray]:
        """Return the state from running sums in float64: one pass, in the memory of D x (D + E) numbers."""
        count, shifts = 0, (torch.zeros(0), torch.zeros(0))
        totals, squares, products = (torch.zeros(0), torch.zeros(0)), torch.zeros(0), torch.zeros(0)
        for inputs in sample:
            for x, y in _pairs(inputs):
                if not count:
                    shifts = (x.mean(dim=0), y.mean(dim=0))
                    totals = (torch.zeros_like(shifts[0]), torch.zeros_like(shifts[1]))
                    squares, products = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])
                x_centred, y_centred = x - shifts[0], y - shifts[1]
                for total, centred in zip(totals, (x_centred, y_centred), strict=True):
                    total += centred.sum(dim=0)
                squares.addmm_(x_centred.mT, x_centred)
                products.addmm_(x_centred.mT, y_centred)
                count += len(x)
        if not count:
            raise UsageError("purify-linear: no image of the sample can be used, so nothing can be fitted to it")
        x_mean, y_mean = (total / count for total in totals)
        within = (squares / count - x_mean[:, None] * x_mean).numpy()
        across = (products / count - x_mean[:, None] * y_mean).numpy()
        state = {
            "latent_mean": (shifts[0] + x_mean).numpy(),
            "token_mean": (shifts[1] + y_mean).numpy(),
            "matrix": np.linalg.pinv(within, rcond=CONSTANT, hermitian=True) @ across,
        }
        return {name: values.astype(np.float32) for name, values in state.items()}

    def apply(self, state: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        assert inputs.latents is not None
        predicted = (inputs.latents.double() - state["latent_mean"]) @ state["matrix"]
        return inputs.tokens.double() - state["token_mean"] - predicted


def _pairs(inputs: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield patches [T, D] and tokens [T, E] of each image."""
    assert inputs.latents is not None
    yield from zip(inputs.latents.double(), inputs.tokens.double(), strict=True)
