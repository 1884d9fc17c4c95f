"""Thermometers, and the bugs of published implementations: each is built here and must be caught."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, RMSprop

from imagekiln.errors import UsageError
from imagekiln.optim.langevin import langevin
from imagekiln.optim.samplers import BAOAB, SGHMC, SGLD, LeimkuhlerMatthews
from imagekiln.optim.thermometer import Reading, Verdict, configurational, kinetic, verify

LR, MU, D = 0.1, 0.9, 1e-3


class Loop:
    """A home-made optimizer: a rule that changes theta, with a velocity of its own."""

    def __init__(self, parameters: list[Parameter], rule: Callable[[Loop, Tensor, Tensor], None]) -> None:
        (self.theta,) = parameters
        self.param_groups = [{"lr": LR}]
        self.velocity = torch.zeros_like(self.theta)
        self.rule = rule

    def step(self) -> None:
        assert self.theta.grad is not None
        self.rule(self, self.theta.grad, torch.randn_like(self.theta))


# -- rules ------------------------------------------------------------------------------------------------------------


def right(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.theta.add_(-LR * g + math.sqrt(2 * LR * D) * xi)


def no_rate_in_the_noise(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.theta.add_(-LR * g + math.sqrt(2 * D) * xi)


def rate_as_standard_deviation(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.theta.add_(-LR * g + LR * math.sqrt(2 * D) * xi)


def variance_as_standard_deviation(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.theta.add_(-LR * g + 2 * LR * D * xi)


def diffusion_as_standard_deviation(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.theta.add_(-LR * g + D * xi)


def no_factor_two(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.theta.add_(-LR * g + math.sqrt(LR * D) * xi)


def noise_after_momentum(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.velocity.mul_(MU).add_(g)
    loop.theta.add_(-LR * loop.velocity + math.sqrt(2 * LR * D) * xi)


def momentum_without_friction_in_the_noise(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.velocity.mul_(MU).add_(g + math.sqrt(2 * D / LR) * xi)
    loop.theta.sub_(LR * loop.velocity)


def root_of_the_wrong_thing(loop: Loop, g: Tensor, xi: Tensor) -> None:
    """`2 * lr * alpha ** 0.5` where `(2 * lr * alpha) ** 0.5` was meant."""
    loop.velocity.mul_(MU).add_(-LR * g + 2 * LR * math.sqrt((1 - MU) * D) * xi)
    loop.theta.add_(loop.velocity)


def momentum_that_means_friction(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.velocity.mul_(1 - MU).add_(g + math.sqrt(2 * D * (1 - MU) / LR) * xi)
    loop.theta.sub_(LR * loop.velocity)


def explicit_euler(loop: Loop, g: Tensor, xi: Tensor) -> None:
    """Old momentum and old gradient: the bias is about 1 / (1 - eta h / friction), and it runs away above 1."""
    friction = 0.1
    loop.theta.add_(LR * loop.velocity)
    loop.velocity.add_(-LR * g - LR * friction * loop.velocity + math.sqrt(2 * friction * LR * D) * xi)


def resampled_to_zero(loop: Loop, g: Tensor, xi: Tensor) -> None:
    """A velocity that is "drawn anew" as 0 takes the heat away."""
    if float(torch.rand(())) < 0.2:
        loop.velocity.zero_()
    loop.velocity.mul_(MU).add_(g + math.sqrt(2 * D * (1 - MU) / LR) * xi)
    loop.theta.sub_(LR * loop.velocity)


def nesterov(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.velocity.mul_(MU).add_(g + math.sqrt(2 * D * (1 - MU) / LR) * xi)
    loop.theta.sub_(LR * (g + MU * loop.velocity))


def noise_that_never_arrives(loop: Loop, g: Tensor, xi: Tensor) -> None:
    loop.theta.sub_(LR * g)


MUSEUM = [
    no_rate_in_the_noise,
    rate_as_standard_deviation,
    variance_as_standard_deviation,
    diffusion_as_standard_deviation,
    no_factor_two,
    noise_after_momentum,
    momentum_without_friction_in_the_noise,
    root_of_the_wrong_thing,
    momentum_that_means_friction,
    explicit_euler,
    resampled_to_zero,
    nesterov,
    noise_that_never_arrives,
]


@pytest.mark.parametrize("rule", MUSEUM, ids=lambda rule: rule.__name__)
def test_the_bugs_of_the_museum_are_caught(rule):
    verdict = verify(lambda parameters: Loop(parameters, rule), diffusion=D, num_steps=900)
    assert not verdict.agrees, str(verdict)
    off_by = max(abs(r.diffusion - D) / max(r.standard_error, 1e-12) for r in verdict.readings)
    assert off_by > 10, "caught, but hardly"


def test_a_right_loop_is_not_caught():
    verdict = verify(lambda parameters: Loop(parameters, right), diffusion=D)
    assert verdict.agrees, str(verdict)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: langevin(SGD(p, lr=LR), diffusion=D),
        lambda p: langevin(SGD(p, lr=LR, momentum=MU, weight_decay=1.0), diffusion=D),
        lambda p: langevin(Adam(p, lr=0.01), diffusion=D),
        lambda p: langevin(RMSprop(p, lr=0.01, alpha=0.999, momentum=MU), diffusion=D),
        *(lambda p, kind=kind: kind(p, lr=LR, diffusion=D) for kind in (SGLD, LeimkuhlerMatthews, SGHMC, BAOAB)),
    ],
    ids=["sgd", "sgd momentum", "adam", "rmsprop momentum", "SGLD", "LeimkuhlerMatthews", "SGHMC", "BAOAB"],
)
def test_ours_agree(make):
    verdict = verify(make)
    assert verdict.requested == D
    assert verdict.agrees, str(verdict)
    assert verdict.standard_error < 0.02 * D
    assert "as asked for" in str(verdict)


def test_a_verdict_says_what_is_wrong():
    hot = verify(lambda p: Loop(p, no_rate_in_the_noise), diffusion=D)
    assert hot.has_temperature and f"{hot.diffusion / D:.3g} times what was asked for" in str(hot)
    assert "no temperature" in str(verify(lambda p: Loop(p, noise_after_momentum), diffusion=D))
    assert "none was asked for" in str(verify(lambda p: Loop(p, right)))
    away = verify(lambda p: SGLD(p, lr=LR, diffusion=D), curvatures=[1.0, 1000.0])
    assert not away.stable and not away.agrees and "runs away" in str(away)
    assert "not what was asked for (0)" in str(Verdict(0.0, (1.0,), (Reading(1.0, 0.1),)))


def test_a_verdict_is_repeatable_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = (verify(lambda p: Loop(p, right), num_chains=50, num_steps=60) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())


def test_springs_that_cannot_be_chosen_are_asked_for():
    class NoRate:
        def __init__(self, parameters: list[Parameter]) -> None: ...

        def step(self) -> None: ...

    with pytest.raises(UsageError, match="curvatures"):
        verify(NoRate)
    with pytest.raises(UsageError, match="diffusion above 0"):
        verify(lambda p: Adam(p, lr=0.1))
    with pytest.raises(UsageError, match="greater than 0"):
        verify(NoRate, curvatures=[0.0, 1.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: langevin(SGD(p, lr=LR, momentum=MU), diffusion=D),
        lambda p: langevin(SGD(p, lr=4 * LR, momentum=MU, dampening=0.75), diffusion=D),
        lambda p: langevin(RMSprop(p, lr=LR * 1e7, eps=1e7, momentum=MU), diffusion=D),
        lambda p: langevin(Adam(p, lr=LR * 1e8, eps=1e7), diffusion=D),
        lambda p: SGHMC(p, lr=LR, momentum=MU, diffusion=D),
        lambda p: BAOAB(p, lr=LR, momentum=MU, diffusion=D),
    ],
    ids=["sgd", "dampening", "rmsprop", "adam", "SGHMC", "BAOAB"],
)
def test_the_velocity_has_the_temperature_that_was_asked_for(make):
    theta = Parameter(torch.zeros(40_000, dtype=torch.float64))
    optimizer = make([theta])
    for _ in range(200):
        theta.grad = 0.1 * theta.detach()
        optimizer.step()
    reading = kinetic(optimizer)
    assert reading.standard_error == pytest.approx(reading.diffusion * math.sqrt(2 / 40_000))
    exact = D if isinstance(optimizer, BAOAB) else D / (1 - 0.1 * LR / (2 * (1 + MU)))
    assert abs(reading.diffusion - exact) < 4 * reading.standard_error


def test_the_heat_of_minibatches_is_in_the_velocity():
    """Gradient noise of variance s^2 makes eta s^2 / (2 (1 - mu)) of kinetic temperature without any noise of ours."""
    generator = torch.Generator().manual_seed(0)
    theta = Parameter(torch.zeros(40_000, dtype=torch.float64))
    optimizer = SGD([theta], lr=LR, momentum=MU)
    for _ in range(200):
        theta.grad = 0.3 * torch.randn(40_000, generator=generator, dtype=torch.float64)
        optimizer.step()
    reading = kinetic(optimizer)
    assert abs(reading.diffusion - LR * 0.3**2 / (2 * (1 - MU))) < 4 * reading.standard_error


def test_what_has_no_velocity_has_no_kinetic_temperature():
    for optimizer in (SGD([Parameter(torch.zeros(3))], lr=LR), BAOAB([Parameter(torch.zeros(3))], lr=LR, diffusion=D)):
        with pytest.raises(UsageError, match="no velocity"):
            kinetic(optimizer)


def test_the_configurational_temperature_is_that_of_the_samples():
    """Exact draws of exp(-L / D) for a quartic L, drawn on a fine grid."""
    grid = torch.linspace(-3, 3, 20_001, dtype=torch.float64)
    density = (-(grid**4 / 4 + grid**2 / 2) / 0.3).exp()
    draws = torch.multinomial(density, 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    positions_SD = grid[draws].view(40, 10_000)
    reading = configurational(positions_SD, positions_SD**3 + positions_SD)
    assert abs(reading.diffusion - 0.3) < 4 * reading.standard_error
    assert reading.standard_error < 0.002


@pytest.mark.parametrize("shapes", [((1, 3), (1, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_samples_that_do_not_fit_are_refused(shapes):
    with pytest.raises(UsageError, match="equal shapes"):
        configurational(*(torch.zeros(shape) for shape in shapes))
