"""Memorization: whether generated pictures lie closer to the training pictures than unseen real pictures do.

With d(x) the distance to the nearest training picture t(x), and held-out pictures as what fresh pictures look like:

copy ratio = q-quantile of d over generated / q-quantile of d over held-out
AuthPct    = share of generated with d(x) > d'(t(x)), d' the distance of a training picture to its own nearest other
             training picture (Alaa et al. 2022, arXiv 2102.08921). Fresh pictures do not reach 1: 0.71 for 500 normal
             pictures in 16 dimensions. It is read beside the same share of the held-out pictures.
C_T        = z of the Mann-Whitney test of d(generated) against d(held-out), averaged over the cells of a partition of
             the training set (Meehan et al. 2020, arXiv 2004.05675). Below -3 copies, above 3 unlike the data. The
             nearest picture is searched in the whole training set, so cells differ in their queries only.
copies     = share of generated with d(x) below the m-th smallest held-out distance, less m / (H + 1), the share of
             fresh pictures expected there; in thousandths.

A copy ratio about 1 is what fresh pictures of the same distribution give. Well below 1 means copies, and the low
quantiles see a few copies among many honest pictures; well above 1 means pictures unlike the data. Remove duplicates
before the split: a held-out picture that also is in the training set hides copying.

Intervals are for fresh generated (and held-out) pictures against the same training set.

Shapes: Q query pictures, N bank pictures, K neighbours, G generated and H held-out pictures, C cells, D features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import DataError
from imagekiln.metrics.distances import Bank
from imagekiln.metrics.share import wilson
from imagekiln.metrics.statistics import Statistics, require_pair

QUANTILES = (0.01, 0.05, 0.5)
LEVEL = 0.95
NORMAL_975 = 1.959964
FRESH_SHARE = 0.01
"""Share of fresh pictures that count as copies by chance: the baseline of `copies_per_thousand`."""

CELLS = 3
FEWEST_IN_CELL = 20
"""Generated and held-out pictures in a cell from which its z says something (Meehan et al. 2020, section 4)."""


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


class Share(NamedTuple):
    """A share of pictures with its 95 % interval."""

    value: float
    low: float
    high: float


class Authenticity(NamedTuple):
    """AuthPct as shares in [0, 1]: of the generated pictures, and of the held-out ones, which is what to expect."""

    generated: Share
    held_out: Share


class CopyTest(NamedTuple):
    """C_T: z over all pictures, about N(0, 1) for fresh ones, and its average over the cells with enough pictures.

    cells: how many those are; with none, the average is the overall z.
    """

    overall: float
    by_cell: float
    cells: int


class Memorization(NamedTuple):
    """All tests of one comparison. `copies_per_thousand` has its chance share subtracted, so it may fall below 0."""

    ratios: list[CopyRatio]
    authenticity: Authenticity
    copy_test: CopyTest
    copies_per_thousand: Share


class Search(NamedTuple):
    """Nearest training pictures of the generated and the held-out set: one search, and every test reads it."""

    generated: Neighbours
    held_out: Neighbours


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


def search(generated: Statistics, train: Statistics, held_out: Statistics) -> Search:
    """The search that `copy_ratios`, `authenticity`, `copy_test` and `copies_per_thousand` share.

    Raises DataError as `nearest`, and when held-out pictures are copies of training pictures: then closeness to the
    training set says nothing.
    """
    found = Search(nearest(generated, train), nearest(held_out, train))
    distance_H = found.held_out.distances[:, 0]
    copies = int((distance_H == 0.0).sum())
    if float(distance_H.quantile(QUANTILES[0])) <= 0.0:
        raise DataError(
            f"{copies} of {held_out.n} held-out pictures equal training pictures; a memorization test needs unseen "
            "ones: remove duplicates before the split."
        )
    return found


def memorization(
    generated: Statistics, train: Statistics, held_out: Statistics, resamples: int = 1000, seed: int = 0
) -> Memorization:
    """All tests of copying, from one search. Raises DataError as `search`, or with one training picture.

    >>> rows = torch.randn(3, 200, 4, generator=torch.Generator().manual_seed(0))
    >>> rows[0, :50] = rows[1, :50]
    >>> found = memorization(*(Statistics.of(side) for side in rows))
    >>> round(found.copies_per_thousand.value), found.copy_test.overall < -3
    (240, True)
    """
    found = search(generated, train, held_out)
    return Memorization(
        _ratios(found, resamples, seed),
        authenticity(found, train),
        copy_test(generated, train, held_out, found, seed=seed),
        copies_per_thousand(found),
    )


def copy_ratios(
    generated: Statistics, train: Statistics, held_out: Statistics, resamples: int = 1000, seed: int = 0
) -> list[CopyRatio]:
    """Distances generated -> train against held-out -> train, at the 1 %, 5 % and 50 % quantiles.

    The interval resamples the query pictures with replacement, the bank stays (percentile bootstrap). Raises DataError
    when held-out pictures are copies of training pictures, which makes a denominator zero.
    """
    return _ratios(search(generated, train, held_out), resamples, seed)


def authenticity(found: Search, train: Statistics) -> Authenticity:
    """AuthPct of generated and held-out pictures with Wilson's intervals. Raises DataError with one training picture.

    >>> train = Statistics.of(torch.tensor([[0.0], [1.0], [10.0], [14.0]]))
    >>> found = search(Statistics.of(torch.tensor([[0.5], [11.0], [16.5], [20.0]])), train, Statistics.of(
    ...     torch.tensor([[2.5], [7.0]])))
    >>> authenticity(found, train).generated.value, authenticity(found, train).held_out.value
    (0.25, 0.5)
    """
    train.require(2, "the authenticity of generated pictures")
    own_N = Bank(train.features).radii(1).sqrt()
    return Authenticity(*(_share(near.distances[:, 0] > own_N[near.indices[:, 0]]) for near in found))


def copies_per_thousand(found: Search, fresh_share: float = FRESH_SHARE) -> Share:
    """Generated pictures nearer to a training picture than all but `fresh_share` of fresh ones are, less that share.

    The threshold is the m-th smallest of H held-out distances; a fresh picture falls below it with probability
    m / (H + 1). The interval joins Wilson's of both shares (Newcombe 1998, method 10), so it knows how uncertain the
    threshold is. With fewer than 1 / `fresh_share` held-out pictures the threshold is the smallest distance.

    >>> def at(distances): return Neighbours(torch.tensor(distances).double()[:, None], torch.zeros(4, 1).long())
    >>> round(copies_per_thousand(Search(at([0.1, 0.2, 2.0, 3.0]), at([1.0, 2.0, 3.0, 4.0]))).value)
    300
    """
    distance_G, distance_H = (near.distances[:, 0] for near in found)
    num_h = len(distance_H)
    m = max(1, math.floor(fresh_share * (num_h + 1)))
    generated = _share(distance_G < distance_H.sort().values[m - 1])
    low, high = wilson(m, num_h)
    chance = m / (num_h + 1)
    value = generated.value - chance
    below = math.hypot(generated.value - generated.low, max(0.0, high - chance))
    above = math.hypot(generated.high - generated.value, max(0.0, chance - low))
    return Share(1000 * value, 1000 * (value - below), 1000 * (value + above))


def copy_test(
    generated: Statistics,
    train: Statistics,
    held_out: Statistics,
    found: Search | None = None,
    cells: int = CELLS,
    seed: int = 0,
) -> CopyTest:
    """C_T, over all pictures and averaged over k-means cells, weighted by the held-out pictures in them.

    found: what `search` gave for the same sets; None searches.
    """
    found = found or search(generated, train, held_out)
    distance_G, distance_H = (near.distances[:, 0] for near in found)
    centres_CD = _centres(train.features.double(), min(cells, train.n), seed)
    cell_G, cell_H = (torch.cdist(side.features.double(), centres_CD).argmin(1) for side in (generated, held_out))
    scores, weights = [], []
    for cell in range(len(centres_CD)):
        own_G, own_H = distance_G[cell_G == cell], distance_H[cell_H == cell]
        if min(len(own_G), len(own_H)) >= FEWEST_IN_CELL:
            scores.append(_mann_whitney(own_G, own_H))
            weights.append(len(own_H))
    overall = _mann_whitney(distance_G, distance_H)
    average = sum(z * w for z, w in zip(scores, weights, strict=True)) / sum(weights) if scores else overall
    return CopyTest(overall, average, len(scores))


def _mann_whitney(x_G: Tensor, y_H: Tensor) -> float:
    """z of U = #{x > y} + #{x = y} / 2, below 0 where x is smaller; corrected for ties (Lehmann 1975, section 1.4)."""
    g, h = len(x_G), len(y_H)
    _, inverse, count = torch.cat([x_G, y_H]).unique(return_inverse=True, return_counts=True)
    rank = count.cumsum(0).double() - (count.double() - 1) / 2
    u = float(rank[inverse[:g]].sum()) - g * (g + 1) / 2
    ties = float((count.double().pow(3) - count).sum()) / ((g + h) * max(1, g + h - 1))
    variance = g * h / 12 * (g + h + 1 - ties)
    return (u - g * h / 2) / math.sqrt(variance) if variance > 1e-9 * g * h else 0.0


