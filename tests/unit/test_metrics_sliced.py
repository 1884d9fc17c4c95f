"""Sliced distance: closed forms of Gaussians, known biases, the coupling of unequal sets, halves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from imagekiln.core import mix
from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import Statistics
from imagekiln.metrics.interval import Halves
from imagekiln.metrics.sliced import Coupling, SlicedDistance, ascending, unit_directions


def normal(n, d, seed, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


def score(x, y, **settings):
    return SlicedDistance(**settings)(Statistics.of(x), Statistics.of(y))


@pytest.mark.parametrize("d", [1, 24])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1.0), (1.7, 0.0), (0.5, -0.8)])
def test_gaussians_of_any_dimension(d, scale, shift):
    """3 (|dmu|^2 + d (s1 - s2)^2). The spread over directions is that of a chi-square: 2 / 1000 for d > 1."""
    rows = normal(1500, d, 0)
    want = 3 * d * (shift**2 + (scale - 1) ** 2)
    assert score(rows * scale + shift, rows) == pytest.approx(want, rel=5 * 0.045 + 0.02)


def test_shift_alone_is_exact_for_the_directions_used():
    rows, shift = normal(50, 4, 0), normal(1, 4, 1)
    directions = unit_directions(1000, 4, mix(0, "directions"))
    want = 3 * 4 * float((directions.double() @ shift[0].double()).square().mean())
    assert score(rows + shift, rows) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("n", "published"), [(200, 5.69), (1000, 1.20), (5000, 0.252)])
def test_published_bias_for_one_distribution_of_64_features(n, published):
    assert score(normal(n, 64, 0), normal(n, 64, 1), directions=300) == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(("g", "r"), [(1, 1), (3, 7), (12, 18), (50, 49)])
def test_coupling_is_optimal_transport(g, r):
    """Against scipy's W1, by the same plan; and W2^2 against a set repeated to the common multiple."""
    x, y = normal(1, g, 0)[0].sort().values.double(), normal(1, r, 1, 2.0, 0.5)[0].sort().values.double()
    plan = Coupling.of(g, r)
    assert float(plan.mass_Q.sum()) == pytest.approx(1.0)
    w1 = float(((x[plan.left_Q] - y[plan.right_Q]).abs() * plan.mass_Q).sum())
    assert w1 == pytest.approx(wasserstein_distance(x.numpy(), y.numpy()), rel=1e-10)
    repeated = (x.repeat_interleave(r) - y.repeat_interleave(g)).square().mean()
    assert plan.squared(x[None], y[None]) == pytest.approx(float(repeated), rel=1e-10)


def test_ascending_leaves_its_input_alone():
    rows = normal(3, 40, 0)
    kept = rows.clone()
    assert np.array_equal(ascending(rows).numpy(), np.sort(kept.numpy(), axis=1)) and torch.equal(rows, kept)


def test_truths():
    x, y = normal(60, 5, 0, 1.3), normal(45, 5, 1)
    assert score(x, x.flip(0)) == pytest.approx(0.0, abs=1e-10)
    assert score(x, y) == pytest.approx(score(y, x), rel=1e-5)
    assert score(x.flip(0), y.roll(3, 0)) == pytest.approx(score(x, y), rel=1e-6)
    assert score(x + 300.0, y + 300.0) == pytest.approx(score(x, y), rel=1e-3)
    assert score(2 * x, 2 * y) == pytest.approx(4 * score(x, y), rel=1e-5)
    assert score(x, y, seed=1) != score(x, y)


def test_sees_a_shape_that_mean_and_covariance_do_not():
    signs, gauss = normal(1000, 1, 0).sign(), normal(1000, 1, 1)
    settings = {"directions": 100}
    assert score(signs, gauss, **settings) > 10 * score(normal(1000, 1, 2), gauss, **settings)


@pytest.mark.parametrize(("g", "r"), [(40, 40), (31, 27)])
def test_halves_equal_direct_subsets(g, r):
    x, y = Statistics.of(normal(g, 3, 0, 1.4)), Statistics.of(normal(r, 3, 1))
    halves, metric = Halves(4, 2), SlicedDistance(directions=50)
    direct = [
        (metric(x.subset(a), y.subset(b)), metric(x.subset(~a), y.subset(~b)))
        for a, b in zip(halves.of(g, "generated"), halves.of(r, "reference"), strict=True)
    ]
    assert sum(metric.on_halves(x, y, halves), ()) == pytest.approx(sum(direct, ()), rel=1e-5)


def test_refusals():
    with pytest.raises(UsageError, match="directions=0"):
        SlicedDistance(directions=0)
    with pytest.raises(DataError, match="needs at least 2"):
        score(normal(1, 2, 0), normal(5, 2, 1))
    with pytest.raises(DataError, match="NaN"):
        score(normal(5, 2, 0) * float("nan"), normal(5, 2, 1))
