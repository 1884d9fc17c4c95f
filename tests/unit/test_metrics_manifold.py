"""Precision, recall, density, coverage: naive loops, planted mode loss, closed forms, hostile numerics."""

from __future__ import annotations

import pytest
import torch

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import Coverage, Density, Precision, Recall, Statistics, expected_coverage, manifold_scores
from imagekiln.metrics import distances as distances_module
from imagekiln.metrics.distances import Bank
from imagekiln.metrics.interval import Halves
from imagekiln.metrics.manifold import manifold_on_halves


def normal(n, d, seed, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


def naive(fake, real, k):
    """From the definitions, with loops and exact differences in float64."""
    fake, real = fake.double(), real.double()

    def distance(a, b):
        return float((a - b).square().sum())

    def radii(rows):
        n = len(rows)
        return [sorted(distance(rows[i], rows[j]) for j in range(n) if j != i)[k - 1] for i in range(n)]

    real_radius, fake_radius = radii(real), radii(fake)
    table = [[distance(g, r) for r in real] for g in fake]
    in_real = [[d < real_radius[i] for i, d in enumerate(row)] for row in table]
    in_fake = [[table[j][i] < fake_radius[j] for j in range(len(fake))] for i in range(len(real))]
    return (
        sum(map(any, in_real)) / len(fake),
        sum(map(any, in_fake)) / len(real),
        sum(map(sum, in_real)) / (k * len(fake)),
        sum(map(any, zip(*in_real, strict=True))) / len(real),
    )


def both(fake, real, k):
    return tuple(manifold_scores(Statistics.of(fake), Statistics.of(real), k))


@pytest.mark.parametrize(
    ("n_fake", "n_real", "d", "k"), [(40, 30, 3, 5), (25, 45, 1, 3), (12, 12, 16, 1), (7, 6, 2, 5)]
)
def test_agrees_with_naive_loops(n_fake, n_real, d, k):
    fake, real = normal(n_fake, d, 0, 1.2, 0.3), normal(n_real, d, 1)
    assert both(fake, real, k) == pytest.approx(naive(fake, real, k), abs=1e-12)


def test_tight_cluster_far_from_the_mean_does_not_cancel():
    """Float32 products see distances of about 1e-2 here as rounding noise of 1e6; the answer is still exact."""
    tight = [normal(20, 4, seed, 0.01) for seed in (0, 1)]
    fake, real = (torch.cat([rows, 1000.0 + rows.flip(0)]) for rows in tight)
    assert both(fake, real, 3) == pytest.approx(naive(fake, real, 3), abs=1e-12)


def test_integer_grid_with_ties_is_strict():
    """Distances equal to a radius are everywhere here; '<' leaves them outside."""
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0)) + 100.0
    assert both(grid + torch.tensor([1.0, 0.0]), grid, 2) == naive(grid + torch.tensor([1.0, 0.0]), grid, 2)
    assert both(grid, grid, 2) == naive(grid, grid, 2)