def _centres(rows_ND: Tensor, cells: int, seed: int, rounds: int = 20) -> Tensor:
    """centres_CD of k-means: seeding by squared distance (Arthur & Vassilvitskii 2007), then Lloyd's rounds."""
    generator = torch.Generator().manual_seed(mix(seed, "cells"))
    centres_CD = rows_ND[torch.randint(len(rows_ND), (1,), generator=generator)]
    while len(centres_CD) < cells:
        near2_N = torch.cdist(rows_ND, centres_CD).amin(1).square()
        if float(near2_N.sum()) == 0.0:
            break  # fewer different pictures than cells
        chosen = torch.multinomial(near2_N, 1, generator=generator)
        centres_CD = torch.cat([centres_CD, rows_ND[chosen]])
    for _ in range(rounds):
        cell_N = torch.cdist(rows_ND, centres_CD).argmin(1)
        count_C = torch.bincount(cell_N, minlength=len(centres_CD))
        total_CD = torch.zeros_like(centres_CD).index_add_(0, cell_N, rows_ND)
        centres_CD = torch.where(count_C[:, None] > 0, total_CD / count_C.clamp(min=1)[:, None], centres_CD)
    return centres_CD


def _share(chosen_Q: Tensor) -> Share:
    count, n = int(chosen_Q.sum()), len(chosen_Q)
    return Share(count / n, *wilson(count, n))


