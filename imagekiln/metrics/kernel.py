"""Kernel distance: the squared maximum mean discrepancy under a cubic polynomial kernel, unbiased at any N.

KD = mean_{i!=j} k(g_i, g_j) + mean_{i!=j} k(r_i, r_j) - 2 mean_{ij} k(g_i, r_j),   k(x, y) = (x.y / D + 1)^3

(Gretton et al. 2012, eq. 3; the kernel of Binkowski et al. 2018.) Being unbiased it may be below 0 when the sets agree.
It is "KID" only on the features of the 2015 Inception network, which this package does not ship.

Shapes: G and R pictures of the two sets, D features, S cuts in halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import UsageError
from imagekiln.metrics.interval import Halves
from imagekiln.metrics.statistics import Statistics, require_pair

BLOCK_ROWS = 1024


class KernelDistance:
    """Unbiased squared MMD between two feature sets; expected value 0 for sets of one distribution.

    subsets, subset_size: the distance is the mean over `subsets` random subsets of `subset_size` pictures (fewer in
        small sets), drawn without replacement from `seed`. Where the complete statistic over all pairs costs no more
        than that, it is used instead: it is the mean over all possible subsets, so the seed drops out.

    Raises UsageError for an impossible subset, DataError with fewer than two pictures on a side.

    >>> rows = torch.tensor([[0.0], [2.0]])
    >>> KernelDistance()(Statistics.of(rows), Statistics.of(rows))  # 1 + 1 - 2 * (1 + 1 + 1 + 125) / 4
    -62.0
    """

    name: str = "kernel"
    lower_is_better: bool = True
    ideal: float = 0.0
    bounds: tuple[float, float] = (-float("inf"), float("inf"))
    min_n: int = 2
    squared: bool = True

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> None:
        if subsets < 1 or subset_size < 2:
            raise UsageError(
                f"KernelDistance got subsets={subsets}, subset_size={subset_size}; it needs at least 1 and 2."
            )
        self.subsets = subsets
        self.subset_size = subset_size
        self.seed = seed

    def __call__(self, generated: Statistics, reference: Statistics) -> float:
        """The distance, computed in float64."""
        require_pair(generated, reference, self.min_n, "a kernel distance")
        if self._complete(generated.n, reference.n):
            return _mmd2(generated.features, reference.features)
        size = min(self.subset_size, generated.n, reference.n)
        generator = torch.Generator().manual_seed(mix(self.seed, "kernel subsets"))
        draws = (
            [torch.randperm(side.n, generator=generator)[:size] for side in (generated, reference)]
            for _ in range(self.subsets)
        )
        return sum(_mmd2(generated.features[g], reference.features[r]) for g, r in draws) / self.subsets

    def on_halves(self, generated: Statistics, reference: Statistics, halves: Halves) -> list[tuple[float, float]]:
        """The complete statistic of the first and second half of every cut: one pass over the pairs serves all."""
        require_pair(generated, reference, 2 * self.min_n, "a kernel distance of halves")
        sets = (
            (generated.features, halves.of(generated.n, "generated")),
            (
                reference.features,
                halves.of(reference.n, "reference"),
            ),
        )
        (x_GD, first_SG), (y_RD, first_SR) = sets
        sums = [
            _half_sums(*pair)
            for pair in (
                (x_GD, x_GD, first_SG, first_SG),
                (y_RD, y_RD, first_SR, first_SR),
                (x_GD, y_RD, first_SG, first_SR),
            )
        ]
        diagonals = [_diagonal(rows) for rows, _ in sets]
        values = []
        for second in (False, True):
            g, r = (int((first_SN[0] != second).sum()) for _, first_SN in sets)
            gg_S, rr_S, gr_S = (pairs[:, int(second)] for pairs in sums)
            gg_S = gg_S - (first_SG != second).double() @ diagonals[0]
            rr_S = rr_S - (first_SR != second).double() @ diagonals[1]
            values.append((gg_S / (g * (g - 1)) + rr_S / (r * (r - 1)) - 2 * gr_S / (g * r)).tolist())
        return list(zip(*values, strict=True))

    def _complete(self, num_generated: int, num_reference: int) -> bool:
        return max(num_generated, num_reference) ** 2 <= self.subsets * self.subset_size**2


def _mmd2(generated_GD: Tensor, reference_RD: Tensor) -> float:
    g, r = len(generated_GD), len(reference_RD)
    gg = _pair_sum(generated_GD, generated_GD) - float(_diagonal(generated_GD).sum())
    rr = _pair_sum(reference_RD, reference_RD) - float(_diagonal(reference_RD).sum())
    return gg / (g * (g - 1)) + rr / (r * (r - 1)) - 2 * _pair_sum(generated_GD, reference_RD) / (g * r)


def _pair_sum(x_GD: Tensor, y_RD: Tensor) -> float:
    y_DR = y_RD.double().T / x_GD.shape[1]
    return sum(
        float(torch.addmm(torch.ones(()).double(), block.double(), y_DR).pow_(3).sum())
        for block in x_GD.split(BLOCK_ROWS)
    )


def _half_sums(x_GD: Tensor, y_RD: Tensor, first_SG: Tensor, first_SR: Tensor) -> Tensor:
    """sums_S2: kernel summed over the pairs within the first halves, and within the second halves."""
    y_DR = y_RD.double().T / x_GD.shape[1]
    first_SG, first_SR = first_SG.double(), first_SR.double()
    sums_S2 = torch.zeros(len(first_SG), 2, dtype=torch.float64)
    for block, first_SB in zip(x_GD.split(BLOCK_ROWS), first_SG.split(BLOCK_ROWS, 1), strict=True):
        kernel_BR = torch.addmm(torch.ones(()).double(), block.double(), y_DR).pow_(3)
        inside_SB = first_SR @ kernel_BR.T
        sums_S2[:, 0] += (inside_SB * first_SB).sum(1)
        sums_S2[:, 1] += ((kernel_BR.sum(1) - inside_SB) * (1.0 - first_SB)).sum(1)
    return sums_S2


def _diagonal(x_GD: Tensor) -> Tensor:
    """k(x_i, x_i): diagonal_G float64."""
    return (x_GD.double().square().sum(1) / x_GD.shape[1] + 1).pow(3)
