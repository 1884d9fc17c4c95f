"""How much of one small picture another explains, after a small shift, crop and change of brightness.

A picture b that is a crop of a with other light is, to first order in the displacement (Lucas and Kanade 1981),

    b = offset + gain a + (t_x + s_x x) da/dx + (t_y + s_y y) da/dy

with x, y in [-1, 1], linear in its unknowns: gain, an offset for each channel, shift t and stretch s in pixels at the
border. Least squares gives them; a is warped by t and s, and the fit repeated. `residual` is the share of b's variance
that is left, on slightly smoothed pictures whose chroma counts half (JPEG keeps little of it). Different pictures of
alike things agree in the large, but not in their details, so `detail` is the correlation of what lies between two
scales of smoothing, in the luma of the warped pictures. Both ways are tried (a crop may be either), the better is kept.
A way whose first fit leaves very much unexplained is not followed: most pairs end there.

Shapes: P pairs, U pictures, C = 3 channels, T = `survey.THUMB` rows and columns, K pixels that are looked at.
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


class _Sides(NamedTuple):
    """What pairs need of pictures, computed once a picture: U of them. terms: those of `_fit`, centred; the first is
    the smoothed picture. products: of the terms with each other. band: what lies between two scales of smoothing."""

    luma_U1TT: np.ndarray
    smooth_UCTT: np.ndarray
    terms_U5K: np.ndarray
    products_U55: np.ndarray
    band_UK: np.ndarray


def agreement(first_PTT3: np.ndarray, second_PTT3: np.ndarray) -> Agreement:
    """How well pairs of small copies agree; uint8 or float on the scale 0..255.

    >>> ramp = np.add.outer(np.arange(32) ** 2 / 8, 4 * np.arange(32))[None, ..., None] * np.ones(3)
    >>> found = agreement(ramp, 0.8 * ramp + 10)
    >>> bool(found.residual[0] < 1e-3)
    True
    """
    rows = np.arange(len(first_PTT3))
    return agreement_of(np.concatenate([first_PTT3, second_PTT3]), rows, rows + len(rows))


def agreement_of(thumbs_UTT3: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> Agreement:
    """How well the pictures `first_P` and `second_P` of U small copies agree; what a picture needs is computed once."""
    parts = [_sides(thumbs_UTT3[start : start + _BLOCK]) for start in range(0, len(thumbs_UTT3), _BLOCK)]
    if not parts or not len(first_P):
        return Agreement(np.zeros(0, np.float32), np.zeros(0, np.float32))
    sides = _Sides(*map(np.concatenate, zip(*parts, strict=True)))
    found = [
        _both_ways(sides, first_P[start : start + _BLOCK], second_P[start : start + _BLOCK])
        for start in range(0, len(first_P), _BLOCK)
    ]
    return Agreement(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _sides(thumbs_UTT3: np.ndarray) -> _Sides:
    pixels = thumbs_UTT3.astype(np.float32).reshape(-1, THUMB**2, 3).transpose(0, 2, 1)
    opponent_UCTT = (_OPPONENT @ pixels).reshape(-1, 3, THUMB, THUMB)
    smooth_UCTT = _smooth(opponent_UCTT, 2) * _WEIGHTS
    terms_U5K = _terms(smooth_UCTT)
    luma_U1TT = opponent_UCTT[:, :1]
    return _Sides(luma_U1TT, smooth_UCTT, terms_U5K, _products(terms_U5K), _band(luma_U1TT))


def _both_ways(sides: _Sides, one_P: np.ndarray, other_P: np.ndarray) -> Agreement:
    best = Agreement(np.full(len(one_P), _REFUSED, np.float32), np.zeros(len(one_P), np.float32))
    for a_P, b_P in ((one_P, other_P), (other_P, one_P)):
        residual, _, move = _fit(sides.terms_U5K[a_P], sides.products_U55[a_P], sides.terms_U5K[b_P, :1])
        at = np.flatnonzero(residual <= _HOPELESS)
        if not len(at):
            continue
        found = _one_way(sides, a_P[at], b_P[at], move[at])
        better = (found.residual < best.residual[at]) | (
            (found.residual == best.residual[at]) & (found.detail > best.detail[at])
        )
        best.residual[at[better]], best.detail[at[better]] = found.residual[better], found.detail[better]
    return best


def _one_way(sides: _Sides, a_P: np.ndarray, b_P: np.ndarray, move_P4: np.ndarray) -> Agreement:
    """The fit repeated on a moved as the first one said, and how details agree then."""
    terms = _terms(_warped(sides.smooth_UCTT[a_P], move_P4))
    residual, gain, further = _fit(terms, _products(terms), sides.terms_U5K[b_P, :1])
    move_P4 = np.clip(move_P4 + further, -2 * LARGEST_MOVE, 2 * LARGEST_MOVE)
    sane = (np.abs(move_P4).max(1) <= LARGEST_MOVE) & (gain >= GAINS[0]) & (gain <= GAINS[1])
    detail = _detail(_band(_warped(sides.luma_U1TT[a_P], move_P4)), sides.band_UK[b_P])
    return Agreement(np.where(sane, residual, _REFUSED).astype(np.float32), detail)


def _terms(a_PCTT: np.ndarray) -> np.ndarray:
    """The right side of the equation above, each channel's mean taken away, which is the same as an offset for each."""
    before, here, after = (slice(_BORDER + step, THUMB - _BORDER + step, _STEP) for step in (-1, 0, 1))
    axis, count = _AXIS[here], len(a_PCTT)
    across = (a_PCTT[..., here, after] - a_PCTT[..., here, before]) / 2
    down = (a_PCTT[..., after, here] - a_PCTT[..., before, here]) / 2
    terms = (a_PCTT[..., here, here], across, down, axis * across, axis[:, None] * down)
    centred = np.stack([term.reshape(count, 3, -1) for term in terms], 1)
    centred -= centred.mean(-1, keepdims=True)
    return centred.reshape(count, len(terms), -1)


def _products(terms_P5K: np.ndarray) -> np.ndarray:
    G = terms_P5K @ terms_P5K.transpose(0, 2, 1)
    G[:, range(5), range(5)] += _RIDGE
    return G


def _fit(X: np.ndarray, G: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual (P,), gain (P,) and move_P4: t_x, t_y, s_x, s_y. X, G: terms of a and their products; y: of b."""
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


def _band(luma_P1TT: np.ndarray) -> np.ndarray:
    inner, fine = slice(_BORDER + 1, THUMB - _BORDER - 1), _smooth(luma_P1TT, 1)
    band = (fine - _smooth(fine, 2))[..., inner, inner].reshape(len(luma_P1TT), -1)
    return band - band.mean(1, keepdims=True)


def _detail(a_PK: np.ndarray, b_PK: np.ndarray) -> np.ndarray:
    energy = [(band**2).sum(1) + _NOISE for band in (a_PK, b_PK)]
    return ((a_PK * b_PK).sum(1) / np.sqrt(energy[0] * energy[1])).astype(np.float32)


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
