"""Conditional GAN: both ways of telling the class, losses against closed forms, sets without labels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from imagekiln.core import Batch, Condition, Progress, seeded_noise
from imagekiln.engine import recipe as recipes
from imagekiln.errors import RecipeError
from imagekiln.nets.cgan import Discriminator, Generator

WAYS = ["projection", "concatenation"]
SHAPES = [(1, 8, 8), (3, 16, 16), (1, 28, 28), (3, 24, 28)]


def family(num_classes: int = 3, **settings):
    torch.manual_seed(0)
    recipe = recipes.resolve("cgan", {"family": {"width": 4, "z_dim": 6, **settings}})
    return recipes.build(recipe, (1, 8, 8), num_classes)


@pytest.mark.parametrize("conditioning", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_ranges_and_gradients(shape, conditioning):
    torch.manual_seed(0)
    generator, critic = Generator(6, shape, 4, 3, conditioning), Discriminator(shape, 4, 3, conditioning)
    images = generator(torch.randn(4, 6), torch.tensor([0, 2, 1, 1]))
    assert images.shape == (4, *shape) and images.abs().max() <= 1
    logits = critic(images, torch.tensor([0, 2, -1, 1]))
    assert logits.shape == (4,)
    logits.square().sum().backward()
    for net in (generator, critic):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_counts_are_those_of_the_layers():
    K, Z, w = 3, 6, 4
    convs = Z * 2 * w * 16 + 2 * w * w * 16 + w * 16 + 1
    assert count(Generator(Z, (1, 16, 16), w, K, "projection")) == convs + (K + 1) * 2 * (2 * w + w)
    assert count(Generator(Z, (1, 16, 16), w, K, "concatenation")) == convs + K * 2 * w * 16 + 2 * (2 * w + w)
    convs = 16 * w + w + w * 2 * w * 16 + 2 * w + 2 * w * 16 + 1
    assert count(Discriminator((1, 16, 16), w, K, "projection")) == convs + (K + 1) * 2 * w
    assert count(Discriminator((1, 16, 16), w, K, "concatenation")) == convs + (K + 1) * w * 16


@pytest.mark.parametrize("conditioning", WAYS)
def test_both_networks_are_told_the_class(conditioning):
    gan = family(conditioning=conditioning).eval()
    with torch.no_grad():  # class norms begin alike for all classes
        for name, parameter in gan.named_parameters():
            if "labels" in name:
                parameter += torch.randn_like(parameter)
    z, images = torch.randn(1, 6), torch.randn(1, 1, 8, 8)
    answers = [gan.generator(z, torch.tensor([label])) for label in range(3)]
    assert not torch.allclose(answers[0], answers[1]) and not torch.allclose(answers[1], answers[2])
    logits = [float(gan.discriminator(images, torch.tensor([label])).detach()) for label in (-1, 0, 1, 2)]
    assert len({round(logit, 5) for logit in logits}) == 4


@pytest.mark.parametrize("conditioning", WAYS)
def test_no_picture_influences_another_ones_logit(conditioning):
    critic = Discriminator((1, 16, 16), 4, 3, conditioning).eval()
    images, labels = torch.randn(5, 1, 16, 16), torch.tensor([0, 1, 2, -1, 0])
    torch.testing.assert_close(critic(images, labels)[2:3], critic(images[2:3], labels[2:3]))


def test_the_projection_is_an_inner_product_with_the_features():
    critic = Discriminator((1, 8, 8), 4, 3, spectral=False)
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 2, -1])
    features = torch.nn.functional.leaky_relu(critic.downs[0](images), 0.2)
    rows = critic.labels.table.weight[torch.tensor([0, 2, 3])]
    expected = critic.head(features).flatten() + torch.einsum("bc,bchw->b", rows, features)
    torch.testing.assert_close(critic(images, labels), expected)


@pytest.mark.parametrize("objective", ["hinge", "non-saturating"])
def test_losses_are_the_closed_forms(objective):
    gan = family(objective=objective).eval()
    batch = Batch(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 1]))
    torch.manual_seed(1)
    z = torch.randn(4, 6)
    fake = gan.generator(z, batch.labels)
    real_B, fake_B = (gan.discriminator(x, batch.labels).double() for x in (batch.images, fake))
    if objective == "hinge":
        critic = (1 - real_B).clamp(min=0).mean() + (1 + fake_B).clamp(min=0).mean()
        generator = -fake_B.mean()
    else:
        critic = -torch.log(torch.sigmoid(real_B)).mean() - torch.log(1 - torch.sigmoid(fake_B)).mean()
        generator = softplus(-fake_B).mean()
    for phase, expected in (("discriminator", critic), ("generator", generator)):
        torch.manual_seed(1)
        total = gan.loss(phase, batch, Progress(0, 1)).total.detach()
        assert float(total) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_set_without_labels_is_refused_in_one_sentence():
    with pytest.raises(RecipeError, match="no labels: put them into a folder a class, two") as caught:
        family(num_classes=0)
    assert caught.value.exit_code == 2


def test_one_class_is_enough():
    gan = family(num_classes=1)
    batch = Batch(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert all(gan.loss(phase.name, batch, Progress(0, 1)).total.isfinite() for phase in gan.phases)
    assert gan.eval().sample(torch.randn(2, *gan.noise_shape()), Condition()).shape == (2, 1, 8, 8)


def test_pictures_without_a_label_do_not_make_the_generator_guess():
    """Fakes beside them are of a drawn class: the row for "anything" of the generator's norms is never used."""
    gan = family()
    batch = Batch(torch.randn(6, 1, 8, 8), torch.full((6,), -1))
    torch.manual_seed(3)
    gan.loss("generator", batch, Progress(0, 1)).total.backward()
    rows = gan.generator.norms[0].labels.table.weight.grad.abs().sum(1)
    assert rows[-1] == 0 and rows[:-1].sum() > 0
    rows = gan.discriminator.labels.table.parametrizations.weight.original.grad.abs().sum(1)
    assert rows[-1] > 0


def test_the_noise_chooses_the_class_where_none_is_asked_for():
    gan = family(conditioning="concatenation").eval()
    noise = seeded_noise(range(64), gan.noise_shape())
    free = gan.sample(noise, Condition())
    by_class = [gan.sample(noise, Condition(torch.full((64,), label))) for label in range(3)]
    chosen = [next(k for k in range(3) if torch.equal(free[i], by_class[k][i])) for i in range(64)]
    thirds = (torch.special.ndtr(noise[:, -1]) * 3).long().tolist()
    assert chosen == thirds and set(chosen) == {0, 1, 2}
    mixed = gan.sample(noise, Condition(torch.tensor([-1, 2] * 32)))
    assert torch.equal(mixed[0::2], free[0::2]) and torch.equal(mixed[1::2], by_class[2][1::2])
