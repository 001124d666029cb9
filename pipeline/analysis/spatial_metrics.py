"""Spatial self-similarity of patch tokens: the figures that predict generation quality (iREPA, arXiv 2512.10794).

In: tokens [B, T, E], row-major over a grid (h, w), any grid. Out: one float32 an image. Tokens are scaled to length 1,
so that a product is a cosine; distance is Manhattan's on the grid. A token of length 0 has cosine 0 to all others.

LDS and CDS need the mean cosine at each distance up to 8 and the mean over all pairs, never a cosine by itself. So the
Gram matrix is not made whole: the grid is cut into strips of some 64 tokens, each is multiplied with itself and the
strips after it that can lie within distance 8, and the products of all strips are added up as they are made. At
256 x 768 that is 9 of 16 blocks and 12,288 sums an image in place of 65,536 cosines. The mean over far pairs follows
from |sum of all tokens|^2 less the near ones, and so does the contrast.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cache_specs.errors import UsageError

FAR = 6  # distance from which a pair is far (LDS, SRSS)
LAST = 8  # distance up to which similarity may decay (CDS)
# Measured at 256 x 768 on one core and on two, the best of 16 to 128 tokens and 1 to 8 images of 0.75 MiB.
_STRIP_TOKENS = 64
_WORKING_BYTES = 2**23  # of float32 tokens at a time: they and the products stay in the processor's cache
# 1 - |mean|^2 has an error of some 1e-6 in float32: below this square of the contrast the root would show it.
_CANCELS = 0.01


def lds(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return local minus distant similarity [B] float32: mean cosine at distance 1 less that at distance >= 6.

    `tokens` [B, T, E] of any float dtype. A pair counts once or twice alike, the mean is the same. Raises `UsageError`
    for a grid that has no pair so far apart.
    """
    return _similarity(tokens, grid).lds()


