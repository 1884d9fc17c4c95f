"""Augmentation: exact on known pictures, closed forms of colours and of the control, derivatives, and in families."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imagekiln import testing
from imagekiln.config import AugmentConfig
from imagekiln.core import Batch, Family, Progress
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.errors import RecipeError
from imagekiln.nets import augmentation as aug
from imagekiln.nets.adversarial import zero_centred_penalty
from imagekiln.nets.augmentation import Augmentation

FAMILIES = [name for name in registry.names() if "augment" in registry.load(name).Config.model_fields]
BETWEEN = ["wgan_gp", "pggan"]
"""Critics that are penalised between real pictures and fakes."""

EVERYTHING = {"ada": "blit,geometry,color,noise,cutout", "diffaugment": ""}


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def long(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def pictures(count: int, channels: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    torch.manual_seed(count)
    return torch.randn(count, channels, height, width, dtype=torch.float64)


def augmentation(policy: str, p: float, channels: int, transforms: str = "") -> Augmentation:
    augment = Augmentation(AugmentConfig(policy=policy, transforms=transforms), channels)
    augment.p.fill_(p)
    return augment


# -- when, and how often ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("policy", ["ada", "diffaugment"])
def test_nothing_changes_at_p_0(policy, channels, dtype):
    augment = augmentation(policy, 0.0, channels, EVERYTHING[policy])
    images = pictures(6, channels, 8, 12).to(dtype)
    assert augment(images).dtype == dtype and torch.equal(augment(images), images)


def test_without_a_policy_nothing_is_drawn_computed_or_stored():
    augment, images = Augmentation(AugmentConfig(), channels=7), pictures(2)
    before = torch.get_rng_state()
    assert augment(images) is images and torch.equal(before, torch.get_rng_state())
    augment.observe(torch.ones(1000))
    augment.adapt(0.5)
    assert not augment.state_dict() and not augment.dials()


P = 0.3
SHARES = {
    # of 16 pixels a shift by up to 2 rounds to 0 with probability 1/4, and a whole number from -2 to 2 is 0 with 1/5
    "ada": {"flip": P / 2, "turn": P * 3 / 4, "shift": P * 15 / 16, "inversion": P / 2}
    | dict.fromkeys(["scale", "rotate", "stretch", "slide", "brightness", "contrast", "hue", "saturation"], P)
    | dict.fromkeys(["noise", "cutout"], P),
    "diffaugment": {"color": 1 - (1 - P) ** 3, "translation": P * 24 / 25, "cutout": P},
}


@pytest.mark.parametrize(("policy", "name"), [(policy, name) for policy in SHARES for name in SHARES[policy]])
def test_each_transformation_changes_its_share_of_pictures(policy, name):
    count, expected = 800, SHARES[policy][name]
    images = torch.randn(count, 3, 16, 16)
    torch.manual_seed(1)
    changed = augmentation(policy, P, 3, name)(images)
    share = float(((changed - images).abs() > 1e-4).flatten(1).any(1).float().mean())  # more than rounding
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


def test_every_transformation_has_its_share_above():
    assert set(SHARES["ada"]) == {*aug.ADA, *aug.ADA_MORE} and set(SHARES["diffaugment"]) == set(aug.DIFFAUGMENT)


def test_transformations_are_drawn_picture_by_picture():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 8, 8).expand(16, -1, -1, -1)
    changed = Augmentation(AugmentConfig(policy="diffaugment"), 3)(image)
    assert len({tuple(row.flatten().tolist()) for row in changed}) == 16


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_blit_is_flip_turn_and_a_shift_into_the_mirrored_picture(flip, turns):
    images, down, right = pictures(2, 3, 6, 6), 2, -1
    moved = aug.blit(images, torch.tensor([flip] * 2), long(turns, turns), long(down, 0), long(right, 0))
    expected = torch.rot90(images.flip(3) if flip else images, turns, (2, 3))
    assert torch.equal(moved[1], expected[1])
    wide = np.pad(expected[0].numpy(), ((0, 0), (3, 3), (3, 3)), mode="symmetric")
    assert np.array_equal(moved[0].numpy(), wide[:, 3 - down : 9 - down, 3 - right : 9 - right])


def test_blit_turns_pictures_that_are_not_square_by_halves():
    images = pictures(1, 1, 4, 6)
    turned = aug.blit(images, torch.tensor([False]), long(2), long(0), long(0))
    assert torch.equal(turned, images.flip(2, 3))
    changed = aug.ada(pictures(32, 1, 4, 6), torch.tensor(1.0), ["turn"])
    originals = pictures(32, 1, 4, 6)
    half = (changed == originals.flip(2, 3)).flatten(1).all(1)
    same = (changed == originals).flatten(1).all(1)
    assert (half ^ same).all() and half.any() and same.any()


def test_translation_moves_zeros_in():
    images = pictures(3, 2, 5, 4)
    moved = aug.translate(images, long(2, -1, 9), long(-1, 0, 0))
    expected = torch.zeros_like(images)
    expected[0, :, 2:, :3] = images[0, :, :3, 1:]
    expected[1, :, :4] = images[1, :, 1:]
    assert torch.equal(moved, expected)


def test_cutout_is_a_box_of_zeros_cut_off_at_the_border():
    images = pictures(2, 3, 8, 8)
    cut = aug.cutout(images, long(4, 0), long(3, 7), (4, 4))
    expected = images.clone()
    expected[0, :, 2:6, 1:5] = 0
    expected[1, :, :2, 5:] = 0
    assert torch.equal(cut, expected)


def test_the_filter_is_an_orthogonal_wavelet_with_six_vanishing_moments():
    taps = double(*aug.FILTER)
    index = torch.arange(12, dtype=torch.float64)
    assert float(taps.sum()) == pytest.approx(math.sqrt(2), abs=1e-10)
    for shift in range(6):
        assert float((taps[2 * shift :] * taps[: 12 - 2 * shift]).sum()) == pytest.approx(float(shift == 0), abs=1e-10)
    for power in range(6):
        assert abs(float((taps * (-1) ** index * index**power).sum())) < 1e-8


def test_a_warp_that_moves_nothing_and_one_by_whole_pixels_are_exact_inside():
    images = pictures(2, 3, 20, 24)
    eye = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    moved = aug.warp(images, eye, double(0, 0, 3, -2).view(2, 2))
    expected = aug.blit(images, torch.zeros(2) > 0, long(0, 0), long(0, -2), long(0, 3))
    inside = (slice(None), slice(None), slice(7, -7), slice(9, -9))
    assert torch.allclose(moved[inside], expected[inside], atol=1e-10)


@pytest.mark.parametrize("angle", [0.4, math.pi / 2, math.pi, -2.0])
def test_a_warp_takes_a_smooth_spot_where_the_matrix_says(angle):
    """A round Gaussian spot, turned, shrunk and moved, against the formula of the spot at its new place and size."""
    y, x = torch.meshgrid(*(torch.arange(40, dtype=torch.float64) - 19.5,) * 2, indexing="ij")

    def spot(x0: float, y0: float, radius: float) -> torch.Tensor:
        return torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * radius**2))[None, None]

    scale, shift, start = 0.8, (1.3, -0.7), (3.0, 2.0)
    inverse = aug.rotation(double(angle)).mT / scale
    cosine, sine = math.cos(angle) * scale, math.sin(angle) * scale
    end = cosine * start[0] - sine * start[1] + shift[0], sine * start[0] + cosine * start[1] + shift[1]
    moved = aug.warp(spot(*start, 3.0), inverse, double(*shift)[None])
    error = (moved - spot(*end, 3.0 * scale)).abs()[:, :, 8:-8, 8:-8]  # from the corners its mirror images look in
    assert float(error.max()) < 0.02


def test_mirrored_places_agree_with_numpy():
    row = np.arange(5)
    wide = np.pad(row, 13, mode="symmetric")
    assert aug.mirrored(torch.arange(-13, 18), 5).long().tolist() == wide.tolist()


# -- colours ----------------------------------------------------------------------------------------------------------


def matrix_of_the_paper(brightness: float, contrast: float, invert: bool, hue: float, saturation: float):
    """The product of five 4 x 4 matrices on (r, g, b, 1), as the appendix of the ADA paper writes them."""
    v = np.array([1, 1, 1, 0]) / math.sqrt(3)
    lift = np.eye(4)
    lift[:3, 3] = brightness
    scale = np.diag([contrast, contrast, contrast, 1])
    householder = np.eye(4) - 2 * np.outer(v, v) * invert
    a, b, c = v[:3]
    cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
    turn = np.eye(4)
    turn[:3, :3] = np.eye(3) + math.sin(hue) * cross + (1 - math.cos(hue)) * cross @ cross
    grey = np.outer(v, v)
    saturate = grey + (np.eye(4) - grey) * saturation
    saturate[3, 3] = 1
    return saturate @ turn @ householder @ scale @ lift


def test_recolor_is_the_product_of_the_papers_matrices():
    settings = [(0.2, 1.3, False, 0.7, 0.4), (-0.3, 0.6, True, -2.5, 1.9)]
    images = pictures(2)
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*settings, strict=True)]
    columns[2] = columns[2] > 0
    changed = aug.recolor(images, *columns)
    for row, setting in enumerate(settings):
        matrix = torch.from_numpy(matrix_of_the_paper(*setting))
        four = torch.cat([images[row], torch.ones(1, 8, 8, dtype=torch.float64)])
        assert torch.allclose(changed[row], torch.einsum("ij,jhw->ihw", matrix, four)[:3], atol=1e-12)


def test_jitter_agrees_with_loops():
    images = pictures(2, 3, 4, 4)
    brightness, saturation, contrast = double(0.3, -0.2), double(0.0, 1.7), double(1.5, 0.5)
    expected = []
    for image, b, s, c in zip(images.numpy(), brightness.numpy(), saturation.numpy(), contrast.numpy(), strict=True):
        x = image + b
        x = s * x + (1 - s) * x.mean(0)
        expected.append(c * x + (1 - c) * x.mean())
    assert np.allclose(aug.jitter(images, brightness, saturation, contrast).numpy(), np.stack(expected))


@pytest.mark.parametrize("policy", ["ada", "diffaugment"])
def test_grey_is_a_picture_of_three_equal_channels(policy):
    grey = pictures(16, 1)
    augment = [augmentation(policy, 0.7, channels) for channels in (1, 3)]
    results = []
    for module, images in zip(augment, (grey, grey.expand(-1, 3, -1, -1)), strict=True):
        torch.manual_seed(4)
        results.append(module(images))
    assert torch.allclose(results[0].expand(-1, 3, -1, -1), results[1], atol=1e-12)


@pytest.mark.parametrize("policy", ["ada", "diffaugment"])
def test_alpha_is_moved_and_not_coloured(policy):
    images = pictures(16, 4)
    coloured = augmentation(policy, 0.7, 4, "color")(images)
    assert torch.equal(coloured[:, 3], images[:, 3]) and not torch.equal(coloured[:, :3], images[:, :3])
    twice = torch.cat([images[:, :3], images[:, :1]], dim=1)
    moved = augmentation(policy, 0.7, 4, "cutout")(twice)
    assert torch.equal(moved[:, 3], moved[:, 0]) and not torch.equal(moved, twice)


# -- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["ada", "diffaugment"])
@pytest.mark.parametrize("channels", [1, 4])
def test_first_and_second_derivatives_agree_with_differences(policy, channels):
    augment = augmentation(policy, 0.7, channels, EVERYTHING[policy])
    images = pictures(3, channels, 6, 6).requires_grad_()

    def seen(x):
        torch.manual_seed(5)
        return augment(x)

    assert torch.autograd.gradcheck(seen, (images,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: seen(x).sigmoid().square(), (images,), fast_mode=True)


@pytest.mark.parametrize("policy", ["ada", "diffaugment"])
def test_a_penalty_through_the_changes_agrees_with_differences(policy):
    """R1 as in StyleGAN2-ADA: the slope of D(T(x)) by x, and the gradient of its square by the weights of D."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Softplus(), nn.Linear(5, 1), nn.Flatten(0)).double()
    augment, real = augmentation(policy, 0.7, 3), pictures(4, 3, 4, 4)

    def penalty() -> torch.Tensor:
        torch.manual_seed(6)
        return zero_centred_penalty(lambda images: critic(augment(images)), real)

    weight, step = critic[1].weight, 1e-6
    (gradient,) = torch.autograd.grad(penalty(), weight)
    torch.manual_seed(7)
    direction = torch.randn_like(weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(float(penalty().detach()))
        with torch.no_grad():
            weight -= sign * step * direction
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


# -- the control ------------------------------------------------------------------------------------------------------


def controlled(**settings) -> Augmentation:
    return Augmentation(AugmentConfig(policy="ada", speed_kimg=10.0, **settings), 3)


def test_p_rises_along_a_line_while_the_discriminator_is_always_right_and_stops_at_its_limit():
    augment, seen = controlled(largest=0.8), []
    for _ in range(10):
        augment.observe(torch.full((500,), 3.0))
        augment.observe(torch.full((500,), 0.1))
        augment.adapt(0.0)
        seen.append(float(augment.p))
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8], abs=1e-6)


