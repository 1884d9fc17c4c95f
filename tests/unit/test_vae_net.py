"""VAE networks: any size, labels, gradients, and that they can reconstruct."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.nets.autoencoder import LOGVAR_RANGE, ConvDecoder, ConvEncoder, VaeDecoder, VaeEncoder, pyramid

SHAPES = [(1, 8, 8), (3, 17, 30), (1, 28, 28), (4, 32, 32), (3, 64, 64)]
NETWORKS = {"residual": (VaeEncoder, VaeDecoder), "convolutional": (ConvEncoder, ConvDecoder)}
each_network = pytest.mark.parametrize(("encoder", "decoder"), NETWORKS.values(), ids=NETWORKS)


@each_network
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_ranges_and_gradients(shape, num_classes, encoder, decoder):
    torch.manual_seed(0)
    encoder = encoder(shape, width=8, z_dim=6, num_classes=num_classes)
    decoder = decoder(shape, width=8, z_dim=6, num_classes=num_classes)
    labels = torch.tensor([0, 1, 2, -1]) if num_classes else None
    mean, logvar = encoder(torch.rand(4, *shape) * 2 - 1, labels)
    assert mean.shape == logvar.shape == (4, 6)
    images = decoder(mean + torch.exp(logvar / 2) * torch.randn(4, 6), labels)
    assert images.shape == (4, *shape) and images.abs().max() <= 1
    images.square().sum().backward()
    for net in (encoder, decoder):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert any(p.grad.any() for p in net.parameters())


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_pyramid_ends_small_for_any_size(rows, columns):
    shapes = pyramid((3, rows, columns), 16)
    assert max(shapes[-1][1:]) <= 4 and min(shapes[-1][1:]) >= 1
    assert all(channels in (16, 32, 64) for channels, _, _ in shapes)


@settings(max_examples=10, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40))
def test_decoders_return_the_size_they_were_built_for(rows, columns):
    for decoder in (VaeDecoder, ConvDecoder):
        drawn = decoder((1, rows, columns), width=8, z_dim=2).eval()(torch.zeros(1, 2))
        assert drawn.shape == (1, 1, rows, columns)


@each_network
def test_labels_matter_and_no_label_is_the_null_label(encoder, decoder):
    torch.manual_seed(0)
    encoder, decoder = encoder((1, 8, 8), 8, 4, 3).eval(), decoder((1, 8, 8), 8, 4, 3).eval()
    for net, inputs in ((lambda *a: encoder(*a)[0], torch.randn(2, 1, 8, 8)), (decoder, torch.randn(2, 4))):
        anything = net(inputs, torch.tensor([-1, -1]))
        assert torch.equal(net(inputs, None), anything)
        assert (net(inputs, torch.tensor([0, 0])) - anything).abs().max() > 0.01


@each_network
def test_log_variances_are_bounded(encoder, decoder):
    encoder = encoder((1, 8, 8), 8, 4)
    with torch.no_grad():
        encoder.head.weight.mul_(1e6)
    _, logvar = encoder(torch.randn(16, 1, 8, 8))
    assert logvar.min() == LOGVAR_RANGE[0] and logvar.max() == LOGVAR_RANGE[1]


def test_pictures_are_independent_of_their_batch():
    torch.manual_seed(0)
    encoder, images = VaeEncoder((1, 8, 8), 8, 4), torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(encoder(images)[0][2:3], encoder(images[2:3])[0])


def test_bars_are_reconstructed_through_the_bottleneck():
    """Pictures with two degrees of freedom, a row and a column that are lit, pass a bottleneck of eight numbers."""
    torch.manual_seed(0)
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    images = -torch.ones(64, 1, 8, 8)
    images[torch.arange(64), 0, row.flatten()] = 1
    images[torch.arange(64), 0, :, column.flatten()] = 1
    encoder, decoder = VaeEncoder((1, 8, 8), 16, 8), VaeDecoder((1, 8, 8), 16, 8)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (decoder(encoder(images)[0]) - images).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * images.var().item()
