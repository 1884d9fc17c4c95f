"""StyleGAN: AdaIN, mixing, truncation, R1, and resumption while growing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import conv2d

from imagekiln.core import Batch, Condition, Progress, seeded_noise
from imagekiln.engine import recipe as recipes
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import RecipeError
from imagekiln.nets import pggan
from imagekiln.nets.pggan import Discriminator
from imagekiln.nets.stylegan1 import AdaIn, Generator, instance_norm
from imagekiln.testing import Toy, _require_equal, _trainer


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_growing_from_8_leaves_out_the_picture_of_4_and_a_smooth_discriminator_is_no_larger():
    with torch.device("meta"):
        small, large = (Generator(512, (3, 32, 32), 512, grow_from=size) for size in (8, 4))
        assert count(large) - count(small) == 512 * 3 + 3
        plain, smooth = (Discriminator((3, 32, 32), 512, blur=blur) for blur in (False, True))
        assert count(plain) == count(smooth)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- styles -----------------------------------------------------------------------------------------------------------


def test_styled_maps_have_the_mean_and_the_deviation_that_were_asked_for():
    layer, x, style = AdaIn(5, style=3), torch.randn(2, 5, 6, 7).double() * 9 + 4, torch.randn(2, 3).double()
    layer = layer.double()
    y = layer(x, style)
    asked = style @ layer.affine.weight.T / math.sqrt(3)
    assert torch.allclose(y.mean((2, 3)), asked[:, 5:])
    assert torch.allclose(y.std((2, 3), correction=0), (1 + asked[:, :5]).abs())
    assert torch.allclose(layer(3 * x + 2, style), y, atol=1e-6)


def test_normalised_constant_maps_are_zero_and_have_finite_slopes():
    x = torch.full((2, 3, 4, 4), 7.0, requires_grad=True)
    y = instance_norm(x)
    (slope,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert not y.any() and slope.isfinite().all()


def test_normalisation_of_short_floats_happens_in_long_ones():
    x = torch.randn(1, 2, 4, 4) * 10 + 100
    short = x.to(torch.bfloat16)
    assert instance_norm(short).dtype == torch.bfloat16
    assert torch.allclose(instance_norm(short).float(), instance_norm(short.float()), atol=0.01)


def test_styling_can_be_differentiated_twice():
    layer = AdaIn(2, style=2).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    style = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (x, style)) and gradgradcheck(layer, (x, style))


# -- the generator ----------------------------------------------------------------------------------------------------


def random(net: Generator) -> Generator:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith("mapping"):
                parameter.normal_()
    return net


def finished(layer, x: torch.Tensor, style: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Noise, bias, leaky ReLU and style, written out."""
    x = x + noise.view(-1, 1, *x.shape[2:]) * layer.noise_strength.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    x = torch.where(x > 0, x, 0.2 * x)
    affine = layer.adain.affine
    scale, shift = (style @ affine.weight.T / math.sqrt(style.shape[1]) + affine.bias).chunk(2, 1)
    x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-8).sqrt()
    return x * (1 + scale)[:, :, None, None] + shift[:, :, None, None]


def test_the_generator_is_the_written_out_one_while_fading_in():
    net = random(Generator(3, (2, 8, 8), 4, 6, mapping_layers=1).double())
    styles, noise = torch.randn(2, 4, 3).double(), torch.randn(2, net.noise_size - 3).double()
    noises = noise.split([16, 16, 64, 64], dim=1)

    def convolved(layer, x):
        weight = layer.convolve.weight
        return conv2d(x, weight * math.sqrt(2 / weight[0].numel()), padding=1)

    def picture(index, x):
        layer = net.pictures[index]
        return conv2d(x, layer.weight / math.sqrt(layer.weight.shape[1]), layer.bias)

    def twice(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = finished(net.layers[0], net.constant.expand(2, -1, -1, -1), styles[:, 0], noises[0])
    x = finished(net.layers[1], convolved(net.layers[1], x), styles[:, 1], noises[1])
    coarse = picture(0, x)
    row = torch.tensor([1, 2, 1]).double() / 4
    x = convolved(net.layers[2], twice(x))
    x = conv2d(x, row.outer(row).expand(4, 1, 3, 3), padding=1, groups=4)
    x = finished(net.layers[2], x, styles[:, 2], noises[2])
    x = finished(net.layers[3], convolved(net.layers[3], x), styles[:, 3], noises[3])
    fine = picture(1, x)
    for level, expected in ((0, coarse), (0.3, 0.7 * twice(coarse) + 0.3 * fine), (1, fine)):
        assert torch.allclose(net.synthesize(styles, noise, level=level), expected, atol=1e-6)


@pytest.mark.parametrize("level", [0, 0.5])
def test_the_generator_can_be_differentiated(level):
    net = random(Generator(2, (1, 8, 8), 4, 4, mapping_layers=1).double())
    noise = torch.randn(2, net.noise_size - 2).double()
    styles = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda styles: net.synthesize(styles, noise, level=level), (styles,))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 24, 28), (4, 16, 16)], ids=str)
