"""The classifier: shapes, batch independence, learning."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from imagekiln.errors import UsageError
from imagekiln.nets.classifier import Classifier


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (4, 64, 64), (3, 9, 40), (1, 64, 8)])
def test_shapes_and_gradients(shape):
    net = Classifier(shape, num_classes=3, width=8)
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    assert net.features(images).shape == (4, net.num_features) == (4, 32)
    logits = net(images)
    assert logits.shape == (4, 3)
    functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_default_feature_count_and_size():
    net = Classifier((1, 28, 28), 10)
    assert net.num_features == 128
    assert sum(p.numel() for p in net.parameters()) < 600_000


def test_batches_do_not_show_in_evaluation():
    net = Classifier((3, 16, 16), 10, width=8)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    net(images)  # moves the running statistics away from their start
    net.eval()
    with torch.inference_mode():
        torch.testing.assert_close(net(images), torch.cat([net(i) for i in images.split(1)]), atol=1e-5, rtol=1e-5)


def test_logits_are_the_head_of_the_features():
    net = Classifier((1, 8, 8), 5, width=4).eval()
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(images), net.head(net.features(images)))


def test_features_are_float32_under_bf16_autocast():
    net = Classifier((1, 8, 8), 5, width=8).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.features(torch.zeros(2, 1, 8, 8)).dtype == torch.float32


def test_learns_handwritten_digits():
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.images[:, None] / 8 - 1).float(), torch.tensor(data.target)
    net = Classifier((1, 8, 8), 10, width=16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for epoch in range(6):
        for batch in torch.randperm(1400, generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    net.eval()
    with torch.inference_mode():
        accuracy = (net(images[1400:]).argmax(1) == labels[1400:]).float().mean()
    assert accuracy > 0.93


@pytest.mark.parametrize(("shape", "num_classes"), [((1, 7, 8), 2), ((0, 8, 8), 2), ((1, 8, 8), 1), ((3, 32, 4), 10)])
def test_refusals(shape, num_classes):
    with pytest.raises(UsageError, match="at least"):
        Classifier(shape, num_classes)
