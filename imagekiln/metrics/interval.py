"""Honest 95 % intervals of metrics over two sets: the delete-a-group jackknife.

The plain bootstrap draws pictures twice; a duplicate is its own neighbour at distance zero and shrinks a covariance,
so it shifts Frechet distances up and breaks nearest-neighbour metrics. The jackknife never repeats a picture: both sets
are dealt into P parts, part p is left out of both, and

se^2 = (P - 1) / P  sum_p (theta_p - mean theta)^2,    interval = theta +- t_{P-1} se   (Efron & Stein 1981, Kott 2001)

with t Student's 97.5 % quantile. The interval is for the expected value *at this N*, bias of the metric included: it
says how far a second evaluation with fresh pictures may land, not where N = infinity lies. The jackknife variance is
biased upwards, if at all (Efron & Stein), most where two sets have the same distribution: there the interval is wide.

Shapes: G and R pictures, P parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.core import Metric, mix
from imagekiln.metrics.statistics import Statistics, require_pair

PARTS = 20
NORMAL_975 = 1.959964


class Interval(NamedTuple):
    """A value with its 95 % interval and standard error."""

    value: float
    low: float
    high: float
    standard_error: float


def interval(
    metric: Metric, generated: Statistics, reference: Statistics, parts: int = PARTS, seed: int = 0
) -> Interval:
    """The metric with its interval, clipped to the metric's `bounds`.

    A metric with a method `without_parts` computes all P values in one pass; any other is called P times.
    seed: deals the pictures into parts. Raises DataError with fewer than `parts` pictures on a side.
    """
    require_pair(generated, reference, parts, "a 95 % interval")
    value = metric(generated, reference)
    deal = _dealt(generated.n, parts, seed, "generated"), _dealt(reference.n, parts, seed, "reference")
    if hasattr(metric, "without_parts"):
        values = metric.without_parts(generated, reference, deal)
    else:
        values = [metric(generated.subset(deal[0] != p), reference.subset(deal[1] != p)) for p in range(parts)]
    spread_P = torch.tensor(values, dtype=torch.float64)
    error = math.sqrt((parts - 1) / parts * float((spread_P - spread_P.mean()).square().sum()))
    reach = student_975(parts - 1) * error
    low, high = getattr(metric, "bounds", (-math.inf, math.inf))
    return Interval(value, max(low, value - reach), min(high, value + reach), error)


def student_975(freedom: int) -> float:
    """97.5 % quantile of Student's t, by the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5).

    >>> round(student_975(19), 3), round(student_975(9), 3)
    (2.093, 2.262)
    """
    z = NORMAL_975
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _dealt(n: int, parts: int, seed: int, side: str) -> Tensor:
    """part_N int64: every part gets n / parts pictures, give or take one."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, "jackknife", side)))
    return order % parts