def test_p_falls_as_fast_as_it_rises_and_stops_at_0():
    augment, seen = controlled(p=0.25), []
    for _ in range(4):
        augment.observe(torch.cat([torch.ones(790), -torch.ones(210)]))  # a mean of 0.58, below 0.6
        augment.adapt(0.0)
        seen.append(float(augment.p))
    assert seen == pytest.approx([0.15, 0.05, 0.0, 0.0], abs=1e-6)


def test_p_is_corrected_when_enough_pictures_were_seen_and_not_in_evaluation_mode():
    augment = controlled()
    for _ in range(3):
        augment.observe(torch.ones(64))
        augment.adapt(0.0)
    assert float(augment.p) == 0 and float(augment.judged) == 192
    augment.eval().observe(torch.ones(64))
    augment.adapt(0.0)
    assert float(augment.p) == 0 and float(augment.judged) == 192
    augment.train().observe(torch.ones(64))
    augment.adapt(0.0)
    assert float(augment.p) == pytest.approx(0.0256) and float(augment.judged) == float(augment.signs) == 0


def test_logits_that_are_no_numbers_do_not_reach_p():
    augment = controlled()
    augment.observe(torch.tensor([math.nan] * 10 + [math.inf] * 990))
    augment.adapt(0.0)
    assert float(augment.p) == pytest.approx(0.1)


