"""Kernel distance: naive loops, unbiasedness, subsets, leave-out sums."""

from __future__ import annotations

import pytest
import torch

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import KernelDistance, Statistics
from imagekiln.metrics.interval import Halves


def normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def naive(x, y):
    """Double loops over Python floats."""
    d = x.shape[1]
    x, y = x.double().tolist(), y.double().tolist()

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / d + 1.0) ** 3

    def off_diagonal(rows):
        n = len(rows)
        return sum(k(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return off_diagonal(x) + off_diagonal(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize(("n_x", "n_y"), [(20, 20), (13, 25), (2, 3)])
def test_agrees_with_naive_loops(n_x, n_y):
    x, y = normal(n_x, 5, 0, 0.7), normal(n_y, 5, 1)
    assert KernelDistance()(Statistics.of(x), Statistics.of(y)) == pytest.approx(naive(x, y), rel=1e-10)


def test_unbiased_at_any_size():
    """Same distribution: the mean over many small draws is 0 within its own error, single values fall below 0."""
    metric = KernelDistance()
    values = torch.tensor([metric(*(Statistics.of(normal(12, 4, 2 * s + i)) for i in (0, 1))) for s in range(400)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 400**0.5
    assert 0.3 < float((values < 0).float().mean()) < 0.8


def test_expected_value_does_not_depend_on_n():
    metric = KernelDistance()
    means = {
        n: torch.tensor(
            [
                metric(Statistics.of(normal(n, 4, 2 * s, 0.5)), Statistics.of(normal(n, 4, 2 * s + 1)))
                for s in range(200)
            ]
        )
        for n in (10, 60)
    }
    error = sum(float(v.var()) / len(v) for v in means.values()) ** 0.5
    assert abs(float(means[10].mean() - means[60].mean())) < 3 * error


def test_subsets_estimate_the_complete_statistic_and_follow_the_seed():
    x, y = Statistics.of(normal(400, 6, 0, 0.3)), Statistics.of(normal(300, 6, 1))
    complete = KernelDistance()(x, y)
    some = [KernelDistance(subsets=60, subset_size=50, seed=seed)(x, y) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert some[0] != complete
    assert some[0] == pytest.approx(complete, rel=0.2)


def test_on_halves_equals_the_halves_on_their_own():
    x, y, halves, metric = (
        Statistics.of(normal(31, 3, 0, 0.4)),
        Statistics.of(normal(27, 3, 1)),
        Halves(5, 0),
        KernelDistance(),
    )
    cuts = zip(halves.of(31, "generated"), halves.of(27, "reference"), strict=True)
    direct = [(metric(x.subset(g), y.subset(r)), metric(x.subset(~g), y.subset(~r))) for g, r in cuts]
    assert torch.tensor(metric.on_halves(x, y, halves)) == pytest.approx(torch.tensor(direct), rel=1e-5, abs=1e-9)


def test_one_repeated_picture_has_a_closed_form():
    """k(x, x) + mean k(y, y') - 2 mean k(x, y), the first without any noise."""
    same, y = torch.full((6, 2), 0.5), normal(9, 2, 1)
    assert KernelDistance()(Statistics.of(same), Statistics.of(same)) == pytest.approx(0.0, abs=1e-12)
    assert KernelDistance()(Statistics.of(same), Statistics.of(y)) == pytest.approx(naive(same, y), rel=1e-10)


def test_order_does_not_show():
    x, y = normal(2500, 8, 0, 0.2), normal(2300, 8, 1)
    metric = KernelDistance()
    want = metric(Statistics.of(x), Statistics.of(y))
    assert metric(Statistics.of(x.flip(0)), Statistics.of(y.roll(100, 0))) == pytest.approx(want, rel=1e-6)


def test_refusals():
    with pytest.raises(DataError, match="needs at least 2"):
        KernelDistance()(Statistics.of(torch.zeros(1, 2)), Statistics.of(torch.zeros(5, 2)))
    with pytest.raises(UsageError, match="subset_size=1"):
        KernelDistance(subset_size=1)
