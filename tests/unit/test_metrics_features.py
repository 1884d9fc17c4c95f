"""Feature networks: fixed weights, batch independence, what they can see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import FeatureNetwork, FrechetDistance, RandomConv, Statistics, extract, weights_hash


def pictures(n, shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (4, 9, 31), (3, 64, 17)])
def test_shapes_and_finite(shape):
    network = RandomConv(shape)
    features = extract(network, [pictures(3, shape)])
    assert isinstance(network, FeatureNetwork)
    assert features.shape == (3, network.num_features) and features.dtype == torch.float32
    assert torch.isfinite(features).all() and not features.requires_grad and not features.is_inference()
    assert float(features.std(0).max()) > 0


def test_weights_are_fixed_and_orthogonal():
    torch.manual_seed(1)
    first = RandomConv((3, 32, 32))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = RandomConv((3, 32, 32))
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers are untouched"
    assert first.hash == second.hash != RandomConv((1, 32, 32)).hash
    assert first.hash == "9f658de046570cd1961d7ac1eaa37d0a19d1bda09d5f3626e3e6a39261abd554", (
        "randconv-v1 is a promise: change the name with the weights"
    )
    weight = first.scales[0][0].weight.flatten(1)
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), atol=5e-3, rtol=0)


def test_batches_do_not_show():
    shape = (3, 16, 16)
    network, images = RandomConv(shape), pictures(20, shape)
    torch.testing.assert_close(extract(network, images.split(7)), extract(network, [images]), atol=1e-5, rtol=1e-5)


def test_blur_and_colour_shift_are_far_compared_with_fresh_pictures():
    shape = (3, 16, 16)
    network = RandomConv(shape)
    real, fresh = pictures(150, shape, 0), pictures(150, shape, 1)
    blurred = nn.functional.avg_pool2d(fresh, 3, 1, 1)
    tinted = fresh + torch.tensor([0.3, 0.0, -0.3]).reshape(3, 1, 1)
    reference = Statistics.of(extract(network, [real]))
    floor, blur, tint = (
        FrechetDistance()(Statistics.of(extract(network, [images])), reference) for images in (fresh, blurred, tinted)
    )
    assert blur > 5 * floor and tint > 5 * floor


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def features(self, images_BCHW):
        return self.norm(images_BCHW).flatten(1)


def test_extract_uses_evaluation_mode_and_puts_training_back():
    network = Normed().train()
    images = pictures(4, (1, 8, 8))
    before = weights_hash(network)
    features = extract(network, [images])
    assert network.training and weights_hash(network) == before
    torch.testing.assert_close(features, images.flatten(1), rtol=1e-4, atol=1e-4)


def test_weights_hash_sees_one_bit():
    network = RandomConv((1, 8, 8))
    before = network.hash
    network.scales[0][1].bias[0] += 2.0**-12
    assert network.hash != before


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "no pictures"),
        ([torch.zeros(2, 1, 8, 8, dtype=torch.uint8)], "uint8"),
        ([torch.zeros(1, 8, 8)], "needs float32"),
        ([torch.full((2, 1, 8, 8), 255.0)], "range"),
    ],
)
def test_refuses_other_pictures(batches, match):
    with pytest.raises(DataError, match=match):
        extract(RandomConv((1, 8, 8)), batches)


def test_refuses_tiny_pictures():
    with pytest.raises(UsageError, match="at least 8"):
        RandomConv((3, 7, 32))
