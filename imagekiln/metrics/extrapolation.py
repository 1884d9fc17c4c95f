"""Frechet distance at infinitely many pictures: the part of its value that is only the size of the sets, taken out.

The Frechet distance of N pictures is too high by about a / N with `a` depending on the model, so its ranking of models
may depend on N. Both sets are cut into k parts of equal size and the distance is averaged over the k pairs of parts:

E[FD_k] = FD_inf + slope k / N      for k = 1, 2, ...;  FD_inf is the intercept of the line through the points

(Chong & Forsyth 2020, arXiv 1911.07023, section 3.1, who draw random subsets of the generated side only. Parts use
every picture once at every size, and cutting both sides takes out the bias of the reference too.) The result is
unbiased up to terms in 1 / N^2, so it may fall below 0 where two sets agree; parts should have more pictures than
there are features.

Shapes: N pictures, D features, P blocks of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.errors import UsageError
from imagekiln.metrics.dealing import content_parts
from imagekiln.metrics.statistics import Statistics, require_pair

CUTS = (1, 2, 3, 4)
BLOCKS = 20


class Extrapolation(NamedTuple):
    """value and its jackknife standard error; distances[i] is the mean over parts of sizes[i] generated pictures."""

    value: float
    standard_error: float
    sizes: tuple[float, ...]
    distances: tuple[float, ...]


class _Moments(NamedTuple):
    """Sums over some pictures about the mean of their whole set: unions of blocks are sums."""

    n: float
    first: Tensor
    second: Tensor


def frechet_infinity(
    generated: Statistics, reference: Statistics, cuts: Sequence[int] = CUTS, seed: int = 0
) -> Extrapolation:
    """The extrapolation with its standard error and the points of the line.

    The error is a delete-a-block jackknife, biased upwards: about 1.4 times the spread of repetitions.

    cuts: into how many parts the sets are cut, at least two different numbers from 1 to 20. seed: deals the pictures.
    Raises UsageError for other cuts, DataError with fewer than 3 pictures a part.

    >>> rows = torch.arange(40.0)[:, None]
    >>> frechet_infinity(Statistics.of(rows), Statistics.of(rows + 100.0)).sizes
    (40.0, 20.0, 13.3, 10.0)
    """
    metric = FrechetInfinity(cuts, seed)
    require_pair(generated, reference, 3 * max(metric.cuts), "the error of an extrapolated Frechet distance")
    left, right = (_blocks(side, content_parts(side.features, BLOCKS, seed)) for side in (generated, reference))
    line = [_point(left, right, cut) for cut in metric.cuts]
    count = min(len(left), len(right)) - 1
    rest = [_intercept([_point(left, right, cut, p) for cut in metric.cuts]) for p in range(count)]
    spread_P = torch.tensor(rest, dtype=torch.float64)
    error = math.sqrt((len(rest) - 1) / len(rest) * float((spread_P - spread_P.mean()).square().sum()))
    sizes = tuple(round(generated.n / x, 1) for x, _ in line)
    return Extrapolation(_intercept(line), error, sizes, tuple(y for _, y in line))


class FrechetInfinity:
    """Frechet distance extrapolated to infinitely many pictures on both sides; expected value 0 for one distribution.

    cuts, seed: see `frechet_infinity`.
    """

    name: str = "frechet_infinity"
    lower_is_better: bool = True
    ideal: float = 0.0
    bounds: tuple[float, float] = (-float("inf"), float("inf"))
    squared: bool = True

    def __init__(self, cuts: Sequence[int] = CUTS, seed: int = 0) -> None:
        self.cuts = tuple(cuts)
        self.seed = seed
        if len(set(self.cuts)) < 2 or not all(1 <= cut <= BLOCKS for cut in self.cuts):
            raise UsageError(
                f"FrechetInfinity got cuts={self.cuts}; it needs at least two different numbers from 1 to {BLOCKS}."
            )
        self.min_n = 2 * max(self.cuts)

    def __call__(self, generated: Statistics, reference: Statistics) -> float:
        """The intercept, computed in float64."""
        require_pair(generated, reference, self.min_n, "an extrapolated Frechet distance")
        left, right = (
            _blocks(side, content_parts(side.features, BLOCKS, self.seed)) for side in (generated, reference)
        )
        return _intercept([_point(left, right, cut) for cut in self.cuts])


def _blocks(side: Statistics, part_N: Tensor) -> list[_Moments]:
    """Moments of every part; the last one, as number P, holds the centre they are taken about."""
    centre_D = side.mean
    blocks = []
    for p in range(1 + int(part_N.max())):
        rows = side.features[part_N == p].double() - centre_D
        blocks.append(_Moments(len(rows), rows.sum(0), rows.T @ rows))
    return [*blocks, _Moments(0, centre_D, torch.empty(0))]


def _point(
    generated: list[_Moments], reference: list[_Moments], cut: int, without: int | None = None
) -> tuple[float, float]:
    """(x, y) of the line: how many times smaller than the sets the parts are, and their mean distance.

    without: a block left out of its part; no block moves to another part, or the jackknife would count that as error.
    """
    x = y = 0.0
    for j in range(cut):
        pair: list[Tensor] = []
        ratio = 0.0
        for *blocks, centre in (generated, reference):
            part = _union([block for p, block in enumerate(blocks) if p % cut == j and p != without], centre.first)
            ratio += sum(block.n for block in blocks) / part[0] / 2
            pair += part[1:]
        x += ratio / cut
        y += _frechet(*pair) / cut
    return x, y


def _union(blocks: list[_Moments], centre_D: Tensor) -> tuple[float, Tensor, Tensor]:
    """(number of pictures, mean_D, covariance_DD) of some blocks together."""
    n = sum(block.n for block in blocks)
    shift_D = torch.stack([block.first for block in blocks]).sum(0) / n
    scatter_DD = blocks[0].second.clone()
    for block in blocks[1:]:
        scatter_DD += block.second
    scatter_DD -= n * torch.outer(shift_D, shift_D)
    return n, centre_D + shift_D, scatter_DD / (n - 1)


def _frechet(mean_D: Tensor, covariance_DD: Tensor, other_mean_D: Tensor, other_covariance_DD: Tensor) -> float:
    """With other covariance = F F^T, the eigenvalues of F^T covariance F are the squares whose roots are summed."""
    factor_DD, failed = torch.linalg.cholesky_ex(other_covariance_DD)
    if failed:
        values_D, vectors_DD = torch.linalg.eigh(other_covariance_DD)
        factor_DD = vectors_DD * values_D.clamp(min=0.0).sqrt()
    overlap = torch.linalg.eigvalsh(factor_DD.T @ covariance_DD @ factor_DD).clamp(min=0.0).sqrt().sum()
    spread = covariance_DD.trace() + other_covariance_DD.trace()
    return float((mean_D - other_mean_D).square().sum() + spread - 2.0 * overlap)


def _intercept(line: Sequence[tuple[float, float]]) -> float:
    """Least squares, extrapolated to parts of infinite size."""
    x, y = torch.tensor(line, dtype=torch.float64).unbind(1)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())
