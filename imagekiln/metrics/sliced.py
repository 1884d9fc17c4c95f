"""Sliced Wasserstein distance of features: the mean over directions of how far sorted projections lie apart.

MIND = 3 D  mean over unit directions u of  W2^2(u.g, u.r)           (arXiv 2605.06797; 1,000 directions)

W2 in one dimension pairs the sorted values. Nothing is taken for Gaussian; where the features are, with equal or
isotropic covariances, the mean over directions times D is the Frechet distance |mu_g - mu_r|^2 + D (s_g - s_r)^2, and
the factor 3 is the paper's. The bias at finite N is about half of the Frechet distance's, so fewer pictures do.

Shapes: G and R pictures, D features, U directions, Q pairs of the coupling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import UsageError
from imagekiln.metrics.interval import Halves
from imagekiln.metrics.statistics import Statistics, require_pair

DIRECTIONS = 1000
FACTOR = 3.0
BLOCK_ELEMENTS = 4 * 2**20
"""Projections held at a time."""


class SlicedDistance:
    """Sliced squared Wasserstein distance in the scaling of MIND, in [0, inf); 0 for equal sets.

    directions: number of random unit directions; seed: chooses them. Raises UsageError for none, DataError with fewer
    than two pictures on a side.

    >>> rows = torch.tensor([[0.0], [2.0]])
    >>> SlicedDistance()(Statistics.of(rows + 3.0), Statistics.of(rows))
    27.0
    """

    name: str = "sliced"
    lower_is_better: bool = True
    ideal: float = 0.0
    bounds: tuple[float, float] = (0.0, float("inf"))
    min_n: int = 2
    squared: bool = True

    def __init__(self, directions: int = DIRECTIONS, seed: int = 0) -> None:
        if directions < 1:
            raise UsageError(f"SlicedDistance got directions={directions}; it needs at least 1.")
        self.directions = directions
        self.seed = seed

    def __call__(self, generated: Statistics, reference: Statistics) -> float:
        """The distance: projections float32 of rows centred on the reference, sums float64."""
        require_pair(generated, reference, self.min_n, "a sliced distance")
        coupling = Coupling.of(generated.n, reference.n)
        total = 0.0
        for left_BG, right_BR in self._projections(generated, reference):
            total += coupling.squared(ascending(left_BG), ascending(right_BR))
        return FACTOR * generated.dim * total / self.directions

    def on_halves(self, generated: Statistics, reference: Statistics, halves: Halves) -> list[tuple[float, float]]:
        """The distance of the first and second half of every cut: what is sorted once stays sorted in its halves."""
        require_pair(generated, reference, 2 * self.min_n, "a sliced distance of halves")
        first_SG, first_SR = halves.of(generated.n, "generated"), halves.of(reference.n, "reference")
        sizes = [(int((first_SG[0] == half).sum()), int((first_SR[0] == half).sum())) for half in (True, False)]
        couplings = [Coupling.of(*size) for size in sizes]
        sums_S2 = torch.zeros(halves.splits, 2, dtype=torch.float64)
        for left_BG, right_BR in self._projections(generated, reference):
            (left, at_left), (right, at_right) = left_BG.sort(1), right_BR.sort(1)
            for s in range(halves.splits):
                in_left, in_right = first_SG[s][at_left], first_SR[s][at_right]
                for half, coupling in enumerate(couplings):
                    kept = (x[m].view(len(x), -1) for x, m in ((left, in_left), (right, in_right)))
                    sums_S2[s, half] += coupling.squared(*kept)
                    in_left, in_right = ~in_left, ~in_right
        return [(a, b) for a, b in (FACTOR * generated.dim / self.directions * sums_S2).tolist()]

    def _projections(self, generated: Statistics, reference: Statistics) -> Iterator[tuple[Tensor, Tensor]]:
        """(left_BG, right_BR) float32 of B directions at a time."""
        centre_D = reference.features.double().mean(0)
        left_DG, right_DR = ((side.features.double() - centre_D).float().T for side in (generated, reference))
        direction_UD = unit_directions(self.directions, generated.dim, mix(self.seed, "directions"))
        for block_BD in direction_UD.split(max(1, BLOCK_ELEMENTS // max(generated.n, reference.n))):
            yield block_BD @ left_DG, block_BD @ right_DR


def unit_directions(directions: int, dim: int, seed: int) -> Tensor:
    """direction_UD float32 of length 1, uniform on the sphere."""
    rows_UD = torch.randn(directions, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rows_UD / torch.linalg.vector_norm(rows_UD, dim=1, keepdim=True)).float()


def ascending(values_BN: Tensor) -> Tensor:
    """Sorted along the last dimension; numpy's, for it uses vector instructions and makes no indices."""
    array = values_BN.contiguous().numpy().copy()
    array.sort(axis=-1)
    return torch.from_numpy(array)


class Coupling(NamedTuple):
    """The optimal plan between G and R sorted values of equal weights: which meet, and how much of the mass."""

    left_Q: Tensor
    right_Q: Tensor
    mass_Q: Tensor

    @classmethod
    def of(cls, g: int, r: int) -> Coupling:
        """Exact in integers: both distribution functions step at multiples of 1 / (G R).

        >>> Coupling.of(1, 2).mass_Q.tolist()
        [0.5, 0.5]
        """
        steps_Q = torch.cat([torch.arange(1, g + 1) * r, torch.arange(1, r + 1) * g]).unique()
        start_Q = torch.cat([steps_Q.new_zeros(1), steps_Q[:-1]])
        return cls(start_Q // r, start_Q // g, (steps_Q - start_Q).double() / (g * r))

    def squared(self, left_BG: Tensor, right_BR: Tensor) -> float:
        """W2^2 between sorted rows, summed over the rows."""
        if left_BG.shape == right_BR.shape:
            return float((left_BG - right_BR).square_().sum(dtype=torch.float64)) / left_BG.shape[1]
        gap_BQ = left_BG[:, self.left_Q] - right_BR[:, self.right_Q]
        return float((gap_BQ.square_().sum(0, dtype=torch.float64) * self.mass_Q).sum())
