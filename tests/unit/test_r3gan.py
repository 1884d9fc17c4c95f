"""R3GAN: Fix-up initialisation, the relativistic loss and its two penalties."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from imagekiln.core import Batch, Progress
from imagekiln.engine import recipe as recipes
from imagekiln.errors import RecipeError
from imagekiln.nets import r3gan
from imagekiln.nets.r3gan import Discriminator, Generator, Residual


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_blocks_begin_as_the_identity_with_small_weights_inside():
    block = Residual(64, total=16, expansion=2, group=16)
    gain = math.sqrt(2 / 1.04) / 2  # 16 ** (-1 / 4) = 1 / 2
    assert block.body[0].weight.std().item() == pytest.approx(gain / math.sqrt(64), rel=0.05)
    assert block.body[2].weight.std().item() == pytest.approx(gain / math.sqrt(16 * 9), rel=0.05)
    assert not block.body[4].weight.any()


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 24, 28), (1, 32, 32)], ids=str)
def test_shapes_and_gradients(shape, classes):
    generator, critic = Generator(6, shape, 4, 8, classes), Discriminator(shape, 4, 8, classes)
    with torch.no_grad():
        for net in (generator, critic):
            for block in net.main:
                if isinstance(block, Residual):
                    block.body[4].weight.normal_(0, 0.1)
    labels = torch.tensor([0, -1, 2]) if classes else None
    images = generator(torch.randn(3, 6), labels)
    assert images.shape == (3, *shape)
    logits = critic(images, labels)
    logits.square().sum().backward()
    for net in (generator, critic):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert torch.allclose(
        critic(images, labels)[2:], critic(images[2:], None if labels is None else labels[2:]), atol=1e-4
    )


def test_impossible_sizes_are_refused_with_a_way_out():
    with pytest.raises(RecipeError, match=r"R3GAN cannot .*30 x 30 .*data\.size"):
        Generator(8, (3, 30, 30), 16)
    with pytest.raises(RecipeError, match=r"family\.group_width = 16: .* 40 channels"):
        Discriminator((3, 32, 32), 20, 20)


def test_the_critic_can_be_differentiated_twice():
    critic = Discriminator((1, 8, 8), 2, 2, group=2).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.normal_()
    images = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(critic, (images,)) and gradgradcheck(critic, (images,))


def build(**settings):
    settings = {"width": 8, "widest": 16, **settings}
    return recipes.build(recipes.resolve("r3gan", {"family": settings}), (3, 16, 16), 0)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_discriminators_loss_is_the_written_out_one_and_so_are_its_gradients(fraction):
    family = build(gamma=2.0, gamma_end=0.2).double()
    with torch.no_grad():
        for parameter in family.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    critic, parameters = family.discriminator, list(family.discriminator.parameters())
    real = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(5)
        total = family.loss("discriminator", Batch(real), Progress(int(1000 * fraction), 1000)).total
        torch.manual_seed(5)
        fake = family.generator(torch.randn(4, 64)).detach()
    finally:
        torch.set_default_dtype(torch.float32)
    gamma, penalty = {0.0: 2.0, 0.5: 1.1, 1.0: 0.2}[fraction], torch.zeros(())
    for images in (real, fake):
        images = images.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
        penalty = penalty + (slope**2).sum() / 4
    difference = critic(real) - critic(fake)
    expected = torch.log1p(torch.exp(-difference)).mean() + gamma / 2 * penalty
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (total, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_the_generators_loss_is_the_mirror_of_the_critics():
    real, fake = torch.randn(2, 6)
    assert r3gan.relativistic_generator(real, fake) == r3gan.relativistic_critic(fake, real)
    assert r3gan.relativistic_critic(real, fake) == pytest.approx(torch.log1p(torch.exp(fake - real)).mean().item())


def test_penalties_are_computed_without_gradients_too():
    family, batch = build().requires_grad_(False), Batch(torch.randn(4, 3, 16, 16))
    with torch.no_grad():
        loss = family.loss("discriminator", batch, Progress(0, 1))
    assert loss.parts["r1"] > 0 and loss.parts["r2"] > 0
