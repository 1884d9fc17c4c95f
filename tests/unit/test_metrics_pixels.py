"""Principal components of pixels: planted directions, an independent decomposition, determinism."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from imagekiln.errors import DataError
from imagekiln.metrics import FeatureNetwork, extract
from imagekiln.metrics.pixels import PixelPCA


def pictures(n, shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equals_the_singular_vectors_of_the_reference():
    reference, images = pictures(80, (3, 6, 5)), pictures(9, (3, 6, 5), 1)
    network = PixelPCA(reference, 10)
    rows = reference.flatten(1).double()
    mean = rows.mean(0)
    _, _, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    expected = (images.flatten(1).double() - mean) @ directions[:10].T
    found = extract(network, [images])
    assert isinstance(network, FeatureNetwork) and found.shape == (9, 10) and found.dtype == torch.float32
    torch.testing.assert_close(found.double().abs(), expected.abs(), rtol=1e-5, atol=1e-5)


def test_signs_are_fixed_and_variance_falls():
    reference = pictures(100, (1, 8, 8))
    network = PixelPCA(reference)
    components = network.components_PD
    assert network.num_features == 63 or network.num_features == 64
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(components.T @ components, torch.eye(network.num_features).double(), rtol=0, atol=1e-9)
    spread = network.features(reference).double().var(0)
    assert bool((spread.diff() <= 1e-6).all())
    assert PixelPCA(reference).hash == network.hash != PixelPCA(pictures(100, (1, 8, 8), 1)).hash


def test_a_planted_direction_comes_first():
    pattern = torch.zeros(1, 8, 8)
    pattern[0, 2, 3], pattern[0, 5, 5] = 0.8, -0.6
    amounts = torch.linspace(-1, 1, 50)
    reference = amounts.view(-1, 1, 1, 1) * pattern + 0.01 * pictures(50, (1, 8, 8))
    found = PixelPCA(reference, 1).features(reference)[:, 0]
    torch.testing.assert_close(found - found.mean(), amounts, rtol=0, atol=0.05)


def test_large_pictures_are_averaged_down():
    reference = pictures(20, (3, 96, 64))
    network = PixelPCA(reference, 5)
    assert network.mean_P.shape == (3 * 32 * 32,)
    small = functional.avg_pool2d(reference, (3, 2))
    torch.testing.assert_close(network.features(reference), PixelPCA(small, 5).features(small), rtol=1e-4, atol=1e-4)


def test_directions_without_variance_are_left_out():
    reference = torch.linspace(-1, 1, 12).view(12, 1, 1, 1).expand(12, 1, 4, 4)
    assert PixelPCA(reference).num_features == 1
    assert PixelPCA(torch.zeros(3, 1, 4, 4)).num_features == 1, "a constant reference still gives a finite feature"
    assert bool(torch.isfinite(PixelPCA(torch.zeros(3, 1, 4, 4)).features(torch.ones(2, 1, 4, 4))).all())


def test_refuses_other_shapes():
    network = PixelPCA(pictures(10, (1, 8, 8)))
    with pytest.raises(DataError, match="one size"):
        network.features(torch.zeros(1, 1, 4, 4))
    with pytest.raises(DataError, match="at least 2"):
        PixelPCA(pictures(1, (1, 8, 8)))
