"""CKNNA: do two representations agree on who is near whom? (Huh et al., arXiv 2405.07987, appendix A.)

K and L are the cosine kernels of N features; entry (i, j) of both is kept where j is among the k nearest of i in both.
The alignment is the unbiased HSIC of the masked kernels (Song et al., 2012, eq. 5), over the geometric mean of each
with itself. As in the authors' code HSIC's first term takes one kernel transposed, so a pair counts there only where it
is near in both directions; their 1e-6 in the denominator is left out (it moves the figure by up to a per mille).
REPA reports it on mean-pooled tokens with k = 10. The masked kernels have at most k entries a row and are kept as
lists: memory is a block of rows times N.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cache_specs.errors import UsageError

DEFAULT_K = 10
_BLOCK_BYTES = 2**26  # of similarities at a time


def cknna(a: Tensor, b: Tensor, k: int = DEFAULT_K) -> float:
    """Return CKNNA of two features of the same N images, `a` [N, D] and `b` [N, E]; 1 for equal kernels.

    Rows are scaled to length 1 and products are taken in float64. Raises `UsageError` where N or k is too small, a
    value is not finite, or a side is the same for every image.
    """
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b):
        raise UsageError(f"features are {list(a.shape)} and {list(b.shape)}; expected [N, D] and [N, E]")
    num = len(a)
    if k < 2 or num < max(4, k + 1):
        raise UsageError(f"CKNNA of {num} images with k = {k}: expected k >= 2 and at least max(4, k + 1) images")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UsageError("CKNNA: a feature is not finite")
    sides = [F.normalize(side.double(), dim=1) for side in (a, b)]
    for name, side in zip(("first", "second"), sides, strict=True):
        if (side - side[0]).abs().max() < 1e-7:
            raise UsageError(f"CKNNA: the {name} representation is the same for every image: no one is nearer")
    near = [_nearest_pairs(side, k) for side in sides]
    both = near[0][torch.isin(near[0], near[1])]
    across = _hsic(sides[0], sides[1], both)
    own = [_hsic(side, side, pairs) for side, pairs in zip(sides, near, strict=True)]
    if min(own) <= 0:
        raise UsageError(f"CKNNA of {num} images with k = {k}: a masked kernel has no variance; take more images")
    return across / (own[0] * own[1]) ** 0.5


def _nearest_pairs(unit: Tensor, k: int) -> Tensor:
    """Return the pairs (i, j), j among the k nearest of i by cosine, as i * N + j, [N * k] int64 ascending in i."""
    num = len(unit)
    pairs = []
    for block in torch.arange(num).split(max(1, _BLOCK_BYTES // (8 * num))):
        likeness = unit[block] @ unit.T
        likeness[torch.arange(len(block)), block] = -torch.inf  # no one is one's own neighbour
        pairs.append(block[:, None] * num + likeness.topk(k, dim=1).indices)
    return torch.cat(pairs).flatten()


def _hsic(a: Tensor, b: Tensor, pairs: Tensor) -> float:
    """Return the unbiased HSIC of the cosine kernels of unit rows `a`, `b` [N, .], both zero but at `pairs`."""
    num = len(a)
    i, j = pairs // num, pairs % num
    k_values, l_values = (a[i] * a[j]).sum(1), (b[i] * b[j]).sum(1)
    mutual = torch.isin(j * num + i, pairs)
    k_columns = torch.zeros(num, dtype=torch.float64).index_add_(0, j, k_values)
    l_rows = torch.zeros(num, dtype=torch.float64).index_add_(0, i, l_values)
    same = (k_values * l_values)[mutual].sum()
    means = k_values.sum() * l_values.sum() / ((num - 1) * (num - 2))
    crossed = 2 * (k_columns @ l_rows) / (num - 2)
    return float((same + means - crossed) / (num * (num - 3)))
