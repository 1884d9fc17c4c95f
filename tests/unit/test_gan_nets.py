"""GAN networks, residual, plain and fully connected: sizes, labels, classifiers, norms."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from imagekiln.config import Recipe
from imagekiln.core import Batch, Progress
from imagekiln.engine import recipe as recipes
from imagekiln.errors import RecipeError
from imagekiln.families import wgan
from imagekiln.nets import conv_gan, dcgan, layer_norm_gan, mlp_gan, resnet_gan

SHAPES = [(1, 8, 8), (3, 16, 16), (3, 24, 28), (1, 28, 28), (3, 32, 32), (3, 48, 48), (4, 64, 64)]
NETS = {"resnet": resnet_gan, "layer norm": layer_norm_gan, "conv": conv_gan, "mlp": mlp_gan}


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_spectral_normalisation_adds_no_parameters():
    plain, spectral = (resnet_gan.Discriminator((3, 16, 16), 4, 3, spectral=spectral) for spectral in (False, True))
    assert count(plain) == count(spectral)


def test_counts_of_the_fully_connected_networks():
    width, pixels = 20, 2 * 5 * 7
    generator, critic = mlp_gan.Generator(11, (2, 5, 7), width), mlp_gan.Discriminator((2, 5, 7), width)
    assert count(generator) == 11 * width + width + width * width + width + width * pixels + pixels
    assert count(critic) == pixels * width + width + width * width + width + width + 1


# -- shapes, gradients, labels ----------------------------------------------------------------------------------------


def both(nets, shape, num_classes, width=4):
    torch.manual_seed(0)
    return nets.Generator(10, shape, width, num_classes), nets.Discriminator(shape, width, num_classes)


@pytest.mark.parametrize("nets", NETS.values(), ids=NETS)
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_ranges_and_gradients(nets, shape, num_classes):
    generator, critic = both(nets, shape, num_classes)
    labels = torch.tensor([0, 2, -1, 1]) if num_classes else None
    images = generator(torch.randn(4, 10), labels)
    assert images.shape == (4, *shape) and images.abs().max() <= 1
    logits = critic(images, labels)
    assert logits.shape == (4,)
    logits.square().sum().backward()
    for net in (generator, critic):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("nets", NETS.values(), ids=NETS)
def test_labels_matter_and_no_label_is_the_null_label(nets):
    generator, critic = both(nets, (1, 8, 8), 3)
    with torch.no_grad():  # conditional norms begin alike for all labels
        for name, parameter in generator.named_parameters():
            if "labels" in name:
                parameter += torch.randn_like(parameter)
    for net, inputs in ((generator.eval(), torch.randn(2, 10)), (critic.eval(), torch.randn(2, 1, 8, 8))):
        anything = net(inputs, torch.tensor([-1, -1]))
        assert torch.equal(net(inputs), anything)
        assert not torch.allclose(net(inputs, torch.tensor([0, 0])), anything)
        assert not torch.allclose(net(inputs, torch.tensor([0, 0])), net(inputs, torch.tensor([1, 1])))


def test_conditional_norm_begins_as_the_plain_one():
    plain, conditional = resnet_gan.ConditionalNorm(5, 0), resnet_gan.ConditionalNorm(5, 3)
    x = torch.randn(4, 5, 3, 3)
    assert torch.allclose(conditional(x, torch.tensor([0, 1, -1, 2])), plain(x, None))


@pytest.mark.parametrize("nets", NETS.values(), ids=NETS)
def test_no_picture_influences_another_ones_logit(nets):
    critic = both(nets, (3, 16, 16), 0)[1].eval()
    images = torch.randn(5, 3, 16, 16)
    assert torch.allclose(critic(images)[2:3], critic(images[2:3]), atol=1e-5)


def test_layer_normalisation_forgets_how_strong_a_map_is():
    block, x = layer_norm_gan.Shrink(4, 6), torch.randn(2, 4, 8, 8)
    inside = [block(scale * x) - block.shortcut(torch.nn.functional.avg_pool2d(scale * x, 2)) for scale in (1.0, 7.0)]
    torch.testing.assert_close(*inside, atol=1e-4, rtol=1e-3)


def test_mean_pooling_is_sum_pooling_over_the_number_of_places():
    critic = resnet_gan.Discriminator((3, 16, 16), 4)
    images = torch.randn(2, 3, 16, 16)
    bias, total = critic.head.bias, critic(images)
    critic.pool = "mean"
    assert torch.allclose((critic(images) - bias) * 16, total - bias, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 30, 30), (3, 4, 4), (3, 64, 32)], ids=str)
def test_impossible_sizes_are_refused_with_a_way_out(shape):
    nets = (resnet_gan, layer_norm_gan, conv_gan)
    makers = [maker for net in nets for maker in (partial(net.Generator, 10), net.Discriminator)]
    for make in makers:
        with pytest.raises(RecipeError, match=rf"This GAN cannot .*{shape[1]} x {shape[2]} .*data\.size"):
            make(shape, 8)


# -- spectral normalisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nets", "count"), [(resnet_gan, 4 * 2 + 2 + 2), (conv_gan, 2 * 2 + 1 + 2)], ids=["resnet", "conv"]
)
def test_every_matrix_stretches_by_one(nets, count):
    """Four blocks with two convolutions each and two shortcuts, or two convolutions a size and one; head, labels."""
    torch.manual_seed(0)
    critic = nets.Discriminator((3, 16, 16), 6, 3, spectral=True)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, -1])
    for _ in range(100):  # one power iteration each
        critic(images, labels)
    matrices = [m.weight.detach().flatten(1) for m in critic.eval().modules() if hasattr(m, "parametrizations")]
    assert len(matrices) == count
    for matrix in matrices:
        assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1.0, abs=0.02)


def spectral_critic() -> resnet_gan.Discriminator:
    torch.manual_seed(0)
    return resnet_gan.Discriminator((3, 16, 16), 6, spectral=True)


def test_power_iteration_runs_in_training_only_and_continues_from_the_saved_vectors():
    critic, images = spectral_critic(), torch.randn(4, 3, 16, 16)
    critic(images)
    saved = {name: value.clone() for name, value in critic.state_dict().items()}
    assert any(name.endswith("_u") for name in saved) and any(name.endswith("_v") for name in saved)
    critic.eval()(images)
    assert all(torch.equal(value, saved[name]) for name, value in critic.state_dict().items())
    torch.manual_seed(9)
    other = resnet_gan.Discriminator((3, 16, 16), 6, spectral=True)
    other.load_state_dict(saved)
    twin = copy.deepcopy(critic)
    for net in (critic.train(), other.train(), twin.train()):
        net(images)
    after = critic.state_dict()
    for net in (other, twin):
        assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    assert any(not torch.equal(value, saved[name]) for name, value in after.items())


# -- what the families do with them -----------------------------------------------------------------------------------


def family(name: str, num_classes: int = 0, **settings):
    recipe: Recipe = recipes.resolve(name, {"family": {"width": 4, **settings}})
    torch.manual_seed(0)
    return recipes.build(recipe, (3, 16, 16), num_classes)


def test_wgan_keeps_the_critic_in_its_box_from_the_start_and_after_every_step():
    wgan = family("wgan", clip=0.02)
    assert max(p.abs().max().item() for p in wgan.critic.parameters()) == pytest.approx(0.02)
    generator = {name: value.clone() for name, value in wgan.generator.named_parameters()}
    with torch.no_grad():
        for parameter in wgan.critic.parameters():
            parameter += 1.0
    wgan.loss("critic", Batch(torch.randn(4, 3, 16, 16)), Progress(0, 1))
    assert all((p == torch.tensor(0.02)).all() for p in wgan.critic.parameters())
    assert all(torch.equal(value, generator[name]) for name, value in wgan.generator.named_parameters())


def test_stretches_of_the_critic_are_those_of_the_published_loop():
    """Arjovsky's main.py: n_critic is 100 while fewer than 25 generator steps are done, and at every 500th."""
    critic_updates: list[int] = []
    for generator_steps in range(1200):
        critic_updates.append(100 if generator_steps < 25 or generator_steps % 500 == 0 else 5)
    ends = [sum(critic_updates[: k + 1]) // 5 - 1 for k in range(1200)]
    assert [step for step in range(ends[-1] + 1) if not wgan.critic_is_alone(step)] == ends
    assert family("wgan", stretches=True).phases[1].rests is wgan.critic_is_alone
    assert family("wgan").phases[1].rests is None


def test_wgan_gp_adds_lambda_times_the_penalty_also_without_gradients():
    batch = Batch(torch.randn(4, 3, 16, 16))
    for weight in (0.0, 10.0):
        wgan_gp = family("wgan_gp", penalty_weight=weight).requires_grad_(False)
        torch.manual_seed(1)
        with torch.no_grad():
            loss = wgan_gp.loss("critic", batch, Progress(0, 1))
        expected = weight * loss.parts["penalty"] - loss.parts["distance"]
        assert loss.total.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("networks", "nets"), [("residual", resnet_gan), ("layer-norm", layer_norm_gan), ("convolutional", dcgan)]
)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_all_networks_of_wgan_gp_play(networks, nets, num_classes):
    gan = family("wgan_gp", num_classes, networks=networks)
    batch = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 2, -1, 1]) if num_classes else None)
    assert type(gan.generator) is nets.Generator and type(gan.critic) is nets.Discriminator
    for phase in gan.phases:
        gan.loss(phase.name, batch, Progress(0, 1)).total.backward()
    slopes = {name: parameter.grad for name, parameter in gan.named_parameters()}
    assert all(slope is not None and slope.isfinite().all() for slope in slopes.values()), slopes


