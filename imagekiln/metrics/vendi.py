"""Vendi score: how many different pictures a set holds, as the exponential of the entropy of its similarities.

With K the matrix of similarities k(x_i, x_j), k(x, x) = 1, and l the eigenvalues of K / N, which sum to 1,

VS = exp(-sum l log l)      order q: VS_q = (sum l^q)^(1 / (1 - q)), q = 1 is the limit above

(Friedman & Dieng 2023, arXiv 2210.02410, definition 3.1; Pasarkar & Dieng 2024, arXiv 2310.12952, for the orders.)
N copies score 1, N pictures without any similarity N. Small orders count rare pictures more, large orders common ones.

The kernel is the cosine of two feature vectors. It is linear in the normalised rows X, so K = X X^T and X^T X have the
same eigenvalues and the smaller one is solved. The reference knows nothing of the score: `Vendi` divides by that of
the reference set, so that 1 is the diversity of real pictures, below 1 is less.

Shapes: N pictures, D features, S cuts into halves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics.interval import Halves
from imagekiln.metrics.statistics import Statistics, require_pair

NOTHING = 1e-12
"""Shares below this are what rounding makes of an eigenvalue 0."""


def vendi_score(statistics: Statistics, order: float = 1.0) -> float:
    """The score of one set under the cosine kernel, in [1, min(N, D + 1)], float64.

    Rows of zeros count as copies of one picture unlike all others. Raises UsageError for a negative order, DataError
    without pictures.

    >>> round(vendi_score(Statistics.of(torch.eye(4))), 9), round(vendi_score(Statistics.of(torch.ones(4, 4))), 9)
    (4.0, 1.0)
    """
    statistics.require(1, "a Vendi score")
    rows_ND, zeros = _normalised(statistics.features)
    if statistics.n <= statistics.dim:
        return _effective_number(torch.linalg.eigvalsh(rows_ND @ rows_ND.T), zeros, statistics.n, order)
    return _effective_number(torch.linalg.eigvalsh(rows_ND.T @ rows_ND), zeros, statistics.n, order)


def vendi_of_kernel(kernel_NN: Tensor, order: float = 1.0) -> float:
    """The score of any kernel's matrix: symmetric, positive semi-definite, ones on the diagonal.

    Raises DataError for a matrix that is not.

    >>> kernel = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> round(vendi_of_kernel(kernel), 4)
    2.1573
    """
    square = kernel_NN.ndim == 2 and kernel_NN.shape[0] == kernel_NN.shape[1] > 0
    kernel = kernel_NN.double()
    if not square or not torch.allclose(kernel, kernel.T) or not torch.allclose(kernel.diag(), torch.ones(()).double()):
        raise DataError(
            f"A Vendi score got a kernel of shape {tuple(kernel_NN.shape)}; it needs a symmetric (pictures, pictures) "
            "matrix of finite numbers with ones on the diagonal."
        )
    return _effective_number(torch.linalg.eigvalsh(kernel), 0, len(kernel), order)


class Vendi:
    """Vendi score of the generated over that of the reference, in (0, inf); 1 for equal sets, higher is more diverse.

    The score grows with N until every kind of picture has been seen: compare at equal N.

    order: q, see the top of the file. Raises UsageError for a negative one.
    """

    name: str = "vendi"
    lower_is_better: bool = False
    ideal: float = 1.0
    bounds: tuple[float, float] = (0.0, float("inf"))
    quadratic: bool = True  # an entropy is flat where eigenvalues are equal; see `interval`
    min_n: int = 1

    def __init__(self, order: float = 1.0) -> None:
        _require_order(order)
        self.order = order

    def __call__(self, generated: Statistics, reference: Statistics) -> float:
        """The ratio, computed in float64."""
        require_pair(generated, reference, self.min_n, "a Vendi score")
        return vendi_score(generated, self.order) / vendi_score(reference, self.order)

    def on_halves(self, generated: Statistics, reference: Statistics, halves: Halves) -> list[tuple[float, float]]:
        """The ratio of the first and second half of every cut; float32 where a half has more rows than features."""
        require_pair(generated, reference, 2 * self.min_n, "a Vendi score of halves")
        scores = [
            _of_halves(side, halves.of(side.n, name), self.order)
            for side, name in ((generated, "generated"), (reference, "reference"))
        ]
        return [(g[0] / r[0], g[1] / r[1]) for g, r in zip(*scores, strict=True)]


def _of_halves(statistics: Statistics, first_SN: Tensor, order: float) -> list[tuple[float, float]]:
    """The score of both halves of every cut: the second's sums are those of the whole less the first's."""
    if statistics.n <= 2 * statistics.dim:
        return [
            (vendi_score(statistics.subset(first_N), order), vendi_score(statistics.subset(~first_N), order))
            for first_N in first_SN
        ]
    rows_ND = _normalised(statistics.features)[0].float()
    whole_DD, zero_N = rows_ND.T @ rows_ND, (rows_ND == 0.0).all(1)
    scores = []
    for first_N in first_SN:
        first_DD = rows_ND[first_N].T @ rows_ND[first_N]
        first, second = (
            _effective_number(
                torch.linalg.eigvalsh(gram_DD).double(), int(zero_N[half_N].sum()), int(half_N.sum()), order
            )
            for gram_DD, half_N in ((first_DD, first_N), (whole_DD - first_DD, ~first_N))
        )
        scores.append((first, second))
    return scores


def _normalised(features_ND: Tensor) -> tuple[Tensor, int]:
    """Rows of length 1, float64, and how many rows are zero (they stay zero)."""
    rows_ND = features_ND.double()
    norm_N = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    return rows_ND / norm_N.where(norm_N > 0.0, 1.0), int((norm_N == 0.0).sum())


def _effective_number(values: Tensor, zeros: int, n: int, order: float) -> float:
    """exp of the Renyi entropy of the eigenvalues; the zero rows are one more of size zeros."""
    _require_order(order)
    share = torch.cat([values.clamp(min=0.0), values.new_tensor([float(zeros)])]) / n
    share = share[share > NOTHING]
    if order == 1.0:
        return max(1.0, math.exp(float(torch.special.entr(share).sum())))
    if math.isinf(order):
        return 1.0 / float(share.max())
    return float(share.pow(order).sum()) ** (1.0 / (1.0 - order))


def _require_order(order: float) -> None:
    if not order >= 0.0:
        raise UsageError(f"A Vendi score got order={order}; it needs a number of at least 0.")
