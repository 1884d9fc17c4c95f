"""Progressive GAN: the schedule, fading, growing pictures, and resumption while growing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import conv2d

from imagekiln.config import Recipe
from imagekiln.core import Batch, Condition, Progress, seeded_noise
from imagekiln.engine import recipe as recipes
from imagekiln.engine.generate import draw
from imagekiln.engine.models import load_model
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import RecipeError
from imagekiln.nets import pggan
from imagekiln.nets.pggan import Discriminator, Generator
from imagekiln.testing import Toy, _require_equal, _trainer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- the schedule -----------------------------------------------------------------------------------------------------

TURNS = {  # share of the run: level, for two stages to come, half of the run, a quarter of a stage fading
    0.0: 0.0,
    0.18: 0.0,
    0.1875: 0.0,
    0.21875: 0.5,
    0.234375: 0.75,
    0.25: 1.0,
    0.4375: 1.0,
    0.46875: 1.5,
    0.5: 2.0,
    0.9: 2.0,
    1.0: 2.0,
}


@pytest.mark.parametrize(("fraction", "level"), TURNS.items())
def test_levels_are_those_of_the_written_out_schedule(fraction, level):
    assert pggan.level_at(fraction, first=0, last=2, growing=0.5, fade=0.25) == pytest.approx(level)
    assert pggan.level_at(fraction, first=3, last=5, growing=0.5, fade=0.25) == pytest.approx(3 + level)


@pytest.mark.parametrize("fade", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("growing", [0.0, 0.3, 1.0])
def test_levels_never_fall_stay_in_bounds_and_end_with_everything(growing, fade):
    levels = [pggan.level_at(step / 1000, 1, 4, growing, fade) for step in range(1001)]
    assert levels == sorted(levels) and levels[-1] == 4 and levels[0] == (1 if growing else 4)
    fading = sum(not level.is_integer() for level in levels) / 1000
    assert fading == pytest.approx(growing * fade, abs=0.004)


def test_where_growing_starts():
    heights = {4: 0, 5: 1, 8: 1, 16: 2, 17: 3, 32: 3, 1000: 3}
    assert {size: pggan.plan((3, 32, 32), 8, 64, size).first for size in heights} == heights
    assert pggan.plan((3, 28, 28), 8, 64).base == (7, 7)


# -- pictures of a stage ----------------------------------------------------------------------------------------------


def test_pictures_are_means_of_squares_and_blended_with_coarser_ones():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    halves = images.view(2, 3, 8, 2, 8, 2).mean((3, 5))
    quarters = images.view(2, 3, 4, 4, 4, 4).mean((3, 5))
    assert pggan.shrunk(images, level=2, last=2) is images
    assert torch.allclose(pggan.shrunk(images, level=1, last=2), halves)
    assert torch.allclose(pggan.shrunk(images, level=0, last=2), quarters)
    coarse = quarters.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(pggan.shrunk(images, level=0.25, last=2), 0.75 * coarse + 0.25 * halves)
    assert torch.allclose(pggan.enlarged(halves, (3, 16, 16))[:, :, 5, 8], halves[:, :, 2, 4])


# -- networks ---------------------------------------------------------------------------------------------------------


def leaky(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def equal_conv(layer, x: torch.Tensor, gain: float = math.sqrt(2)) -> torch.Tensor:
    weight = layer.weight * gain / math.sqrt(layer.weight[0].numel())
    return conv2d(x, weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def test_the_generator_is_the_written_out_one_while_fading_in():
    net, z = Generator(6, (3, 8, 8), 4, 8).double(), torch.randn(3, 6).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    x = unit(z) @ (net.spread.weight * math.sqrt(2) / 4 / math.sqrt(6)).T
    x = unit(leaky(x.view(3, 8, 4, 4) + net.spread_bias[None, :, None, None]))
    x = unit(leaky(equal_conv(net.blocks[0][0].convolve, x)))
    coarse = equal_conv(net.pictures[0], x, gain=1)
    y = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for layer in net.blocks[1]:
        y = unit(leaky(equal_conv(layer.convolve, y)))
    fine = equal_conv(net.pictures[1], y, gain=1)
    faded = 0.7 * coarse.repeat_interleave(2, 2).repeat_interleave(2, 3) + 0.3 * fine
    for level, expected in ((0, coarse), (0.3, faded), (1, fine)):
        assert torch.allclose(net(z, level=level), expected)
    assert torch.allclose(net(z, level=0.3), net(7 * z, level=0.3), atol=1e-6)


@pytest.mark.parametrize("blur", [False, True])
def test_the_discriminator_is_the_written_out_one_while_fading_in(blur):
    net = Discriminator((3, 8, 8), 4, 8, stddev_group=1, blur=blur).double()
    images = torch.randn(3, 3, 8, 8).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()

    def halved(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))

    x = leaky(equal_conv(net.blocks[0].first, leaky(equal_conv(net.pictures[1], images))))
    if blur:
        row = torch.tensor([1, 2, 1]).double() / 4
        x = conv2d(x, row.outer(row).expand(4, 1, 3, 3), padding=1, groups=4)
        x = leaky(halved(equal_conv(net.blocks[0].second, x)))
    else:
        x = halved(leaky(equal_conv(net.blocks[0].second, x)))
    x = 0.7 * leaky(equal_conv(net.pictures[0], halved(images))) + 0.3 * x
    x = torch.cat([x, torch.full((3, 1, 4, 4), 1e-4).double()], 1)  # one picture a group: no deviation
    x = leaky(equal_conv(net.last, x)).flatten(1)
    x = leaky(x @ net.features.weight.T * math.sqrt(2 / 128) + net.features.bias)
    expected = x @ net.head.weight.T / math.sqrt(8) + net.head.bias
    assert torch.allclose(net(images, level=0.3), expected.flatten(), atol=1e-6)


@pytest.mark.parametrize("level", [0, 0.5])
def test_networks_can_be_differentiated_twice(level):
    # one picture a group: the deviation is computed in float32
    critic = Discriminator((1, 8, 8), 4, 4, num_classes=2, stddev_group=1, blur=True).double()
    images = torch.randn(2, 1, *((8, 8) if level else (4, 4)), dtype=torch.float64, requires_grad=True)

    def logits(images):
        return critic(images, torch.tensor([1, -1]), level=level)

    assert gradcheck(logits, (images,)) and gradgradcheck(logits, (images,))
    generator = Generator(3, (1, 8, 8), 4, 4).double()
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z: generator(z, level=level), (z,))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 24, 28), (4, 16, 16)], ids=str)
def test_layers_in_use_get_a_gradient_and_others_none(shape, classes):
    generator, critic = Generator(6, shape, 4, 8, classes), Discriminator(shape, 4, 8, classes)
    labels = torch.tensor([0, -1, 2]) if classes else None
    base, last = generator.plan.base, generator.plan.last
    reached = set()
    for level in (0, 0.5, *range(1, last + 1)):
        generator.zero_grad(), critic.zero_grad()
        images = generator(torch.randn(3, 6), labels, level=level)
        stage = math.ceil(level)
        assert images.shape == (3, shape[0], base[0] << stage, base[1] << stage)
        critic(images, labels, level=level).square().sum().backward()
        for net in (generator, critic):
            graded = {name for name, p in net.named_parameters() if p.grad is not None}
            assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
            pictures = {name.split(".")[1] for name in graded if name.startswith("pictures")}
            assert pictures == ({str(stage)} if level == stage else {str(stage - 1), str(stage)})
            blocks = {int(name.split(".")[1]) for name in graded if name.startswith("blocks")}
            assert blocks == set(range(stage + 1 if net is generator else stage))
            reached |= {(net, name) for name in graded}
    assert len(reached) == sum(len(list(net.parameters())) for net in (generator, critic))


@pytest.mark.parametrize("shape", [(3, 30, 30), (3, 33, 33), (3, 4, 4)], ids=str)
def test_impossible_sizes_are_refused_with_a_way_out(shape):
    for kind in (lambda: Generator(8, shape, 4), lambda: Discriminator(shape, 4)):
        with pytest.raises(RecipeError, match=rf"cannot .*{shape[1]} x {shape[2]} .*data\.size"):
            kind()


def test_a_network_that_does_not_grow_has_one_layer_that_makes_pictures():
    net = Generator(4, (3, 32, 32), 4, 8, grow_from=32)
    assert len(net.pictures) == 1 and net.level == 3
    assert net(torch.randn(1, 4), level=float(net.level)).shape == (1, 3, 32, 32)


# -- the family -------------------------------------------------------------------------------------------------------

SMALL = {"width": 4, "widest": 8, "z_dim": 8, "grow_from": 4}


def build(num_classes=0, **settings):
    return recipes.build(recipes.resolve("pggan", {"family": {**SMALL, **settings}}), (3, 16, 16), num_classes)


FADING = Progress(21875, 100_000)
"""7/8 of the first of two stages, which fill half of the run: three quarters faded in."""


def test_the_loss_is_the_written_out_one_while_fading_in():
    family, images = build(gamma=3.0), torch.randn(4, 3, 16, 16)
    level = family.level(FADING)
    assert level == pytest.approx(0.75)
    torch.manual_seed(5)
    loss = family.loss("critic", Batch(images), FADING)
    torch.manual_seed(5)
    real = pggan.shrunk(images, level, last=2)
    fake, share = family.generator(torch.randn(4, 8), level=level).detach(), torch.rand(4, 1, 1, 1)
    between = (share * real + (1 - share) * fake).requires_grad_(True)
    (slope,) = torch.autograd.grad(family.critic(between, level=level).sum(), between)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    on_real, on_fake = family.critic(real, level=level), family.critic(fake, level=level)
    expected = on_fake.mean() - on_real.mean() + 3 * penalty + 1e-3 * on_real.square().mean()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.manual_seed(5)
    generator = family.loss("generator", Batch(images), FADING)
    assert generator.total.item() == pytest.approx(-on_fake.mean().item(), rel=1e-4)


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
        loss = family.loss("critic", batch, Progress(0, 1))
        return loss.total.item(), loss.parts["penalty"].item()

    before, penalty = value()
    dial.fill_(5.0)
    assert value()[0] - before == pytest.approx(2 * penalty, rel=1e-3)


def test_pictures_have_the_level_of_the_weights_and_full_size():
    family, noise = build().eval(), seeded_noise([1, 2], (8,))
    first = family.sample(noise, Condition())
    assert first.shape == (2, 3, 16, 16)
    assert torch.equal(first, first[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))
    family.after_step(FADING)
    second = family.sample(noise, Condition())
    fine = second[:, :, ::2, ::2]
    assert torch.equal(second, fine.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.allclose(fine, family.generator(noise, level=0.75).clamp(-1, 1))


def test_a_run_made_longer_does_not_shrink():
    family = build()
    family.after_step(Progress(100, 100))
    assert family.level(Progress(100, 1000)) == 2
    copy = build()
    copy.load_state_dict(family.state_dict())
    assert copy.level(Progress(100, 1000)) == 2


@pytest.mark.parametrize("stop", [3, 5])
def test_resumption_is_exact_also_across_a_stage(tmp_path: Path, stop: int):
    """Ten steps; stages of 2.5 steps: 4 pixels until 1.25, 8 from 2.5, fading to 16 from 3.75, 16 from 5 on."""
    settings = {"family": SMALL}
    whole, first = (_trainer("pggan", tmp_path / name, 10, settings) for name in ("whole", "parts"))
    levels = []
    for _ in range(10):
        whole.step()
        levels.append(float(whole.family.generator.level))
    assert levels == pytest.approx([0, 0, 0.6, 1, 1.2, 2, 2, 2, 2, 2])
    for _ in range(stop):
        first.step()
    first.time_event("checkpoint")
    second = again(first)
    assert float(second.family.generator.level) == pytest.approx(levels[stop - 1])
    for _ in range(10 - stop):
        second.step()
    _require_equal(whole, second, "resumed differs")


def test_layers_that_begin_later_are_heated_from_then_on(tmp_path: Path):
    warm = {"langevin": {"temperature": 1e-3}}
    settings = {"family": SMALL, "optim": {"critic": warm, "generator": warm}}
    whole, first = (_trainer("pggan", tmp_path / name, 10, settings) for name in ("whole", "parts"))
    cold = _trainer("pggan", tmp_path / "cold", 10, {"family": SMALL})
    layer = "generator.blocks.2.0.convolve.weight"
    for step in range(10):
        whole.step()
        cold.step()
        kept = torch.equal(whole.family.get_parameter(layer), cold.family.get_parameter(layer))
        assert kept == (step < 4), "a layer that is not in use does not move"
        if step < 3:
            first.step()
    first.time_event("checkpoint")
    second = again(first)
    for _ in range(7):
        second.step()
    _require_equal(whole, second, "resumed differs")


def test_optimizers_begin_with_a_layer_when_it_begins(tmp_path: Path):
    trainer = _trainer("pggan", tmp_path, 10, {"family": SMALL})
    trainer.step()
    key = next(key for key in trainer.optimizer_tensors() if key.endswith("generator.blocks.0.0.convolve.weight/step"))
    assert not any("blocks.2" in name for name in trainer.optimizer_tensors())
    for _ in range(9):
        trainer.step()
    steps = trainer.optimizer_tensors()
    assert steps[key] == 10 and steps[key.replace("blocks.0", "blocks.2")] == 6


def test_weights_of_an_earlier_moment_draw_its_size(tmp_path: Path):
    trainer = _trainer("pggan", tmp_path, 10, {"family": SMALL})
    for _ in range(3):
        trainer.step()
    trainer.time_event("checkpoint")
    early = trainer.run.weights()
    pictures = draw(trainer.inference_twin(), [1, 2], [0, 1])
    for _ in range(7):
        trainer.step()
    family = load_model(early, "cpu").family
    assert family.generator.level == pytest.approx(0.6)
    assert torch.equal(draw(family, [1, 2], [0, 1]), pictures)
    assert torch.equal(pictures, pictures[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


def again(first: Trainer) -> Trainer:
    recipe: Recipe = first.recipe
    second = Trainer(recipe, recipes.build(recipe, (3, 16, 16), 3), Toy(), Toy(), first.run, Silent())
    assert second.restore()
    return second
