"""What a small copy shows, in numbers a linear classifier can use: edges by direction, colours by place, colours alone.

Edges are histograms of oriented gradients (Dalal and Triggs 2005): 9 directions in cells of 8 and of 4 pixels, on the
square root of the pixels, the channel with the strongest gradient counting, each cell scaled by its four blocks of
2 x 2 cells and cut at 0.2. Colours are mean and deviation of luma and chroma in 4 x 4 cells, and the square root of a
histogram of 4 x 6 x 6 of them.

Shapes: N pictures, T = `survey.THUMB` rows and columns, F = `NUM_FEATURES`.
"""

from __future__ import annotations

import numpy as np

from imagekiln.data.survey import THUMB

_BINS = 9
_CELLS = (8, 4)
_LUMA_LEVELS, _CHROMA_LEVELS = 4, 6
_COLOUR_GRID = 4
_LENGTHS = (
    *((THUMB // cell) ** 2 * _BINS for cell in _CELLS),
    6 * _COLOUR_GRID**2,
    _LUMA_LEVELS * _CHROMA_LEVELS**2,
)
NUM_FEATURES = sum(_LENGTHS)
BALANCE_F = np.repeat(1 / np.sqrt(_LENGTHS), _LENGTHS).astype(np.float32)
"""Scales of standardised features with which every kind counts as much, however many numbers it has."""

_OPPONENT = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)


def features(thumbs_NTT3: np.ndarray) -> np.ndarray:
    """features_NF float32 of small copies, uint8.

    >>> features(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, NUM_FEATURES)
    True
    """
    opponent = thumbs_NTT3.astype(np.float32) / 255 @ _OPPONENT.T
    directions = _directions(thumbs_NTT3)
    kinds = [_edges(directions, cell) for cell in _CELLS] + [_places(opponent), _colours(opponent)]
    return np.concatenate(kinds, 1, dtype=np.float32)


def _directions(thumbs_NTT3: np.ndarray) -> np.ndarray:
    """(N, T, T, 9): the strength of the gradient, shared between its two nearest directions."""
    x = np.sqrt(thumbs_NTT3.astype(np.float32) / 255)
    down, across = np.zeros_like(x), np.zeros_like(x)
    down[:, 1:-1], across[:, :, 1:-1] = x[:, 2:] - x[:, :-2], x[:, :, 2:] - x[:, :, :-2]
    strength = np.hypot(across, down)
    strongest = strength.argmax(-1)[..., None]
    strength, across, down = (np.take_along_axis(each, strongest, -1) for each in (strength, across, down))
    place = np.arctan2(down, across) % np.pi / np.pi * _BINS
    below = np.floor(place)
    share = place - below
    out = np.zeros((*x.shape[:3], _BINS), np.float32)
    lower = below.astype(np.int64) % _BINS
    np.put_along_axis(out, lower, strength * (1 - share), -1)
    np.put_along_axis(out, (lower + 1) % _BINS, strength * share, -1)
    return out


def _edges(directions_NTT9: np.ndarray, cell: int) -> np.ndarray:
    """Histograms of cells, every pixel shared between its nearest cells."""
    num_cells = THUMB // cell
    centres = np.arange(num_cells) * cell + (cell - 1) / 2
    weights = np.maximum(0, 1 - np.abs(np.arange(THUMB) - centres[:, None]) / cell).astype(np.float32)
    count = len(directions_NTT9)
    down = (weights @ directions_NTT9.reshape(count, THUMB, -1)).reshape(count * num_cells, THUMB, _BINS)
    cells = (weights @ down).reshape(count, num_cells, num_cells, _BINS)
    energy = np.pad((cells**2).sum(-1), ((0, 0), (1, 1), (1, 1)), mode="edge")
    blocks = energy[:, 1:, 1:] + energy[:, 1:, :-1] + energy[:, :-1, 1:] + energy[:, :-1, :-1]
    corners = [blocks[:, y : y + num_cells, x : x + num_cells, None] for y in (0, 1) for x in (0, 1)]
    scaled = [np.minimum(cells / np.sqrt(corner + 1e-2), 0.2) for corner in corners]
    return (sum(scaled) / 4).reshape(count, -1)


def _places(opponent_NTT3: np.ndarray) -> np.ndarray:
    step = THUMB // _COLOUR_GRID
    cells = opponent_NTT3.reshape(-1, _COLOUR_GRID, step, _COLOUR_GRID, step, 3)
    return np.concatenate([part.reshape(len(cells), -1) for part in (cells.mean((2, 4)), cells.std((2, 4)))], 1)


def _colours(opponent_NTT3: np.ndarray) -> np.ndarray:
    luma = np.clip(opponent_NTT3[..., 0] * _LUMA_LEVELS, 0, _LUMA_LEVELS - 1).astype(np.int64)
    chroma = np.clip((opponent_NTT3[..., 1:] * 2 + 0.5) * _CHROMA_LEVELS, 0, _CHROMA_LEVELS - 1).astype(np.int64)
    codes = (luma * _CHROMA_LEVELS + chroma[..., 0]) * _CHROMA_LEVELS + chroma[..., 1]
    count, num_codes = len(codes), _LUMA_LEVELS * _CHROMA_LEVELS**2
    rows = np.arange(count)[:, None] * num_codes
    counts = np.bincount((codes.reshape(count, -1) + rows).ravel(), minlength=count * num_codes)
    return np.sqrt(counts.reshape(count, num_codes) / THUMB**2)
