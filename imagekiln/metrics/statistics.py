"""Statistics of features: what every metric over two sets of pictures is computed from.

Features are rounded to float32 once, when they come in, and kept: neighbours, subsets and intervals need the rows.
Mean and covariance are float64 over those rows, two passes (Chan, Golub & LeVeque 1983), so neither the batch size nor
the order of the updates shows in the first nine digits.

Shapes: N pictures, D features, B rows of one update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from imagekiln.errors import DataError

BLOCK_ROWS = 8192
"""Rows converted to float64 at a time: bounds the memory of the covariance."""

REPEATED = 0.01
"""Share of repeated pictures that is worth a remark."""


class Statistics:
    """Features of a set of pictures, gathered batch by batch.

    dim: D, number of features of a picture. name: of the set, for messages ("generated").

    >>> statistics = Statistics(dim=2).update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    >>> statistics.n, statistics.mean.tolist(), statistics.covariance.tolist()
    (2, [1.0, 2.0], [[2.0, 4.0], [4.0, 8.0]])
    """

    def __init__(self, dim: int, name: str = "") -> None:
        self.dim = dim
        self.name = name
        self.n = 0
        self._rows: list[Tensor] = []
        self._moments: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, features_ND: Tensor, name: str = "") -> Statistics:
        """Statistics of features that are already all there."""
        if features_ND.ndim != 2:
            raise DataError(
                f"Statistics got features of shape {tuple(features_ND.shape)}; it needs (pictures, features)."
            )
        return cls(features_ND.shape[1], name).update(features_ND)

    def update(self, features_BD: Tensor) -> Statistics:
        """Add rows; returns itself. features_BD: any float dtype, any device, finite.

        Raises DataError for a wrong shape, or NaN or infinity: a broken generator must not become a number.
        """
        if features_BD.ndim != 2 or features_BD.shape[1] != self.dim:
            raise DataError(
                f"Statistics of {self.dim} features got an update of shape {tuple(features_BD.shape)}; "
                f"it needs (pictures, {self.dim}): use one feature network throughout."
            )
        rows = features_BD.detach().to("cpu", torch.float32, copy=True)
        broken_M = (~torch.isfinite(rows)).any(1).nonzero().flatten()
        if len(broken_M):
            of = f" of the {self.name} set" if self.name else ""
            raise DataError(
                f"The features of {len(broken_M)} of {len(rows)} pictures{of} are NaN or infinite, the first of them "
                f"picture {self.n + int(broken_M[0])} (counted from 0); metrics need finite numbers: look at the "
                "pictures, the model may have diverged."
            )
        self._rows.append(rows)
        self._moments = None
        self.n += len(rows)
        return self

    @property
    def features(self) -> Tensor:
        """features_ND float32 in the order they came."""
        if len(self._rows) != 1:
            self._rows = [torch.cat(self._rows) if self._rows else torch.empty(0, self.dim)]
        return self._rows[0]

    @property
    def mean(self) -> Tensor:
        """mean_D float64. Raises DataError without pictures."""
        return self._finished()[0]

    @property
    def covariance(self) -> Tensor:
        """covariance_DD float64 with N - 1 in the denominator. Raises DataError with fewer than two pictures."""
        self.require(2, "a covariance")
        return self._finished()[1] / (self.n - 1)

    @property
    def hash(self) -> str:
        """sha256 of the float32 features in their order: names a reference set."""
        return hashlib.sha256(f"{self.n}x{self.dim}:".encode() + self.features.numpy().tobytes()).hexdigest()

    def subset(self, indices: Tensor | Iterable[int]) -> Statistics:
        """Statistics of some of the pictures. indices: int64 positions or a boolean mask_N."""
        chosen = indices if isinstance(indices, Tensor) else torch.as_tensor(list(indices), dtype=torch.int64)
        return Statistics(self.dim, self.name).update(self.features[chosen])

    @property
    def num_distinct(self) -> int:
        """Pictures whose features differ from those of every picture before them.

        >>> Statistics.of(torch.tensor([[1.0], [2.0], [1.0]])).num_distinct
        2
        """
        return len({row.tobytes() for row in self.features.numpy()})

    def require(self, n: int, purpose: str) -> None:
        """Raises DataError when there are fewer than n pictures."""
        if self.n < n:
            raise DataError(f"There are {self.n} pictures; {purpose} needs at least {n}: add pictures.")

    def _finished(self) -> tuple[Tensor, Tensor]:
        """mean_D and the centred scatter_DD."""
        self.require(1, "a mean")
        if self._moments is None:
            blocks = self.features.split(BLOCK_ROWS)
            mean_D = sum((block.double().sum(0) for block in blocks), torch.zeros(self.dim).double()) / self.n
            scatter_DD = torch.zeros(self.dim, self.dim, dtype=torch.float64)
            for block in blocks:
                centred = block.double() - mean_D
                scatter_DD += centred.T @ centred
            self._moments = mean_D, scatter_DD
        return self._moments


def require_pair(generated: Statistics, reference: Statistics, n: int, purpose: str) -> None:
    """Raises DataError unless both sets have the same features and at least n pictures."""
    if generated.dim != reference.dim:
        raise DataError(
            f"The generated set has {generated.dim} features and the reference {reference.dim}; "
            f"{purpose} compares one feature space: extract both with the same network."
        )
    generated.require(n, purpose)
    reference.require(n, purpose)


def remarks(generated: Statistics, reference: Statistics) -> list[str]:
    """What a reader of metrics over these sets should know: repeated pictures, more features than pictures.

    >>> same, two = Statistics.of(torch.zeros(4, 1)), Statistics.of(torch.tensor([[0.0], [1.0]]))
    >>> remarks(same, two)
    ['All 4 generated pictures have the same features: the model may have collapsed.']
    """
    found = []
    for side, name, meaning in (
        (generated, "generated", "the model may have collapsed"),
        (reference, "reference", "balls around repeated pictures are empty: remove duplicates"),
    ):
        distinct = side.num_distinct
        if side.n > 1 and distinct == 1:
            found.append(f"All {side.n} {name} pictures have the same features: {meaning}.")
        elif distinct < (1 - REPEATED) * side.n:
            found.append(f"{side.n - distinct} of {side.n} {name} pictures repeat the features of another: {meaning}.")
    n = min(generated.n, reference.n)
    if n <= generated.dim:
        found.append(
            f"{n} pictures do not span the space of {generated.dim} features: a Frechet distance is then mostly "
            "bias, and compares only at equal numbers."
        )
    return found
