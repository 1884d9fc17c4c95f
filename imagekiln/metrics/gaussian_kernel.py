"""Gaussian kernel distance: the squared maximum mean discrepancy under exp(-|x - y|^2 / 2 s^2), unbiased at any N.

GKD = 1000 ( mean_{i!=j} k(g_i, g_j) + mean_{i!=j} k(r_i, r_j) - 2 mean_{ij} k(g_i, r_j) )

(Gretton et al. 2012, eq. 3.) The Gaussian kernel is characteristic: in expectation 0 only for equal distributions,
without taking the features for Gaussian. Rows normalised to length 1, s = 10 and the factor 1000 are the definition of
CMMD (Jayasumana et al. 2024, arXiv 2401.09603); it is "CMMD" only on the CLIP embeddings of that paper, which this
package does not ship. With s = 10 against distances of at most 2 the kernel is nearly linear and sees mostly means;
bandwidth "median" (the median distance between reference pictures, Gretton et al. section 8) sees shapes.

The ones of k cancel between the three means, so k - 1 is summed: float32 keeps its digits.

Shapes: G and R pictures of the two sets, D features, B rows of a block, S cuts into halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics.dealing import content_order
from imagekiln.metrics.distances import Bank
from imagekiln.metrics.interval import Halves
from imagekiln.metrics.statistics import Statistics, require_pair

SCALE = 1000.0
MEDIAN_ROWS = 2000
"""Reference pictures the median distance is taken over: 2 million pairs."""


class GaussianKernelDistance:
    """Unbiased squared MMD x 1000; expected value 0 for sets of one distribution, single values may be below 0.

    bandwidth: s > 0, or "median". normalize: rows to length 1 first (rows of zeros stay).

    Raises UsageError for another bandwidth; DataError with fewer than two pictures on a side, or a median distance 0.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> round(GaussianKernelDistance()(Statistics.of(-rows), Statistics.of(rows)), 4)
    9.8512
    """

    name: str = "gaussian_kernel"
    lower_is_better: bool = True
    ideal: float = 0.0
    bounds: tuple[float, float] = (-float("inf"), float("inf"))
    min_n: int = 2
    squared: bool = True

    def __init__(self, bandwidth: float | str = 10.0, normalize: bool = True) -> None:
        if bandwidth != "median" and (isinstance(bandwidth, str) or not bandwidth > 0.0):
            raise UsageError(
                f"GaussianKernelDistance got bandwidth={bandwidth!r}; it needs a positive number or 'median'."
            )
        self.bandwidth = bandwidth
        self.normalize = normalize

    def __call__(self, generated: Statistics, reference: Statistics) -> float:
        """The distance: kernels float32 of centred rows, sums float64."""
        require_pair(generated, reference, self.min_n, "a Gaussian kernel distance")
        everyone = [torch.ones(1, side.n, dtype=torch.bool) for side in (generated, reference)]
        return self._distances(generated, reference, *everyone)[0][0]

    def on_halves(self, generated: Statistics, reference: Statistics, halves: Halves) -> list[tuple[float, float]]:
        """The distance of the first and second half of every cut: one pass over the pairs serves all.

        The bandwidth is that of the whole reference.
        """
        require_pair(generated, reference, 2 * self.min_n, "a Gaussian kernel distance of halves")
        first_SG, first_SR = halves.of(generated.n, "generated"), halves.of(reference.n, "reference")
        return self._distances(generated, reference, first_SG, first_SR)

    def _distances(
        self, generated: Statistics, reference: Statistics, first_SG: Tensor, first_SR: Tensor
    ) -> list[tuple[float, float]]:
        """The distance of the pictures in, and of those not in, each row of the masks; nan for one of nobody."""
        x_GD, y_RD = (_normalised(s.features) if self.normalize else s.features for s in (generated, reference))
        gamma = 0.5 / (median_distance(y_RD) if isinstance(self.bandwidth, str) else self.bandwidth) ** 2
        banks = Bank(x_GD), Bank(y_RD)
        gg_S2 = _half_sums(x_GD, banks[0], first_SG, first_SG, gamma, same=True)
        rr_S2 = _half_sums(y_RD, banks[1], first_SR, first_SR, gamma, same=True)
        gr_S2 = _half_sums(x_GD, banks[1], first_SG, first_SR, gamma, same=False)
        g_S2, r_S2 = (torch.stack([m.sum(1), (~m).sum(1)], 1).double() for m in (first_SG, first_SR))
        values_S2 = gg_S2 / (g_S2 * (g_S2 - 1)) + rr_S2 / (r_S2 * (r_S2 - 1)) - 2 * gr_S2 / (g_S2 * r_S2)
        return [(first, second) for first, second in (SCALE * values_S2).tolist()]


def median_distance(features_RD: Tensor) -> float:
    """Median Euclidean distance between two different rows, among 2,000 of them chosen by content.

    >>> median_distance(torch.tensor([[0.0], [1.0], [4.0]]))
    3.0
    """
    rows_RD = features_RD
    if len(rows_RD) > MEDIAN_ROWS:
        rows_RD = rows_RD[content_order(rows_RD)[:MEDIAN_ROWS]]
    bank = Bank(rows_RD)
    upper = [
        distance2_BN[torch.arange(len(rows_RD)) > torch.arange(start, start + len(distance2_BN))[:, None]]
        for start, distance2_BN, _ in bank.blocks(rows_RD)
    ]
    median = float(torch.cat(upper).median().sqrt())
    if median <= 0.0:
        raise DataError("More than half of the reference pictures are equal; a median distance needs different ones.")
    return median


def _normalised(features_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features_ND.double(), dim=1).float()


def _half_sums(x_GD: Tensor, bank: Bank, first_SG: Tensor, first_SR: Tensor, gamma: float, same: bool) -> Tensor:
    """sums_S2 float64 of k - 1 over the pairs within the first halves, and within the second halves.

    same: the rows are the bank's, and no row is paired with itself.
    """
    whole = bool(first_SR.all())
    sums_S2 = torch.zeros(len(first_SG), 2, dtype=torch.float64)
    for start, distance2_BR, _ in bank.blocks(x_GD):
        if same:
            distance2_BR.diagonal(start).zero_()
        kernel_BR = distance2_BR.mul_(-gamma).expm1_()
        total_B = kernel_BR.sum(1, dtype=torch.float64)
        inside_SB = total_B[None] if whole else (first_SR.float() @ kernel_BR.T).double()
        first_SB = first_SG[:, start : start + len(total_B)].double()
        sums_S2[:, 0] += (inside_SB * first_SB).sum(1)
        sums_S2[:, 1] += ((total_B - inside_SB) * (1.0 - first_SB)).sum(1)
    return sums_S2