def test_layers_in_use_get_a_gradient_and_others_none(shape, classes):
    net = Generator(6, shape, 4, 8, 2, classes)
    labels = torch.tensor([0, -1, 2]) if classes else None
    reached = set()
    for level in (0, 0.5, *range(1, net.plan.last + 1)):
        net.zero_grad()
        images, stage = net(torch.randn(3, net.noise_size), labels, level=level), math.ceil(level)
        assert images.shape == (3, shape[0], net.plan.base[0] << stage, net.plan.base[1] << stage)
        images.square().sum().backward()
        graded = {name for name, p in net.named_parameters() if p.grad is not None}
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
        layers = {int(name.split(".")[1]) for name in graded if name.startswith("layers")}
        assert layers == set(range(2 * stage + 2)) and net.styles_at(level) == 2 * stage + 2
        reached |= graded
    assert reached == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("shape", [(3, 30, 30), (3, 33, 33)], ids=str)
def test_impossible_sizes_are_refused_with_a_way_out(shape):
    with pytest.raises(RecipeError, match=rf"cannot .*{shape[1]} x {shape[2]} .*data\.size"):
        Generator(8, shape, 4)


def test_every_value_of_the_noise_matters_once_its_strength_is_learned():
    net = random(Generator(4, (1, 8, 8), 4, 8))
    noise = torch.randn(1, net.noise_size, requires_grad=True)
    (slope,) = torch.autograd.grad(net(noise, level=1).square().sum(), noise)
    assert (slope != 0).all()
    (slope,) = torch.autograd.grad(net(noise, level=0).square().sum(), noise)
    assert (slope[:, : 4 + 32] != 0).all() and not slope[:, 4 + 32 :].any()


def test_truncation_pulls_the_first_places_to_the_mean_style():
    net = random(Generator(4, (1, 8, 8), 4))
    noise, other = torch.randn(2, 1, net.noise_size)
    other[:, 4:] = noise[:, 4:]
    net.track(torch.ones(5, 4))
    assert torch.allclose(net.mean_style, torch.full((4,), 0.005))
    first, second = (net(x, level=1, truncation=0.0) for x in (noise, other))
    assert torch.equal(first, second) and not torch.allclose(net(noise, level=1), net(other, level=1))
    seen = []
    net.synthesize = lambda styles, noise, level: seen.append(styles)
    net(noise, level=1, truncation=0.5, truncated=3)
    style = net.mapping(noise[:, :4])[0]
    halfway = (style + net.mean_style) / 2
    assert torch.allclose(seen[0][0], torch.stack([halfway, halfway, halfway, style]))
    net.track(torch.full((5, 4), float("nan")))
    assert net.mean_style.isfinite().all()


def test_mixed_styles_cross_over_where_they_are_told():
    net = Generator(4, (1, 8, 8), 4)
    mixed = net.mixed(torch.zeros(2, 4), torch.ones(2, 4), torch.tensor([1, net.num_styles]))
    assert mixed[0, :, 0].tolist() == [0, 1, 1, 1] and not mixed[1].any()


# -- the family -------------------------------------------------------------------------------------------------------

SMALL = {"width": 4, "widest": 8, "z_dim": 8, "mapping_layers": 2, "grow_from": 4}


def build(num_classes=0, **settings):
    return recipes.build(recipes.resolve("stylegan1", {"family": {**SMALL, **settings}}), (3, 16, 16), num_classes)


FADING = Progress(21875, 100_000)
"""7/8 of the first of two stages, which fill half of the run: three quarters faded in."""


