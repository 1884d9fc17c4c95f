"""Kernel distance: the squared maximum mean discrepancy under a cubic polynomial kernel, unbiased at any N.

KD = mean_{i!=j} k(g_i, g_j) + mean_{i!=j} k(r_i, r_j) - 2 mean_{ij} k(g_i, r_j),   k(x, y) = (x.y / D + 1)^3

(Gretton et al. 2012, eq. 3; the kernel of Binkowski et al. 2018.) Being unbiased it may be below 0 when the sets agree.
It is "KID" only on the features of the 2015 Inception network, which this package does not ship.

Shapes: G and R pictures of the two sets, D features, P parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import UsageError
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

    def without_parts(self, generated: Statistics, reference: Statistics, parts: tuple[Tensor, Tensor]) -> list[float]:
        """The complete statistic with part p of both sets left out, for every p: one pass over the pairs serves all.

        parts: (part_G, part_R) int64 in [0, P): which part each picture belongs to.
        """
        require_pair(generated, reference, self.min_n, "a kernel distance")
        part_G, part_R = parts
        count = 1 + int(max(part_G.max(), part_R.max()))
        sums = [
            _pair_sums(x.features, y.features, part_x, part_y, count)
            for x, y, part_x, part_y in (
                (generated, generated, part_G, part_G),
                (reference, reference, part_R, part_R),
                (generated, reference, part_G, part_R),
            )
        ]
        diagonals = [_diagonal(side.features) for side in (generated, reference)]
        values = []
        for part in range(count):
            kept = torch.arange(count) != part
            gg, rr, gr = (float(pairs[kept][:, kept].sum()) for pairs in sums)
            g, r = (int((part_X != part).sum()) for part_X in parts)
            gg -= float(diagonals[0][part_G != part].sum())
            rr -= float(diagonals[1][part_R != part].sum())
            values.append(gg / (g * (g - 1)) + rr / (r * (r - 1)) - 2 * gr / (g * r))
        return values

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


def _pair_sums(x_GD: Tensor, y_RD: Tensor, part_G: Tensor, part_R: Tensor, count: int) -> Tensor:
    """sums_PP: kernel summed over the pairs of every two parts."""
    y_DR = y_RD.double().T / x_GD.shape[1]
    sums_PP = torch.zeros(count, count, dtype=torch.float64)
    member_RP = torch.nn.functional.one_hot(part_R, count).double()
    for block, part in zip(x_GD.split(BLOCK_ROWS), part_G.split(BLOCK_ROWS), strict=True):
        kernel_BR = torch.addmm(torch.ones(()).double(), block.double(), y_DR).pow_(3)
        sums_PP.index_add_(0, part, kernel_BR @ member_RP)
    return sums_PP


def _diagonal(x_GD: Tensor) -> Tensor:
    """k(x_i, x_i): diagonal_G float64."""
    return (x_GD.double().square().sum(1) / x_GD.shape[1] + 1).pow(3)
