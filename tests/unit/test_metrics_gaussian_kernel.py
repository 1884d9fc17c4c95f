"""Gaussian kernel distance: naive loops, closed form, unbiasedness, bandwidths, halves."""

from __future__ import annotations

import math

import pytest
import torch

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import Statistics
from imagekiln.metrics.gaussian_kernel import GaussianKernelDistance, median_distance
from imagekiln.metrics.interval import Halves


def normal(n, d, seed, shift=0.0, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


def score(x, y, **settings):
    return GaussianKernelDistance(**settings)(Statistics.of(x), Statistics.of(y))


def naive(x, y, bandwidth, normalize):
    """Double loops over Python floats."""

    def rows(z):
        return [[v / (math.hypot(*row) if normalize else 1.0) for v in row] for row in z.double().tolist()]

    def k(a, b):
        return math.exp(-(math.dist(a, b) ** 2) / (2 * bandwidth**2))

    def off_diagonal(z):
        n = len(z)
        return sum(k(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    x, y = rows(x), rows(y)
    return 1000 * (off_diagonal(x) + off_diagonal(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y)))


@pytest.mark.parametrize(("n_x", "n_y"), [(20, 20), (13, 25), (2, 3)])
@pytest.mark.parametrize(("bandwidth", "normalize"), [(10.0, True), (0.7, True), (2.0, False)])
def test_agrees_with_naive_loops(n_x, n_y, bandwidth, normalize):
    x, y = normal(n_x, 5, 0, 0.7), normal(n_y, 5, 1)
    want = naive(x, y, bandwidth, normalize)
    assert score(x, y, bandwidth=bandwidth, normalize=normalize) == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_expected_value_of_two_gaussians():
    """E k(x, y) of N(a, I) and N(b, I) in d dimensions: (1 + 2 / s^2)^(-d / 2) exp(-|a - b|^2 / 2 (s^2 + 2))."""
    d, s, shift = 3, 1.5, 0.8
    level = (1 + 2 / s**2) ** (-d / 2)
    want = 2000 * level * (1 - math.exp(-d * shift**2 / (2 * (s**2 + 2))))
    settings = {"bandwidth": s, "normalize": False}
    values = torch.tensor(
        [score(normal(100, d, 2 * i, shift), normal(100, d, 2 * i + 1), **settings) for i in range(60)]
    )
    assert abs(float(values.mean()) - want) < 3.5 * float(values.std()) / 60**0.5


@pytest.mark.parametrize("settings", [{}, {"bandwidth": 1.0, "normalize": False}])
def test_unbiased_at_any_size(settings):
    """Same distribution: the mean over many small draws is 0 within its own error, single values fall below 0."""
    values = torch.tensor([score(normal(12, 4, 2 * s), normal(12, 4, 2 * s + 1), **settings) for s in range(120)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 120**0.5
    assert 0.3 < float((values < 0).float().mean()) < 0.8


def test_median_is_that_of_all_pairs_of_the_reference():
    y = normal(41, 6, 1)
    want = float(torch.pdist(y.double()).median())
    assert median_distance(y) == pytest.approx(want, rel=1e-5)
    x = normal(30, 6, 0, 0.5)
    found = score(x, y, bandwidth="median", normalize=False)
    assert found == pytest.approx(naive(x, y, want, False), rel=1e-4)
    assert median_distance(normal(2100, 2, 0)) == pytest.approx(median_distance(normal(2100, 2, 0).flip(0)), rel=1e-6)


def test_normalised_rows_know_no_length_and_order_does_not_show():
    x, y = normal(80, 6, 0, 0.4), normal(70, 6, 1)
    lengths = 1 + torch.arange(80.0)[:, None]
    assert score(x * lengths, y) == pytest.approx(score(x, y), rel=1e-5)
    assert score(x.flip(0), y.roll(9, 0)) == pytest.approx(score(x, y), rel=1e-6)


def test_sees_a_shape_that_mean_and_covariance_do_not():
    signs, gauss = normal(600, 1, 0).sign(), normal(600, 1, 1)
    settings = {"bandwidth": "median", "normalize": False}
    assert score(signs, gauss, **settings) > 10 * abs(score(normal(600, 1, 2), gauss, **settings))


@pytest.mark.parametrize("settings", [{}, {"bandwidth": 1.3, "normalize": False}])
def test_halves_equal_direct_subsets(settings):
    x, y = Statistics.of(normal(31, 3, 0, 0.4)), Statistics.of(normal(27, 3, 1))
    halves, metric = Halves(4, 1), GaussianKernelDistance(**settings)
    direct = [
        (metric(x.subset(g), y.subset(r)), metric(x.subset(~g), y.subset(~r)))
        for g, r in zip(halves.of(31, "generated"), halves.of(27, "reference"), strict=True)
    ]
    assert sum(metric.on_halves(x, y, halves), ()) == pytest.approx(sum(direct, ()), rel=1e-4, abs=1e-5)


def test_refusals():
    for bandwidth in (0.0, -1.0, "mean", math.nan):
        with pytest.raises(UsageError, match="positive number"):
            GaussianKernelDistance(bandwidth)
    with pytest.raises(DataError, match="needs at least 2"):
        score(normal(1, 2, 0), normal(5, 2, 1))
    with pytest.raises(DataError, match="are equal"):
        score(normal(5, 2, 0), torch.ones(5, 2), bandwidth="median")
    with pytest.raises(DataError, match="NaN"):
        score(normal(5, 2, 0) * math.nan, normal(5, 2, 1))
