"""DCGAN networks: sizes, kernels, labels, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagekiln.errors import RecipeError
from imagekiln.nets.dcgan import Discriminator, Generator, halvings

SHAPES = [(1, 8, 8), (3, 16, 16), (3, 24, 28), (1, 28, 28), (3, 32, 32), (4, 64, 64)]


def test_keys_are_those_of_the_pytorch_example():
    generator, discriminator = Generator(100, (3, 64, 64)), Discriminator((3, 64, 64))
    matrices = {name: tuple(p.shape) for name, p in generator.named_parameters() if p.ndim == 4}
    assert matrices == {
        "main.0.weight": (100, 512, 4, 4),
        "main.3.weight": (512, 256, 4, 4),
        "main.6.weight": (256, 128, 4, 4),
        "main.9.weight": (128, 64, 4, 4),
        "main.12.weight": (64, 3, 4, 4),
    }
    assert [name for name, p in discriminator.named_parameters() if p.ndim == 4] == [
        f"main.{index}.weight" for index in (0, 2, 5, 8, 11)
    ]


@pytest.mark.parametrize("kernel", [4, 5])
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_ranges_and_gradients(shape, num_classes, kernel):
    generator = Generator(10, shape, width=8, num_classes=num_classes, kernel=kernel)
    discriminator = Discriminator(shape, width=8, num_classes=num_classes, kernel=kernel)
    labels = torch.tensor([0, 2, -1, 1]) if num_classes else None
    images = generator(torch.randn(4, 10), labels)
    assert images.shape == (4, *shape) and images.abs().max() <= 1
    logits = discriminator(images, labels)
    assert logits.shape == (4,)
    logits.square().sum().backward()
    for net in (generator, discriminator):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_logits_without_normalisation_are_those_of_single_pictures():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    for normalised in (True, False):
        net = Discriminator((3, 16, 16), 8, kernel=5, bias=True, normalised=normalised)
        assert torch.allclose(net(images)[:1], net(images[:1]), atol=1e-6) is not normalised


@pytest.mark.parametrize("settings", [{}, {"kernel": 5, "bias": True}], ids=str)
def test_initialisation_is_the_papers(settings):
    torch.manual_seed(0)
    generator = Generator(100, (3, 64, 64), **settings)
    weights = torch.cat([p.flatten() for p in generator.parameters() if p.ndim > 1])
    gains = torch.cat([m.weight for m in generator.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)])
    assert not any(p.any() for name, p in generator.named_parameters() if name.endswith("bias"))
    assert weights.mean().abs() < 1e-4 and abs(weights.std() - 0.02) < 1e-4
    assert abs(gains.mean() - 1) < 0.005 and abs(gains.std() - 0.02) < 0.002


def test_labels_matter_and_no_label_is_the_null_label():
    torch.manual_seed(0)
    generator, discriminator = Generator(10, (1, 8, 8), 8, 3).eval(), Discriminator((1, 8, 8), 8, 3).eval()
    z, images = torch.randn(2, 10), torch.randn(2, 1, 8, 8)
    for net, inputs in ((generator, z), (discriminator, images)):
        anything = net(inputs, torch.tensor([-1, -1]))
        assert torch.equal(net(inputs), anything)
        assert not torch.allclose(net(inputs, torch.tensor([0, 0])), anything)
        assert not torch.allclose(net(inputs, torch.tensor([0, 0])), net(inputs, torch.tensor([1, 1])))


@pytest.mark.parametrize("shape", [(3, 30, 30), (3, 4, 4), (1, 7, 7), (3, 64, 32), (3, 100, 64), (3, 0, 0)], ids=str)
def test_impossible_sizes_are_refused_with_a_way_out(shape):
    for make in (lambda: Generator(10, shape), lambda: Discriminator(shape)):
        with pytest.raises(RecipeError, match=rf"{shape[1]} x {shape[2]} pixels.* Possible near by: .*\d"):
            make()


def test_the_way_out_names_the_nearest_sizes():
    with pytest.raises(RecipeError, match=r"28 or 32 for 30\. Set data\.size"):
        halvings((3, 30, 30))


@given(st.integers(1, 600), st.integers(1, 600))
def test_halvings_are_exact_or_refused(height, width):
    try:
        count, base = halvings((3, height, width))
    except RecipeError:
        return
    assert (base[0] * 2**count, base[1] * 2**count) == (height, width)
    assert all(4 <= side <= 7 for side in base)
