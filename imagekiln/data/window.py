"""Where a smart crop cuts: the window with most of a picture's edges, near the middle unless far more lie elsewhere.

The picture is looked at along its longer side, with a short side of `SHORT_SIDE` pixels. With Y its luma (times alpha),
A its alpha, and e_i the sum over column i (or row i) of |dY/dx| + |dY/dy| + |dA/dx| + |dA/dy|, the window at x has the
score

    score(x) = sum of e_i inside / sum of all e_i - x^2 / 8,    x = -1 at one end, 0 in the middle, 1 at the other end,

and the best one is taken. So a window at an end has to hold an eighth of all edges more than the middle one. Details of
any kind count, also those of grass; nothing is learned, nothing is random, and the pixels are read once.

Shapes: H rows, W columns, L places along the longer side, S along the other.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

SHORT_SIDE = 64
"""Pixels of the short side of the copy that edges are measured on; smaller pictures are measured as they are."""

_PULL = 1 / 8
_TIE = 1e-9  # of all edges: far above rounding

Box = tuple[float, float, float, float]


def best_shift(image: Image.Image, box: Box, size: tuple[float, float]) -> float:
    """How far the best window lies from the middle of `box`: -1 (left or upper end) to 1 (right or lower end).

    image: mode L, LA, RGB or RGBA. box: left, top, right and bottom of the picture in it. size: width and height of the
    window; one of them is that of the box. Of equally good windows the one nearest to the middle is taken, of two of
    these the left or upper one.

    >>> picture = Image.new("L", (96, 32))
    >>> picture.paste(255, (80, 8, 90, 24)), best_shift(picture, (0, 0, 96, 32), (32, 32)) > 0.7
    (None, True)
    """
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    across = width - size[0] > height - size[1]
    scale = min(1.0, SHORT_SIDE / min(width, height))
    edges_L = _edges(image, box, (max(2, round(width * scale)), max(2, round(height * scale))), across)
    length = len(edges_L) * (size[0] / width if across else size[1] / height)
    room = len(edges_L) - length
    total = float(edges_L.sum())
    if room < 0.5 or total == 0:
        return 0.0
    num_steps = math.ceil(room)
    x = np.arange(-num_steps, num_steps + 1) / num_steps
    ends, inside = np.arange(len(edges_L) + 1), np.concatenate([[0.0], np.cumsum(edges_L)]) / total
    start = (1 + x) / 2 * room
    score = np.interp(start + length, ends, inside) - np.interp(start, ends, inside) - _PULL * x**2
    best = np.flatnonzero(score >= score.max() - _TIE)
    return float(x[best[np.abs(x[best]).argmin()]])


def _edges(image: Image.Image, box: Box, size: tuple[int, int], across: bool) -> np.ndarray:
    """Edges at every place along the longer side: (L,) float64. A step between two places counts half for each."""
    copy = image.convert("LA" if image.mode.endswith("A") else "L")
    pixels = np.asarray(copy.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0), np.float64)
    planes = [pixels] if pixels.ndim == 2 else [pixels[..., 0] * pixels[..., 1] / 255, pixels[..., 1]]
    edges_L = np.zeros(size[0] if across else size[1])
    for plane_HW in planes:
        plane_LS = plane_HW.T if across else plane_HW
        steps = np.abs(np.diff(plane_LS, axis=0)).sum(1) / 2
        edges_L += np.abs(np.diff(plane_LS, axis=1)).sum(1)
        edges_L[:-1] += steps
        edges_L[1:] += steps
    return edges_L
