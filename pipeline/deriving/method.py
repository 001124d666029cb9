"""What a method of deriving is: it is fitted once to a sample of rows, and then makes tokens of tokens.

The rows come as they are stored, whether from a component on disk or straight from an encoder, so that both give one
fit and one component. A method is a file beside this one and a row of choose.py: whatever it learns (axes, weights of a
network) is arrays by name, stored as they are and digested.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.derived import Fit


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """b images of one view: `tokens` [b, T, E] float32, those of several layers one after the other along E.

    `latents` [b, T, D] float32 are the patches of the clean latents at the tokens' places, where the method reads them.
    """

    tokens: Tensor
    latents: Tensor | None = None


class Fitting(Protocol):
    """What can be learnt of rows.

    `latents`: it reads those too. `whole`: it is fitted to every row and view, not to a sample of them.
    """

    latents: bool
    whole: bool

    def fit(self, sample: Iterable[Inputs]) -> dict[str, np.ndarray]:
        """Return what the sample teaches, arrays by name, float32; the same of the same images, however batched.

        Raises `UsageError` where the sample cannot teach it.
        """
        ...


@runtime_checkable
class Method(Fitting, Protocol):
    """One way to make tokens [b, T, K] of `Inputs`, once fitted."""

    def width(self, source: int) -> int:
        """Return K, given E."""
        ...

    def apply(self, state: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Return tokens [b, T, K] of images, each independent of the others; `state` is what `fit` gave, in float64."""
        ...


class Derivation:
    """A method with its fit on a device: a function from `Inputs` to tokens [b, T, K] float32."""

    def __init__(self, method: Method, fit: Fit, device: str | torch.device = "cpu") -> None:
        self._method = method
        self._state = {
            name: torch.tensor(np.asarray(values, dtype=np.float64), device=device)
            for name, values in fit.arrays.items()
        }

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Tensor:
        return self._method.apply(self._state, inputs).float()