def test_a_critic_that_names_classes_pays_for_wrong_ones_and_so_does_the_generator():
    gan, images = family("wgan_gp", 3, labels="classifier", penalty_weight=0.0), torch.randn(4, 3, 16, 16)
    labels, nobody = torch.tensor([0, 2, -1, 1]), torch.full((4,), -1)
    totals = {}
    for phase in ("critic", "generator"):
        for name, given in (("some", labels), ("none", nobody)):
            torch.manual_seed(1)
            totals[phase, name] = gan.loss(phase, Batch(images, given), Progress(0, 1))
    logits, classes = gan.critic.classify(images)
    assert torch.equal(logits, gan.critic(images)) and torch.equal(logits, gan.critic(images, labels))
    known = [0, 1, 3]
    nats = -classes.log_softmax(1)[known, labels[known]].sum() / 4
    critic = totals["critic", "some"]
    assert critic.parts["class_nats"].item() == pytest.approx(nats.item(), rel=1e-5)
    assert critic.total.item() == pytest.approx(nats.item() - critic.parts["distance"].item(), rel=1e-4)
    assert totals["critic", "none"].parts["class_nats"] == 0
    z = (torch.manual_seed(1), torch.randn(4, 128))[1]
    answers, classes = gan.critic.classify(gan.generator(z, labels))
    nats = -classes.log_softmax(1)[known, labels[known]].sum() / 4
    expected = -answers.mean() + 0.1 * nats
    assert totals["generator", "some"].total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_classifier_that_cannot_be_is_refused_with_a_way_out():
    with pytest.raises(RecipeError, match=r"labels = 'classifier': these pictures have no labels.*'projection'"):
        family("wgan_gp", labels="classifier")
    with pytest.raises(RecipeError, match=r"networks = 'layer-norm' has no classifier.*networks = 'residual'"):
        family("wgan_gp", 3, labels="classifier", networks="layer-norm")


@pytest.mark.parametrize(("networks", "nets"), [("residual", resnet_gan), ("convolutional", conv_gan)])
def test_both_networks_of_sngan_play(networks, nets):
    sngan, batch = family("sngan", networks=networks, generator_width=4), Batch(torch.randn(4, 3, 16, 16))
    assert type(sngan.generator) is nets.Generator and type(sngan.discriminator) is nets.Discriminator
    for phase in sngan.phases:
        assert sngan.loss(phase.name, batch, Progress(0, 1)).total.isfinite()


@pytest.mark.parametrize("name", ["wgan", "wgan_gp", "sngan"])
def test_critic_steps_are_repeats_of_the_first_phase(name):
    assert [phase.repeat for phase in family(name, critic_steps=3).phases] == [3, 1]


def test_the_objective_of_the_vanilla_gan_is_a_choice():
    batch, losses = Batch(torch.randn(4, 3, 16, 16)), {}
    for objective in ("minimax", "non-saturating"):
        torch.manual_seed(1)
        gan = family("vanilla_gan", objective=objective)
        losses[objective] = gan.loss("generator", batch, Progress(0, 1)).total.item()
    assert losses["minimax"] < 0 < losses["non-saturating"]