def cds(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the correlation decay slope [B] float32: how fast the mean cosine falls with distance.

    Minus the slope of the unweighted least-squares line through the mean cosine at distance 1 to 8, or to the longest
    that the grid has. `tokens` [B, T, E] of any float dtype. Raises `UsageError` for a grid with fewer than two.
    """
    return _similarity(tokens, grid).cds()


def rmsc(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the root-mean-square contrast [B] float32: sqrt(mean_t |x_t - mean x|^2) of unit tokens [B, T, E]."""
    _check(tokens, grid)
    parts = [_contrast(_unit(part)) for part in tokens.split(_images_at_once(tokens))]
    return torch.cat(parts).float()


def srss(tokens: Tensor, grid: tuple[int, int], masks: Tensor) -> Tensor:
    """Return semantic-region self-similarity [B] float32, NaN for an image without an anchor that has both pairs.

    `masks` [B, T] bool, true on the foreground. For each foreground token: mean cosine to foreground at distance 1 less
    mean cosine to background at distance >= 6; then the mean over the tokens that have both.
    """
    _check(tokens, grid)
    if masks.shape != tokens.shape[:2] or masks.dtype != torch.bool:
        raise UsageError(
            f"masks are {masks.dtype} {list(masks.shape)}; expected torch.bool {list(tokens.shape[:2])}, true on the "
            "foreground"
        )
    apart = distances(grid).to(tokens.device)
    near, far = (apart == 1).float(), (apart >= FAR).float()
    size = max(1, min(_images_at_once(tokens), _WORKING_BYTES // (4 * len(apart) ** 2)))
    parts = []
    for part, mask in zip(tokens.split(size), masks.split(size), strict=True):
        unit = _unit(part)
        cosines = unit @ unit.transpose(1, 2)  # [b, T, T]
        foreground, background = mask.float()[..., None], (~mask).float()[..., None]
        num_near, num_far = (near @ foreground)[..., 0], (far @ background)[..., 0]
        like = ((cosines * near) @ foreground)[..., 0] / num_near.clamp(min=1)
        unlike = ((cosines * far) @ background)[..., 0] / num_far.clamp(min=1)
        anchors = mask & (num_near > 0) & (num_far > 0)
        contrast = torch.where(anchors, like - unlike, 0).double().sum(1)
        parts.append(contrast / torch.where(anchors.any(1), anchors.sum(1), torch.nan))
    return torch.cat(parts).float()


def unmasked_metrics(tokens: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return `lds`, `cds` and `rmsc` of `tokens` from one pass over them, by name, without those the grid lacks."""
    similarity = _similarity(tokens, grid)
    undefined = undefined_metrics(grid)
    values = {"lds": similarity.lds, "cds": similarity.cds, "rmsc": lambda: similarity.contrast.float()}
    return {name: value() for name, value in values.items() if name not in undefined}


def undefined_metrics(grid: tuple[int, int]) -> dict[str, str]:
    """Return, by metric, why `grid` is too small for it; empty for most grids."""
    longest = sum(grid) - 2
    undefined: dict[str, str] = {}
    if longest < FAR:
        reason = f"no two tokens of a {grid[0]} x {grid[1]} grid are {FAR} apart"
        undefined |= {"lds": reason, "srss": reason}
    if longest < 2:
        undefined["cds"] = f"a {grid[0]} x {grid[1]} grid has fewer than two distances"
    return undefined


def distances(grid: tuple[int, int]) -> Tensor:
    """Return the Manhattan distance of every two tokens, [T, T] int64."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    return (places[:, None] - places).abs().sum(-1)


@dataclass(frozen=True, kw_only=True)
class _Similarity:
    """Mean cosines of B images, float64: `near` [B, D] at distance 1 to D <= 8, `far` [B] from 6; `contrast` [B]."""

    grid: tuple[int, int]
    near: Tensor
    far: Tensor
    contrast: Tensor

    def lds(self) -> Tensor:
        self._need("lds")
        return (self.near[:, 0] - self.far).float()

    def cds(self) -> Tensor:
        self._need("cds")
        places = torch.arange(self.near.shape[1], dtype=torch.float64, device=self.near.device)
        places -= places.mean()
        return (-(self.near @ places) / (places @ places)).float()

    def _need(self, metric: str) -> None:
        reason = undefined_metrics(self.grid).get(metric)
        if reason:
            raise UsageError(f"{metric}: {reason}; take a finer grid")


def _similarity(tokens: Tensor, grid: tuple[int, int]) -> _Similarity:
    """Return mean cosines by distance, and the contrast, of `tokens` [B, T, E]."""
    _check(tokens, grid)
    plan = _strips(grid, tokens.device)
    num = tokens.shape[1]
    sums, totals, contrasts = [], [], []
    for part in tokens.split(_images_at_once(tokens)):
        unit = _unit(part)
        sums.append(_sums_by_distance(unit, plan))
        totals.append(unit.sum(1).double().square().sum(-1))
        square = sums[-1][:, 0] / num - totals[-1] / num**2  # mean |x|^2 - |mean x|^2
        contrasts.append(square.sqrt() if (square > _CANCELS).all() else _contrast(unit))
    by_distance = torch.cat(sums)
    far = torch.cat(totals) - by_distance[:, :FAR].sum(1)
    num_far = num**2 - plan.num_pairs[:FAR].sum()
    return _Similarity(
        grid=grid,
        near=by_distance[:, 1:] / plan.num_pairs[1:],
        far=far / num_far,
        contrast=torch.cat(contrasts),
    )


@dataclass(frozen=True, kw_only=True)
class _Strips:
    """How a grid is cut: strips of M = `tokens` tokens, each multiplied with the K = `reach` tokens from its first on.

    `pairs` [M * K, D + 1] float32: how many ordered pairs an entry of the products stands for, at distance 0 to D.
    `num_pairs` [D + 1] float64: ordered pairs of the grid at each distance.
    """

    tokens: int
    reach: int
    pairs: Tensor
    num_pairs: Tensor


@functools.lru_cache(maxsize=16)
def _strips(grid: tuple[int, int], device: torch.device) -> _Strips:
    height, width = grid
    rows = min(height, max(1, round(_STRIP_TOKENS / width)))
    # A strip k later starts k * rows rows below, and its nearest row is (k - 1) * rows + 1 away.
    reached = rows * min(-(-height // rows), (LAST + rows - 1) // rows + 1)
    last = min(LAST, height + width - 2)
    apart = distances((reached, width))[: rows * width]  # [M, K]
    pairs = F.one_hot(apart.clamp(max=last + 1), last + 2)[..., :-1].float()
    pairs[:, rows * width :] *= 2  # a strip and a later one are multiplied once; their pairs have two orders
    num_pairs = torch.bincount(distances(grid).flatten())[: last + 1].double()
    return _Strips(
        tokens=rows * width,
        reach=reached * width,
        pairs=pairs.flatten(0, 1).to(device),
        num_pairs=num_pairs.to(device),
    )


def _sums_by_distance(unit: Tensor, plan: _Strips) -> Tensor:
    """Return the sum of cosines over ordered pairs at each distance, [b, D + 1] float64, of `unit` [b, T, E]."""
    products = unit.new_zeros(len(unit), plan.tokens, plan.reach)
    for start in range(0, unit.shape[1], plan.tokens):
        strip, reached = unit[:, start : start + plan.tokens], unit[:, start : start + plan.reach]
        products[:, : strip.shape[1], : reached.shape[1]].baddbmm_(strip, reached.transpose(1, 2))
    return (products.flatten(1) @ plan.pairs).double()


def _contrast(unit: Tensor) -> Tensor:
    centred = unit - unit.mean(1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=(1, 2)).double() / unit.shape[1] ** 0.5


def _unit(tokens: Tensor) -> Tensor:
    return F.normalize(tokens.float(), dim=-1)


def _images_at_once(tokens: Tensor) -> int:
    return max(1, _WORKING_BYTES // max(1, 4 * tokens.shape[1] * tokens.shape[2]))


def _check(tokens: Tensor, grid: tuple[int, int]) -> None:
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise UsageError(f"tokens are {tokens.dtype} {list(tokens.shape)}; expected floats [B, T, E]")
    if min(grid) < 1 or grid[0] * grid[1] != tokens.shape[1]:
        raise UsageError(
            f"tokens are {list(tokens.shape)} but the grid is {grid[0]} x {grid[1]}; expected T = "
            f"{grid[0]} * {grid[1]} = {grid[0] * grid[1]}"
        )
