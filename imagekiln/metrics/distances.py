"""Distances between rows of features: blocked, float32 where that decides and float64 where it does not.

|x - y|^2 = |x|^2 + |y|^2 - 2 x.y costs one matrix product, but cancels when rows lie close together compared with
their distance from the origin. So rows are centred first, the product is float32, and what the rounding could change
(the order of nearest rows, a distance close to a radius) is computed again from x - y in float64. The results are
those of float64 throughout, in bounded memory.

Shapes: Q query rows, N bank rows, D features, K neighbours, B rows of a block, M pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK_ELEMENTS = 16 * 2**20
"""Distances held at a time: 64 MB of float32."""

PAIR_ELEMENTS = 8 * 2**20
"""Float64 differences held at a time."""

SPARE = 3
"""Neighbours looked at beyond the K asked for, so that rounding cannot push one out."""

ROUNDING = 8e-6
"""Bound on the error of a float32 squared distance relative to |x|^2 + |y|^2: 64 ulps, ample for blocked sums."""


class Bank:
    """Rows to measure distances to. features_ND float32."""

    def __init__(self, features_ND: Tensor) -> None:
        self.rows_ND = features_ND
        self._centre_D = features_ND.double().mean(0)
        self._centred_ND = self._centred(features_ND)
        self._norm2_N = self._centred_ND.square().sum(1)

    def blocks(self, query_QD: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row of the block, squared distances_BN float32, bound on their error_BN) over all query rows."""
        step = max(1, BLOCK_ELEMENTS // max(1, len(self.rows_ND)))
        for start in range(0, len(query_QD), step):
            block_BD = self._centred(query_QD[start : start + step])
            size_BN = block_BD.square().sum(1)[:, None] + self._norm2_N
            with _full_float32():
                distance2_BN = torch.addmm(size_BN, block_BD, self._centred_ND.T, alpha=-2.0)
            yield start, distance2_BN.clamp_(min=0.0), size_BN.mul_(ROUNDING)

    def nearest(self, query_QD: Tensor, k: int, same: bool = False) -> tuple[Tensor, Tensor]:
        """The k nearest rows of every query row: squared distances_QK float64 ascending, indices_QK int64.

        same: the query is the bank itself, and no row is its own neighbour.
        """
        found = []
        available = len(self.rows_ND) - same
        for start, distance2_BN, error_BN in self.blocks(query_QD):
            if same:
                distance2_BN.diagonal(start).fill_(torch.inf)
            rough_BK, candidates_BK = distance2_BN.topk(min(k + SPARE, available), largest=False)
            row_B = torch.arange(start, start + len(distance2_BN))
            exact_BK = self.exact(query_QD, row_B.repeat_interleave(candidates_BK.shape[1]), candidates_BK.flatten())
            sorted_BK, order_BK = exact_BK.view(candidates_BK.shape).sort(stable=True)
            near_BK, index_BK = sorted_BK[:, :k], candidates_BK.gather(1, order_BK)[:, :k]
            doubtful_B = rough_BK[:, -1] - error_BN.amax(1) < near_BK[:, -1]
            for b in doubtful_B.nonzero().flatten().tolist() if available > k + SPARE else ():
                near_BK[b], index_BK[b] = self._nearest_exactly(query_QD, start + b, k, same)
            found.append((near_BK, index_BK))
        return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])

    def exact(self, query_QD: Tensor, query_M: Tensor, bank_M: Tensor) -> Tensor:
        """Squared distances_M float64 of given pairs, free of cancellation."""
        step = max(1, PAIR_ELEMENTS // max(1, self.rows_ND.shape[1]))
        pairs = zip(query_M.split(step), bank_M.split(step), strict=True)
        parts = [(query_QD[q].double() - self.rows_ND[b].double()).square().sum(1) for q, b in pairs]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def _nearest_exactly(self, query_QD: Tensor, row: int, k: int, same: bool) -> tuple[Tensor, Tensor]:
        """The k nearest rows of one query row whose neighbours lie closer together than float32 can tell."""
        everyone = torch.arange(len(self.rows_ND))
        distance2_N = self.exact(query_QD, torch.full_like(everyone, row), everyone)
        if same:
            distance2_N[row] = torch.inf
        nearest = distance2_N.topk(k, largest=False)
        return nearest.values, nearest.indices

    def within(self, query_QD: Tensor, radius2_N: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, inside_BN bool): whether a query row lies strictly inside the ball around a bank row.

        radius2_N: squared radii float64.
        """
        for start, distance2_BN, error_BN in self.blocks(query_QD):
            gap_BN = distance2_BN.sub_(radius2_N.float())
            inside_BN = gap_BN < 0.0
            unsure = (gap_BN.abs_() <= error_BN).nonzero()
            query_M, bank_M = unsure[:, 0], unsure[:, 1]
            inside_BN[query_M, bank_M] = self.exact(query_QD, query_M + start, bank_M) < radius2_N[bank_M]
            yield start, inside_BN

    def _centred(self, rows: Tensor) -> Tensor:
        return (rows.double() - self._centre_D).float()


@contextmanager
def _full_float32() -> Iterator[None]:
    """The error bound assumes true float32 products, whatever a training in this process has allowed."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
