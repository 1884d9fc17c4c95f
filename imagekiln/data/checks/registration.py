"""How much of one small picture another explains, after a small shift, crop and change of brightness.

A picture b that is a crop of a with other light is, to first order in the displacement (Lucas and Kanade 1981),

    b = offset + gain a + (t_x + s_x x) da/dx + (t_y + s_y y) da/dy

with x, y in [-1, 1], linear in its unknowns: gain, an offset for each channel, shift t and stretch s in pixels at the
border. Least squares gives them; a is warped by t and s, and the fit repeated. `residual` is the share of b's variance
that is left, on slightly smoothed pictures whose chroma counts half (JPEG keeps little of it). Different pictures of
alike things agree in the large, but not in their details, so `detail` is the correlation of what lies between two
scales of smoothing, in the luma of the warped pictures. Both ways are tried (a crop may be either), the better is kept.

Shapes: P pairs, T = `survey.THUMB` rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from imagekiln.data.survey import THUMB

LARGEST_MOVE = 2.5
"""Pixels of a small copy that the border may move: 8 % of a side."""
GAINS = (0.4, 2.5)

_REFUSED = 1.0
_OPPONENT = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)
_CHROMA = 0.5
_AXIS = np.linspace(-1, 1, THUMB, dtype=np.float32)
_BORDER, _STEP = 2, 2  # border pixels have no place to come from; the fit needs no more than every second one
_RIDGE = 1e-2
_NOISE = 30.0  # squared grey levels in a picture's details: less is rounding
_BLOCK = 256


class Agreement(NamedTuple):
    """residual: (P,) float32 in [0, 1], 1 where no small change leads from one to the other. detail: (P,) in [-1, 1]"""

    residual: np.ndarray
    detail: np.ndarray


def agreement(first_PTT3: np.ndarray, second_PTT3: np.ndarray) -> Agreement:
    """How well pairs of small copies agree; uint8 or float on the scale 0..255.

    >>> ramp = np.add.outer(np.arange(32) ** 2 / 8, 4 * np.arange(32))[None, ..., None] * np.ones(3)
    >>> found = agreement(ramp, 0.8 * ramp + 10)
    >>> bool(found.residual[0] < 1e-3)
    True
    """
    parts = []
    for start in range(0, len(first_PTT3), _BLOCK):
        sides = [
            np.asarray(side[start : start + _BLOCK], np.float32) @ _OPPONENT.T for side in (first_PTT3, second_PTT3)
        ]
        there, back = _one_way(sides[0], sides[1]), _one_way(sides[1], sides[0])
        better = (there.residual < back.residual) | ((there.residual == back.residual) & (there.detail > back.detail))
        parts.append([np.where(better, *both) for both in zip(there, back, strict=True)])
    if not parts:
        return Agreement(np.zeros(0, np.float32), np.zeros(0, np.float32))
    return Agreement(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _one_way(a: np.ndarray, b: np.ndarray) -> Agreement:
    weighed = [_smooth(side, 2) * np.array([1, _CHROMA, _CHROMA], np.float32) for side in (a, b)]
    _, _, move = _fit(weighed[0], weighed[1])
    residual, gain, further = _fit(_warped(weighed[0], move), weighed[1])
    move = np.clip(move + further, -2 * LARGEST_MOVE, 2 * LARGEST_MOVE)
    sane = (np.abs(move).max(1) <= LARGEST_MOVE) & (gain >= GAINS[0]) & (gain <= GAINS[1])
    return Agreement(
        np.where(sane, residual, _REFUSED).astype(np.float32), _detail(_warped(a[..., :1], move), b[..., :1])
    )


def _fit(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual (P,), gain (P,) and move_P4: t_x, t_y, s_x, s_y."""
    down, across = np.zeros_like(a), np.zeros_like(a)
    down[:, 1:-1], across[:, :, 1:-1] = (a[:, 2:] - a[:, :-2]) / 2, (a[:, :, 2:] - a[:, :, :-2]) / 2
    inner = slice(_BORDER, THUMB - _BORDER, _STEP)
    axis = _AXIS[inner]
    terms = [side[:, inner, inner] for side in (a, across, down)]
    terms += [terms[1] * axis[:, None], terms[2] * axis[:, None, None]]
    target = b[:, inner, inner]
    # An offset for each channel is the same as taking every channel's mean away from both sides.
    terms, target = (
        [term - term.mean((1, 2), keepdims=True) for term in terms],
        target - target.mean((1, 2), keepdims=True),
    )
    X = np.stack([term.reshape(len(a), -1) for term in terms], 1)
    y = target.reshape(len(a), -1, 1)
    G = X @ X.transpose(0, 2, 1)
    G[:, range(5), range(5)] += _RIDGE
    weights = np.linalg.solve(G, X @ y)
    left = y - X.transpose(0, 2, 1) @ weights
    gain = weights[:, 0, 0]
    divisor = np.where(np.abs(gain) < 0.1, 0.1, gain)
    residual = (left**2).sum((1, 2)) / np.maximum((y**2).sum((1, 2)), 1.0)
    return residual, gain, np.clip(weights[:, 1:, 0] / divisor[:, None], -LARGEST_MOVE, LARGEST_MOVE)


def _warped(a: np.ndarray, move_P4: np.ndarray) -> np.ndarray:
    """a at x + t + s x, linearly interpolated, clamped at the border."""
    across, down = (_interpolation(move_P4[:, at], move_P4[:, at + 2]) for at in (0, 1))
    channels = a.shape[-1]
    rows = (down @ a.reshape(len(a), THUMB, -1)).reshape(len(a), THUMB, THUMB, channels)
    return np.stack([rows[..., channel] @ across.transpose(0, 2, 1) for channel in range(channels)], -1)


def _interpolation(shift_P: np.ndarray, stretch_P: np.ndarray) -> np.ndarray:
    """Matrices (P, T, T) that take a row or column of pixels to the moved places."""
    places = np.arange(THUMB, dtype=np.float32) + shift_P[:, None] + stretch_P[:, None] * _AXIS
    distance = np.abs(np.clip(places, 0, THUMB - 1)[..., None] - np.arange(THUMB, dtype=np.float32))
    return np.maximum(0, 1 - distance)


def _detail(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    inner = slice(_BORDER + 1, THUMB - _BORDER - 1)
    bands = []
    for side in (a, b):
        fine = _smooth(side, 1)
        band = (fine - _smooth(fine, 2))[:, inner, inner].reshape(len(side), -1)
        bands.append(band - band.mean(1, keepdims=True))
    energy = [(band**2).sum(1) + _NOISE for band in bands]
    return ((bands[0] * bands[1]).sum(1) / np.sqrt(energy[0] * energy[1])).astype(np.float32)


def _smooth(pictures: np.ndarray, times: int) -> np.ndarray:
    """[1 2 1]/4 down and across, the border repeated."""
    for _ in range(times):
        padded = np.pad(pictures, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
        pictures = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
        padded = np.pad(pictures, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
        pictures = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
    return pictures
