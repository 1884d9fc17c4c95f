"""Vendi score: truths of effective numbers, published examples, both forms, halves."""

from __future__ import annotations

import math

import pytest
import torch

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import Statistics
from imagekiln.metrics.interval import Halves
from imagekiln.metrics.vendi import Vendi, vendi_of_kernel, vendi_score


def normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 2.0, math.inf])
def test_orthogonal_pictures_count_and_copies_do_not(order):
    rows = torch.eye(6) * torch.arange(1.0, 7.0)
    assert vendi_score(Statistics.of(rows), order) == pytest.approx(6.0, rel=1e-9)
    assert vendi_score(Statistics.of(rows[2:3].repeat(9, 1)), order) == pytest.approx(1.0, rel=1e-9)
    assert vendi_score(Statistics.of(rows.repeat(5, 1)), order) == pytest.approx(6.0, rel=1e-9)


def test_unequal_kinds():
    """Three of one kind and one of another: exp of the entropy of (3/4, 1/4)."""
    rows = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 5.0]])
    want = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert vendi_score(Statistics.of(rows)) == pytest.approx(want, rel=1e-9)
    assert vendi_score(Statistics.of(rows), 2.0) == pytest.approx(1 / (0.75**2 + 0.25**2), rel=1e-9)
    assert vendi_score(Statistics.of(rows), math.inf) == pytest.approx(4 / 3, rel=1e-9)


def test_published_examples():
    points = torch.tensor([0.0, 0.0, 10.0, 10.0, 20.0, 20.0])
    score = vendi_of_kernel((-(points[:, None] - points).double().abs()).exp())
    assert math.floor(score * 1e4) / 1e4 == 2.9999  # as printed; e^-10 shows in the ninth digit only
    kernel = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert vendi_of_kernel(kernel) == pytest.approx(2.1573, abs=5e-5)


@pytest.mark.parametrize(("n", "d"), [(50, 8), (8, 50), (20, 20)])
def test_dual_form_agrees_with_the_kernel_matrix(n, d):
    rows = normal(n, d, 0, 0.3)
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    assert vendi_score(Statistics.of(rows)) == pytest.approx(vendi_of_kernel(unit @ unit.T), rel=1e-9)


def test_zero_rows_are_copies_of_one_more_kind():
    rows = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    assert vendi_score(Statistics.of(rows)) == pytest.approx(4.0, rel=1e-9)
    assert vendi_score(Statistics.of(torch.zeros(7, 3))) == pytest.approx(1.0)


def test_ratio_sees_mode_loss_and_not_order():
    modes = 10.0 * torch.eye(12)
    labels = torch.arange(600) % 12
    reference = Statistics.of(modes[labels] + normal(600, 12, 0))
    half = Statistics.of(modes[labels % 6] + normal(600, 12, 1))
    assert Vendi()(half, reference) < 0.7
    assert Vendi()(Statistics.of(half.features.flip(0)), reference) == pytest.approx(Vendi()(half, reference), rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(90, 6), (30, 40)])
def test_halves_equal_direct_subsets(n, d):
    x, y = Statistics.of(normal(n, d, 0, 0.4)), Statistics.of(normal(n + 3, d, 1))
    halves = Halves(3, 5)
    direct = [
        (Vendi()(x.subset(g), y.subset(r)), Vendi()(x.subset(~g), y.subset(~r)))
        for g, r in zip(halves.of(n, "generated"), halves.of(n + 3, "reference"), strict=True)
    ]
    assert sum(Vendi().on_halves(x, y, halves), ()) == pytest.approx(sum(direct, ()), rel=1e-5)


def test_refusals():
    with pytest.raises(UsageError, match="order=-1"):
        Vendi(-1)
    with pytest.raises(UsageError, match="order=nan"):
        Vendi(math.nan)
    for kernel in (
        torch.ones(2, 3),
        torch.zeros(2, 2),
        torch.tensor([[1.0, 0.5], [0.1, 1.0]]),
        torch.eye(2) * math.nan,
    ):
        with pytest.raises(DataError, match="symmetric"):
            vendi_of_kernel(kernel)
    with pytest.raises(DataError, match="NaN"):
        vendi_score(Statistics.of(torch.tensor([[math.nan]])))
