"""Mean and spread of every channel at every place of the grid, over all images and views of a component.

What diffuses an encoder's tokens themselves sees them as (x - mean) / std (RAE, arXiv 2510.11690: per channel and
position). Stored once beside the cache's tokens, the numbers are the same for every run.
"""

from collections.abc import Iterable

import numpy as np
import torch

from ...cache_specs.errors import UsageError
from .method import Inputs


class Standardise:
    """`standardise`. State: `mean` and `std` [T, E]; std over the images, divided by their number, not one less."""

    latents = False
    whole = True

    def fit(self, sample: Iterable[Inputs]) -> dict[str, np.ndarray]:
        """Return the state from running sums in float64: one pass, in the memory of a few images."""
        count, shift = 0, torch.zeros(0)
        total, squares = torch.zeros(0), torch.zeros(0)
        for inputs in sample:
            for tokens in inputs.tokens.double():
                if not count:
                    # The first image: near enough to the mean that little is lost where that is large.
                    shift, total, squares = tokens, torch.zeros_like(tokens), torch.zeros_like(tokens)
                centred = tokens - shift
                total += centred
                squares.addcmul_(centred, centred)
                count += 1
        if not count:
            raise UsageError("standardise: no image can be used, so there is nothing to take the mean of")
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min_(0)
        state = {"mean": shift + mean, "std": variance.sqrt_()}
        return {name: values.numpy().astype(np.float32) for name, values in state.items()}