def test_the_control_is_a_function_of_its_state():
    first, second = controlled(), controlled()
    first.observe(torch.ones(300))
    second.load_state_dict(first.state_dict())
    for augment in (first, second):
        augment.observe(torch.ones(100))
        augment.adapt(0.0)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert set(first.state_dict()) == {"p", "signs", "judged"}
    assert first.dials()["augment_p"] is first.p


def test_a_ramp_is_half_a_cosine():
    augment = Augmentation(AugmentConfig(policy="ramp", p=0.1, largest=0.5), 3)
    seen = []
    for fraction in (0.0, 0.25, 0.5, 1.0):
        augment.observe(torch.ones(1000))
        augment.adapt(fraction)
        seen.append(float(augment.p))
    assert seen == pytest.approx([0.1, 0.3 - 0.2 * math.cos(math.pi / 4), 0.3, 0.5])


@pytest.mark.parametrize(
    ("settings", "channels", "words"),
    [
        ({"policy": "ada", "transforms": "blit,hu"}, 3, "no transformation 'hu'"),
        ({"policy": "diffaugment", "transforms": "blit"}, 3, "no transformation 'blit'"),
        ({"policy": "ada"}, 2, "2 channels"),
        ({"policy": "ada", "p": 0.9}, 3, "above family.augment.largest"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(settings, channels, words):
    with pytest.raises(RecipeError, match=words):
        Augmentation(AugmentConfig(**settings), channels)


# -- in families ------------------------------------------------------------------------------------------------------


def built(name: str, **settings):
    return recipes.build(testing._recipe(name, {"family": settings}), testing.SHAPE, testing.CLASSES)


def watched(name: str) -> tuple[Family, list[torch.Tensor]]:
    """A family that cuts a piece out of every picture, and what its discriminator or critic gets."""
    torch.manual_seed(0)
    family, seen = built(name, augment={"policy": "diffaugment", "transforms": "cutout"}), []
    opponent = family.get_submodule(family.phases[0].trains[0])
    opponent.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    return family, seen


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(BETWEEN)))
def test_the_discriminator_sees_nothing_but_changed_pictures(name):
    """With a piece cut out of every picture, each one it gets has that hole: real ones, fakes, and where penalised."""
    family, seen = watched(name)
    images = torch.rand(6, *testing.SHAPE) + 0.1
    for phase in family.phases:
        if phase.name == "path":
            continue  # lengths of paths need no discriminator
        seen.clear()
        family.loss(phase.name, Batch(images, torch.arange(6) % 3), Progress(0, 1000))
        assert seen, phase
        holes = torch.cat(seen).eq(0).all(1).flatten(1).sum(1)  # at least a quarter of an 8 x 8 box
        assert (holes >= 16).all(), phase


@pytest.mark.parametrize("name", BETWEEN)
def test_slopes_are_penalised_between_the_pictures_that_the_critic_sees(name):
    family, seen = watched(name)
    images = torch.rand(6, *testing.SHAPE) + 0.1
    family.loss("critic", Batch(images, torch.arange(6) % 3), Progress(0, 1000))
    *pair, between = seen
    real, fake = torch.cat(pair).flatten(1).chunk(2)
    apart, moved = real - fake, between.flatten(1) - fake
    share = (moved * apart).sum(1, keepdim=True) / apart.square().sum(1, keepdim=True)
    assert ((share >= 0) & (share <= 1)).all() and torch.allclose(share * apart, moved, atol=1e-5)
    assert all((images.view(6, *testing.SHAPE) == 0).all(1).sum() >= 6 * 16 for images in (real, fake))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_with_ada_is_continued_in_the_same_bits(name, tmp_path: Path):
    settings = {"family": {"augment": {"policy": "ada", "p": 0.5}, **registry.load(name).check_settings}}
    settings["family"] |= {"width": 8} if name in ("dcgan", "cgan", "sngan", "wgan", "vanilla_gan") else {}

    def trainer(folder: str):
        return testing._trainer(name, tmp_path / folder, steps=2, settings=settings)

    whole, first = trainer("whole"), trainer("parts")
    for _ in range(2):
        whole.step()
    first.step()
    first.time_event("checkpoint")
    second = trainer("parts")
    assert second.restore()
    assert float(second.family.augment.judged) > 0
    second.step()
    testing._require_equal(whole, second, "the continued run differs")


@pytest.mark.parametrize("name", FAMILIES)
def test_ada_is_observed_and_adapted_by_training(name):
    family = built(name, augment={"policy": "ada", "speed_kimg": 1.0}).train()
    family.augment.judged.fill_(aug.INTERVAL_NIMG)
    family.augment.signs.fill_(aug.INTERVAL_NIMG)
    images = torch.rand(6, *testing.SHAPE)
    family.loss(family.phases[0].name, Batch(images, torch.arange(6) % 3), Progress(0, 1000))
    assert float(family.augment.judged) == aug.INTERVAL_NIMG + 6
    family.after_step(Progress(0, 1000))
    assert float(family.dials()["augment_p"]) == pytest.approx((aug.INTERVAL_NIMG + 6) / 1000)


DIALS = {"wgan_gp": {"penalty_weight"}} | {name: {"gamma"} for name in ("pggan", "stylegan1", "stylegan2", "r3gan")}


@pytest.mark.parametrize("name", FAMILIES)
def test_dials_are_scalars_of_the_state_and_start_at_the_settings(name):
    plain = built(name)
    assert set(plain.dials()) == DIALS.get(name, set())
    state = plain.state_dict(keep_vars=True)
    assert not any(key.startswith("augment") for key in state)
    for key, dial in plain.dials().items():
        assert state[key] is dial and dial.ndim == 0
        assert float(dial) == pytest.approx(getattr(plain.config, key))


@pytest.mark.parametrize(("name", "phase"), [("wgan_gp", "critic"), ("stylegan2", "r1"), ("r3gan", "discriminator")])
def test_turning_a_dial_turns_its_penalty(name, phase):
    torch.manual_seed(0)
    family = built(name).eval()
    batch = Batch(torch.rand(6, *testing.SHAPE), torch.arange(6) % 3)
    ((key, dial),) = family.dials().items()
    totals = []
    for factor in (0.0, 1.0, 3.0):
        dial.fill_(getattr(family.config, key) * factor)
        torch.manual_seed(1)
        loss = family.loss(phase, batch, Progress(300, 1000))
        totals.append(float(loss.total.detach()))
    assert totals[1] > totals[0]
    assert totals[2] - totals[0] == pytest.approx(3 * (totals[1] - totals[0]), rel=1e-3)
