"""Memorization: whether generated pictures lie closer to the training pictures than unseen real pictures do.

For a quantile q of the distance to the nearest training picture,

copy ratio = q-quantile over generated / q-quantile over held-out

About 1 is what fresh pictures of the same distribution give. Well below 1 means copies, and the low quantiles see a few
copies among many honest pictures; well above 1 means pictures unlike the data. (The question is that of Meehan et al.
2020, arXiv 2004.05675; a ratio of quantiles is easier to read than their test statistic.) Remove duplicates before the
split: a held-out picture that also is in the training set hides copying.

Shapes: Q query pictures, N bank pictures, K neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import DataError
from imagekiln.metrics.distances import Bank
from imagekiln.metrics.statistics import Statistics, require_pair

QUANTILES = (0.01, 0.05, 0.5)
LEVEL = 0.95


class Neighbours(NamedTuple):
    """distances_QK float64 ascending and indices_QK int64 into the bank."""

    distances: Tensor
    indices: Tensor


class CopyRatio(NamedTuple):
    """One quantile's ratio with its 95 % bootstrap interval, and both distances."""

    quantile: float
    ratio: float
    low: float
    high: float
    generated_distance: float
    held_out_distance: float


def nearest(query: Statistics, bank: Statistics, k: int = 1) -> Neighbours:
    """The k nearest bank pictures of every query picture, by Euclidean distance of their features.

    Raises DataError for different features, or fewer than k bank pictures.

    >>> bank = Statistics.of(torch.tensor([[0.0], [10.0]]))
    >>> found = nearest(Statistics.of(torch.tensor([[7.0]])), bank)
    >>> found.distances.item(), found.indices.item()
    (3.0, 1)
    """
    require_pair(query, bank, 1, "a search for nearest pictures")
    bank.require(k, f"a search for {k} nearest pictures")
    distance2_QK, indices_QK = Bank(bank.features).nearest(query.features, k)
    return Neighbours(distance2_QK.sqrt(), indices_QK)


def copy_ratios(
    generated: Statistics, train: Statistics, held_out: Statistics, resamples: int = 1000, seed: int = 0
) -> list[CopyRatio]:
    """Distances generated -> train against held-out -> train, at the 1 %, 5 % and 50 % quantiles.

    The interval resamples the query pictures with replacement, the bank stays (percentile bootstrap). Raises DataError
    when held-out pictures are copies of training pictures, which makes a denominator zero.
    """
    distance_G = nearest(generated, train).distances[:, 0]
    distance_H = nearest(held_out, train).distances[:, 0]
    copies = int((distance_H == 0.0).sum())
    q_K = torch.tensor(QUANTILES, dtype=torch.float64)
    if float(distance_H.quantile(q_K[0])) <= 0.0:
        raise DataError(
            f"{copies} of {held_out.n} held-out pictures equal training pictures; a memorization test needs unseen "
            "ones: remove duplicates before the split."
        )
    generator = torch.Generator().manual_seed(mix(seed, "copy ratio"))
    tail_K = torch.tensor([(1.0 - LEVEL) / 2, (1.0 + LEVEL) / 2], dtype=torch.float64)
    draws_KR = _resampled(distance_G, q_K, resamples, generator) / _resampled(distance_H, q_K, resamples, generator)
    rows = zip(q_K, distance_G.quantile(q_K), distance_H.quantile(q_K), draws_KR, strict=True)
    ratios = []
    for q, own, fresh, draws_R in rows:
        low, high = draws_R.quantile(tail_K).tolist()
        ratios.append(CopyRatio(float(q), float(own / fresh), low, high, float(own), float(fresh)))
    return ratios


def _resampled(distance_Q: Tensor, q_K: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Quantiles_KR of resampled distances, one resample at a time: memory stays that of one set."""
    n = len(distance_Q)
    draws = [distance_Q[torch.randint(n, (n,), generator=generator)].quantile(q_K) for _ in range(resamples)]
    return torch.stack(draws, dim=1)
