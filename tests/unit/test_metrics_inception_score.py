"""Inception score: its two ends, hand values, splits."""

from __future__ import annotations

import math

import pytest
import torch

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics.inception_score import inception_score


def logits(n, k, seed=0):
    return 2.0 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [2, 10])
def test_ends(k):
    uniform, certain = torch.full((50, k), 1.0 / k), torch.eye(k).repeat(20, 1)
    assert inception_score(uniform, "probabilities", splits=1).mean == pytest.approx(1.0, abs=1e-7)
    assert inception_score(certain, "probabilities", splits=1).mean == pytest.approx(k, rel=1e-12)
    assert inception_score(certain[:1].repeat(30, 1), "probabilities").mean == 1.0  # sure, but always the same


def test_hand_value_and_plain_loops():
    p = [[0.5, 0.5], [1.0, 0.0]]
    want = math.exp((0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25) + math.log(1 / 0.75)) / 2)
    assert inception_score(torch.tensor(p), "probabilities", splits=1).mean == pytest.approx(want, rel=1e-12)
    rows = logits(40, 5).double().softmax(1).tolist()
    mean = [sum(row[c] for row in rows) / 40 for c in range(5)]
    divergence = sum(row[c] * math.log(row[c] / mean[c]) for row in rows for c in range(5)) / 40
    assert inception_score(logits(40, 5), splits=1).mean == pytest.approx(math.exp(divergence), rel=1e-10)


def test_logits_and_probabilities_agree_and_offsets_drop_out():
    x = logits(60, 4)
    want = inception_score(x)
    assert inception_score(x.softmax(1), "probabilities").values == pytest.approx(want.values, rel=1e-5)
    assert inception_score(x.double() + 1000.0).values == pytest.approx(want.values, rel=1e-9)


def test_splits_are_named_and_smaller_splits_score_lower():
    one, ten = inception_score(logits(200, 20), splits=1), inception_score(logits(200, 20), splits=10)
    assert (one.splits, one.split_size, one.std) == (1, 200, 0.0) and (ten.splits, ten.split_size) == (10, 20)
    assert ten.mean == pytest.approx(sum(ten.values) / 10) and ten.mean < one.mean
    assert ten.std == pytest.approx((sum((v - ten.mean) ** 2 for v in ten.values) / 10) ** 0.5)
    assert inception_score(logits(200, 20), seed=1).values != ten.values


def test_order_does_not_show_in_one_split():
    x = logits(100, 7)
    assert inception_score(x.flip(0), splits=1).mean == pytest.approx(inception_score(x, splits=1).mean, rel=1e-12)


def test_refusals():
    x = logits(20, 3)
    with pytest.raises(DataError, match="NaN"):
        inception_score(x * float("nan"))
    with pytest.raises(DataError, match="classes"):
        inception_score(x[0])
    with pytest.raises(DataError, match="sum to"):
        inception_score(x, "probabilities")
    with pytest.raises(UsageError, match="splits=21"):
        inception_score(x, splits=21)
    with pytest.raises(UsageError, match="kind='odds'"):
        inception_score(x, "odds")
