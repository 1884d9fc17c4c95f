"""Memorization: nearest pictures and planted copies."""

from __future__ import annotations

import pytest
import torch

from imagekiln.errors import DataError
from imagekiln.metrics import Statistics, copy_ratios, nearest


def normal(n, seed, d=16, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale


TRAIN = normal(500, 0)
HELD_OUT = Statistics.of(normal(300, 1))


def ratios(generated):
    return {r.quantile: r for r in copy_ratios(Statistics.of(generated), Statistics.of(TRAIN), HELD_OUT, resamples=300)}


def test_nearest_agrees_with_loops():
    query, bank = normal(15, 3, 4), normal(40, 4, 4)
    found = nearest(Statistics.of(query), Statistics.of(bank), k=3)
    for i, row in enumerate(query.double()):
        order = sorted(range(40), key=lambda j: float((row - bank[j].double()).square().sum()))[:3]
        assert found.indices[i].tolist() == order
        assert found.distances[i].tolist() == pytest.approx([float((row - bank[j].double()).norm()) for j in order])


def test_copies_are_found_at_distance_zero_despite_a_large_offset():
    bank = normal(200, 0) + 1000.0
    found = nearest(Statistics.of(bank.flip(0)), Statistics.of(bank))
    assert found.distances.max() == 0.0
    assert found.indices[:, 0].tolist() == list(range(199, -1, -1))


def test_close_rows_far_from_the_mean_are_ordered_exactly():
    """64 rows 1e-3 apart, 1000 away from the centre: below what float32 products resolve."""
    line = torch.arange(64.0)[:, None] * 2.0**-10 + 1024.0
    bank = torch.cat([line, -line])
    found = nearest(Statistics.of(line + 2.0**-13), Statistics.of(bank), k=2)
    assert found.indices[:-1].tolist() == [[i, i + 1] for i in range(63)]


def test_fresh_pictures_have_ratio_one_inside_the_interval():
    found = ratios(normal(300, 2))
    assert found[0.5].ratio == pytest.approx(1.0, abs=0.05)
    assert all(r.low <= 1.0 <= r.high and r.low < r.high for r in found.values())


def test_planted_near_copies():
    found = ratios(TRAIN[:300] + normal(300, 3, scale=0.01))
    assert all(r.high < 0.1 for r in found.values())


def test_a_few_exact_copies_show_in_the_low_quantile_only():
    generated = normal(300, 2)
    generated[:9] = TRAIN[:9]  # 3 %
    found = ratios(generated)
    assert found[0.01].ratio == 0.0
    assert found[0.5].low > 0.9


def test_too_wide_pictures_are_above_one():
    assert ratios(normal(300, 4, scale=1.5))[0.5].low > 1.2


def test_seeded():
    a, b = (copy_ratios(HELD_OUT, Statistics.of(TRAIN), HELD_OUT, resamples=50, seed=s) for s in (0, 0))
    assert a == b


def test_refusals():
    train = Statistics.of(TRAIN)
    with pytest.raises(DataError, match="remove duplicates"):
        copy_ratios(HELD_OUT, train, train)
    with pytest.raises(DataError, match="needs at least 3"):
        nearest(train, Statistics.of(TRAIN[:2]), k=3)
    with pytest.raises(DataError, match="same network"):
        nearest(train, Statistics.of(TRAIN[:, :3]))
