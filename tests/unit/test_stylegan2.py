"""StyleGAN2: modulation, mixing, path lengths, lazy phases and exact resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import conv2d

from imagekiln.core import Batch, Condition, Progress, seeded_noise
from imagekiln.engine import recipe as recipes
from imagekiln.errors import RecipeError
from imagekiln.nets import stylegan2
from imagekiln.nets.stylegan2 import Discriminator, Generator, Mapping, ModulatedConv2d
from imagekiln.testing import _require_equal, _trainer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- the modulated convolution ----------------------------------------------------------------------------------------


def reference(layer: ModulatedConv2d, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Equations 1 to 3, picture by picture, with weights of its own for each."""
    scales, outputs = layer.affine(style), []
    for picture, scale in zip(x, scales, strict=True):
        weight = layer.weight * layer.weight_scale * scale[None, :, None, None]
        if layer.demodulate:
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if layer.blur is None:
            outputs.append(conv2d(picture[None], weight, padding=layer.padding))
            continue
        _, channels, height, width = x.shape
        spread = x.new_zeros(1, channels, 2 * height - 1, 2 * width - 1)
        spread[0, :, ::2, ::2] = picture
        grown = conv2d(spread, weight.flip(2, 3), padding=2)
        row = x.new_tensor([1, 3, 3, 1])
        kernel = row.outer(row) / 16
        outputs.append(conv2d(grown.transpose(0, 1), kernel[None, None], padding=1).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_convolution_is_the_one_with_weights_for_every_picture(up, demodulate):
    layer = ModulatedConv2d(4, 5, 3, style=3, demodulate=demodulate, up=up).double()
    x, style = torch.randn(3, 4, 5, 6).double(), torch.randn(3, 3).double()
    assert torch.allclose(layer(x, style), reference(layer, x, style), atol=1e-6)


@pytest.mark.parametrize("up", [False, True])
def test_modulated_convolution_can_be_differentiated_twice(up):
    layer = ModulatedConv2d(2, 2, 3, style=2, up=up).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    style = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (x, style)) and gradgradcheck(layer, (x, style))


def test_demodulation_gives_unit_variance_and_forgets_the_strength_of_a_style():
    layer = ModulatedConv2d(64, 200, 3, style=4)
    x, style = torch.randn(4, 64, 16, 16), torch.randn(4, 4)
    y = layer(x, style)[:, :, 1:-1, 1:-1]
    assert y.std().item() == pytest.approx(1.0, abs=0.05)
    with torch.no_grad():
        for parameter in layer.affine.parameters():
            parameter *= 100
    assert torch.allclose(layer(x, style)[:, :, 1:-1, 1:-1], y, atol=1e-3)


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 24, 28), (1, 32, 32)], ids=str)
def test_shapes_and_gradients(shape, residual, classes):
    generator = Generator(6, shape, 4, 8, num_classes=classes)
    critic = Discriminator(shape, 4, 8, classes, residual=residual)
    labels = torch.tensor([0, -1, 2]) if classes else None
    images = generator(torch.randn(3, generator.noise_size), labels)
    assert images.shape == (3, *shape)
    logits = critic(images, labels)
    assert logits.shape == (3,)
    logits.square().sum().backward()
    for net in (generator, critic):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("shape", [(3, 30, 30), (3, 4, 4)], ids=str)
def test_impossible_sizes_are_refused_with_a_way_out(shape):
    for kind in (lambda: Generator(8, shape, 4), lambda: Discriminator(shape, 4)):
        with pytest.raises(RecipeError, match=rf"StyleGAN cannot .*{shape[1]} x {shape[2]} .*data\.size"):
            kind()


def test_every_value_of_the_noise_matters_once_its_strength_is_learned():
    net = Generator(4, (1, 8, 8), 4)
    with torch.no_grad():
        for layer in net.layers:
            layer.noise_strength.fill_(0.5)
    noise = torch.randn(1, net.noise_size, requires_grad=True)
    (slope,) = torch.autograd.grad(net(noise).square().sum(), noise)
    assert (slope != 0).all()


def test_truncation_pulls_to_the_mean_style():
    net = Generator(4, (1, 8, 8), 4)
    noise, other = torch.randn(2, 1, net.noise_size)
    other[:, 4:] = noise[:, 4:]
    net.track(torch.ones(5, 4))
    assert torch.allclose(net.mean_style, torch.full((4,), 0.005))
    assert torch.equal(net(noise, truncation=0.0), net(other, truncation=0.0))
    assert not torch.allclose(net(noise), net(other))
    net.track(torch.full((5, 4), float("nan")))
    assert net.mean_style.isfinite().all()


def test_mixed_styles_cross_over_where_they_are_told():
    net = Generator(4, (1, 8, 8), 4)
    mixed = net.mixed(torch.zeros(2, 4), torch.ones(2, 4), torch.tensor([1, net.num_styles]))
    assert mixed[0, :, 0].tolist() == [0, 1, 1, 1] and not mixed[1].any()


