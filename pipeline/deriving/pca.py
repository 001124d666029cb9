"""Principal components: tokens projected on the K directions in which those of a sample vary most.

    y = W (x - m)        W [K, E]: eigenvectors of the covariance of x, by falling eigenvalue; m its mean

of all tokens of the sample's images, whatever their place. Nothing is divided by an eigenvalue, so that distances are
those of the tokens as far as K directions hold them. Scaled, x - m is first divided by each channel's standard
deviation, so that none decides by its size alone (ReDi, REGLUE): the eigenvectors are those of the correlation.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.errors import UsageError
from .method import Inputs

CONSTANT = 1e-12  # of the largest variance: a direction below it is what rounding leaves of none


class Pca:
    """`pca:K`, `pca-scaled:K`.

    State: `mean` [E], `components` [K, E] (scaled: with the division in them), `variance` [E] along every direction, of
    which K are kept.
    """

    latents = False
    whole = False

    def __init__(self, width: int, *, scaled: bool = False) -> None:
        self._width = width
        self._scaled = scaled
        self._label = f"pca{'-scaled' * scaled}:{width}"

    def width(self, source: int) -> int:
        return self._width

    def fit(self, sample: Iterable[Inputs]) -> dict[str, np.ndarray]:
        """Return the state from running sums in float64: one pass, in the memory of E x E numbers.

        The sign of a direction is that in which its largest entry is positive.
        """
        mean, covariance = _covariance(sample)
        spread = covariance.diagonal()
        scaled = self._scaled & (spread > CONSTANT * spread.max())  # a channel that never varies stays what it is: 0
        std = np.sqrt(np.where(scaled, spread, 1.0))
        variance, columns = np.linalg.eigh(covariance / (std[:, None] * std))
        variance, rows = variance[::-1].clip(min=0), columns.T[::-1]
        varying = int((variance > CONSTANT * variance[0]).sum())
        if varying < self._width:
            raise UsageError(
                f"{self._label}: the sample's tokens vary in {varying} directions alone; ask for at most {varying}"
                if varying
                else f"{self._label}: all tokens of the sample are the same, so that there is nothing to project on"
            )
        rows = rows[: self._width]
        largest = np.abs(rows).argmax(axis=1)
        rows = rows * np.sign(rows[np.arange(len(rows)), largest])[:, None]
        state = {"mean": mean, "components": rows / std, "variance": variance}
        return {name: values.astype(np.float32) for name, values in state.items()}

    def apply(self, state: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        return (inputs.tokens.double() - state["mean"]) @ state["components"].mT


def _covariance(sample: Iterable[Inputs]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [E] and covariance [E, E] float64 (divided by the number) of all tokens."""
    count, shift = 0, torch.zeros(0)
    total, products = torch.zeros(0), torch.zeros(0)
    for inputs in sample:
        for tokens in inputs.tokens.cpu().double():  # an image at a time: sums do not depend on how they were batched
            if not count:
                # Near the mean, so that little is lost where a channel's mean is large against its spread.
                shift = tokens.mean(dim=0)
                total = torch.zeros_like(shift)
                products = total.new_zeros(len(total), len(total))
            centred = tokens - shift
            total += centred.sum(dim=0)
            products.addmm_(centred.mT, centred)
            count += len(tokens)
    if not count:
        raise UsageError("no image of the sample can be used, so nothing can be fitted to it")
    mean = total / count
    return (shift + mean).numpy(), (products / count - mean[:, None] * mean).numpy()
