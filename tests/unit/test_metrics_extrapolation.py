"""Frechet distance at infinity: analytic values where the plain distance is biased, independent recomputation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import FrechetDistance, Statistics
from imagekiln.metrics.dealing import content_parts
from imagekiln.metrics.extrapolation import BLOCKS, FrechetInfinity, frechet_infinity


def normal(n, d, seed, scale=1.0, shift=0.0):
    return Statistics.of(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.5, 0.3)])
def test_recovers_the_analytic_value_where_the_plain_distance_is_biased(scale, shift):
    n, d, repeats = 300, 24, 6
    truth = d * (shift**2 + (scale - 1) ** 2)
    pairs = [(normal(n, d, 2 * s, scale, shift), normal(n, d, 2 * s + 1)) for s in range(repeats)]
    plain = torch.tensor([FrechetDistance()(*pair) for pair in pairs])
    found = [frechet_infinity(*pair, cuts=(1, 2, 3)) for pair in pairs]
    error = torch.tensor([f.value for f in found]) - truth
    spread = float(torch.tensor([f.standard_error for f in found]).mean())
    assert abs(float(error.mean())) < 3 * spread / repeats**0.5
    assert float((error.abs() < 2 * spread).float().mean()) > 0.7
    assert float(plain.mean()) - truth > 6 * float(plain.std()) / repeats**0.5
    assert float(plain.mean()) - truth > 6 * abs(float(error.mean()))


def test_standard_error_is_the_spread_of_repetitions():
    pairs = ((normal(200, 4, 2 * s, 1.3), normal(200, 4, 2 * s + 1)) for s in range(16))
    found = [frechet_infinity(*pair, cuts=(1, 2)) for pair in pairs]
    spread = float(torch.tensor([f.value for f in found]).std())
    assert 0.6 < float(torch.tensor([f.standard_error for f in found]).mean()) / spread < 1.7


def test_agrees_with_polyfit_through_directly_computed_distances():
    generated, reference = normal(200, 5, 0, 1.2, 0.4), normal(160, 5, 1)
    blocks = [content_parts(side.features, BLOCKS) for side in (generated, reference)]
    y = []
    for cut in (1, 2, 4):
        parts = [
            FrechetDistance()(generated.subset(blocks[0] % cut == j), reference.subset(blocks[1] % cut == j))
            for j in range(cut)
        ]
        y.append(sum(parts) / cut)
    found = frechet_infinity(generated, reference, cuts=(1, 2, 4))
    assert found.distances == pytest.approx(y, rel=1e-8) and found.sizes == (200, 100, 50)
    assert found.value == pytest.approx(np.polyfit([1, 2, 4], y, 1)[1], rel=1e-8)
    assert FrechetInfinity((1, 2, 4))(generated, reference) == found.value


def test_features_far_from_the_origin_and_order_do_not_show():
    generated, reference = normal(150, 6, 0, 1.2), normal(130, 6, 1)
    want = FrechetInfinity()(generated, reference)
    moved = Statistics.of(generated.features.flip(0)), Statistics.of(reference.features.roll(7, 0))
    assert FrechetInfinity()(*moved) == pytest.approx(want, rel=1e-6)
    far = [Statistics.of(side.features.double() + 4096.0) for side in (generated, reference)]
    assert FrechetInfinity(seed=3)(*far) == pytest.approx(want, abs=3 * frechet_infinity(generated, reference)[1])


def test_dead_features_and_few_pictures_are_finite():
    rows = torch.zeros(30, 40)
    rows[:, 0] = torch.arange(30.0)
    value = FrechetInfinity()(Statistics.of(rows + 1.0), Statistics.of(rows))
    assert value == pytest.approx(40.0, abs=30.0) and value == value


def test_refusals():
    for cuts in ((1,), (2, 2), (0, 1), (1, 21)):
        with pytest.raises(UsageError, match="two different numbers"):
            FrechetInfinity(cuts)
    with pytest.raises(DataError, match="needs at least 8"):
        FrechetInfinity()(normal(7, 2, 0), normal(50, 2, 1))
    with pytest.raises(DataError, match="needs at least 12"):
        frechet_infinity(normal(11, 2, 0), normal(50, 2, 1))
