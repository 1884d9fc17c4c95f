"""D from a budget of loss: the closed loop on quadratics, whose excess over the mean of a block is known exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer

from imagekiln.errors import UsageError
from imagekiln.optim import BAOAB, auto, langevin
from imagekiln.optim.auto import BudgetControl
from imagekiln.optim.temperature import linear

LR, EVERY, WINDOW = 0.1, 5, 40


def cost(h: float, num: int) -> float:
    """Excess over the mean of a block of `num` weights of curvature h for a D of 1 under SGD.

    theta is an AR(1) process of variance D / (h (1 - eta h / 2)); the mean of n samples correlated by r has the share
    ((1 + r) / (1 - r) - 2 r (1 - r^n) / (n (1 - r)^2)) / n of it.
    """
    r, n = (1 - LR * h) ** EVERY, WINDOW
    kept = ((1 + r) / (1 - r) - 2 * r * (1 - r**n) / n / (1 - r) ** 2) / n
    return num / 2 / (1 - LR * h / 2) * (1 - kept)


def train(
    optimizer: Optimizer,
    control: BudgetControl,
    gradient: Callable[[], Tensor],
    loss: Callable[[], Tensor],
    num_steps: int,
) -> list[float]:
    """D after each measurement."""
    (theta,) = optimizer.param_groups[0]["params"]
    found = []
    for step in range(1, num_steps + 1):
        theta.grad = gradient()
        optimizer.step()
        control.step(loss)
        if step % EVERY == 0:
            found.append(control.diffusion)
    return found


def spring(h: Tensor, start: float = 0.0) -> tuple[Parameter, Callable[[], Tensor], Callable[[], Tensor]]:
    theta = Parameter(torch.full_like(h, start))
    return theta, lambda: h * theta.detach(), lambda: (h * theta.square()).sum() / 2


@pytest.mark.parametrize("start", [0.0, 3.0])
def test_the_loop_spends_the_budget_on_the_weights_that_the_loss_holds(start: float) -> None:
    """Half of the weights are free: the open loop spends half of the budget, the closed one all of it."""
    num, budget = 2000, 0.2
    h = torch.cat([torch.ones(num // 2), torch.zeros(num // 2)]).double()
    theta, gradient, loss = spring(h, start)
    optimizer = SGD([theta], lr=LR)
    control = auto(optimizer, budget, every=EVERY, window=WINDOW, law="matched")
    assert control.diffusion == pytest.approx(2 * budget / num) and control.excess is None
    each = train(optimizer, control, gradient, loss, 3000)
    expected = budget / cost(1.0, num // 2)
    assert expected > 1.9 * 2 * budget / num
    # An excess is known to sqrt(2 / 1000) = 4 %, and the last 200 measurements hold over 40 that are independent.
    assert sum(each[-200:]) / 200 == pytest.approx(expected, rel=0.04)
    assert control.excess == pytest.approx(budget, rel=0.06)
    assert max(each) < 1.3 * expected, "it overshoots"


def test_noise_gets_what_minibatches_leave_of_the_budget() -> None:
    num, budget, heat = 2000, 0.2, 1e-4
    theta, gradient, loss = spring(torch.ones(num, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)

    def noisy() -> Tensor:
        # eta s^2 / 2 is the diffusion that gradient noise of variance s^2 makes by itself
        noise = torch.randn(num, generator=generator, dtype=torch.float64)
        return gradient() + (2 * heat / LR) ** 0.5 * noise

    optimizer = SGD([theta], lr=LR)
    control = auto(optimizer, budget, every=EVERY, window=WINDOW, law="matched")
    each = train(optimizer, control, noisy, loss, 2400)
    assert sum(each[-200:]) / 200 == pytest.approx(budget / cost(1.0, num) - heat, rel=0.05)

    optimizer = SGD([theta], lr=LR)
    control = auto(optimizer, budget / 10, every=EVERY, window=WINDOW, law="matched")
    each = train(optimizer, control, noisy, loss, 2000)
    assert each[-1] < 0.05 * each[0], "minibatches alone cost more than the budget, and D has to fall"


def test_a_sampler_follows_its_budget_too() -> None:
    num, budget = 4000, 0.2
    theta, gradient, loss = spring(torch.full((num,), 2.0, dtype=torch.float64))
    sampler = BAOAB([theta], lr=LR, momentum=0.5, diffusion=1.0, law="matched")
    control = auto(sampler, budget, every=EVERY, window=WINDOW)
    assert control.diffusion == pytest.approx(2 * budget / num), "it starts anew, from the budget"
    each = train(sampler, control, gradient, loss, 3000)
    assert sum(each[-200:]) / 200 == pytest.approx(2 * budget / num, rel=0.08)  # exact but for what the average keeps


def test_a_falling_schedule_does_not_raise_the_diffusion() -> None:
    num, budget = 4000, 0.2
    theta, gradient, loss = spring(torch.ones(num, dtype=torch.float64))
    optimizer = SGD([theta], lr=LR)
    control = auto(optimizer, budget, every=EVERY, window=WINDOW, law="matched", schedule=linear(), num_steps=3000)
    each = train(optimizer, control, gradient, loss, 3000)
    assert each[-1] == pytest.approx(budget / cost(1.0, num), rel=0.15)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_continued_training_repeats_bit_for_bit(kind: type[Optimizer]) -> None:
    h = torch.linspace(0.1, 2.0, 50)

    def build() -> tuple[Optimizer, BudgetControl, tuple]:
        theta, gradient, loss = spring(h, 1.0)
        options = {"momentum": 0.5} if kind is SGD else {"eps": 1e-3}
        optimizer = kind([theta], lr=0.05, **options)
        return optimizer, auto(optimizer, 0.1, every=3, window=7, seed=5), (gradient, loss)

    whole, control, functions = build()
    train(whole, control, *functions, 200)
    first, control, functions = build()
    train(first, control, *functions, 103)
    second, resumed, functions = build()
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["params"][0].data.copy_(first.param_groups[0]["params"][0].data)
    train(second, resumed, *functions, 97)
    ours, theirs = (o.param_groups[0] for o in (second, whole))
    assert torch.equal(ours["params"][0], theirs["params"][0])
    for key in ("noise_diffusion", "auto_excess", "auto_diffusion", "auto_num", "auto_step"):
        assert ours[key] == theirs[key]
    assert theirs["noise_diffusion"] != 0.2 / 50, "D has moved, or there was nothing to repeat"


def test_measuring_changes_nothing_and_both_losses_see_the_same_random_numbers() -> None:
    theta = Parameter(torch.ones(20))
    optimizer = SGD([theta], lr=0.0)  # nothing moves, so the average is where the weights are
    control = auto(optimizer, 0.1, every=1, window=2)
    seen: list[float] = []

    def loss() -> Tensor:
        value = (theta * torch.rand(20)).sum()
        seen.append(float(value))
        return value

    state = torch.get_rng_state()
    for _ in range(6):
        theta.grad = torch.zeros(20)
        optimizer.step()
        control.step(loss)
    assert len(seen) == 8 and seen[0] == seen[1], "two evaluations after each step from the third on"
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(theta, torch.ones(20))


def test_groups_keep_the_ratio_of_their_diffusions() -> None:
    parameters = [Parameter(torch.zeros(10)), Parameter(torch.zeros(30))]
    groups = [{"params": parameters[:1], "noise_diffusion": 3.0}, {"params": parameters[1:], "noise_diffusion": 1.0}]
    optimizer = langevin(SGD(groups, lr=0.1), diffusion=0.5)
    control = auto(optimizer, 0.2)
    hot, cool = (group["noise_diffusion"] for group in optimizer.param_groups)
    assert hot == pytest.approx(3 * cool) and control.diffusion == pytest.approx(2 * 0.2 / 40)


def test_a_weight_that_is_never_trained_is_left_out() -> None:
    used, unused = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    optimizer = langevin(Adam([used], lr=0.1), diffusion=0.1)
    control = auto(optimizer, 0.1, every=1, window=1)
    for step in range(4):
        if step == 1:
            optimizer.add_param_group({"params": [unused]})
        used.grad = torch.ones(3)
        optimizer.step()
        control.step(lambda: used.sum())
    assert unused not in optimizer.state
    unused.grad, used.grad = torch.ones(3), torch.ones(3)
    optimizer.step()  # Adam begins its memory as it should
    assert "exp_avg" in optimizer.state[unused]


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    theta = Parameter(torch.zeros(3))
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="above 0"):
            auto(SGD([theta], lr=0.1), budget)
    with pytest.raises(UsageError, match="at least 1"):
        auto(SGD([theta], lr=0.1), 0.1, every=0)
    with pytest.raises(UsageError, match="noise already"):
        auto(langevin(SGD([theta], lr=0.1), diffusion=0.1), 0.1, law="matched")
    with pytest.raises(UsageError, match="finite"):
        auto(SGD([theta], lr=0.1), float("inf"))
