"""Memorization: nearest pictures and planted copies."""

from __future__ import annotations

import math

import pytest
import torch

from imagekiln.errors import DataError
from imagekiln.metrics import Precision, Statistics, copy_ratios, nearest
from imagekiln.metrics.memorization import (
    _mann_whitney,
    authenticity,
    copies_per_thousand,
    copy_test,
    memorization,
    search,
)


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


def test_one_held_out_copy_leaves_intervals_whole():
    """Resamples that hold it twice have a held-out distance of 0, so the interval has no upper end."""
    held_out = normal(200, 1)
    held_out[0] = TRAIN[0]
    copies = torch.cat([TRAIN[:20], normal(180, 2)])
    for generated, low in ((normal(200, 2), 0.5), (copies, 0.0)):
        lowest, *others = copy_ratios(Statistics.of(generated), Statistics.of(TRAIN), Statistics.of(held_out))
        assert low <= lowest.low <= lowest.ratio and lowest.high == math.inf
        assert all(r.low <= r.ratio <= r.high < math.inf for r in others)


def test_seeded():
    a, b = (copy_ratios(HELD_OUT, Statistics.of(TRAIN), HELD_OUT, resamples=50, seed=s) for s in (0, 0))
    assert a == b


def all_tests(generated, seed=0, train=TRAIN):
    held_out = Statistics.of(normal(500, 900 + seed))
    return memorization(Statistics.of(generated), Statistics.of(train), held_out, resamples=2)


def test_one_search_serves_all_tests():
    generated, train = Statistics.of(normal(300, 2)), Statistics.of(TRAIN)
    found, together = search(generated, train, HELD_OUT), memorization(generated, train, HELD_OUT, seed=3)
    assert together.ratios == copy_ratios(generated, train, HELD_OUT, seed=3)
    assert together.authenticity == authenticity(found, train)
    assert together.copy_test == copy_test(generated, train, HELD_OUT, seed=3)
    assert together.copies_per_thousand == copies_per_thousand(found)


def test_authenticity_agrees_with_loops():
    generated, train = normal(25, 5, 3).double(), normal(30, 6, 3).double()
    authentic = 0
    for row in generated:
        distance_N = (train - row).norm(dim=1)
        i = int(distance_N.argmin())
        own = min(float((train[i] - train[j]).norm()) for j in range(30) if j != i)
        authentic += float(distance_N[i]) > own
    sides = [Statistics.of(rows.float()) for rows in (generated, train)]
    found = authenticity(search(*sides, Statistics.of(normal(40, 7, 3))), sides[1])
    assert found.generated.value == authentic / 25 and 0 < authentic < 25


def test_rank_sum_agrees_with_counting_pairs_and_its_null_variance():
    x, y = (torch.arange(23) * 7 % 10).double(), (torch.arange(17) * 5 % 9).double() + 1
    u = sum(float((a > b) + 0.5 * (a == b)) for a in x for b in y)
    pool, null = torch.cat([x, y]), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):  # the permutation variance of U, ties and all
        rows = pool[torch.randperm(40, generator=generator)]
        difference = rows[:23, None] - rows[None, 23:]
        null.append(float((difference > 0).sum() + 0.5 * (difference == 0).sum()))
    z = (u - 23 * 17 / 2) / float(torch.tensor(null).double().std())
    assert _mann_whitney(x, y) == pytest.approx(z, rel=0.05, abs=0.02)
    assert _mann_whitney(torch.ones(5), torch.ones(6)) == 0.0


def test_copies_fresh_pictures_and_strangers():
    """500 normal pictures in 16 dimensions: AuthPct 0, 0.71 for fresh ones, C_T -27.4, about 0, +22.6."""
    near = [all_tests(TRAIN + normal(500, seed, scale=0.01), seed) for seed in range(4)]
    assert all(m.copy_test.overall < -27 and m.authenticity.generated.value == 0.0 for m in near)
    assert all(m.copies_per_thousand.value > 985 and m.copies_per_thousand.low > 900 for m in near)
    fresh = [all_tests(normal(500, 300 + seed), seed, normal(500, 600 + seed)) for seed in range(8)]
    scores = torch.tensor([m.copy_test.overall for m in fresh])
    assert abs(float(scores.mean())) < 3 / 8**0.5 * 1.3 and float(scores.abs().max()) < 4
    shares = torch.tensor([[s.value for s in m.authenticity] for m in fresh])
    assert shares.mean(0).tolist() == pytest.approx([0.69, 0.69], abs=0.04), "the baseline is not 1"
    assert abs(sum(m.copies_per_thousand.value for m in fresh) / 8) < 10
    wide = all_tests(normal(500, 20, scale=1.5))
    assert 20 < wide.copy_test.overall < 26 and wide.authenticity.generated.low > wide.authenticity.held_out.high


