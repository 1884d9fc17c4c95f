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

Shapes: G generated and R real pictures, D features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.errors import UsageError
from imagekiln.metrics.distances import Bank
from imagekiln.metrics.statistics import Statistics, require_pair

NEIGHBOURS = 5


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
    real, fake = Bank(reference.features), Bank(generated.features)
    real_radius2_R = real.nearest(reference.features, k, same=True)[0][:, -1]
    fake_radius2_G = fake.nearest(generated.features, k, same=True)[0][:, -1]
    balls_G = torch.zeros(num_g, dtype=torch.int64)
    covered_R = torch.zeros(num_r, dtype=torch.bool)
    for start, inside_BR in real.within(generated.features, real_radius2_R):
        balls_G[start : start + len(inside_BR)] = inside_BR.sum(1)
        covered_R |= inside_BR.any(0)
    recalled = sum(int(inside_BG.any(1).sum()) for _, inside_BG in fake.within(reference.features, fake_radius2_G))
    return ManifoldScores(
        precision=int((balls_G > 0).sum()) / num_g,
        recall=recalled / num_r,
        density=int(balls_G.sum()) / (k * num_g),
        coverage=int(covered_R.sum()) / num_r,
    )


def manifold_without_parts(
    generated: Statistics, reference: Statistics, parts: tuple[Tensor, Tensor], k: int = NEIGHBOURS
) -> list[ManifoldScores]:
    """The scores with part p of both sets left out, for every p: one pass over the distances serves all (float32).

    parts: (part_G, part_R) int64 in [0, P). Raises as `manifold_scores`. The last comparison is remembered.
    """
    require_pair(generated, reference, 2 * k + 2, f"an interval of {k} nearest neighbours")
    part_G, part_R = parts
    return _scores_without(generated, reference, tuple(part_G.tolist()), tuple(part_R.tolist()), k)


@lru_cache(maxsize=1)
def _scores_without(
    generated: Statistics, reference: Statistics, parts_G: tuple[int, ...], parts_R: tuple[int, ...], k: int
) -> list[ManifoldScores]:
    part_G, part_R = torch.tensor(parts_G), torch.tensor(parts_R)
    count = 1 + int(max(part_G.max(), part_R.max()))
    real, fake = Bank(reference.features), Bank(generated.features)
    real_radius2_PR = _radii_without(real, reference, part_R, count, k)
    fake_radius2_PG = _radii_without(fake, generated, part_G, count, k)
    inside_P, balls_P, recalled_P = torch.zeros(3, count, dtype=torch.int64)
    covered_PR = torch.zeros(count, reference.n, dtype=torch.bool)
    for start, distance2_BR, _ in real.blocks(generated.features):
        part_B = part_G[start : start + len(distance2_BR)]
        for p in range(count):
            inside_BR = (distance2_BR < real_radius2_PR[p])[part_B != p]
            balls_B = inside_BR.sum(1)
            inside_P[p] += (balls_B > 0).sum()
            balls_P[p] += balls_B.sum()
            covered_PR[p] |= inside_BR.any(0)
    for start, distance2_BG, _ in fake.blocks(reference.features):
        part_B = part_R[start : start + len(distance2_BG)]
        for p in range(count):
            recalled_P[p] += (distance2_BG < fake_radius2_PG[p]).any(1)[part_B != p].sum()
    kept_P = [(int((part_G != p).sum()), int((part_R != p).sum())) for p in range(count)]
    return [
        ManifoldScores(
            precision=int(inside_P[p]) / num_g,
            recall=int(recalled_P[p]) / num_r,
            density=int(balls_P[p]) / (k * num_g),
            coverage=int(covered_PR[p].sum()) / num_r,
        )
        for p, (num_g, num_r) in enumerate(kept_P)
    ]


def _radii_without(bank: Bank, statistics: Statistics, part_N: Tensor, count: int, k: int) -> Tensor:
    """radius2_PN float32: squared k-th nearest distance when part p is left out; -1 for the rows of p themselves.

    Among 3 k neighbours at least k are outside a small part, but for about one row in 10^10.
    """
    near = min(3 * k, statistics.n - 1)
    distance2_NK, index_NK = bank.nearest(statistics.features, near, same=True)
    radius2_PN = torch.empty(count, statistics.n)
    for p in range(count):
        outside_NK = distance2_NK.masked_fill(part_N[index_NK] == p, torch.inf)
        kth_N = outside_NK.sort(1).values[:, k - 1].float()
        radius2_PN[p] = torch.where(kth_N.isinf(), distance2_NK[:, -1].float(), kth_N).masked_fill(part_N == p, -1.0)
    return radius2_PN


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

    def without_parts(self, generated: Statistics, reference: Statistics, parts: tuple[Tensor, Tensor]) -> list[float]:
        """The score with part p of both sets left out, for every p; see `manifold_without_parts`."""
        return [getattr(s, self.name) for s in manifold_without_parts(generated, reference, parts, self.k)]


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
