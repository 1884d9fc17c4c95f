"""How much of one small picture another explains, after a small shift, crop and change of brightness.

A picture b that is a crop of a with other light is, to first order in the displacement (Lucas and Kanade 1981),

    b = offset + gain a + (t_x + s_x x) da/dx + (t_y + s_y y) da/dy

with x, y in [-1, 1], linear in its unknowns: gain, an offset for each channel, shift t and stretch s in pixels at the
border. Least squares gives them; a is warped by t and s, and the fit repeated. `residual` is the share of b's variance
that is left, on slightly smoothed pictures whose chroma counts half (JPEG keeps little of it). Different pictures of
alike things agree in the large, but not in their details, so `detail` is the correlation of what lies between two
scales of smoothing, in the luma of the warped pictures. Both ways are tried (a crop may be either), the better is kept.
A way whose first fit leaves very much unexplained is not followed: most pairs end there.

Shapes: P pairs, C = 3 channels, T = `survey.THUMB` rows and columns.
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
_WEIGHTS = np.array([1, 0.5, 0.5], np.float32)[:, None, None]  # JPEG keeps little of chroma
_AXIS = np.linspace(-1, 1, THUMB, dtype=np.float32)
_BORDER, _STEP = 2, 2  # border pixels have no place to come from; the fit needs no more than every second one
_RIDGE = 1e-2
_NOISE = 30.0  # squared grey levels in a picture's details: less is rounding
_BLOCK = 64  # what is computed of so many pairs stays in the processor's cache
# Share that the first fit leaves: at most 0.142 in 3,577 planted near duplicates of flowers and CIFAR-10, more than
# this in about half of the unrelated pairs that come here.
_HOPELESS = 0.25


class Agreement(NamedTuple):
    """residual: (P,) float32 in [0, 1], 1 where no small change leads from one to the other. detail: (P,) in [-1, 1],
    0 where it was not worth a look."""

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
            (
                _OPPONENT @ side[start : start + _BLOCK].astype(np.float32).reshape(-1, THUMB**2, 3).transpose(0, 2, 1)
            ).reshape(-1, 3, THUMB, THUMB)
            for side in (first_PTT3, second_PTT3)
        ]
        parts.append(_both_ways(*sides))
    if not parts:
        return Agreement(np.zeros(0, np.float32), np.zeros(0, np.float32))
    return Agreement(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _both_ways(one: np.ndarray, other: np.ndarray) -> Agreement:
    best = Agreement(np.full(len(one), _REFUSED, np.float32), np.zeros(len(one), np.float32))
    smoothed = [_smooth(side, 2) * _WEIGHTS for side in (one, other)]
    for (a, b), (smooth_a, smooth_b) in (((one, other), smoothed), ((other, one), smoothed[::-1])):
        residual, _, move = _fit(smooth_a, smooth_b)
        at = np.flatnonzero(residual <= _HOPELESS)
        if not len(at):
            continue
        found = _one_way(a[at, :1], b[at, :1], smooth_a[at], smooth_b[at], move[at])
        better = (found.residual < best.residual[at]) | (
            (found.residual == best.residual[at]) & (found.detail > best.detail[at])
        )
        best.residual[at[better]], best.detail[at[better]] = found.residual[better], found.detail[better]
    return best


def _one_way(
    luma_a: np.ndarray, luma_b: np.ndarray, smooth_a: np.ndarray, smooth_b: np.ndarray, move_P4: np.ndarray
) -> Agreement:
    """The fit repeated on a moved as the first one said, and how details agree then."""
    residual, gain, further = _fit(_warped(smooth_a, move_P4), smooth_b)
    move_P4 = np.clip(move_P4 + further, -2 * LARGEST_MOVE, 2 * LARGEST_MOVE)
    sane = (np.abs(move_P4).max(1) <= LARGEST_MOVE) & (gain >= GAINS[0]) & (gain <= GAINS[1])
    return Agreement(np.where(sane, residual, _REFUSED).astype(np.float32), _detail(_warped(luma_a, move_P4), luma_b))


def _fit(a_PCTT: np.ndarray, b_PCTT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual (P,), gain (P,) and move_P4: t_x, t_y, s_x, s_y."""
    before, here, after = (slice(_BORDER + step, THUMB - _BORDER + step, _STEP) for step in (-1, 0, 1))
    axis, count = _AXIS[here], len(a_PCTT)
    across = (a_PCTT[..., here, after] - a_PCTT[..., here, before]) / 2
    down = (a_PCTT[..., after, here] - a_PCTT[..., before, here]) / 2
    terms = (a_PCTT[..., here, here], across, down, axis * across, axis[:, None] * down, b_PCTT[..., here, here])
    centred = np.stack([term.reshape(count, 3, -1) for term in terms], 1)
    # An offset for each channel is the same as taking every channel's mean away from both sides.
    centred -= centred.mean(-1, keepdims=True)
    X, y = (part.reshape(count, part.shape[1], -1) for part in (centred[:, :-1], centred[:, -1:]))
    G = X @ X.transpose(0, 2, 1)
    G[:, range(5), range(5)] += _RIDGE
    weights = np.linalg.solve(G, X @ y.transpose(0, 2, 1))
    left = y - weights.transpose(0, 2, 1) @ X
    gain = weights[:, 0, 0]
    divisor = np.where(np.abs(gain) < 0.1, 0.1, gain)
    residual = (left**2).sum((1, 2)) / np.maximum((y**2).sum((1, 2)), 1.0)
    return residual, gain, np.clip(weights[:, 1:, 0] / divisor[:, None], -LARGEST_MOVE, LARGEST_MOVE)