def test_planted_copies_move_what_theory_says_while_precision_stays():
    """A share c of copies: AuthPct falls to (1 - c) of fresh, copies per thousand rise by 1000 c (1 - chance)."""
    fresh = normal(500, 40)
    planted = fresh.clone()
    planted[:100] = TRAIN[:100]  # c = 0.2
    before, after = all_tests(fresh), all_tests(planted)
    expected = 0.8 * before.authenticity.generated.value
    assert after.authenticity.generated.value == pytest.approx(expected, abs=3 * (0.21 * 100) ** 0.5 / 500)
    gained = after.copies_per_thousand.value - before.copies_per_thousand.value
    assert gained == pytest.approx(200, abs=12) and after.copies_per_thousand.low > 100
    assert after.copy_test.overall < before.copy_test.overall - 3
    real = Statistics.of(normal(500, 41))
    precise = [Precision()(Statistics.of(rows), real) for rows in (fresh, planted)]
    assert precise[0] == pytest.approx(precise[1], abs=0.04)


def test_copying_in_one_region_shows_in_its_cell():
    """Copies in one cluster, strangers in the others: the mean over all pictures would cancel less than a rank does."""
    centres = 40.0 * torch.eye(3, 16).repeat_interleave(200, 0)
    train, held_out = (normal(600, seed) + centres for seed in (50, 51))
    generated = torch.cat([train[:200] + normal(200, 52, scale=0.01), normal(400, 53, scale=1.6) + centres[200:]])
    found = copy_test(*map(Statistics.of, (generated, train, held_out)))
    assert found.cells == 3
    own = [
        copy_test(*(Statistics.of(rows[part]) for rows in (generated, train, held_out)), cells=1).overall
        for part in (slice(0, 200), slice(200, 400), slice(400, 600))
    ]
    assert own[0] < -15 and min(own[1:]) > 10
    assert found.by_cell == pytest.approx(sum(own) / 3, rel=1e-6)


def test_copies_interval_holds_zero_for_fresh_pictures():
    held = 0
    for seed in range(60):
        sides = normal(200, 5000 + seed), normal(300, 6000 + seed)
        found = copies_per_thousand(
            search(Statistics.of(sides[0]), Statistics.of(TRAIN), Statistics.of(sides[1])), 0.05
        )
        held += found.low <= 0.0 <= found.high
    assert held >= 53  # P = 0.01 at 95 %


def test_one_repeated_picture_and_too_few():
    same = Statistics.of(TRAIN[:1].repeat(50, 1))
    found = memorization(same, Statistics.of(TRAIN), HELD_OUT, resamples=20)
    assert found.ratios[-1].ratio == 0.0 and found.authenticity.generated.value == 0.0
    assert found.copies_per_thousand.value > 950 and found.copy_test.overall < -5
    with pytest.raises(DataError, match="remove duplicates"):
        memorization(HELD_OUT, same, Statistics.of(TRAIN[:1].repeat(9, 1)))
    with pytest.raises(DataError, match="There are 1 pictures"):
        memorization(HELD_OUT, Statistics.of(TRAIN[:1]), HELD_OUT)
    three = memorization(*(Statistics.of(normal(3, seed)) for seed in (1, 2, 3)), resamples=20)
    assert math.isfinite(three.copy_test.overall) and three.copy_test.cells == 0


def test_refusals():
    train = Statistics.of(TRAIN)
    with pytest.raises(DataError, match="remove duplicates"):
        copy_ratios(HELD_OUT, train, train)
    with pytest.raises(DataError, match="needs at least 3"):
        nearest(train, Statistics.of(TRAIN[:2]), k=3)
    with pytest.raises(DataError, match="same network"):
        nearest(train, Statistics.of(TRAIN[:, :3]))
