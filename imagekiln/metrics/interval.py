"""Honest 95 % intervals of metrics over two sets: repeated half-splits.

The plain bootstrap draws pictures twice; a duplicate is its own neighbour at distance zero and shrinks a covariance,
so it shifts Frechet distances up and breaks nearest-neighbour metrics. The jackknife repeats nothing, but counts every
interaction of pictures as often as it has members (Efron & Stein 1981), and nearest-neighbour metrics consist of
interactions: its intervals are up to twice too wide there. So both sets are cut into disjoint halves, S times. The two
values of a cut are independent, hence for any metric, whatever interacts in it, without bias

V = mean_s (a_s - b_s)^2 / 4        estimates Var(metric at N / 2) / 2,

which is Var(metric at N) where a variance falls like 1 / N. Three kinds of metric need more than value +- t_S sqrt(V):

Shares (bounds 0 and 1). Their variance vanishes at both ends, so the interval is Wilson's (1927) with the effective
number of pictures p (1 - p) / V.

Functions near their maximum (`quadratic = True`), an entropy for one: beside a part A ~ 1 / N of the variance there is
a part Q ~ 1 / N^2 of products of pictures, V = 2 Q + A, and d_s = (a_s + b_s) / 2 - value holds no A (Hoeffding 1948
for U-statistics): Q = var_s d_s and Var(metric at N) = Q + A = V - Q.

Squared distances (`squared = True`): theta = |delta|^2 in some space, seen through delta + noise. Here A ~ theta / N
depends on what is measured, and the mean of d_s is the bias of the value. With tau = value - bias, the interval holds
every tau_0 for which

(tau - tau_0)^2 <= t^2 (Q + A max(tau_0, 0) / tau),

that is, whose own variance allows what was seen, as in Wilson's. A variance taken at the value instead is small where
the value happens to be, and misses too often on one side.

The interval is for the expected value *at this N*, bias of the metric included: it says how far a second evaluation
with fresh pictures may land, not where N = infinity lies.

Shapes: N pictures, S cuts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.core import Metric, mix
from imagekiln.metrics.statistics import Statistics, require_pair

SPLITS = 60
FEWEST = 20
NORMAL_975 = 1.959964


class Interval(NamedTuple):
    """A value with its 95 % interval and standard error.

    The standard error of a squared distance is an upper estimate where the sets agree: its part A cannot be negative.
    """

    value: float
    low: float
    high: float
    standard_error: float


class Halves(NamedTuple):
    """How sets are cut: `splits` times, from `seed`."""

    splits: int
    seed: int

    def of(self, n: int, side: str) -> Tensor:
        """first_SN bool: the pictures of the first half of every cut; halves differ by one picture at most.

        >>> Halves(3, 0).of(10, "reference").sum(1).tolist()
        [5, 5, 5]
        """
        generator = torch.Generator().manual_seed(mix(self.seed, "halves", side))
        first_SN = torch.zeros(self.splits, n, dtype=torch.bool)
        for row_N in first_SN:
            row_N[torch.randperm(n, generator=generator)[: n // 2]] = True
        return first_SN


def interval(
    metric: Metric, generated: Statistics, reference: Statistics, splits: int = SPLITS, seed: int = 0
) -> Interval:
    """The metric with its interval, clipped to the metric's `bounds`.

    A metric with a method `on_halves` computes all cuts in one pass; any other is called twice a cut.
    seed: of the cuts. Raises DataError with fewer than 20 pictures on a side, or than the metric needs in a half.
    """
    require_pair(generated, reference, max(FEWEST, 2 * getattr(metric, "min_n", 1)), "a 95 % interval")
    value = metric(generated, reference)
    a_S, b_S = _on_halves(metric, generated, reference, Halves(splits, seed))
    variance = float((a_S - b_S).square().mean()) / 4
    bounds = getattr(metric, "bounds", (-math.inf, math.inf))
    reach = student_975(splits)
    if getattr(metric, "squared", False):
        low, high, variance = _squared_distance(value, variance, (a_S + b_S) / 2 - value, reach)
    elif bounds == (0.0, 1.0):
        low, high = _share(value, variance, min(generated.n, reference.n), reach)
    else:
        if getattr(metric, "quadratic", False):
            variance -= min(variance / 2, float(((a_S + b_S) / 2).var()))  # V = 2 Q + A, so Q is at most its half
        low, high = (value + sign * reach * math.sqrt(variance) for sign in (-1, 1))
    return Interval(value, max(bounds[0], low), min(bounds[1], high), math.sqrt(variance))


def _on_halves(metric: Metric, generated: Statistics, reference: Statistics, halves: Halves) -> tuple[Tensor, Tensor]:
    """The metric of the first and of the second half of every cut: a_S, b_S float64."""
    if hasattr(metric, "on_halves"):
        values = metric.on_halves(generated, reference, halves)
    else:
        first_SG, first_SR = halves.of(generated.n, "generated"), halves.of(reference.n, "reference")
        values = [
            tuple(metric(generated.subset(g), reference.subset(r)) for g, r in ((g_G, r_R), (~g_G, ~r_R)))
            for g_G, r_R in zip(first_SG, first_SR, strict=True)
        ]
    a_S, b_S = torch.tensor(values, dtype=torch.float64).T
    return a_S, b_S


def _share(share: float, variance: float, n: int, reach: float) -> tuple[float, float]:
    """Wilson's interval with the effective number of pictures; n itself where no cut differed."""
    spread = share * (1.0 - share)
    effective = spread / variance if variance > 0.0 and spread > 0.0 else float(n)
    ratio = reach * reach / effective
    centre = (share + ratio / 2) / (1.0 + ratio)
    half = math.sqrt(ratio * (spread + ratio / 4)) / (1.0 + ratio)
    return min(share, centre - half), max(share, centre + half)


def _squared_distance(value: float, variance: float, excess_S: Tensor, reach: float) -> tuple[float, float, float]:
    """(low, high, variance of the value) of a squared distance.

    variance: 2 Q + A as above. excess_S: mean of both halves less the value.
    """
    bias, floor = float(excess_S.mean()), float(excess_S.var())
    above = max(0.0, variance - 2.0 * floor)
    distance = value - bias
    slope = above / max(distance, math.sqrt(floor)) if above else 0.0  # within its noise of 0, tau tells no slope
    quadratic = reach * reach * slope / 2
    low = distance - reach * math.sqrt(floor)
    if low > 0.0:
        low = distance + quadratic - math.sqrt(quadratic**2 + reach * reach * (floor + slope * distance))
    high = distance + reach * math.sqrt(floor)
    if high > 0.0:
        root = quadratic**2 + reach * reach * (floor + slope * distance)
        high = max(0.0, distance + quadratic + math.sqrt(max(0.0, root)))
    return min(value, low + bias), max(value, high + bias), floor + slope * max(0.0, distance)


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
