"""Frechet distance: closed forms, singular covariances, finite-sample bias, an independent derivation."""

from __future__ import annotations

import pytest
import torch

from imagekiln.errors import DataError
from imagekiln.metrics import FrechetDistance, Statistics

FD = FrechetDistance()


def normal(n, d, seed, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def whitened(n, d, seed):
    """Rows whose sample mean is 0 and sample covariance I: closed forms hold without sampling error."""
    rows = normal(n, d, seed)
    rows = rows - rows.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(rows.T @ rows / (n - 1)), rows.T, upper=False).T


def by_square_roots(x, y):
    """The textbook form, through symmetric square roots."""
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross)


@pytest.mark.parametrize(("n", "d"), [(200, 16), (8, 16), (16, 16), (17, 16)])
def test_zero_for_equal_sets(n, d):
    statistics = Statistics.of(normal(n, d, 0, shift=3.0))
    assert FD(statistics, statistics) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1.0), (1.0, 0.0), (2.5, 0.0), (0.5, -2.0), (0.0, 1.0)])
def test_isotropic_gaussians(scale, shift):
    d = 12
    x, y = Statistics.of(whitened(300, d, 0) * scale + shift), Statistics.of(whitened(200, d, 1))
    assert FD(x, y) == pytest.approx(d * shift**2 + d * (scale - 1.0) ** 2, rel=1e-5, abs=1e-5)


def test_unit_shift_in_every_feature_is_the_dimension():
    rows = torch.randint(-8, 9, (900, 256), generator=torch.Generator().manual_seed(0)).float()
    assert FD(Statistics.of(rows + 1.0), Statistics.of(rows)) == pytest.approx(256.0, rel=1e-9)


@pytest.mark.parametrize(("n_x", "n_y"), [(100, 80), (100, 6), (6, 100), (6, 5), (11, 10), (2, 2)])
def test_agrees_with_the_textbook_form_and_is_symmetric(n_x, n_y):
    x, y = (rows.float() for rows in (normal(n_x, 10, 2, 1.3, 0.4), normal(n_y, 10, 3)))
    a, b = Statistics.of(x), Statistics.of(y)
    assert FD(a, b) == pytest.approx(by_square_roots(x.double(), y.double()), rel=1e-6)
    assert FD(a, b) == pytest.approx(FD(b, a), rel=1e-9)


@pytest.mark.parametrize("decades", [0, 3, 8])
def test_agrees_with_scipy_on_correlated_features(decades):
    """The product's matrix root by Schur decomposition, and its complex eigenvalues: two routes that are not ours."""
    linalg = pytest.importorskip("scipy.linalg")
    d = 24
    scales = torch.logspace(0, -decades / 2, d, dtype=torch.float64)
    mixing = torch.linalg.qr(normal(d, d, 5)).Q
    x, y = ((normal(400, d, seed, scale, 0.1) * scales @ mixing).float() for seed, scale in ((0, 1.3), (1, 1.0)))
    cov_x, cov_y = (torch.cov(rows.double().T).numpy() for rows in (x, y))
    rest = float((x.double().mean(0) - y.double().mean(0)).square().sum()) + cov_x.trace() + cov_y.trace()
    found = FD(Statistics.of(x), Statistics.of(y))
    assert found == pytest.approx(rest - 2 * linalg.sqrtm(cov_x @ cov_y).real.trace(), rel=1e-6)
    roots = linalg.eigvals(cov_x @ cov_y).astype(complex) ** 0.5
    assert found == pytest.approx(rest - 2 * float(roots.real.sum()), rel=1e-6)


def test_three_pictures_and_one_repeated_picture():
    """A point mass against anything: the shift and the whole spread of the other side."""
    same, y = torch.full((50, 6), 0.25), normal(40, 6, 1).float()
    want = float((0.25 - y.double().mean(0)).square().sum() + torch.cov(y.double().T).trace())
    assert FD(Statistics.of(same), Statistics.of(y)) == pytest.approx(want, rel=1e-9)
    assert FD(Statistics.of(same), Statistics.of(same)) == 0.0
    three = normal(3, 6, 2).float()
    assert FD(Statistics.of(three), Statistics.of(y)) == pytest.approx(by_square_roots(three.double(), y.double()))


def test_never_negative_on_nearly_equal_ill_conditioned_sets():
    scales = torch.logspace(0, -9, 40, dtype=torch.float64)
    for seed in range(5):
        x = (normal(60, 40, seed) * scales).float()
        assert 0.0 <= FD(Statistics.of(x), Statistics.of(x)) < 1e-7


def test_dead_and_duplicate_features():
    x, y = normal(80, 4, 0, 1.2), normal(90, 4, 1)
    alone = FD(Statistics.of(x), Statistics.of(y))
    dead = [torch.cat([rows, rows, torch.zeros(len(rows), 2)], 1) for rows in (x, y)]
    assert FD(*map(Statistics.of, dead)) == pytest.approx(2 * alone, rel=1e-5)


def test_zero_features_against_each_other():
    zeros = Statistics.of(torch.zeros(30, 3))
    assert FD(zeros, zeros) == 0.0


def test_rotation_and_permutation_invariance():
    x, y = normal(120, 9, 0, 1.5), normal(100, 9, 1)
    turn = torch.linalg.qr(normal(9, 9, 2)).Q
    want = FD(Statistics.of(x), Statistics.of(y))
    assert FD(Statistics.of(x @ turn), Statistics.of(y @ turn)) == pytest.approx(want, rel=1e-5)
    assert FD(Statistics.of(x.flip(0)), Statistics.of(y.roll(7, 0))) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("n", "expected"), [(200, 11.16), (1000, 2.12), (5000, 0.457)])
def test_finite_sample_bias(n, expected):
    """Two sets of one 64-dimensional normal distribution: the value is all bias, about 1 / N."""
    assert FD(Statistics.of(normal(n, 64, 0)), Statistics.of(normal(n, 64, 1))) == pytest.approx(expected, rel=0.1)


def test_needs_two_pictures_and_one_feature_space():
    two = Statistics.of(torch.zeros(2, 3))
    with pytest.raises(DataError, match="needs at least 2"):
        FD(Statistics.of(torch.zeros(1, 3)), two)
    with pytest.raises(DataError, match="3 features and the reference 4"):
        FD(two, Statistics.of(torch.zeros(2, 4)))
