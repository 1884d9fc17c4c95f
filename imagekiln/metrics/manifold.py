"""Precision, recall, density and coverage: fidelity and diversity told apart by nearest-neighbour balls.

With B(x) the open ball around x that reaches to its k-th nearest neighbour in x's own set (itself not counted):

precision = share of generated pictures inside any B(real)      (Kynkaanniemi et al. 2019, arXiv 1904.06991)
recall    = share of real pictures inside any B(generated)
density   = mean over generated pictures of the number of B(real) they lie in, / k   (Naeem et al. 2020, 2002.09797)
coverage  = share of B(real) that hold a generated picture

Convention: k = 5 and strict "<" as in Naeem et al.; Kynkaanniemi et al. use k = 3 and "<=". A row with k exact
duplicates in its own set has an empty ball. Even for two sets of one distribution precision and recall stay below 1
(0.77 at 64 dimensions): read them beside the floor, the same number between two real sets. One distribution gives
E[density] = 1 and E[coverage] = `expected_coverage`.

Shapes: G generated and R real pictures, D features, K neighbours, S cuts in halves, M pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.errors import UsageError
from imagekiln.metrics.distances import Bank
from imagekiln.metrics.interval import Halves
from imagekiln.metrics.statistics import Statistics, require_pair

NEIGHBOURS = 5

CURVE_NEIGHBOURS = (1, 2, 3, 5, 8, 13, 21, 34)
"""Sizes of the balls along a curve."""


class ManifoldScores(NamedTuple):
    """The four numbers of one comparison."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(generated: Statistics, reference: Statistics, k: int = NEIGHBOURS) -> ManifoldScores:
    """All four at once; O(G R + G^2 + R^2) time, bounded memory. The last comparison is remembered.

    Raises UsageError for k < 1, DataError with k or fewer pictures on a side.

    >>> rows = torch.arange(8.0)[:, None]
    >>> manifold_scores(Statistics.of(rows + 2.1), Statistics.of(rows), k=1)
    ManifoldScores(precision=0.75, recall=0.75, density=1.375, coverage=0.75)
    """
    if k < 1:
        raise UsageError(f"The nearest-neighbour metrics got k={k}; they need at least 1.")
    require_pair(generated, reference, k + 1, f"a comparison of {k} nearest neighbours")
    return _scores(generated, reference, k, generated.n, reference.n)


def precision_recall_curve(
    generated: Statistics, reference: Statistics, ks: Sequence[int] = CURVE_NEIGHBOURS
) -> list[tuple[int, float, float]]:
    """(k, precision, recall) for balls of several sizes; those that need more pictures than there are are left out.

    A model that is better at one k and worse at another has not been shown to be better.

    >>> rows = torch.arange(8.0)[:, None]
    >>> precision_recall_curve(Statistics.of(rows + 2.1), Statistics.of(rows), ks=(1, 99))
    [(1, 0.75, 0.75)]
    """
    ks = [k for k in ks if k < min(generated.n, reference.n)]
    if not ks:
        return []
    real, fake = Bank(reference.features), Bank(generated.features)
    real_radius2_RK, fake_radius2_GK = (bank.neighbours(max(ks))[0] for bank in (real, fake))
    curve = []
    for k in ks:
        inside, recalled_R = 0, torch.zeros(reference.n, dtype=torch.bool)
        radii = real_radius2_RK[:, k - 1], fake_radius2_GK[:, k - 1]
        for _, in_real_BR, in_fake_BR in real.within(generated.features, *radii):
            inside += int(in_real_BR.any(1).sum())
            recalled_R |= in_fake_BR.any(0)
        curve.append((k, inside / generated.n, int(recalled_R.sum()) / reference.n))
    return curve


def expected_coverage(num_generated: int, num_reference: int, k: int = NEIGHBOURS) -> float:
    """Coverage of two sets of one continuous distribution: 1 - prod_{j<k} (R - 1 - j) / (G + R - 1 - j).

    (Naeem et al. 2020, lemma 2.)

    >>> round(expected_coverage(500, 500), 5), round(expected_coverage(1000, 500), 5)
    (0.96922, 0.99597)
    """
    missed = 1.0
    for j in range(k):
        missed *= (num_reference - 1 - j) / (num_generated + num_reference - 1 - j)
    return 1.0 - missed


@lru_cache(maxsize=1)
def _scores(generated: Statistics, reference: Statistics, k: int, num_g: int, num_r: int) -> ManifoldScores:
    """Statistics only ever grow, so the two objects with their sizes are a sound key."""
    real = Bank(reference.features)
    real_radius2_R = real.radii(k)
    fake_radius2_G = Bank(generated.features).radii(k)
    balls_G = torch.zeros(num_g, dtype=torch.int64)
    covered_R, recalled_R = torch.zeros(2, num_r, dtype=torch.bool)
    for start, in_real_BR, in_fake_BR in real.within(generated.features, real_radius2_R, fake_radius2_G):
        balls_G[start : start + len(in_real_BR)] = in_real_BR.sum(1)
        covered_R |= in_real_BR.any(0)
        recalled_R |= in_fake_BR.any(0)
    return ManifoldScores(
        precision=int((balls_G > 0).sum()) / num_g,
        recall=int(recalled_R.sum()) / num_r,
        density=int(balls_G.sum()) / (k * num_g),
        coverage=int(covered_R.sum()) / num_r,
    )