def test_mapping_ignores_the_length_of_z():
    mapping, z = Mapping(8, 8, 2), torch.randn(3, 8)
    assert torch.allclose(mapping(z), mapping(5 * z), atol=1e-5)


# -- path lengths -----------------------------------------------------------------------------------------------------


def test_path_length_of_a_linear_generator_is_the_length_of_its_adjoint():
    matrix, styles = torch.randn(12, 2 * 3).double(), torch.randn(5, 2, 3).double()

    def synthesize(styles_BLZ):
        return (styles_BLZ.flatten(1) @ matrix.T).view(5, 3, 2, 2)

    torch.manual_seed(1)
    lengths = stylegan2.path_lengths(synthesize, styles)
    torch.manual_seed(1)
    directions = torch.randn(5, 3, 2, 2, dtype=torch.float64).flatten(1) / 2
    slopes = (directions @ matrix).view(5, 2, 3)
    assert torch.allclose(lengths, (slopes.square().sum((1, 2)) / 2).sqrt())


def test_path_length_can_be_differentiated():
    net = Generator(3, (1, 8, 8), 4).double()
    noise = torch.randn(2, net.noise_size - 3).double()

    def lengths(constant):
        torch.manual_seed(1)
        net.constant = constant
        return stylegan2.path_lengths(lambda styles: net.synthesize(styles, noise), styles)

    styles = torch.randn(2, net.num_styles, 3).double()
    constant = net._parameters.pop("constant").detach()[:, :1, :1].clone().requires_grad_(True)
    assert gradcheck(lambda value: lengths(value.expand(-1, 4, 4)), (constant,))


# -- the family -------------------------------------------------------------------------------------------------------


def build(**settings):
    return recipes.build(recipes.resolve("stylegan2", {"family": {"width": 4, "z_dim": 8, **settings}}), (3, 16, 16), 0)


def test_phases_and_their_optimizers():
    plain, full = build(), build(path_weight=2.0)
    assert [(phase.name, phase.every) for phase in plain.phases] == [("discriminator", 1), ("r1", 16), ("generator", 1)]
    assert full.phases[-1].every == 4 and full.phases[-1].optimizer == "generator"
    settings = type(full).optimizers["discriminator"]
    assert settings["lr"] == pytest.approx(0.0025 * 16 / 17) and settings["betas"][1] == pytest.approx(
        0.99 ** (16 / 17)
    )


def test_r1_is_half_gamma_times_the_squared_gradient():
    family, images = build(gamma=3.0), torch.randn(4, 3, 16, 16, requires_grad=True)
    loss = family.loss("r1", Batch(images.detach()), Progress(0, 1))
    (slope,) = torch.autograd.grad(family.discriminator(images).sum(), images)
    assert loss.total.item() == pytest.approx(1.5 * slope.square().sum().item() / 4, rel=1e-4)


def test_the_mean_path_length_moves_in_training_only():
    family, batch = build(path_weight=2.0, mixing=0.9), Batch(torch.randn(4, 3, 16, 16))
    torch.manual_seed(3)
    first = family.eval().loss("path", batch, Progress(0, 1))
    assert family.mean_length == 0
    torch.manual_seed(3)
    second = family.train().loss("path", batch, Progress(0, 1))
    assert torch.equal(first.total, second.total)
    assert family.mean_length.item() == pytest.approx(0.01 * second.parts["length"].item())


def test_resumption_is_exact_with_path_lengths_and_mixing(tmp_path: Path):
    settings = {"family": {"width": 4, "z_dim": 8, "widest": 8, "path_weight": 2.0, "mixing": 0.9}}
    whole, first = (_trainer("stylegan2", tmp_path / name, 6, settings) for name in ("whole", "parts"))
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    first.time_event("checkpoint")
    second = _trainer_again(first, tmp_path / "parts", settings)
    for _ in range(3):
        second.step()
    assert second.family.mean_length > 0 and second.family.generator.mean_style.any()
    _require_equal(whole, second, "resumed differs")


def _trainer_again(first, folder: Path, settings):
    from imagekiln.engine.tracker import Silent
    from imagekiln.engine.trainer import Trainer
    from imagekiln.testing import Toy

    family = recipes.build(first.recipe, (3, 16, 16), 3)
    second = Trainer(first.recipe, family, Toy(), Toy(), first.run, Silent())
    assert second.restore()
    return second


def test_truncation_is_an_option_of_drawing():
    family = build().eval()
    noise = seeded_noise([1, 2], family.noise_shape())
    options = type(family.config.sample)(truncation=0.0)
    swapped = torch.cat([noise[:, :8].flip(0), noise[:, 8:]], 1)
    assert torch.equal(family.sample(noise, Condition(), options), family.sample(swapped, Condition(), options))
    assert not torch.allclose(family.sample(noise, Condition()), family.sample(swapped, Condition()))
