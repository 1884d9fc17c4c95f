"""Two-sample tests: exact at any size, blind to order, and awake to what differs."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import Statistics
from imagekiln.metrics.two_sample import category_test, holm, mean_tests, novelty, two_sample


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def p_of(new: torch.Tensor, reference: torch.Tensor, permutations: int = 99, seed: int = 0, **options: object) -> float:
    return two_sample(Statistics.of(new), Statistics.of(reference), permutations, seed=seed, **options).p_value


def slow_mmd2(x: torch.Tensor, y: torch.Tensor, gamma: float) -> float:
    """Gretton et al. 2012, eq. 3, one pair at a time."""

    def mean(a: torch.Tensor, b: torch.Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum(math.exp(-gamma * float((a[i] - b[j]).square().sum())) for i, j in pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


@pytest.mark.parametrize("seed", range(6))
def test_tiny_sets_are_enumerated_exactly(seed: int) -> None:
    """All deals by hand, in float64, with loops instead of matrices."""
    rows = normal(7, 2, seed).double()
    rows[:3] += 0.7
    found = two_sample(Statistics.of(rows[:3]), Statistics.of(rows[3:]), permutations=1000, bandwidths=(1.0,))
    pooled = rows.float().double()
    scaled = (pooled - pooled.mean(0)) / pooled.std(0, correction=0)
    distance2 = sorted(float((scaled[i] - scaled[j]).square().sum()) for i, j in combinations(range(7), 2))
    gamma = 0.5 / distance2[10]  # the 11th of 21
    values = []
    for chosen in combinations(range(7), 3):
        others = [i for i in range(7) if i not in chosen]
        values.append(slow_mmd2(scaled[list(chosen)], scaled[others], gamma))
    observed = values[0]  # 0, 1, 2
    expected = sum(value >= observed - 1e-12 for value in values) / len(values)
    assert found.enumerated and found.num_deals == math.comb(7, 3) == len(values)
    assert found.p_value == pytest.approx(expected)
    root = math.sqrt(sum(value**2 for value in values) / len(values))
    assert found.statistic == pytest.approx(observed / root, rel=1e-6)
    assert sum(values) == pytest.approx(0.0, abs=1e-12), "its mean over all deals is 0"


def test_sampled_deals_agree_with_all_of_them() -> None:
    new, reference = normal(6, 2, 0, shift=0.6), normal(6, 2, 1)
    exact = p_of(new, reference, permutations=1000)
    sampled = [p_of(new, reference, permutations=400, seed=seed) for seed in range(5)]
    band = 4 * math.sqrt(exact * (1 - exact) / 2000)
    assert abs(sum(sampled) / 5 - exact) < band + 1 / 400


def test_the_order_of_pictures_does_not_matter() -> None:
    new, reference = normal(40, 5, 0, shift=0.2), normal(60, 5, 1)
    first = p_of(new, reference, seed=3)
    again = p_of(new.flip(0), reference[torch.randperm(60, generator=torch.Generator().manual_seed(9))], seed=3)
    assert first == again
    assert p_of(new, reference, seed=4) != first or p_of(new, reference, seed=5) != first, "the seed chooses the deals"


def test_units_do_not_matter() -> None:
    new, reference = normal(30, 3, 0, shift=0.4), normal(30, 3, 1)
    unit = torch.tensor([1.0, 64.0, 0.25])
    one, other = (two_sample(Statistics.of(new * by), Statistics.of(reference * by)).statistic for by in (1.0, unit))
    # The deals differ, as the bytes of the rows do; the statistic of the observed deal is nearly the same.
    assert one == pytest.approx(other, rel=0.2)


@pytest.mark.parametrize("sizes", [(30, 30), (20, 60)])
def test_p_is_uniform_without_a_difference(sizes: tuple[int, int]) -> None:
    """200 draws: at each level the number of false alarms lies in a band of 1 in 10,000."""
    draws = [p_of(normal(sizes[0], 3, 2 * i), normal(sizes[1], 3, 2 * i + 1), 39, seed=i) for i in range(200)]
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        alarms = sum(p <= level + 1e-12 for p in draws)
        assert abs(alarms - 200 * level) <= 4 * math.sqrt(200 * level * (1 - level)), level
    assert min(draws) >= 1 / 40


@pytest.mark.parametrize("kind", ["mean", "scale", "shape"])
def test_every_kind_of_difference_is_seen(kind: str) -> None:
    reference = normal(200, 2, 0)
    new = {
        "mean": normal(200, 2, 1, shift=0.6),
        "scale": 1.8 * normal(200, 2, 1),
        "shape": normal(200, 2, 1).sign() + 0.1 * normal(200, 2, 2),  # same mean and covariance
    }[kind]
    assert p_of(new, reference, 199) == pytest.approx(1 / 200)


def test_equal_rows_and_constant_features() -> None:
    same = torch.ones(10, 2)
    assert p_of(same, same) == 1.0
    assert p_of(torch.zeros(10, 2), same) < 0.02, "two constants differ"
    rows = normal(300, 2, 0)
    assert p_of(rows, rows.clone()) > 0.9, "equal sets are as near as can be"


def test_bad_input_is_said() -> None:
    rows = Statistics.of(normal(5, 2, 0))
    with pytest.raises(UsageError, match="permutations=0"):
        two_sample(rows, rows, 0)
    with pytest.raises(UsageError, match="bandwidths"):
        two_sample(rows, rows, bandwidths=(-1.0,))
    with pytest.raises(DataError, match="at least 2"):
        two_sample(Statistics.of(normal(1, 2, 0)), rows)
    with pytest.raises(DataError, match="features"):
        two_sample(Statistics.of(normal(5, 3, 0)), rows)
    with pytest.raises(UsageError, match="both sides"):
        category_test([0, 0], [3, 4])
    with pytest.raises(UsageError, match="k=0"):
        novelty(rows, rows, 0)


def test_category_test_is_exact_where_it_can_be_counted() -> None:
    """2 x 2 tables: the two-sided G test by the hypergeometric law."""
    new, reference = [7, 3], [2, 8]
    total, first, drawn = 20, 9, 10

    def g(a: int) -> float:
        observed = [[a, drawn - a], [first - a, total - drawn - (first - a)]]
        sides = [drawn, total - drawn]
        expected = [[side * first / total, side * (total - first) / total] for side in sides]
        cells = [(o, e) for row, other in zip(observed, expected, strict=True) for o, e in zip(row, other, strict=True)]
        return 2 * sum(o * math.log(o / e) for o, e in cells if o)

    law = {a: math.comb(first, a) * math.comb(total - first, drawn - a) / math.comb(total, drawn) for a in range(10)}
    exact = sum(p for a, p in law.items() if g(a) >= g(7) - 1e-9)
    found = category_test(new, reference, permutations=20_000).p_value
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000))


def test_means_are_tested_one_by_one() -> None:
    new, reference = normal(60, 3, 0), normal(80, 3, 1)
    new[:, 1] += 1.0
    p_values = [test.p_value for test in mean_tests(new, reference, 199)]
    assert p_values[1] == pytest.approx(1 / 200) and min(p_values[0], p_values[2]) > 0.01


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_holm_by_its_definition(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected: set[int] = set()
        for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if (len(p_values) - rank) * p_values[index] > level:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


def test_a_stranger_is_novel_and_the_familiar_are_not() -> None:
    reference, new = normal(400, 4, 0), normal(100, 4, 1)
    new[17] += 30.0
    found = novelty(Statistics.of(new), Statistics.of(reference))
    assert int(found.ratio_X.argmax()) == 17 and float(found.p_value_X[17]) == pytest.approx(1 / 401)
    rest = torch.arange(100) != 17
    assert 0.8 < float(found.ratio_X[rest].median()) < 1.25
    assert abs(int((found.p_value_X[rest] <= 0.2).sum()) - 20) <= 4 * math.sqrt(16) + 4
