"""Dealing by content: the same pictures whatever their order, random otherwise."""

from __future__ import annotations

import torch

from imagekiln.metrics.dealing import content_order, content_parts


def rows(n, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_parts_follow_the_pictures_not_their_places():
    features = rows(101)
    moved = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    assert torch.equal(content_parts(features, 7)[moved], content_parts(features[moved], 7))
    assert torch.equal(features[content_order(features)], features[moved][content_order(features[moved])])


def test_parts_are_even_and_differ_by_seed():
    parts = content_parts(rows(101), 7)
    assert sorted(parts.bincount().tolist()) == [14] * 4 + [15] * 3
    assert not torch.equal(parts, content_parts(rows(101), 7, seed=1))


def test_a_sorted_set_is_dealt_at_random():
    """Every part of a sorted ramp has the ramp's mean, within six standard errors."""
    ramp = torch.linspace(0, 1, 2000)[:, None]
    parts = content_parts(ramp, 4)
    for p in range(4):
        assert abs(float(ramp[parts == p].mean()) - 0.5) < 6 * (1 / 12 / 500) ** 0.5


def test_equal_pictures_are_spread_over_the_parts():
    assert content_parts(torch.ones(40, 2), 4).bincount().tolist() == [10] * 4
