"""Dense histograms of oriented gradients, many images at a time: the study's encoder without weights.

Definition (iREPA's classic features): luma in [0, 1], skimage.feature.hog with 2 x 2 pixels a cell, 4 x 4 cells a
block, 8 orientations and L2-Hys; each block's 128 numbers L2-normalised; the map of blocks resized bilinearly to the
token grid. skimage loops over blocks in Python, about 165 ms an image at 256 px; here the loops are array operations,
and a test holds the two equal.
"""

import numpy as np
import torch

CELL = 2
BLOCK = 4
ORIENTATIONS = 8
WIDTH = BLOCK * BLOCK * ORIENTATIONS
MIN_PIXELS = CELL * BLOCK
_LUMA = np.array([0.2126, 0.7152, 0.0722])
_EPS = 1e-5  # skimage's
_CLIP = 0.2  # the Hys of L2-Hys


def hog_tokens(images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return HOG tokens [B, h * w, 128] float32, row-major over `grid` (h, w), of `images` [B, 3, H, W] uint8.

    Computed on the CPU; H and W at least 8 pixels.
    """
    pixels = images.permute(0, 2, 3, 1).cpu().numpy().astype(np.float32)
    gray = np.clip((pixels @ _LUMA.astype(np.float32)) / np.float32(255), 0, 1)
    cells = _cell_histograms(gray)
    top, bottom, down = _bilinear_taps(cells.shape[1] - BLOCK + 1, grid[0])
    left, right, across = _bilinear_taps(cells.shape[2] - BLOCK + 1, grid[1])
    down, across = down[:, None, None], across[:, None]

    def corner(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return _normalized_blocks(cells, rows, columns)

    upper = corner(top, left) * (1 - across) + corner(top, right) * across
    lower = corner(bottom, left) * (1 - across) + corner(bottom, right) * across
    tokens = upper * (1 - down) + lower * down
    return torch.from_numpy(tokens.reshape(len(tokens), -1, WIDTH).astype(np.float32))


def _bilinear_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two source positions and the second one's weight, each [out], of a bilinear resize of `size` places.

    Pixel centres (`align_corners=False`), as torch computes it. A token reads four blocks of the map, so at 16 x 16
    from 125 x 125 only one block in fifteen is ever made.
    """
    source = np.maximum((np.arange(out) + 0.5) * (size / out) - 0.5, 0)
    first = source.astype(np.int64)
    return first, np.minimum(first + 1, size - 1), source - first


def _cell_histograms(gray: np.ndarray) -> np.ndarray:
    """Return the mean gradient magnitude by orientation of each cell, [B, H // 2, W // 2, 8] float64."""
    rows = np.zeros(gray.shape, dtype=np.float32)
    columns = np.zeros(gray.shape, dtype=np.float32)
    rows[:, 1:-1] = gray[:, 2:] - gray[:, :-2]
    columns[:, :, 1:-1] = gray[:, :, 2:] - gray[:, :, :-2]
    wide_rows, wide_columns = rows.astype(np.float64), columns.astype(np.float64)
    magnitude = np.hypot(wide_columns, wide_rows)
    angle = np.rad2deg(np.arctan2(wide_rows, wide_columns)) % 180
    # The remainder of a tiny negative angle rounds to 180 itself, which lies in no bin there: it votes nowhere.
    index = np.floor(angle / (180 / ORIENTATIONS)).astype(np.int64)
    magnitude[index == ORIENTATIONS] = 0
    index[index == ORIENTATIONS] = 0

    images, height, width = gray.shape
    cells_high, cells_wide = height // CELL, width // CELL
    inside = np.s_[:, : cells_high * CELL, : cells_wide * CELL]
    cell = (
        np.arange(images)[:, None, None] * (cells_high * cells_wide)
        + (np.arange(cells_high * CELL) // CELL)[None, :, None] * cells_wide
        + (np.arange(cells_wide * CELL) // CELL)[None, None, :]
    )
    votes = np.bincount(
        (cell * ORIENTATIONS + index[inside]).ravel(),
        weights=magnitude[inside].ravel(),
        minlength=images * cells_high * cells_wide * ORIENTATIONS,
    )
    return votes.reshape(images, cells_high, cells_wide, ORIENTATIONS) / CELL**2


def _normalized_blocks(cells: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the blocks of 4 x 4 cells at `rows` x `columns`, by L2-Hys then L2, [B, rows, columns, 128] float64."""
    windows = np.lib.stride_tricks.sliding_window_view(cells, (BLOCK, BLOCK), axis=(1, 2))
    blocks = (
        windows[:, rows[:, None], columns].transpose(0, 1, 2, 4, 5, 3).reshape(len(cells), len(rows), len(columns), -1)
    )
    blocks = blocks / np.sqrt(np.sum(blocks**2, axis=-1, keepdims=True) + _EPS**2)
    blocks = np.minimum(blocks, _CLIP)
    blocks = blocks / np.sqrt(np.sum(blocks**2, axis=-1, keepdims=True) + _EPS**2)
    return blocks / np.maximum(np.linalg.norm(blocks, axis=-1, keepdims=True), 1e-12)
