"""Inception score: whether a classifier is sure of every picture and sees all classes.

IS = exp( mean_i KL( p(y | x_i) || p(y) ) ),   p(y) = mean_i p(y | x_i)      (Salimans et al. 2016, section 4)

From 1, when every picture gets the same answer, to K, when answers are certain and classes equally frequent. The
published number is the mean over 10 splits of 5,000 pictures by ImageNet's Inception network; with any other classifier
write its name beside it. It does not look at real pictures at all: copies, and one perfect picture a class, score K.
Smaller splits score lower, so the number and size of the splits belong to the number.

Shapes: N pictures, K classes, S splits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import DataError, UsageError

SPLITS = 10
KINDS = ("logits", "probabilities")


class InceptionScore(NamedTuple):
    """Mean and standard deviation (N in the denominator, as published) over `splits` splits of about `split_size`."""

    mean: float
    std: float
    splits: int
    split_size: int
    values: tuple[float, ...]


def inception_score(scores_NK: Tensor, kind: str = "logits", splits: int = SPLITS, seed: int = 0) -> InceptionScore:
    """The score from a classifier's outputs, float64.

    kind: "logits" (any float dtype) or "probabilities" (rows sum to 1). seed: deals the pictures into splits.

    Raises UsageError for another kind or an impossible number of splits, DataError for a wrong shape, NaN, infinity,
    or rows that are no probabilities.

    >>> sure, unsure = 60.0 * torch.eye(4).repeat(10, 1), torch.zeros(40, 4)
    >>> round(inception_score(sure, splits=1).mean, 6), inception_score(unsure).mean
    (4.0, 1.0)
    """
    if kind not in KINDS:
        raise UsageError(f"An Inception score got kind={kind!r}; it needs one of {', '.join(KINDS)}.")
    if scores_NK.ndim != 2 or not scores_NK.shape[0] or not scores_NK.shape[1]:
        raise DataError(
            f"An Inception score got outputs of shape {tuple(scores_NK.shape)}; it needs (pictures, classes)."
        )
    if not 1 <= splits <= len(scores_NK):
        raise UsageError(
            f"An Inception score got splits={splits} for {len(scores_NK)} pictures; it needs from 1 to their number."
        )
    scores = scores_NK.detach().cpu().double()
    if not torch.isfinite(scores).all():
        raise DataError("An Inception score got NaN or infinite outputs; look at the pictures and the classifier.")
    if kind == "logits":
        log_NK = scores.log_softmax(1)
    else:
        sums_N = scores.sum(1)
        if bool((scores < 0.0).any()) or bool(((sums_N - 1.0).abs() > 1e-3).any()):
            raise DataError(
                f"An Inception score got rows that sum to {float(sums_N.min()):g} ... {float(sums_N.max()):g}; "
                "probabilities are not negative and sum to 1: give logits with kind='logits'."
            )
        log_NK = (scores / sums_N[:, None]).log()
    order_N = torch.randperm(len(log_NK), generator=torch.Generator().manual_seed(mix(seed, "inception splits")))
    values_S = torch.stack([_one_split(log_NK[part]) for part in order_N.tensor_split(splits)])
    return InceptionScore(
        mean=float(values_S.mean()),
        std=float(values_S.std(correction=0)),
        splits=splits,
        split_size=len(log_NK) // splits,
        values=tuple(values_S.tolist()),
    )


def _one_split(log_NK: Tensor) -> Tensor:
    """H(mean p) - mean H(p), at least 0 whatever the rounding."""
    p_NK = log_NK.exp()
    gain = torch.special.entr(p_NK.mean(0)).sum() - torch.special.entr(p_NK).sum(1).mean()
    return gain.clamp(min=0.0).exp()
