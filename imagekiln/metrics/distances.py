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

SELF_BLOCK_ROWS = 1024
"""Rows of a block of a set against itself: small, so that little of the lower triangle is computed."""

PAIR_ELEMENTS = 8 * 2**20
"""Float64 differences held at a time."""

SPARE = 3
"""Neighbours looked at beyond the K asked for, so that rounding cannot push one out."""

ROUNDING = 8e-6
"""Bound on the error of a float32 squared distance relative to |x|^2 + |y|^2: 64 ulps, ample for blocked sums."""

VAGUE = 1e-4
"""Relative error beyond which a float32 distance is computed again for an interval."""


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
            distance2_BN, size_BN = self._block(self._centred(query_QD[start : start + step]), slice(None))
            yield start, distance2_BN, size_BN.mul_(ROUNDING)

    def nearest(self, query_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest rows of every query row: squared distances_QK float64 ascending, indices_QK int64."""
        rough, found = [], []
        for _, distance2_BN, _ in self.blocks(query_QD):
            near = distance2_BN.topk(min(k + SPARE, len(self.rows_ND)), largest=False)
            rough.append(near.values)
            found.append(near.indices)
        return self._settled(query_QD, k, torch.cat(rough), torch.cat(found), same=False)

    def neighbours(self, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest other rows of every bank row, as `nearest`; every pair of rows is multiplied once.

        Needs more than k rows.
        """
        return self._settled(self.rows_ND, k, *self._candidates(k), same=True)

    def radii(self, k: int) -> Tensor:
        """Squared distance of every bank row to its k-th nearest other row: the last column of `neighbours`, float64.

        Of the candidates only those are computed again that rounding may have put on the other side of the k-th.
        """
        rough_NK, found_NK = self._candidates(k)
        error_NK = ROUNDING * (self._norm2_N[:, None] + self._norm2_N[found_NK])
        highest_N = (rough_NK + error_NK)[:, :k].amax(1, keepdim=True)  # k rows are no farther than this,
        lowest_N = (rough_NK - error_NK)[:, k - 1 :].amin(1, keepdim=True)  # and all but k - 1 no nearer than this
        nearer_NK, farther_NK = rough_NK + error_NK < lowest_N, rough_NK - error_NK > highest_N
        row_M, column_M = (~nearer_NK & ~farther_NK).nonzero().unbind(1)
        exact_NK = torch.full(rough_NK.shape, torch.inf, dtype=torch.float64).masked_fill_(nearer_NK, -torch.inf)
        exact_NK[row_M, column_M] = self.exact(self.rows_ND, row_M, found_NK[row_M, column_M])
        radius2_N = exact_NK.kthvalue(k).values
        for row in self._undecided(self.rows_ND, rough_NK, radius2_N, same=True):
            radius2_N[row] = self._nearest_exactly(self.rows_ND, row, k, same=True)[0][-1]
        return radius2_N

    def _candidates(self, k: int) -> tuple[Tensor, Tensor]:
        """The k rows and a few more that float32 finds nearest to each bank row: distances_NK ascending, indices_NK."""
        num = len(self.rows_ND)
        keep = min(k + SPARE, num - 1)
        rough_NK = torch.full((num, keep), torch.inf)
        found_NK = torch.zeros((num, keep), dtype=torch.int64)
        step = max(1, min(SELF_BLOCK_ROWS, BLOCK_ELEMENTS // num))
        for start in range(0, num, step):
            stop = min(start + step, num)
            distance2_BM, _ = self._block(self._centred_ND[start:stop], slice(start, num))
            distance2_BM.diagonal().fill_(torch.inf)
            _merge(rough_NK, found_NK, slice(start, stop), distance2_BM, start)
            if stop < num:
                later_MB = distance2_BM[:, stop - start :].T.contiguous()
                _merge(rough_NK, found_NK, slice(stop, num), later_MB, start)
        return rough_NK, found_NK

    def exact(self, query_QD: Tensor, query_M: Tensor, bank_M: Tensor) -> Tensor:
        """Squared distances_M float64 of given pairs, free of cancellation."""
        step = max(1, PAIR_ELEMENTS // max(1, self.rows_ND.shape[1]))
        pairs = zip(query_M.split(step), bank_M.split(step), strict=True)
        parts = [(query_QD[q].double() - self.rows_ND[b].double()).square().sum(1) for q, b in pairs]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def within(self, query_QD: Tensor, radius2_N: Tensor, radius2_Q: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, in_bank_BN, in_query_BN bool): is a query row strictly inside the ball around a bank row, and is
        the bank row strictly inside the ball around the query row.

        radius2_N, radius2_Q: squared radii float64.
        """
        for start, distance2_BN, error_BN in self.blocks(query_QD):
            radius2_B = radius2_Q[start : start + len(distance2_BN)]
            sides = []
            for radius2, which in ((radius2_N, 1), (radius2_B[:, None], 0)):
                gap_BN = distance2_BN - radius2.float()
                inside_BN = gap_BN < 0.0
                unsure = (gap_BN.abs_() <= error_BN).nonzero()
                query_M, bank_M = unsure[:, 0], unsure[:, 1]
                exact_M = self.exact(query_QD, query_M + start, bank_M)
                inside_BN[query_M, bank_M] = exact_M < radius2.flatten()[unsure[:, which]]
                sides.append(inside_BN)
            yield start, sides[0], sides[1]

    def pairs_within(
        self, query_QD: Tensor, radius2_N: Tensor, radius2_Q: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(query_M, bank_M, squared distance_M float64) of all pairs that lie in either of their balls, in blocks.

        A distance that float32 resolves to four digits stays as it is.
        """
        for start, distance2_BN, error_BN in self.blocks(query_QD):
            radius2_B = radius2_Q[start : start + len(distance2_BN)].float()
            reach_BN = torch.maximum(radius2_N.float(), radius2_B[:, None])
            query_M, bank_M = (distance2_BN - error_BN <= reach_BN).nonzero().unbind(1)
            distance2_M = distance2_BN[query_M, bank_M].double()
            vague = error_BN[query_M, bank_M] > VAGUE * distance2_M
            distance2_M[vague] = self.exact(query_QD, query_M[vague] + start, bank_M[vague])
            yield query_M + start, bank_M, distance2_M

    def _block(self, block_BD: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Squared distances_BN float32 of centred rows to some of the bank, and |x|^2 + |y|^2."""
        size_BN = block_BD.square().sum(1)[:, None] + self._norm2_N[columns]
        with _full_float32():
            distance2_BN = torch.addmm(size_BN, block_BD, self._centred_ND[columns].T, alpha=-2.0)
        return distance2_BN.clamp_(min=0.0), size_BN

    def _settled(
        self, query_QD: Tensor, k: int, rough_QK: Tensor, found_QK: Tensor, same: bool
    ) -> tuple[Tensor, Tensor]:
        """Candidates in the order of their exact distances; rows float32 cannot decide are searched exactly."""
        num, keep = rough_QK.shape
        row_M = torch.arange(num).repeat_interleave(keep)
        exact_QK = self.exact(query_QD, row_M, found_QK.flatten()).view(num, keep)
        sorted_QK, order_QK = exact_QK.sort(stable=True)
        near_QK, index_QK = sorted_QK[:, :k].clone(), found_QK.gather(1, order_QK)[:, :k].clone()
        for q in self._undecided(query_QD, rough_QK, near_QK[:, -1], same):
            near_QK[q], index_QK[q] = self._nearest_exactly(query_QD, q, k, same)
        return near_QK, index_QK

    def _undecided(self, query_QD: Tensor, rough_QK: Tensor, radius2_Q: Tensor, same: bool) -> list[int]:
        """Query rows that may have a row within their radius which float32 did not find among the nearest."""
        if len(self.rows_ND) - same <= rough_QK.shape[1]:
            return []
        norm2_Q = self._norm2_N if same else self._centred(query_QD).square().sum(1)
        size_Q = norm2_Q + self._norm2_N.max()
        return (rough_QK.amax(1) - ROUNDING * size_Q < radius2_Q).nonzero().flatten().tolist()

    def _nearest_exactly(self, query_QD: Tensor, row: int, k: int, same: bool) -> tuple[Tensor, Tensor]:
        """The k nearest rows of one query row whose neighbours lie closer together than float32 can tell."""
        everyone = torch.arange(len(self.rows_ND))
        distance2_N = self.exact(query_QD, torch.full_like(everyone, row), everyone)
        if same:
            distance2_N[row] = torch.inf
        nearest = distance2_N.topk(k, largest=False)
        return nearest.values, nearest.indices

    def _centred(self, rows: Tensor) -> Tensor:
        return (rows.double() - self._centre_D).float()


def _merge(rough_NK: Tensor, found_NK: Tensor, rows: slice, distance2_BM: Tensor, first: int) -> None:
    """Put the nearest columns of a block into the candidates of some rows; its columns start at index `first`."""
    keep = rough_NK.shape[1]
    near = distance2_BM.topk(min(keep, distance2_BM.shape[1]), largest=False)
    both = torch.cat([rough_NK[rows], near.values], 1).topk(keep, largest=False)
    found_NK[rows] = torch.cat([found_NK[rows], near.indices + first], 1).gather(1, both.indices)
    rough_NK[rows] = both.values


@contextmanager
def _full_float32() -> Iterator[None]:
    """The error bound assumes true float32 products, whatever a training in this process has allowed."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