def test_the_discriminator_loss_is_the_written_out_one_while_fading_in():
    family, images = build(gamma=3.0, mixing=0.0), torch.randn(4, 3, 16, 16)
    level = family.level(FADING)
    assert level == pytest.approx(0.75)
    torch.manual_seed(5)
    loss = family.loss("discriminator", Batch(images), FADING)
    torch.manual_seed(5)
    real = pggan.shrunk(images, level, last=2).requires_grad_(True)
    fake = family.generator(torch.randn(4, family.generator.noise_size), level=level)
    on_real, on_fake = family.discriminator(real, level=level), family.discriminator(fake, level=level)
    (slope,) = torch.autograd.grad(on_real.sum(), real)
    expected = -on_real.sigmoid().log().mean() - (-on_fake).sigmoid().log().mean() + 1.5 * slope.square().sum() / 4
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.manual_seed(5)
    generator = family.loss("generator", Batch(images), FADING)
    assert generator.total.item() == pytest.approx(-on_fake.sigmoid().log().mean().item(), rel=1e-4)


def test_short_floats_give_finite_losses_and_gradients_of_full_length():
    family, batch = build(3), Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, -1]))
    for phase in family.phases:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = family.loss(phase.name, batch, FADING)
        assert loss.total.dtype == torch.float32 and loss.total.isfinite()
        loss.total.backward()
    gradients = [p.grad for p in family.parameters() if p.grad is not None]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = family.eval().sample(seeded_noise([1], family.noise_shape()), Condition())
    assert images.dtype == torch.float32 and images.shape == (1, 3, 16, 16)


def test_the_dial_turns_the_penalty_and_is_in_checkpoints():
    family, batch = build(gamma=3.0), Batch(torch.randn(4, 3, 16, 16))
    dial = family.dials()["gamma"]
    assert dial.shape == () and dial.item() == 3.0 and "gamma" in family.state_dict()

    def value() -> tuple[float, float]:
        torch.manual_seed(1)
        loss = family.loss("discriminator", batch, Progress(0, 1))
        return loss.total.item(), loss.parts["penalty"].item()

    before, penalty = value()
    dial.fill_(50.0)
    assert value()[0] - before == pytest.approx(47 / 2 * penalty, rel=1e-3)


def test_two_styles_meet_within_the_layers_in_use():
    family, seen = build(mixing=1.0), []
    mixed = family.generator.mixed
    family.generator.mixed = lambda first, second, crossover: (
        seen.append(crossover.tolist()) or mixed(first, second, crossover)
    )
    for level, places in ((0, {1}), (1, {1, 2, 3}), (2, {1, 2, 3, 4, 5})):
        family._fakes(Batch(torch.zeros(200, 3, 16, 16)), float(level))
        assert set(seen[-1]) == places


def test_the_mean_style_moves_in_training_of_the_generator_alone():
    family, batch = build(), Batch(torch.randn(4, 3, 16, 16))
    family.train().loss("discriminator", batch, Progress(0, 1))
    family.eval().loss("generator", batch, Progress(0, 1))
    assert not family.generator.mean_style.any()
    family.train().loss("generator", batch, Progress(0, 1))
    assert family.generator.mean_style.any()


def test_truncation_is_an_option_of_drawing():
    family = build(grow_from=16).eval()
    noise = seeded_noise([1, 2], family.noise_shape())
    swapped = torch.cat([noise[:, :8].flip(0), noise[:, 8:]], 1)
    options = type(family.config.sample)(truncation=0.0)
    assert torch.equal(family.sample(noise, Condition(), options), family.sample(swapped, Condition(), options))
    partly = type(family.config.sample)(truncation=0.0, truncated_layers=5)
    for chosen in (partly, None):
        assert not torch.allclose(
            family.sample(noise, Condition(), chosen), family.sample(swapped, Condition(), chosen)
        )


@pytest.mark.parametrize("stop", [3, 5])
def test_resumption_is_exact_also_across_a_stage(tmp_path: Path, stop: int):
    """Ten steps; stages of 2.5 steps: 4 pixels until 1.25, 8 from 2.5, fading to 16 from 3.75, 16 from 5 on."""
    settings = {"family": SMALL}
    whole, first = (_trainer("stylegan1", tmp_path / name, 10, settings) for name in ("whole", "parts"))
    levels = []
    for _ in range(10):
        whole.step()
        levels.append(float(whole.family.generator.level))
    assert levels == pytest.approx([0, 0, 0.6, 1, 1.2, 2, 2, 2, 2, 2])
    for _ in range(stop):
        first.step()
    first.time_event("checkpoint")
    second = Trainer(first.recipe, recipes.build(first.recipe, (3, 16, 16), 3), Toy(), Toy(), first.run, Silent())
    assert second.restore() and float(second.family.generator.level) == pytest.approx(levels[stop - 1])
    for _ in range(10 - stop):
        second.step()
    assert second.family.generator.mean_style.any()
    _require_equal(whole, second, "resumed differs")