def manifold_on_halves(
    generated: Statistics, reference: Statistics, halves: Halves, k: int = NEIGHBOURS
) -> list[tuple[ManifoldScores, ManifoldScores]]:
    """The scores of the first and second half of every cut: one pass over the distances serves all.

    Raises as `manifold_scores`. The last comparison is remembered.
    """
    require_pair(generated, reference, 2 * k + 2, f"an interval of {k} nearest neighbours")
    return _scores_of_halves(generated, reference, halves, k, generated.n, reference.n)


@lru_cache(maxsize=1)
def _scores_of_halves(
    generated: Statistics, reference: Statistics, halves: Halves, k: int, num_g: int, num_r: int
) -> list[tuple[ManifoldScores, ManifoldScores]]:
    first_SG, first_SR = halves.of(num_g, "generated"), halves.of(num_r, "reference")
    real, fake = Bank(reference.features), Bank(generated.features)
    real_radius2_SR, fake_radius2_SG = _radii_of_halves(real, first_SR, k), _radii_of_halves(fake, first_SG, k)
    balls_SG = torch.zeros(halves.splits, num_g, dtype=torch.int64)
    covered_SR, recalled_SR = torch.zeros(2, halves.splits, num_r, dtype=torch.bool)
    for g_M, r_M, distance2_M in real.pairs_within(
        generated.features, real_radius2_SR.amax(0), fake_radius2_SG.amax(0)
    ):
        for s in range(halves.splits):
            together_M = first_SG[s, g_M] == first_SR[s, r_M]
            in_real_M = together_M & (distance2_M < real_radius2_SR[s, r_M])
            in_fake_M = together_M & (distance2_M < fake_radius2_SG[s, g_M])
            balls_SG[s] += torch.bincount(g_M[in_real_M], minlength=num_g)
            covered_SR[s, r_M[in_real_M]] = True
            recalled_SR[s, r_M[in_fake_M]] = True

    def scores(s: int, own_G: Tensor, own_R: Tensor) -> ManifoldScores:
        return ManifoldScores(
            precision=float((balls_SG[s, own_G] > 0).double().mean()),
            recall=float(recalled_SR[s, own_R].double().mean()),
            density=float(balls_SG[s, own_G].double().mean()) / k,
            coverage=float(covered_SR[s, own_R].double().mean()),
        )

    both = zip(first_SG, first_SR, strict=True)
    return [(scores(s, g_G, r_R), scores(s, ~g_G, ~r_R)) for s, (g_G, r_R) in enumerate(both)]


def _radii_of_halves(bank: Bank, first_SN: Tensor, k: int) -> Tensor:
    """radius2_SN float64: squared distance to the k-th nearest row of a row's own half, in every cut.

    Among 8 k neighbours at least k are in the same half, but for one row in 10^7 at k = 5; that takes the last.
    """
    num = first_SN.shape[1]
    distance2_NK, index_NK = bank.neighbours(min(8 * k, num - 1))
    radius2_SN = torch.empty(first_SN.shape, dtype=torch.float64)
    for s, first_N in enumerate(first_SN):
        kin_NK = (first_N[index_NK] == first_N[:, None]).cumsum(1)
        kth_N = (kin_NK >= k).int().argmax(1)  # 0 where there is none
        kth_N = torch.where(kin_NK[:, -1] < k, kin_NK.shape[1] - 1, kth_N)
        radius2_SN[s] = distance2_NK.gather(1, kth_N[:, None])[:, 0]
    return radius2_SN


class Precision:
    """Share of generated pictures that lie where real ones do, in [0, 1]: fidelity. 1 for equal sets."""

    name: str = "precision"
    lower_is_better: bool = False
    ideal: float = 1.0
    bounds: tuple[float, float] = (0.0, 1.0)

    def __init__(self, k: int = NEIGHBOURS) -> None:
        self.k = k
        self.min_n = k + 1

    def __call__(self, generated: Statistics, reference: Statistics) -> float:
        """The score; see `manifold_scores` for what is computed and raised."""
        return getattr(manifold_scores(generated, reference, self.k), self.name)

    def on_halves(self, generated: Statistics, reference: Statistics, halves: Halves) -> list[tuple[float, float]]:
        """The score of the first and second half of every cut; see `manifold_on_halves`."""
        cuts = manifold_on_halves(generated, reference, halves, self.k)
        return [(getattr(first, self.name), getattr(second, self.name)) for first, second in cuts]


class Recall(Precision):
    """Share of real pictures that lie where generated ones do, in [0, 1]: diversity. 1 for equal sets."""

    name = "recall"


class Density(Precision):
    """Mean number of real balls a generated picture lies in, / k, in [0, inf): fidelity. 1 for equal sets."""

    name = "density"
    bounds = (0.0, float("inf"))


class Coverage(Precision):
    """Share of real balls that hold a generated picture, in [0, 1]: diversity. 1 for equal sets."""

    name = "coverage"
