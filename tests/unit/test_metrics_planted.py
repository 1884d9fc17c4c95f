"""Planted faults: a metric moves by what theory says when its own fault is planted, and stays when another one is."""

from __future__ import annotations

import pytest
import torch

from imagekiln.metrics import DEFAULT, Statistics, expected_coverage, interval, measure
from imagekiln.metrics.manifold import manifold_scores

N, MODES, DIM = 600, 10, 16


def normal(n, seed, scale=1.0):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)) * scale


def modes(seed, present=MODES, n=N):
    """Well-separated normal clusters; `present` of the ten are drawn, equally often."""
    centres = normal(MODES, 99, 10.0)
    return normal(n, seed) + centres[torch.arange(n) % present]


def scores(generated):
    return manifold_scores(Statistics.of(generated), Statistics.of(modes(1)))


FAITHFUL = scores(modes(0))


@pytest.mark.parametrize("present", [2, 5, 8])
def test_mode_loss_costs_recall_and_coverage_only(present):
    """A share m of the modes is drawn: recall is m of what it was, coverage m of that with 1 / m as many pictures."""
    share, found = present / MODES, scores(modes(0, present))
    assert found.recall == pytest.approx(share * FAITHFUL.recall, abs=0.06)
    per_mode = N // MODES
    expected = share * expected_coverage(round(per_mode / share), per_mode)
    assert found.coverage == pytest.approx(expected, abs=0.02)
    assert found.precision == pytest.approx(FAITHFUL.precision, abs=0.06)
    assert found.density == pytest.approx(FAITHFUL.density, abs=0.15)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_strange_pictures_cost_precision_and_density_only(share):
    """Far from everything, `share` of the generated: precision and density are 1 - share of what they were."""
    generated = modes(0)[torch.randperm(N, generator=torch.Generator().manual_seed(5))]
    generated[: int(N * share)] = 100.0 + 5.0 * normal(int(N * share), 7)
    found = scores(generated)
    assert found.precision == pytest.approx((1 - share) * FAITHFUL.precision, abs=0.05)
    assert found.density == pytest.approx((1 - share) * FAITHFUL.density, abs=0.1)
    assert found.coverage > expected_coverage(round(N * (1 - share)), N) - 0.06
    assert found.recall > FAITHFUL.recall - 0.35 * share - 0.1


def test_narrow_pictures_keep_precision_and_lose_recall():
    """Pictures pulled to their cluster's centre, as truncation does."""
    centres = normal(MODES, 99, 10.0)[torch.arange(N) % MODES]
    found = scores(centres + 0.4 * (modes(0) - centres))
    assert found.precision > FAITHFUL.precision + 0.05 and found.density > 1.5 * FAITHFUL.density
    assert found.recall < FAITHFUL.recall - 0.4


def test_every_default_metric_tells_mode_loss_or_keeps_quiet_inside_its_interval():
    """Two faithful sets lie within each other's noise; half of the modes lie outside it where diversity is measured."""
    reference = Statistics.of(modes(1, n=200))
    whole, again, half = (Statistics.of(rows) for rows in (modes(0, n=200), modes(2, n=200), modes(3, 5, n=200)))
    for metric in DEFAULT:
        first, second, lost = (interval(metric, side, reference, splits=30) for side in (whole, again, half))
        noise = 4 * (first.standard_error**2 + second.standard_error**2) ** 0.5
        assert abs(first.value - second.value) < noise, metric.name
        if metric.name in ("frechet", "kernel", "recall", "coverage"):
            apart = lost.low > first.high if metric.lower_is_better else lost.high < first.low
            assert apart, metric.name


def test_floor_and_value_agree_for_a_perfect_generator():
    found = measure(*(Statistics.of(modes(seed, n=200)) for seed in (0, 1, 2)))
    assert all(abs(m.value - m.floor) <= 2 * (m.high - m.low) for m in found)
