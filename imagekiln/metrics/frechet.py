"""Frechet distance: how far apart two sets lie when each is summed up as a Gaussian of its features.

FD = |mu_g - mu_r|^2 + tr(S_g) + tr(S_r) - 2 tr((S_g S_r)^(1/2))   (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)

With any factors S_g = F_g F_g^T, S_r = F_r F_r^T the last trace is the nuclear norm of F_g^T F_r: a symmetric problem,
so nothing turns complex or negative, and it holds for singular covariances too. The factor is Cholesky's when there
are more pictures than features, and the centred features themselves when there are fewer (an N x N problem then).
Between two Cholesky factors the norm is the sum of the roots of the eigenvalues of F_g^T S_r F_g, an eigenvalue problem
at a third of the price; it squares the condition, so where eigenvalues span more than 10 digits the singular values
are taken after all.
It is "FID" only on the features of the 2015 Inception network, which this package does not ship.

The expected value falls with N like 1 / N: only distances at equal N compare.

Shapes: N pictures, D features, R columns of a factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imagekiln.metrics.statistics import Statistics, require_pair

CONDITION = 1e-10
"""Smallest eigenvalue, relative to the largest, whose root float64 still gives to 5 digits."""


class FrechetDistance:
    """Frechet distance between the Gaussians of two feature sets, in [0, inf); 0 for equal sets.

    Covariances have N - 1 in the denominator. Raises DataError with fewer than two pictures on a side.

    >>> rows = torch.tensor([[0.0], [2.0]])
    >>> FrechetDistance()(Statistics.of(rows + 3.0), Statistics.of(rows))
    9.0
    """

    name: str = "frechet"
    lower_is_better: bool = True
    ideal: float = 0.0
    bounds: tuple[float, float] = (0.0, float("inf"))
    min_n: int = 2
    squared: bool = True

    def __call__(self, generated: Statistics, reference: Statistics) -> float:
        """The distance, computed in float64."""
        require_pair(generated, reference, self.min_n, "a Frechet distance")
        shift = (generated.mean - reference.mean).square().sum()
        spread = generated.covariance.trace() + reference.covariance.trace()
        return max(0.0, float(shift + spread - 2.0 * _overlap(generated, reference)))


def _overlap(generated: Statistics, reference: Statistics) -> Tensor:
    """tr((S_g S_r)^(1/2)), a float64 scalar."""
    lower_DD = _cholesky(generated)
    if lower_DD is not None and reference.n > reference.dim:
        values_D = torch.linalg.eigvalsh(lower_DD.T @ reference.covariance @ lower_DD)
        if values_D[0] > CONDITION * values_D[-1]:
            return values_D.sqrt().sum()
    return torch.linalg.svdvals(_factor(generated).T @ _factor(reference)).sum()


def _cholesky(statistics: Statistics) -> Tensor | None:
    """Lower triangular factor_DD of the covariance; None where the covariance is singular."""
    if statistics.n <= statistics.dim:
        return None
    lower_DD, failed = torch.linalg.cholesky_ex(statistics.covariance)
    return None if failed else lower_DD


def _factor(statistics: Statistics) -> Tensor:
    """factor_DR float64 with factor @ factor.T = covariance."""
    if statistics.n <= statistics.dim:
        return (statistics.features.double() - statistics.mean).T / (statistics.n - 1) ** 0.5
    lower_DD = _cholesky(statistics)
    if lower_DD is not None:
        return lower_DD
    values_D, vectors_DD = torch.linalg.eigh(statistics.covariance)  # dead or duplicate features: singular
    return vectors_DD * values_D.clamp(min=0.0).sqrt()
