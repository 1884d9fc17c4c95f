"""Noise on stock optimizers and in samplers: what stays bit for bit, what is saved, what is refused."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from imagekiln.errors import UsageError
from imagekiln.optim.langevin import detach, langevin
from imagekiln.optim.samplers import BAOAB, SGHMC, SGLD, LeimkuhlerMatthews

STOCK = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, centered=True),
    "rmsprop momentum": lambda p: RMSprop(p, lr=0.01, momentum=0.9),
}
SAMPLERS = (SGLD, LeimkuhlerMatthews, SGHMC, BAOAB)
ALL: dict[str, Callable[[list], Optimizer]] = {
    **{name: (lambda p, make=make: langevin(make(p), diffusion=1e-3, seed=7)) for name, make in STOCK.items()},
    **{kind.__name__: (lambda p, kind=kind: kind(p, lr=0.1, diffusion=1e-3, seed=7)) for kind in SAMPLERS},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def advance(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", STOCK)
def test_without_temperature_it_is_the_optimizer_bit_for_bit(name):
    bare, cold, warm = network(), network(), network()
    advance(bare, STOCK[name](bare.parameters()), range(6))
    advance(cold, langevin(STOCK[name](cold.parameters()), temperature=0.0, num_data=10), range(6))
    advance(warm, langevin(STOCK[name](warm.parameters()), temperature=0.1, num_data=10), range(6))
    assert same(bare, cold)
    assert not same(bare, warm)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_cold_samplers_are_gradient_descent(kind):
    momentum = 0.9 if kind in (SGHMC, BAOAB) else 0.0
    bare, cold = network(), network()
    advance(bare, SGD(bare.parameters(), lr=0.05, momentum=momentum, weight_decay=0.1), range(10))
    advance(cold, kind(cold.parameters(), lr=0.05, diffusion=0.0, weight_decay=0.1), range(10))
    for a, b in zip(bare.parameters(), cold.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ALL)
def test_a_saved_state_continues_bit_for_bit(name):
    through = network()
    advance(through, ALL[name](through.parameters()), range(12))

    first = network()
    optimizer = ALL[name](first.parameters())
    advance(first, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(first)
    other = ALL[name](second.parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    advance(second, other, range(5, 12))
    assert same(through, second)


def test_diffusion_and_seed_are_part_of_the_state():
    model = network()
    hot = langevin(SGD(model.parameters(), lr=0.1), diffusion=0.5, seed=3)
    cold = langevin(SGD(model.parameters(), lr=0.1), diffusion=0.0, seed=4)
    cold.load_state_dict(hot.state_dict())
    assert cold.param_groups[0]["noise_diffusion"] == 0.5 and cold.param_groups[0]["noise_seed"] == 3


def test_a_state_saved_without_noise_is_continued_with_it():
    model = network()
    bare = SGD(model.parameters(), lr=0.1)
    advance(model, bare, range(2))
    noisy = langevin(SGD(model.parameters(), lr=0.1), diffusion=0.5)
    noisy.load_state_dict(bare.state_dict())
    before = copy.deepcopy(model)
    advance(model, noisy, range(2, 3))
    assert noisy.param_groups[0]["noise_diffusion"] == 0.5
    assert not same(before, model)


@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "adam", "SGHMC"])
def test_noise_follows_the_parameter_not_its_group(name):
    models = [network() for _ in range(3)]
    whole = list(models[0].named_parameters())
    split = list(models[1].named_parameters())
    turned = list(models[2].named_parameters())[::-1]
    advance(models[0], ALL[name]([{"params": whole}]), range(5))
    advance(models[1], ALL[name]([{"params": split[::2]}, {"params": split[1::2]}]), range(5))
    advance(models[2], ALL[name]([{"params": turned}]), range(5))
    assert same(models[0], models[1]) and same(models[0], models[2])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_groups_have_a_diffusion_of_their_own(momentum):
    theta, cold = Parameter(torch.zeros(50)), Parameter(torch.zeros(50))
    optimizer = SGD([{"params": [theta]}, {"params": [cold], "noise_diffusion": 0.0}], lr=0.1, momentum=momentum)
    langevin(optimizer, diffusion=0.1)
    late = Parameter(torch.zeros(50))
    optimizer.add_param_group({"params": [late]})
    for _ in range(2):
        for parameter in (theta, cold, late):
            parameter.grad = torch.zeros(50)
        optimizer.step()
    assert (cold == 0).all() and (theta != 0).all() and (late != 0).all()
    assert not torch.equal(theta, late)


def test_the_rate_of_the_moment_sets_the_noise():
    """Under a scheduler the first kick of plain SGD is sqrt(2 eta D) of the eta at that step."""
    theta = Parameter(torch.zeros(20_000))
    optimizer = langevin(SGD([theta], lr=1.0), diffusion=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.25)
    for expected in (1.0, 0.5, 0.25):
        before = theta.detach().clone()
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        assert float((theta.detach() - before).std()) == pytest.approx(expected, rel=0.03)
        scheduler.step()


def test_a_rate_of_zero_moves_nothing_and_breaks_nothing():
    model = network()
    optimizer = langevin(SGD(model.parameters(), lr=0.1, momentum=0.9), diffusion=0.1)
    advance(model, optimizer, range(2))
    before = copy.deepcopy(model)
    optimizer.param_groups[0]["lr"] = 0.0
    advance(model, optimizer, range(2, 4))
    assert same(before, model)


def test_a_schedule_scales_the_diffusion():
    theta = Parameter(torch.zeros(20_000))
    optimizer = langevin(SGD([theta], lr=1.0), diffusion=0.5, schedule=lambda step: 1.0 if step < 1 else 0.0)
    for moved in (True, False):
        before = theta.detach().clone()
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        assert torch.equal(before, theta) is not moved


@pytest.mark.parametrize("name", ALL)
def test_frozen_weights_gradients_and_the_global_generator_are_left_alone(name):
    model = network()
    optimizer = ALL[name](model.parameters())
    advance(model, optimizer, range(2))
    frozen = model[0].weight.detach().clone()
    optimizer.zero_grad()
    model[2].weight.grad = torch.ones_like(model[2].weight)
    state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert (model[2].weight.grad == 1).all()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "adam", "BAOAB"])
def test_a_closure_gives_the_same_path(name):
    plain, closed = network(), network()
    advance(plain, ALL[name](plain.parameters()), range(5))
    optimizer = ALL[name](closed.parameters())
    for step in range(5):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (closed(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() >= 0
        optimizer.zero_grad()  # so that no gradient is there before the next closure
    assert same(plain, closed)


@pytest.mark.parametrize("name", ["adamw fused", "sgd fused"])
def test_a_step_that_mixed_precision_skips_gets_no_noise(name):
    model = network()
    optimizer = ALL[name](model.parameters())
    advance(model, optimizer, range(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    scaler.scale(model(torch.ones(1, 5)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(before, model)
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    for place, entries in optimizer.state_dict()["state"].items():
        for key, tensor in entries.items():
            assert torch.equal(tensor, state["state"][place][key]), key


def test_noise_can_be_taken_away():
    bare, model = network(), network()
    advance(bare, SGD(bare.parameters(), lr=0.1), range(3))
    optimizer = detach(langevin(SGD(model.parameters(), lr=0.1), diffusion=1.0))
    advance(model, optimizer, range(3))
    assert same(bare, model)
    assert langevin(optimizer, diffusion=1.0) is optimizer
    with pytest.raises(UsageError, match="no Langevin noise"):
        detach(SGD(model.parameters(), lr=0.1))


# -- what is refused --------------------------------------------------------------------------------------------------


def weights() -> list[Parameter]:
    return [Parameter(torch.zeros(3))]


@pytest.mark.parametrize(
    ("dials", "words"),
    [
        ({}, "either diffusion"),
        ({"diffusion": 0.1, "temperature": 1.0, "num_data": 5}, "either diffusion"),
        ({"temperature": 1.0}, "needs num_data"),
        ({"temperature": 1.0, "num_data": 0}, "at least 1"),
        ({"diffusion": 0.1, "num_data": 5}, "belongs to temperature"),
        ({"diffusion": -0.1}, "not negative"),
        ({"diffusion": float("nan")}, "nan"),
        ({"diffusion": float("inf")}, "finite"),
        ({"temperature": float("nan"), "num_data": 3}, "nan"),
    ],
)
def test_wrong_dials_are_refused_everywhere(dials, words):
    for make in (lambda: langevin(SGD(weights(), lr=0.1), **dials), lambda: SGLD(weights(), lr=0.1, **dials)):
        with pytest.raises(UsageError, match=words):
            make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGD(weights(), lr=0.1, momentum=0.9, nesterov=True), "nesterov"),
        (lambda: SGD(weights(), lr=0.1, maximize=True), "maximize"),
        (lambda: Adam(weights(), lr=0.1, maximize=True), "negate"),
        (lambda: SGD(weights(), lr=0.1, momentum=1.0), "never forgets"),
        (lambda: torch.optim.NAdam(weights(), lr=0.1), "NAdam"),
        (lambda: torch.optim.LBFGS(weights()), "LBFGS"),
        (lambda: SGD([Parameter(torch.zeros(3, dtype=torch.bfloat16))], lr=0.1), "bfloat16"),
        (lambda: SGD([Parameter(torch.zeros(3, dtype=torch.complex64))], lr=0.1), "complex64"),
        (lambda: SGD([{"params": weights(), "noise_diffusion": -1.0}], lr=0.1), "not negative"),
        (lambda: langevin(SGD(weights(), lr=0.1), diffusion=0.1), "already"),
    ],
)
def test_optimizers_without_such_a_law_are_refused(make, words):
    with pytest.raises(UsageError, match=words):
        langevin(make(), diffusion=0.1)


def test_wrong_sampler_settings_are_refused():
    for wrong in ({"lr": -1.0}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "weight_decay": float("nan")}):
        with pytest.raises(UsageError, match="expected"):
            SGHMC(weights(), diffusion=0.1, **wrong)
    with pytest.raises(UsageError, match="float16"):
        SGLD([Parameter(torch.zeros(3, dtype=torch.float16))], lr=0.1, diffusion=0.1)


@pytest.mark.parametrize(
    "make", [lambda p: langevin(SGD(p, lr=0.1), diffusion=0.1), lambda p: SGLD(p, lr=0.1, diffusion=0.1)]
)
def test_sparse_gradients_are_refused(make):
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = make(table.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(UsageError, match="sparse=False"):
            optimizer.step()


def test_a_negative_schedule_is_refused_at_its_step():
    parameters = weights()
    optimizer = langevin(SGD(parameters, lr=0.1), diffusion=0.1, schedule=lambda step: 1.0 - step)
    parameters[0].grad = torch.zeros(3)
    optimizer.step()
    optimizer.step()
    with pytest.raises(UsageError, match="step 2"):
        optimizer.step()