def test_blocks_do_not_show(monkeypatch):
    fake, real = normal(90, 5, 0, 1.1), normal(70, 5, 1)
    want = both(fake, real, 5)
    monkeypatch.setattr(distances_module, "BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(distances_module, "PAIR_ELEMENTS", 64)
    monkeypatch.setattr(distances_module, "SELF_BLOCK_ROWS", 7)
    assert both(fake, real, 5) == want == both(fake.flip(0), real.roll(9, 0), 5)


def test_readme_values_of_high_dimensional_normals():
    """N(0, I) against itself, d = 1000: the published example at 10,000 has P .477 R .471 D 1.056 C .974."""
    scores = manifold_scores(Statistics.of(normal(2000, 1000, 0)), Statistics.of(normal(2000, 1000, 1)))
    assert 0.40 < scores.precision < 0.60 and 0.40 < scores.recall < 0.60
    assert scores.density == pytest.approx(1.0, abs=0.15)
    assert scores.coverage == pytest.approx(0.969, abs=0.02)


@pytest.mark.parametrize(
    ("n_fake", "n_real", "closed"), [(500, 500, 0.96922), (1000, 500, 0.99597), (300, 300, 0.96953)]
)
def test_identity_coverage_and_density(n_fake, n_real, closed):
    assert expected_coverage(n_fake, n_real) == pytest.approx(closed, abs=6e-6)
    scores = [
        manifold_scores(Statistics.of(normal(n_fake, 8, 2 * s)), Statistics.of(normal(n_real, 8, 2 * s + 1)))
        for s in range(12)
    ]
    assert sum(s.coverage for s in scores) / 12 == pytest.approx(closed, abs=0.006)
    assert sum(s.density for s in scores) / 12 == pytest.approx(1.0, abs=0.05)


def test_precision_of_identity_is_below_one():
    for d, expected in ((8, 0.935), (64, 0.768)):
        scores = manifold_scores(Statistics.of(normal(500, d, 0)), Statistics.of(normal(500, d, 1)))
        assert scores.precision == pytest.approx(expected, abs=0.06)


def test_precision_and_recall_are_not_swapped():
    narrow, wide = Statistics.of(normal(200, 16, 0, 0.1)), Statistics.of(normal(200, 16, 1, 3.0))
    assert Precision()(narrow, wide) > 0.8 and Recall()(narrow, wide) < 0.3
    assert Precision()(wide, narrow) < 0.3 and Recall()(wide, narrow) > 0.8


def modes(n, num_modes, seed):
    centres = normal(10, 16, 99, 10.0)
    return normal(n, 16, seed) + centres[torch.arange(n) % num_modes]


def test_planted_mode_loss_halves_recall_and_coverage_only():
    real = Statistics.of(modes(1000, 10, 1))
    whole, half = (manifold_scores(Statistics.of(modes(1000, count, 0)), real) for count in (10, 5))
    assert tuple(whole) == pytest.approx((0.884, 0.882, 1.005, 0.971), abs=0.05)
    assert tuple(half) == pytest.approx((0.884, 0.429, 0.989, 0.488), abs=0.05)


def test_equal_sets_are_perfect():
    rows = Statistics.of(normal(60, 4, 0))
    assert tuple(manifold_scores(rows, rows)) == (1.0, 1.0, 1.0, 1.0)


def test_on_halves_equals_the_halves_on_their_own():
    fake, real, halves = Statistics.of(normal(63, 4, 0, 1.1)), Statistics.of(normal(58, 4, 1)), Halves(7, 3)
    cuts = zip(halves.of(63, "generated"), halves.of(58, "reference"), strict=True)
    direct = [
        tuple(manifold_scores(fake.subset(g), real.subset(r), 3) for g, r in ((fake_G, real_R), (~fake_G, ~real_R)))
        for fake_G, real_R in cuts
    ]
    found = manifold_on_halves(fake, real, halves, 3)
    assert torch.tensor(found) == pytest.approx(torch.tensor(direct), abs=1e-6)


def test_agrees_with_the_prdc_package():
    prdc = pytest.importorskip("prdc", reason="pip install prdc, to compare with an independent implementation")
    fake, real = normal(400, 12, 0, 1.1, 0.2), normal(300, 12, 1)
    theirs = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    found = manifold_scores(Statistics.of(fake), Statistics.of(real))
    assert 0.05 < found.precision < 0.95 and 0.05 < found.recall < 0.99
    assert found._asdict() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_mirror_each_other(seed):
    a, b = Statistics.of(normal(130, 7, 2 * seed, 1.2, 0.3)), Statistics.of(normal(90, 7, 2 * seed + 1))
    assert Precision()(a, b) == Recall()(b, a) and Recall()(a, b) == Precision()(b, a)


def test_three_pictures_and_sets_of_one_repeated_picture():
    three = Statistics.of(normal(3, 4, 0))
    with pytest.raises(DataError, match="There are 3 pictures; a comparison of 5 nearest neighbours needs at least 6"):
        manifold_scores(three, three)
    same, spread = Statistics.of(torch.full((30, 4), 0.1)), Statistics.of(normal(30, 4, 1))
    assert tuple(manifold_scores(same, same)) == (0.0, 0.0, 0.0, 0.0), "a strict '<' leaves empty balls empty"
    collapsed = manifold_scores(same, spread)
    assert collapsed.recall == 0.0 and collapsed.precision in (0.0, 1.0)
    assert tuple(collapsed) == pytest.approx(naive(same.features, spread.features, 5))


@pytest.mark.slow
def test_published_example_of_ten_thousand_normals():
    """N(0, I), 10,000 against 10,000, d = 1000, k = 5: P .4772 R .4705 D 1.0555 C .9735 in the paper's package.

    Two draws differ by the standard errors of an interval of this size; ours and theirs are one draw each.
    """
    fake, real = Statistics.of(normal(10_000, 1000, 0)), Statistics.of(normal(10_000, 1000, 1))
    found = manifold_scores(fake, real)
    cuts = torch.tensor(manifold_on_halves(fake, real, Halves(20, 0)))
    error = ((cuts[:, 0] - cuts[:, 1]).square().mean(0) / 4).sqrt()
    published = torch.tensor([0.4772, 0.4705, 1.0555, 0.9735])
    assert ((torch.tensor(found) - published).abs() < 4 * 2**0.5 * error).all()


def test_growing_statistics_are_not_remembered_stale():
    fake, real = Statistics.of(normal(30, 2, 0)), Statistics.of(normal(30, 2, 1))
    before = Coverage()(fake, real)
    fake.update(normal(30, 2, 2, 0.01, 50.0))
    assert Density()(fake, real) < 0.7
    assert Coverage()(fake, real) == before


@pytest.mark.parametrize("metric", [Precision(), Recall(), Density(), Coverage()])
def test_needs_more_than_k_pictures(metric):
    six, five = Statistics.of(normal(6, 2, 0)), Statistics.of(normal(5, 2, 1))
    assert 0.0 <= metric(six, six) <= 1.0
    for pair in ((six, five), (five, six)):
        with pytest.raises(DataError, match="There are 5 pictures"):
            metric(*pair)


def test_k_must_be_positive():
    with pytest.raises(UsageError, match="k=0"):
        manifold_scores(Statistics.of(normal(6, 2, 0)), Statistics.of(normal(6, 2, 1)), k=0)


ROWS = {
    "normal": lambda g: torch.randn(500, 16, generator=g),
    "far from the origin": lambda g: torch.randn(400, 8, generator=g) + 1000,
    "many ties": lambda g: torch.randint(0, 3, (300, 4), generator=g).float(),
    "fewer rows than candidates": lambda g: torch.randn(7, 3, generator=g),
    "of very different length": lambda g: (
        torch.randn(300, 64, generator=g) * torch.rand(300, 1, generator=g).exp() ** 6
    ),
    "all the same": lambda g: torch.zeros(50, 3),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_radii_are_those_of_float64(kind, k):
    rows = ROWS[kind](torch.Generator().manual_seed(0))
    exact = (rows.double()[:, None] - rows.double()).square().sum(2).fill_diagonal_(torch.inf)
    expected = exact.topk(k, largest=False).values[:, -1]
    torch.testing.assert_close(Bank(rows).radii(k), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(Bank(rows).radii(k), Bank(rows).neighbours(k)[0][:, -1])