def _warped(a_PCTT: np.ndarray, move_P4: np.ndarray) -> np.ndarray:
    """a at x + t + s x, linearly interpolated, clamped at the border."""
    across, down = (_interpolation(move_P4[:, at], move_P4[:, at + 2])[:, None] for at in (0, 1))
    return down @ a_PCTT @ across.transpose(0, 1, 3, 2)


def _interpolation(shift_P: np.ndarray, stretch_P: np.ndarray) -> np.ndarray:
    """Matrices (P, T, T) that take a row or column of pixels to the moved places."""
    places = np.arange(THUMB, dtype=np.float32) + shift_P[:, None] + stretch_P[:, None] * _AXIS
    distance = np.abs(np.clip(places, 0, THUMB - 1)[..., None] - np.arange(THUMB, dtype=np.float32))
    return np.maximum(0, 1 - distance)


def _detail(a_P1TT: np.ndarray, b_P1TT: np.ndarray) -> np.ndarray:
    inner = slice(_BORDER + 1, THUMB - _BORDER - 1)
    bands = []
    for side in (a_P1TT, b_P1TT):
        fine = _smooth(side, 1)
        band = (fine - _smooth(fine, 2))[..., inner, inner].reshape(len(side), -1)
        bands.append(band - band.mean(1, keepdims=True))
    energy = [(band**2).sum(1) + _NOISE for band in bands]
    return ((bands[0] * bands[1]).sum(1) / np.sqrt(energy[0] * energy[1])).astype(np.float32)


def _smooth(pictures_PCTT: np.ndarray, times: int) -> np.ndarray:
    """[1 2 1]/4 down and across, the border repeated."""
    for _ in range(times):
        for axis in (-1, -2):
            along = np.moveaxis(pictures_PCTT, axis, -1)
            smooth = 2 * along
            smooth[..., 1:] += along[..., :-1]
            smooth[..., :-1] += along[..., 1:]
            smooth[..., [0, -1]] += along[..., [0, -1]]
            pictures_PCTT = np.moveaxis(smooth, -1, axis) / 4
    return pictures_PCTT
