"""Can one tell a set's pictures from their mirror images? If so, mirroring them teaches a model pictures it never saw.

A linear classifier gets what changes sign under mirroring, d(x) = f(x) - f(mirrored x), so that "original or mirrored?"
is "is w . d > 0?", with w learned by logistic regression and judged on pictures it was not learned on. f holds grey
values and edges by place (layout: shoes that point left, digits), and how edges of two directions lie beside each other
anywhere in the picture (strokes: letters, wherever they stand; the co-occurrence of gradients of Watanabe, Ito and
Yokoi 2009). That photographs mostly, but not always, survive mirroring is measured in Lin et al. 2020,
"Visual chirality" (arXiv:2006.09512): writing, clothes and hands give it away.

Shapes: N pictures, T rows and columns, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

MOST = 1500
"""Pictures looked at: with so many, an accuracy is known to about 0.03."""

FEWEST = 60
"""Of fewer pictures nothing can be said."""

FOLDS = 5
SURE = 3.0
"""Standard errors from 1/2 from where on the answer is not chance."""

TOLD = 0.6
"""Accuracy from which on a set is called handed: mirrored pictures would be seen to be wrong."""

DIRECTIONS = 8
_BLOCK = 128
OFFSETS = ((0, 2), (2, 0), (2, 2), (2, -2), (0, 4), (4, 0))
"""Rows down and columns right from one edge to another."""


@dataclass(frozen=True)
class Handedness:
    """accuracy: of telling pictures from their mirror images, 0.5 is chance. error: its standard error. n: pictures."""

    accuracy: float
    error: float
    n: int

    @property
    def verdict(self) -> str:
        """ "symmetric", "handed", or "unknown" where there are too few pictures, or it is a near thing."""
        if self.n < FEWEST:
            return "unknown"
        if self.accuracy - SURE * self.error > 0.5:
            return "handed" if self.accuracy >= TOLD else "unknown"
        return "symmetric" if self.accuracy + 2 * self.error < TOLD else "unknown"


def handedness(thumbs_NTTC: np.ndarray, seed: int = 0) -> Handedness:
    """How well pictures can be told from their mirror images.

    thumbs_NTTC: uint8, small copies of whole pictures (`survey.THUMB`); of many, an even sample is looked at.

    >>> left = np.zeros((100, 16, 16, 3), np.uint8)
    >>> left[:, :, :8] = 200
    >>> handedness(left).verdict, handedness(left[:10]).verdict
    ('handed', 'unknown')
    """
    from sklearn.linear_model import LogisticRegression  # imported late: scikit-learn takes a second to load

    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(thumbs_NTTC))[:MOST]
    n = len(chosen)
    if n < FEWEST:
        return Handedness(0.5, 0.5, n)
    grey_NTT = np.asarray(thumbs_NTTC[np.sort(chosen)], np.float32).mean(3) / 255
    parts = [grey_NTT[start : start + _BLOCK] for start in range(0, n, _BLOCK)]
    change_NF = np.concatenate([features(part) - features(part[:, :, ::-1]) for part in parts])
    change_NF /= change_NF.std(0) + 1e-3
    fold_N = generator.permutation(n) % FOLDS
    right_N = np.zeros(n)
    for fold in range(FOLDS):
        known = change_NF[fold_N != fold]
        model = LogisticRegression(C=3e-4, fit_intercept=False, max_iter=200)
        model.fit(np.concatenate([known, -known]), np.repeat([1, 0], len(known)))
        score = model.decision_function(change_NF[fold_N == fold])
        right_N[fold_N == fold] = np.where(score == 0, 0.5, score > 0)
    accuracy = float(right_N.mean())
    return Handedness(accuracy, float(np.sqrt(max(accuracy * (1 - accuracy), 0.25 / n) / n)), n)


def features(grey_NTT: np.ndarray) -> np.ndarray:
    """What is looked at in grey pictures of any square size: (N, F) float32."""
    n, T, _ = grey_NTT.shape
    even_NTT = grey_NTT - grey_NTT.mean((1, 2), keepdims=True)
    even_NTT = even_NTT / (even_NTT.std((1, 2), keepdims=True) + 0.02)
    dy, dx = np.gradient(even_NTT, axis=(1, 2))
    size = np.hypot(dy, dx)
    turn = np.arctan2(dy, dx) % (2 * np.pi) * DIRECTIONS / (2 * np.pi)
    kind_NTT = np.where(size > 0.3, np.round(turn).astype(np.int8) % DIRECTIONS, -1)
    side = max(1, T // 8)
    coarse = [_pooled(even_NTT, side).reshape(n, -1)]
    edges = [_pooled((kind_NTT == k) * size, max(1, T // 4)).reshape(n, -1) for k in range(DIRECTIONS)]
    return np.concatenate([*coarse, *edges, *(_pairs(kind_NTT, *offset) for offset in OFFSETS)], 1).astype(np.float32)


def _pooled(values_NTT: np.ndarray, side: int) -> np.ndarray:
    """Means over squares of this side; what is left over at the far edges is shared out evenly on both."""
    n, T, _ = values_NTT.shape
    count = T // side
    start = (T - count * side) // 2
    inner = values_NTT[:, start : start + count * side, start : start + count * side]
    return cast(np.ndarray, inner.reshape(n, count, side, count, side).mean((2, 4)))


def _pairs(kind_NTT: np.ndarray, down: int, right: int) -> np.ndarray:
    """Share of every pair of directions among edges that lie (down, right) apart: (N, DIRECTIONS ** 2)."""
    n, T, _ = kind_NTT.shape
    here = kind_NTT[:, : T - down, max(0, -right) : T - max(0, right)].astype(np.int64)
    there = kind_NTT[:, down:, max(0, right) : T + min(0, right)].astype(np.int64)
    both = (here >= 0) & (there >= 0)
    place = np.broadcast_to(np.arange(n)[:, None, None], here.shape)
    index = (place * DIRECTIONS**2 + here * DIRECTIONS + there)[both]
    counts = np.bincount(index, minlength=n * DIRECTIONS**2).reshape(n, -1)
    return counts / np.maximum(1, counts.sum(1, keepdims=True))
