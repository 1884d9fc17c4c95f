"""Two-sample tests by permutation: whether two sets of pictures come from one distribution, at an exact level.

With X and Y of one distribution every deal of the pooled rows into two sets of these sizes is equally likely, so

p = (1 + #{permutations with T >= T observed}) / (1 + P)      P(p <= a) <= a for every a, at every size

(Phipson & Smyth 2010.) Where there are no more than P deals they are all enumerated, and p is the share with
T >= T observed. For pictures T is the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3)

MMD^2 = mean_{i!=j} k(x_i, x_j) + mean_{i!=j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),  k = exp(-|x - y|^2 / 2 s^2)

with s = b times the median pooled distance for several b. Its mean over all deals is 0, so every MMD^2_b is divided by
its root mean square over the deals and T is the largest. Scale, median and divisor are functions of the pooled set and
of all deals together, so the level stays exact. Features are scaled to unit pooled variance first. For class counts T
is G = 2 sum O log(O / E), for numbers the absolute difference of means.

Shapes: X and Y pictures of the two sets, M = X + Y, D features, P deals, K classes, Q numbers a picture, B bandwidths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import UsageError
from imagekiln.metrics.dealing import content_order
from imagekiln.metrics.distances import Bank
from imagekiln.metrics.statistics import Statistics, require_pair

PERMUTATIONS = 999
BANDWIDTHS = (0.5, 1.0, 2.0)
NEIGHBOURS = 5
EXACT_ROWS = 300
"""Up to so many pictures kernels are summed in float64; with more, float32 is far below the spread over the deals."""

TIE = 1e-9
"""Statistics closer together than this share of the largest count as equal: rounding must not make p small."""

_CHUNK_ELEMENTS = 4 * 2**20


class TwoSample(NamedTuple):
    """One test: p_value in (0, 1], the statistic T, and from how many deals (all there are when `enumerated`)."""

    p_value: float
    statistic: float
    num_deals: int
    enumerated: bool = False


class Novelty(NamedTuple):
    """How far pictures lie from a reference, in its own terms.

    ratio_X: distance to the k-th nearest reference picture over the median of what reference pictures have themselves.
    p_value_X: (1 + number of reference pictures with at least that distance) / (1 + R).
    nearest_X: the nearest reference picture, int64.
    """

    ratio_X: Tensor
    p_value_X: Tensor
    nearest_X: Tensor


def two_sample(
    new: Statistics,
    reference: Statistics,
    permutations: int = PERMUTATIONS,
    bandwidths: Sequence[float] = BANDWIDTHS,
    seed: int = 0,
) -> TwoSample:
    """Whether two sets of features differ in any way: the largest normalised Gaussian MMD^2 over the bandwidths.

    permutations: P, at least 1. bandwidths: multiples b > 0 of the median distance. seed: chooses the deals; the order
    in which the pictures came does not matter. O(M^2 (D + P B)) time, O(M^2 + M P) memory.

    Raises UsageError for other settings, DataError with fewer than two pictures on a side or different features.

    >>> rows = torch.arange(6.0)[:, None]
    >>> apart = two_sample(Statistics.of(rows[:3]), Statistics.of(rows[3:]))  # two of 20 deals are as far apart
    >>> apart.p_value, apart.num_deals, apart.enumerated
    (0.1, 20, True)
    """
    _require_permutations(permutations)
    if not bandwidths or not all(b > 0.0 and math.isfinite(b) for b in bandwidths):
        raise UsageError(f"A kernel two-sample test got bandwidths={tuple(bandwidths)}; it needs positive numbers.")
    require_pair(new, reference, 2, "a two-sample test")
    pooled_MD = torch.cat([new.features, reference.features])
    order_M = content_order(pooled_MD, seed)
    rows_MD = pooled_MD[order_M].double()
    rows_MD = rows_MD - rows_MD.mean(0)
    spread_D = rows_MD.square().mean(0).sqrt()
    rows_MD = rows_MD / spread_D.where(spread_D > 0.0, 1.0)
    deals_PM, enumerated = _deals(order_M < new.n, permutations, mix(seed, "two-sample"))
    gram_MM = rows_MD @ rows_MD.T
    distance2_MM = (gram_MM.diag()[:, None] + gram_MM.diag() - 2 * gram_MM).clamp_(min=0.0)
    scale = _median_square(distance2_MM)
    dtype = torch.float64 if len(rows_MD) <= EXACT_ROWS else torch.float32
    distance2_MM, deals_PM = (distance2_MM / scale).to(dtype), deals_PM.to(dtype)
    statistic_P = torch.full((len(deals_PM),), -math.inf, dtype=torch.float64)
    for b in bandwidths:
        mmd2_P = _mmd2((distance2_MM * (-0.5 / b**2)).exp_(), deals_PM)
        size = float(mmd2_P.square().mean().sqrt())
        statistic_P = torch.maximum(statistic_P, mmd2_P / size if size > 0.0 else mmd2_P)
    return _result(statistic_P, enumerated)


def category_test(
    new_K: Sequence[int], reference_K: Sequence[int], permutations: int = PERMUTATIONS, seed: int = 0
) -> TwoSample:
    """Whether two sets have the same mix of classes: G test with p from random deals of the pooled pictures.

    new_K, reference_K: pictures by class, at least one on each side; classes without any do not count.
    Raises UsageError for other counts.

    >>> category_test([10, 10], [100, 100]).p_value, category_test([30, 0], [100, 100], permutations=99).p_value
    (1.0, 0.01)
    """
    _require_permutations(permutations)
    new, pooled = np.asarray(new_K, np.int64), np.asarray(new_K, np.int64) + np.asarray(reference_K, np.int64)
    if new.min(initial=0) < 0 or (pooled - new).min(initial=0) < 0 or not 0 < new.sum() < pooled.sum():
        raise UsageError(f"A test of classes got {list(new_K)} and {list(reference_K)}; it needs counts on both sides.")
    random = np.random.Generator(np.random.PCG64(mix(seed, "categories")))
    dealt_PK = random.multivariate_hypergeometric(pooled, int(new.sum()), size=permutations, method="marginals")
    both_PK = np.concatenate([new[None], dealt_PK])
    share = new.sum() / pooled.sum()
    g_P = np.zeros(len(both_PK))
    for observed_PK, expected_K in ((both_PK, share * pooled), (pooled - both_PK, (1 - share) * pooled)):
        with np.errstate(divide="ignore", invalid="ignore"):
            g_P += 2 * np.where(observed_PK > 0, observed_PK * np.log(observed_PK / expected_K), 0.0).sum(1)
    return _result(torch.from_numpy(g_P), False)


def mean_tests(
    new_XQ: Tensor, reference_YQ: Tensor, permutations: int = PERMUTATIONS, seed: int = 0
) -> list[TwoSample]:
    """Whether the means of some numbers a picture differ, one two-sided test a column; adjust with `holm`.

    >>> [test.p_value for test in mean_tests(torch.tensor([[5.0], [6.0]]), torch.tensor([[1.0], [2.0]]))]
    [0.3333333333333333]
    """
    _require_permutations(permutations)
    pooled_MQ = torch.cat([new_XQ, reference_YQ])
    order_M = content_order(pooled_MQ, seed)
    deals_PM, enumerated = _deals(order_M < len(new_XQ), permutations, mix(seed, "means"))
    centred_MQ = pooled_MQ[order_M].double()
    centred_MQ = centred_MQ - centred_MQ.mean(0)
    return [_result(row_P, enumerated) for row_P in (deals_PM @ centred_MQ).abs().T]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having made several tests (Holm 1979): the chance of any false alarm stays at the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def novelty(new: Statistics, reference: Statistics, k: int = NEIGHBOURS) -> Novelty:
    """How unlike anything in the reference each new picture is, by the distance to its k-th nearest picture there.

    Features are scaled to unit variance over the reference. A reference picture is not its own neighbour. Raises
    UsageError for k < 1, DataError with k or fewer reference pictures.

    >>> rows = torch.arange(9.0)[:, None]
    >>> found = novelty(Statistics.of(torch.tensor([[4.4], [40.0]])), Statistics.of(rows), k=2)
    >>> [round(ratio, 1) for ratio in found.ratio_X.tolist()], found.p_value_X.tolist(), found.nearest_X.tolist()
    ([0.6, 33.0], [1.0, 0.1], [4, 8])
    """
    if k < 1:
        raise UsageError(f"A search for novel pictures got k={k}; it needs at least 1.")
    require_pair(new, reference, 1, "a search for novel pictures")
    reference.require(k + 1, f"a search for novel pictures with {k} neighbours")
    mean_D = reference.mean
    spread_D = (reference.features.double() - mean_D).square().mean(0).sqrt()
    scaled = [
        ((side.features.double() - mean_D) / spread_D.where(spread_D > 0.0, 1.0)).float() for side in (new, reference)
    ]
    bank = Bank(scaled[1])
    own_Y = bank.nearest(scaled[1], k + 1)[0][:, -1].sqrt()  # the nearest of all is the picture itself
    distance2_XK, nearest_XK = bank.nearest(scaled[0], k)
    far_X = distance2_XK[:, -1].sqrt()
    at_least_X = len(own_Y) - torch.searchsorted(own_Y.sort().values, far_X)
    unit = max(float(own_Y.median()), torch.finfo(torch.float32).tiny)
    return Novelty(far_X / unit, (1.0 + at_least_X.double()) / (1.0 + len(own_Y)), nearest_XK[:, 0])


def _deals(new_M: Tensor, permutations: int, seed: int) -> tuple[Tensor, bool]:
    """deals_PM float64, 1 where a row is dealt to the first set, the observed deal first; whether these are all."""
    total, count = len(new_M), int(new_M.sum())
    if math.comb(total, count) <= permutations + 1:
        chosen_PX = torch.tensor(list(islice(combinations(range(total), count), permutations + 1)))
        others_PM = torch.zeros(len(chosen_PX), total, dtype=torch.float64).scatter_(1, chosen_PX, 1.0)
        observed_M = new_M.double()
        return torch.cat([observed_M[None], others_PM[(others_PM != observed_M).any(1)]]), True
    generator = torch.Generator().manual_seed(seed)
    deals_PM = torch.zeros(permutations + 1, total, dtype=torch.float64)
    deals_PM[0] = new_M.double()
    for rows_PM in deals_PM[1:].split(max(1, _CHUNK_ELEMENTS // total)):
        keys_PM = torch.rand(rows_PM.shape, generator=generator, dtype=torch.float64)
        rows_PM.scatter_(1, keys_PM.topk(count, dim=1, sorted=False).indices, 1.0)
    return deals_PM, False


def _mmd2(kernel_MM: Tensor, deals_PM: Tensor) -> Tensor:
    """Unbiased MMD^2 float64 of every deal, from one product with the kernel matrix, which is overwritten.

    A constant taken off the kernel cancels between the three means and leaves float32 more digits.
    """
    x, total = int(deals_PM[0].sum()), len(kernel_MM)
    y = total - x
    kernel_MM -= kernel_MM.mean()
    kernel_MM.fill_diagonal_(0.0)
    row_M = kernel_MM.sum(1, dtype=torch.float64)
    step = max(1, _CHUNK_ELEMENTS // total)
    parts = deals_PM.split(step)
    xx_P = torch.cat([((part @ kernel_MM).mul_(part)).sum(1, dtype=torch.float64) for part in parts])
    x_all_P = torch.cat([part.double() @ row_M for part in parts])
    yy_P = row_M.sum() - 2 * x_all_P + xx_P
    return xx_P / (x * (x - 1)) + yy_P / (y * (y - 1)) - 2 * (x_all_P - xx_P) / (x * y)


def _result(statistic_P: Tensor, enumerated: bool) -> TwoSample:
    """The first statistic against all: itself counts once, which is the 1 + in numerator and denominator."""
    observed = float(statistic_P[0])
    slack = TIE * max(float(statistic_P.abs().max()), 1e-300)
    at_least = int((statistic_P >= observed - slack).sum())
    return TwoSample(at_least / len(statistic_P), observed, len(statistic_P), enumerated)


def _median_square(distance2_MM: Tensor) -> float:
    """Median squared distance between two different rows; the mean of the positive ones where that is 0, else 1."""
    above = torch.ones(distance2_MM.shape, dtype=torch.bool).triu_(1)
    pairs = distance2_MM[above]
    median = float(pairs.median())
    positive = pairs[pairs > 0.0]
    return median if median > 0.0 else float(positive.mean()) if len(positive) else 1.0


def _require_permutations(permutations: int) -> None:
    if permutations < 1:
        raise UsageError(f"A permutation test got permutations={permutations}; it needs at least 1.")