def _ratios(found: Search, resamples: int, seed: int) -> list[CopyRatio]:
    distance_G, distance_H = (near.distances[:, 0] for near in found)
    q_K = torch.tensor(QUANTILES, dtype=torch.float64)
    generator = torch.Generator().manual_seed(mix(seed, "copy ratio"))
    draws_KR = _resampled(distance_G, q_K, resamples, generator) / _resampled(distance_H, q_K, resamples, generator)
    rows = zip(q_K, distance_G.quantile(q_K), distance_H.quantile(q_K), draws_KR, strict=True)
    ratios = []
    for q, own, fresh, draws_R in rows:
        ratios.append(CopyRatio(float(q), float(own / fresh), *_tails(draws_R), float(own), float(fresh)))
    return ratios


def _tails(draws_R: Tensor) -> tuple[float, float]:
    """The ends of the interval of resampled ratios. A resample of copies alone has a held-out distance of 0: its ratio
    is infinite, or 0 / 0, which may be anything and so counts at both ends. Between a number and infinity is infinity.
    """
    found = []
    for tail, unknown in (((1.0 - LEVEL) / 2, 0.0), ((1.0 + LEVEL) / 2, math.inf)):
        ordered_R = draws_R.masked_fill(draws_R.isnan(), unknown).sort().values
        above = ordered_R[math.ceil(tail * (len(ordered_R) - 1))]
        found.append(float(above if above.isinf() else ordered_R.quantile(tail)))
    return found[0], found[1]


def _resampled(distance_Q: Tensor, q_K: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Quantiles_KR of resampled distances, one resample at a time: memory stays that of one set."""
    n = len(distance_Q)
    draws = [distance_Q[torch.randint(n, (n,), generator=generator)].quantile(q_K) for _ in range(resamples)]
    return torch.stack(draws, dim=1)
