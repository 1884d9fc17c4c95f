"""Pictures unlike the rest of the set: far away in the space of principal components, or outside it.

A picture x (its small copy, averaged to 8 x 8 pixels) has the scores s = V^T (x - mean) on the components V that hold
95 % of the variance. Two distances are looked at, as in robust PCA (Hubert, Rousseeuw, Vanden Branden 2005): within the
space, |s / spread|, and to the space, |x - mean - V s|. Each becomes a robust z of its logarithm,

    z = (log d - median log d) / (1.4826 median |log d - median log d|)

and the larger one counts. The logarithm makes the long right tail of distances nearly normal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from imagekiln.data.checks.thresholds import CleanConfig, Finding
from imagekiln.data.measures import averaged, small_copies
from imagekiln.data.survey import Survey

_FEWEST = 50
_FITTED_ON = 5000
_KEPT_VARIANCE = 0.95
_SIDE = 8
_BLOCK = 512
_LEAST = 1e-3


def outlier(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Robust z above `outlier_z`, in sets of at least 50 pictures. value: z."""
    rows = survey.usable
    if len(rows) < _FEWEST:
        return []
    z = _robust_z(_distances(survey, rows)).max(1)
    return [
        Finding("outlier", int(rows[at]), float(z[at]), config.outlier_z, "unlike the rest of the set")
        for at in np.flatnonzero(z > config.outlier_z)
    ]


def _distances(survey: Survey, rows: np.ndarray) -> np.ndarray:
    """(N, 2): within the space of the components, and to it."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _FITTED_ON)).astype(int)]
    fitted = np.concatenate(list(_blocks(survey, chosen)))
    mean = fitted.mean(0)
    centred = (fitted - mean).astype(np.float64)
    variance, components = np.linalg.eigh(centred.T @ centred)  # the smallest first
    share = np.cumsum(variance[::-1]) / max(float(variance.sum()), _LEAST)
    V = components[:, ::-1][:, : int(np.searchsorted(share, _KEPT_VARIANCE)) + 1].astype(np.float32)
    scores = (fitted - mean) @ V
    spread = 1.4826 * np.median(np.abs(scores - np.median(scores, 0)), 0) + _LEAST
    found = []
    for block in _blocks(survey, rows):
        centred = block - mean
        scores = centred @ V
        within = np.sqrt(np.mean((scores / spread) ** 2, 1))
        found.append(np.stack([within, np.linalg.norm(centred - scores @ V.T, axis=1)], 1))
    return np.concatenate(found)


def _blocks(survey: Survey, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Small copies averaged to 8 x 8 pixels: (block, 192) float32 in [0, 1]."""
    for start in range(0, len(rows), _BLOCK):
        small = averaged(small_copies(survey.thumbs, rows[start : start + _BLOCK]), _SIDE)
        yield small.reshape(len(small), -1) / 255


def _robust_z(distances: np.ndarray) -> np.ndarray:
    logarithm = np.log(distances + _LEAST)
    centred = logarithm - np.median(logarithm, 0)
    return centred / (1.4826 * np.median(np.abs(centred), 0) + _LEAST)
