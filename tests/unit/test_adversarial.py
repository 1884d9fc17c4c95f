"""Adversarial losses, penalties and constraints against closed forms and float64 finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from imagekiln.nets import adversarial as adv

finite = st.floats(-20, 20)
CRITICS = [adv.cross_entropy_critic, adv.hinge_critic, adv.wasserstein_critic, adv.least_squares_critic]
GENERATORS = [
    adv.minimax_generator,
    adv.non_saturating_generator,
    adv.linear_generator,
    adv.least_squares_generator,
]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def smooth_critic(seed: int = 0, size: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 7), nn.Softplus(), nn.Linear(7, 1), nn.Flatten(0)).double()


# -- losses -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first call of a torch function is slow
@given(finite, finite, st.floats(0, 0.49), st.floats(0, 0.49))
def test_cross_entropy_is_written_with_logarithms(real, fake, smooth_real, smooth_fake):
    def log_sigma(d: float) -> float:
        return -math.log1p(math.exp(-d))

    a, b = 1 - smooth_real, smooth_fake
    expected = -(a * log_sigma(real) + (1 - a) * log_sigma(-real)) - (b * log_sigma(fake) + (1 - b) * log_sigma(-fake))
    loss = adv.cross_entropy_critic(tensor(real), tensor(fake), smooth_real=smooth_real, smooth_fake=smooth_fake)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert float(adv.minimax_generator(tensor(fake))) == pytest.approx(log_sigma(-fake), rel=1e-9)
    assert float(adv.non_saturating_generator(tensor(fake))) == pytest.approx(-log_sigma(fake), rel=1e-9)


@pytest.mark.parametrize(("smooth_real", "smooth_fake"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.2)])
@pytest.mark.parametrize("p_data", [0.1, 0.5, 0.8])
def test_the_best_discriminator_is_the_one_of_the_theory(smooth_real, smooth_fake, p_data):
    """At a point seen as real with share p and as fake with 1 - p the loss is least at (a p + b (1 - p))."""
    best = (1 - smooth_real) * p_data + smooth_fake * (1 - p_data)
    d = torch.logit(tensor(best)).requires_grad_()
    on_real = adv.cross_entropy_critic(d, tensor(0.0), smooth_real=smooth_real, smooth_fake=smooth_fake)
    on_fake = adv.cross_entropy_critic(tensor(0.0), d, smooth_real=smooth_real, smooth_fake=smooth_fake)
    (slope,) = torch.autograd.grad(p_data * on_real + (1 - p_data) * on_fake, d)
    assert abs(float(slope)) < 1e-12


@settings(deadline=None)  # the first call of a torch function is slow
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=5))
def test_hinge_wasserstein_and_least_squares(pairs):
    real, fake = (tensor(*side) for side in zip(*pairs, strict=True))
    n = len(pairs)
    hinge = sum(max(0.0, 1 - r) + max(0.0, 1 + f) for r, f in pairs) / n
    squares = sum((r - 1) ** 2 + f**2 for r, f in pairs) / n / 2
    assert float(adv.hinge_critic(real, fake)) == pytest.approx(hinge, abs=1e-9)
    assert float(adv.least_squares_critic(real, fake)) == pytest.approx(squares, abs=1e-9)
    assert float(adv.wasserstein_critic(real, fake)) == pytest.approx(sum(f - r for r, f in pairs) / n, abs=1e-9)
    assert float(adv.linear_generator(fake)) == pytest.approx(-sum(f for _, f in pairs) / n, abs=1e-9)
    assert float(adv.least_squares_generator(fake)) == pytest.approx(sum((f - 1) ** 2 for _, f in pairs) / n / 2)


@pytest.mark.parametrize("loss", CRITICS)
def test_critics_want_real_up_and_fake_down(loss):
    real, fake = torch.zeros(3, requires_grad=True), torch.full((3,), 0.1, requires_grad=True)
    loss(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()


@pytest.mark.parametrize("loss", GENERATORS)
def test_generators_want_their_fakes_up(loss):
    fake = torch.zeros(3, requires_grad=True)
    loss(fake).backward()
    assert (fake.grad < 0).all()


def test_only_minimax_loses_its_slope_where_the_discriminator_is_sure():
    slopes = {}
    for loss in (adv.minimax_generator, adv.non_saturating_generator):
        sure = tensor(-12.0).requires_grad_()
        (slope,) = torch.autograd.grad(loss(sure), sure)
        slopes[loss] = float(slope)
    sigma = 1 / (1 + math.exp(12))
    assert slopes[adv.minimax_generator] == pytest.approx(-sigma)
    assert slopes[adv.non_saturating_generator] == pytest.approx(sigma - 1)


# -- penalties --------------------------------------------------------------------------------------------------------


def test_penalties_of_a_linear_critic_have_a_closed_form():
    """D(x) = w x has the slope w everywhere: (|w| - 1)^2 and |w|^2, with gradients 2 (1 - 1 / |w|) w and 2 w."""
    w = torch.randn(12, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)

    def critic(images):
        return images.flatten(1) @ w

    norm = w.detach().norm()
    one, zero = adv.gradient_penalty(critic, real, fake), adv.zero_centred_penalty(critic, real)
    assert one.item() == pytest.approx(float((norm - 1) ** 2)) and zero.item() == pytest.approx(float(norm**2))
    assert torch.allclose(torch.autograd.grad(one, w)[0], 2 * (1 - 1 / norm) * w.detach())
    assert torch.allclose(torch.autograd.grad(zero, w)[0], 2 * w.detach())


def slopes_by_differences(critic, images, step=1e-5):
    """dD/dx by central differences, with no derivative of the program in it."""
    columns = []
    for index in range(images[0].numel()):
        shift = torch.zeros_like(images).flatten(1)
        shift[:, index] = step
        shift = shift.view_as(images)
        columns.append((critic(images + shift) - critic(images - shift)).detach() / (2 * step))
    return torch.stack(columns, dim=1)


def test_penalties_agree_with_finite_differences():
    critic = smooth_critic()
    real, fake = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    expected = slopes_by_differences(critic, real)
    assert torch.allclose(adv.input_gradients(critic, real), expected, atol=1e-8)
    assert adv.zero_centred_penalty(critic, real).item() == pytest.approx(float(expected.square().sum(1).mean()))
    torch.manual_seed(3)
    share = torch.rand(4, 1, 1, 1)
    between = slopes_by_differences(critic, share * real + (1 - share) * fake)
    torch.manual_seed(3)
    penalty = adv.gradient_penalty(critic, real, fake)
    assert penalty.item() == pytest.approx(float((between.norm(dim=1) - 1).square().mean()))


@pytest.mark.parametrize("kind", ["one", "zero"])
def test_second_derivatives_agree_with_finite_differences(kind):
    """The penalty's gradient with respect to every weight of the critic, by differences of the penalty."""
    critic = smooth_critic()
    real, fake = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)

    def penalty():
        torch.manual_seed(3)
        if kind == "one":
            return adv.gradient_penalty(critic, real, fake)
        return adv.zero_centred_penalty(critic, real)

    weight = critic[1].weight
    (gradient,) = torch.autograd.grad(penalty(), weight)
    differences, step = torch.zeros_like(gradient), 1e-6
    for place in [(row, column) for row in range(7) for column in range(12)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            values.append(penalty().detach())
            with torch.no_grad():
                weight[place] -= sign * step
        differences[place] = (values[0] - values[1]) / (2 * step)
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(gradient, differences, atol=1e-7)


def test_interpolates_lie_between_each_pair():
    real, fake = torch.zeros(64, 1, 1, 1), torch.ones(64, 1, 1, 1)
    seen = []

    def critic(images):
        seen.append(images.detach())
        return images.flatten()

    adv.gradient_penalty(critic, real, fake)
    (points,) = seen
    assert (points >= 0).all() and (points <= 1).all() and points.unique().numel() > 60


def test_penalties_work_without_gradients_around_them_and_with_frozen_weights():
    critic = smooth_critic().requires_grad_(False)
    real, fake = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    expected = adv.zero_centred_penalty(critic, real)
    with torch.no_grad():
        assert torch.equal(adv.zero_centred_penalty(critic, real), expected)
        assert adv.gradient_penalty(critic, real, fake).isfinite()


def test_penalties_are_float32_under_autocast():
    critic = smooth_critic().float()
    real = torch.randn(4, 3, 2, 2)
    expected = adv.zero_centred_penalty(critic, real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adv.zero_centred_penalty(critic, real), expected)
        assert adv.zero_centred_penalty(critic, real.bfloat16()).dtype == torch.float32


def test_drift_is_the_mean_square():
    assert float(adv.drift(tensor(1, -2, 3))) == pytest.approx(14 / 3)


def test_orthogonal_penalty_is_zero_on_rotations_and_has_the_known_gradient():
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert float(adv.orthogonal_penalty([rotation], diagonal=True)) < 1e-24
    assert float(adv.orthogonal_penalty([torch.diag(tensor(1, 2, 3)) @ rotation[:3]])) < 1e-24
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(adv.orthogonal_penalty([weight], diagonal=True), weight)
    w = weight.detach().flatten(1)
    assert torch.allclose(gradient.flatten(1), 4 * (w @ w.T - torch.eye(4)) @ w)
    (gradient,) = torch.autograd.grad(adv.orthogonal_penalty([weight, weight]), weight)
    assert torch.allclose(gradient.flatten(1), 8 * (w @ w.T * (1 - torch.eye(4))) @ w)


@settings(deadline=None)  # the first call of a torch function is slow
@given(st.lists(finite, min_size=1, max_size=6), st.floats(1e-3, 10))
def test_clipping_cuts_and_leaves_the_rest(values, largest):
    weight = nn.Parameter(tensor(*values))
    adv.clip_weights_([weight], largest)
    assert weight.requires_grad and weight.tolist() == [max(-largest, min(largest, value)) for value in values]
