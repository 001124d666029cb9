"""What an encoder sees: for a few samples the image, its tokens' principal components and their likeness to anchors.

One row a sample. Left half: tokens as stored; right half: normalised over space. The first three principal components
of the sample's own tokens are red, green and blue; each anchor's map is the cosine of every token with the anchor's,
one scale for all maps. Tokens are drawn as they are, one flat square each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .figures import new_figure, save

NUM_ANCHORS = 3
ANCHOR_COLOURS = ("#ff3b6b", "#ffb000", "#00c2ff")
_CLIP = 0.01  # of the tokens at either end of a component, so that one outlier does not grey the rest
_INCHES = 1.5  # a panel
_CAPTION = 22  # letters that fit into one


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One sample: `image` [H, W, 3] uint8, `stored` and `normalized` [T, E] float32 over `grid`, and its captions."""

    image: np.ndarray
    stored: Tensor
    normalized: Tensor
    grid: tuple[int, int]
    title: str


def principal_components(tokens: Tensor, grid: tuple[int, int], like: np.ndarray | None = None) -> np.ndarray:
    """Return the first three principal components of `tokens` [T, E] as colours [h, w, 3] in [0, 1].

    Each is scaled to its own range. A component has no sign of its own: it takes the one that goes with the same colour
    of `like` [h, w, 3], another picture of the sample, or puts its longer tail up. A component without variance
    (constant tokens, E < 3) is mid-grey.
    """
    centred = tokens.double() - tokens.double().mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    colours = torch.full((len(tokens), 3), 0.5, dtype=torch.float64)
    for k in range(min(3, len(singular))):
        if singular[k] <= 1e-6 * max(float(tokens.double().norm()), 1e-12):
            break
        component = left[:, k]
        guide = component**2 if like is None else torch.from_numpy(like[..., k]).flatten()
        component = component * (1.0 if component @ (guide - guide.mean()) >= 0 else -1.0)
        low, high = torch.quantile(component, torch.tensor([_CLIP, 1 - _CLIP], dtype=torch.float64))
        colours[:, k] = ((component - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.view(*grid, 3).numpy()


def anchor_tokens(tokens: Tensor, num: int = NUM_ANCHORS) -> list[int]:
    """Return `num` token positions that are unlike each other, of `tokens` [T, E].

    The first is the token most like the mean; each next is the one whose largest cosine to those before is smallest.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    chosen = [int((unit @ F.normalize(unit.mean(0), dim=0)).argmax())]
    while len(chosen) < min(num, len(tokens)):
        likeness = (unit @ unit[chosen].T).amax(1)
        likeness[chosen] = 2.0
        chosen.append(int(likeness.argmin()))
    return chosen


def cosine_map(tokens: Tensor, anchor: int, grid: tuple[int, int]) -> np.ndarray:
    """Return the cosine of every token of `tokens` [T, E] with token `anchor`, [h, w] float32."""
    unit = F.normalize(tokens.float(), dim=-1)
    return (unit @ unit[anchor]).view(grid).numpy()


def draw(panels: Sequence[Panel], file: Path, *, title: str, gamma: float) -> None:
    """Draw the panels, one row each, into a PNG; errors as in `save`."""
    halves = 1 + NUM_ANCHORS
    # image, four panels, a gap, four panels, colour bar
    widths = [1.0, 0.06, *[1.0] * halves, 0.14, *[1.0] * halves, 0.06]
    height = _INCHES * len(panels) + 0.75
    figure = new_figure(figsize=(_INCHES * sum(widths) + 0.7, height), facecolor="white")
    grid = figure.add_gridspec(
        len(panels),
        len(widths),
        width_ratios=widths,
        wspace=0.05,
        hspace=0.05,
        left=0.012,
        right=1 - 0.55 / (_INCHES * sum(widths) + 0.7),
        bottom=0.12 / height,
        top=1 - 0.62 / height,
    )
    first_columns = {"stored": 2, "normalized": 3 + halves}
    colours: Any = None
    for row, panel in enumerate(panels):
        axes = _blank(figure.add_subplot(grid[row, 0]))
        axes.imshow(panel.image, interpolation="nearest")
        anchors = anchor_tokens(panel.normalized)
        _mark(axes, anchors, panel.grid, panel.image.shape[:2])
        axes.text(
            0.03, 0.03, _caption(panel.title), transform=axes.transAxes, fontsize=6, color="white", va="bottom",
            bbox={"facecolor": "black", "alpha": 0.55, "pad": 1.2, "linewidth": 0},
        )  # fmt: skip
        components: np.ndarray | None = None
        for half, column in first_columns.items():
            tokens: Tensor = getattr(panel, half)
            axes = _blank(figure.add_subplot(grid[row, column]))
            components = principal_components(tokens, panel.grid, like=components)
            axes.imshow(components, interpolation="nearest")
            _heading(axes, row, "principal components")
            for k, anchor in enumerate(anchors):
                axes = _blank(figure.add_subplot(grid[row, column + 1 + k]), ANCHOR_COLOURS[k])
                colours = axes.imshow(
                    cosine_map(tokens, anchor, panel.grid), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest"
                )
                _mark(axes, [anchor], panel.grid, panel.grid, [ANCHOR_COLOURS[k]])
                _heading(axes, row, f"cosine to anchor {k + 1}")
    bar = figure.colorbar(colours, cax=figure.add_subplot(grid[:, -1]), ticks=[-1, 0, 1])
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_linewidth(0.4)
    for half, text in (("stored", "as stored"), ("normalized", f"normalised over space, gamma {gamma:g}")):
        column = first_columns[half]
        left, right = (grid[0, c].get_position(figure) for c in (column, column + halves - 1))
        figure.text((left.x0 + right.x1) / 2, 1 - 0.30 / height, text, ha="center", fontsize=9, weight="bold")
    figure.text(0.012, 1 - 0.30 / height, title, fontsize=9, weight="bold")
    save(figure, file)


def _caption(title: str) -> str:
    return title if len(title) <= _CAPTION else f"...{title[3 - _CAPTION :]}"


def _blank(axes: Any, colour: str | None = None) -> Any:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=1.4)
    return axes


def _heading(axes: Any, row: int, text: str) -> None:
    if row == 0:
        axes.set_title(text, fontsize=6.5, pad=2.5, color="#444444")


def _mark(
    axes: Any,
    anchors: Sequence[int],
    grid: tuple[int, int],
    size: tuple[int, int],
    colours: Sequence[str] = ANCHOR_COLOURS,
) -> None:
    """Draw a ring at each anchor token, on axes whose picture has `size` (h, w) pixels."""
    for anchor, colour in zip(anchors, colours, strict=False):
        row, column = divmod(anchor, grid[1])
        x = (column + 0.5) * size[1] / grid[1] - 0.5
        y = (row + 0.5) * size[0] / grid[0] - 0.5
        for edge, thickness in (("white", 2.6), (colour, 1.5)):
            axes.plot(
                x,
                y,
                "o",
                markersize=6,
                markerfacecolor="none",
                markeredgecolor=edge,
                markeredgewidth=thickness,
                clip_on=False,
            )
