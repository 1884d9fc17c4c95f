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
from torch.utils._python_dispatch import TorchDispatchMode

from imagekiln.errors import UsageError
from imagekiln.optim.adaptive_samplers import PSGLD, SGNHT
from imagekiln.optim.dials import Dials, gradient_variance
from imagekiln.optim.gradient_noise import gradient_noise
from imagekiln.optim.langevin import describe, detach, langevin, place
from imagekiln.optim.noise import normal
from imagekiln.optim.samplers import BAOAB, SGHMC, SGLD, LeimkuhlerMatthews
from imagekiln.optim.temperature import linear

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
    **{
        kind.__name__: (lambda p, kind=kind: kind(p, lr=0.01, diffusion=1e-3, seed=7))
        for kind in (*SAMPLERS, SGNHT, PSGLD)
    },
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


class Reads(TorchDispatchMode):
    """Counts numbers that are read out of tensors, for each of which a program waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.99)])
def test_a_step_does_not_wait_for_each_parameter(betas):
    counts = []
    for num in (1, 50):
        parameters = [Parameter(torch.ones(2)) for _ in range(num)]
        optimizer = langevin(Adam(parameters, lr=0.1, betas=betas, fused=True), diffusion=0.1)
        with Reads() as reads:
            for _ in range(3):
                for parameter in parameters:
                    parameter.grad = torch.ones(2)
                optimizer.step()
        counts.append(reads.count)
    assert counts[0] == counts[1]


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
    with pytest.warns(UserWarning, match="anneals the noise already"):
        advance(model, optimizer, range(2, 3))
    advance(model, optimizer, range(3, 4))  # says it once
    assert same(before, model)


def test_a_schedule_of_progress_and_a_factor_of_the_group_scale_the_diffusion():
    theta = Parameter(torch.zeros(20_000))
    optimizer = langevin(SGD([theta], lr=1.0), diffusion=0.5, schedule=linear(), num_steps=2)
    for expected in (1.0, 0.5**0.5, 0.0):
        before = theta.detach().clone()
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        assert float((theta.detach() - before).std()) == pytest.approx(expected, rel=0.03)
    optimizer = langevin(SGD([theta], lr=1.0), diffusion=0.5)
    optimizer.param_groups[0]["noise_factor"] = 0.25
    before = theta.detach().clone()
    optimizer.step()
    assert float((theta.detach() - before).std()) == pytest.approx(0.5, rel=0.03)


def test_a_schedule_without_a_length_is_refused():
    for wrong in ({"schedule": linear()}, {"num_steps": 5}, {"schedule": linear(), "num_steps": 0}):
        with pytest.raises(UsageError, match="together with num_steps"):
            langevin(SGD(weights(), lr=0.1), diffusion=0.1, **wrong)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_trainer_that_places_its_steps_repeats_them_without_a_saved_count(name):
    """What it needs is the optimizer's memory and the number of the step: nothing of the noise is saved."""

    def go(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            place(optimizer, step=step, factor=0.5)
            advance(model, optimizer, range(step, step + 1))

    through, first = network(), network()
    go(through, ALL[name](through.parameters()), range(6))
    optimizer = ALL[name](first.parameters())
    go(first, optimizer, range(3))
    memory = copy.deepcopy(optimizer.state_dict()["state"])
    other = ALL[name](first.parameters())
    other.load_state_dict({"state": memory, "param_groups": other.state_dict()["param_groups"]})
    assert other.param_groups[0]["noise_step"] == 0
    go(first, other, range(3, 6))
    assert same(through, first)
    with pytest.raises(UsageError, match="factor of the diffusion"):
        place(other, step=0, factor=-1.0)
    place(SGD(weights(), lr=0.1), step=3)  # has no noise, and is left alone


# -- dials ------------------------------------------------------------------------------------------------------------


def test_the_four_dials_say_the_same():
    seen: list[Dials] = []
    known = {"num_data": 1000, "gradient_variance": 0.25, "report": seen.append}
    theta = [Parameter(torch.zeros(400))]
    for dial in ({"diffusion": 1e-4}, {"temperature": 0.1}, {"loss_budget": 0.02}, {"noise_ratio": 0.64}):
        optimizer = langevin(SGD(theta, lr=0.2, momentum=0.8, dampening=0.5), **dial, **known)
        theta[0].grad = torch.zeros(400)
        optimizer.step()
        optimizer.step()
    assert len(seen) == 4, "the report comes once, after the first step"
    for dials in seen:
        assert dials.diffusion == pytest.approx(1e-4) and dials.temperature == pytest.approx(0.1)
        # 2 D (1 - mu) / (eta (1 - t)) for each of 400 weights, over the gradient's variance
        assert dials.noise_ratio == pytest.approx(2e-4 * 0.2 / (0.2 * 0.5) * 400 / 0.25)
        assert dials.loss_budget == pytest.approx(1e-4 * 400 / 2) and dials.num_params == 400
    bare = describe(langevin(SGD(theta, lr=0.1), diffusion=1e-4))
    assert bare.temperature is None and bare.noise_ratio is None and "unknown without num_data" in str(bare)
    with pytest.raises(UsageError, match="no Langevin noise"):
        describe(SGD(theta, lr=0.1))


@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "adam", "rmsprop momentum", "rmsprop"])
def test_the_noise_ratio_is_the_variance_measured_where_the_gradient_enters(name):
    """Steps with a gradient noise of ratio times the variance, without Langevin noise, move the memory as much."""
    theta = Parameter(torch.full((50_000,), 1.0))
    optimizer = STOCK[name]([theta])
    for sign in (1, -1, 1):
        theta.grad = torch.full_like(theta, 0.3 * sign)
        optimizer.step()
    variance = 0.01 * theta.numel()
    langevin(optimizer, noise_ratio=1.0, gradient_variance=variance)
    assert describe(optimizer).noise_ratio == pytest.approx(1.0, rel=1e-4)
    noisy = copy.deepcopy(theta)
    quiet = STOCK[name]([noisy])
    quiet.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moved = []
    for parameter, each, sd in ((theta, optimizer, 0.0), (noisy, quiet, 0.1)):
        before = parameter.detach().clone()
        parameter.grad = 0.001 * torch.ones_like(parameter)
        if sd:  # a gradient that enters the velocity with this noise, second moments as they were
            parameter.grad = parameter.grad + sd * normal(parameter.numel(), seed=5, step=0, tensor="g")
        each.step()
        moved.append(float((parameter.detach() - before).std()))
    assert moved[0] == pytest.approx(moved[1], rel=0.12 if name != "adam" else 0.05)


def test_a_ratio_needs_to_know_the_gradient():
    with pytest.raises(UsageError, match="needs gradient_variance"):
        langevin(SGD(weights(), lr=0.1), noise_ratio=1.0)
    with pytest.raises(UsageError, match="take a few steps first"):
        langevin(Adam(weights(), lr=0.1), noise_ratio=1.0, gradient_variance=1.0)
    with pytest.raises(UsageError, match="at least two"):
        gradient_variance([[torch.zeros(2)]])
    gradients = [[torch.randn(500, generator=torch.Generator().manual_seed(k)), None] for k in range(50)]
    assert gradient_variance(gradients) == pytest.approx(500, rel=0.05)


# -- what else a step may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_climbing_is_descending_from_minus_the_loss(kind):
    paths = []
    for maximize in (False, True):
        theta = Parameter(torch.zeros(50))
        options = {"momentum": 0.9} if kind is SGD else {}
        optimizer = langevin(kind([theta], lr=0.1, maximize=maximize, **options), diffusion=0.01)
        for _ in range(4):
            theta.grad = (theta.detach() - 1) * (-1 if maximize else 1)
            optimizer.step()
        paths.append(theta.detach())
    assert torch.equal(*paths)


@pytest.mark.parametrize("law", ["gauss", "matched"])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_fused_grouped_and_looped_kernels_get_the_same_noise(kind, law):
    """Without a gradient the noise is all that moves SGD, so that the bits are compared; Adam's kernels round apart."""
    paths = []
    for kernel in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        theta = [Parameter(torch.zeros(300)), Parameter(torch.zeros(7, 3))]
        optimizer = langevin(kind(theta, lr=0.1, **kernel), diffusion=0.01, law=law)
        for _ in range(3):
            for parameter in theta:
                parameter.grad = torch.zeros_like(parameter) if kind is SGD else torch.ones_like(parameter)
            optimizer.step()
        paths.append(torch.cat([parameter.detach().flatten() for parameter in theta]))
    for other in paths[1:]:
        assert torch.equal(paths[0], other) if kind is SGD else torch.allclose(paths[0], other, rtol=1e-4, atol=1e-5)


def test_a_piece_of_a_tensor_gets_its_piece_of_the_noise():
    whole = Parameter(torch.zeros(1000))
    langevin(SGD([("w", whole)], lr=0.1), diffusion=0.1)
    for cuts in ([1000], [500, 500], [250, 250, 250, 250], [1, 998, 1]):
        pieces, start = [], 0
        for num in cuts:
            piece = Parameter(torch.zeros(num))
            piece.noise_start = start
            optimizer = langevin(SGD([("w", piece)], lr=0.1), diffusion=0.1)
            piece.grad = torch.zeros(num)
            optimizer.step()
            pieces.append(piece.detach())
            start += num
        expected = normal(1000, seed=0, step=0, tensor="w") * (2 * 0.1 * 0.1) ** 0.5
        assert torch.allclose(torch.cat(pieces), expected, atol=1e-7)


def test_bfloat16_weights_follow_steps_below_their_last_place():
    """A step of 1e-4 of a unit near 1 is lost by rounding to nearest; at random it arrives on average."""
    theta = Parameter(torch.ones(200_000, dtype=torch.bfloat16))
    sampler = SGLD([theta], lr=1e-4, diffusion=0.0)
    for _ in range(20):
        theta.grad = torch.ones_like(theta)
        sampler.step()
    moved = theta.detach().double() - 1
    assert abs(float(moved.mean()) + 20e-4) < 4 * float(moved.std()) / len(theta) ** 0.5 + 1e-5
    assert float(moved.std()) > 0


def test_bfloat16_weights_continue_bit_for_bit():
    def start() -> tuple[Parameter, SGHMC]:
        theta = Parameter(torch.ones(500, dtype=torch.bfloat16))
        return theta, SGHMC([theta], lr=0.01, diffusion=1e-3)

    def go(theta: Parameter, sampler: SGHMC, num: int) -> None:
        for _ in range(num):
            theta.grad = theta.detach().clone()
            sampler.step()

    through, sampler = start()
    go(through, sampler, 8)
    first, sampler = start()
    go(first, sampler, 3)
    second, other = start()
    second.data.copy_(first)
    other.load_state_dict(sampler.state_dict())
    go(second, other, 5)
    assert torch.equal(through, second)


# -- gradient noise ---------------------------------------------------------------------------------------------------


def test_gradient_noise_has_the_variance_of_its_step_and_leaves_the_global_generator_alone():
    theta = Parameter(torch.zeros(50_000))
    optimizer = gradient_noise(SGD([theta], lr=1.0), eta=0.3, gamma=0.55)
    state = torch.get_rng_state()
    for step in range(4):
        theta.grad = torch.ones_like(theta)
        optimizer.step()
        assert float(theta.grad.var()) == pytest.approx(0.3 / (1 + step) ** 0.55, rel=0.04)
        assert float(theta.grad.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UsageError, match="already"):
        gradient_noise(optimizer)
    with pytest.raises(UsageError, match="closure"):
        optimizer.step(lambda: torch.zeros(()))


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
    for index, entries in optimizer.state_dict()["state"].items():
        for key, tensor in entries.items():
            assert torch.equal(tensor, state["state"][index][key]), key


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
        ({"law": "cauchy", "diffusion": 0.1}, "No noise has the law 'cauchy'"),
        ({"temperature": 1.0}, "needs num_data"),
        ({"temperature": 1.0, "num_data": 0}, "at least 1"),
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
        (lambda: SGD([Parameter(torch.zeros(3), requires_grad=False)], lr=0.1), "frozen"),
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
    optimizer = langevin(SGD(parameters, lr=0.1), diffusion=0.1, schedule=lambda p: 1.0 - 3 * p, num_steps=6)
    parameters[0].grad = torch.zeros(3)
    for _ in range(3):
        optimizer.step()
    with pytest.raises(UsageError, match="step 3"):
        optimizer.step()


def test_a_parameter_the_loss_does_not_use_is_refused_in_the_first_step():
    used, unused = Parameter(torch.zeros(3)), Parameter(torch.zeros(2))
    optimizer = langevin(SGD([("a", used), ("b", unused)], lr=0.1), diffusion=0.1)
    used.grad = torch.zeros(3)
    with pytest.raises(UsageError, match=r"b .*no gradient in the first step"):
        optimizer.step()
    assert (used == 0).all()


def test_a_trainer_that_places_the_noise_may_begin_with_some_parameters_later():
    early, late = Parameter(torch.zeros(3)), Parameter(torch.zeros(2))
    optimizer = langevin(SGD([early, late], lr=0.1), diffusion=0.1)
    for step in range(2):
        place(optimizer, step=step)
        early.grad, late.grad = torch.zeros(3), torch.zeros(2) if step else None
        optimizer.step()
        assert (early != 0).all() and bool((late != 0).all()) == bool(step)


def test_another_list_of_parameters_is_refused_at_the_resume():
    a, b = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    state = langevin(SGD([("a", a), ("b", b)], lr=0.1), diffusion=0.1).state_dict()
    for other in ([("b", b), ("a", a)], [("a", a), ("c", b)], [("a", a), ("b", Parameter(torch.zeros(4)))]):
        with pytest.raises(UsageError, match="other parameters"):
            langevin(SGD(other, lr=0.1), diffusion=0.1).load_state_dict(state)
    same_list = langevin(SGD([("a", a), ("b", b)], lr=0.1), diffusion=0.5)
    same_list.load_state_dict(state)
    assert same_list.param_groups[0]["noise_diffusion"] == 0.1 and "noise_tensors" not in same_list.param_groups[0]


def test_wrong_settings_of_adaptive_samplers_are_refused():
    for make in (
        lambda: SGNHT(weights(), lr=0.1, diffusion=0.0),
        lambda: SGNHT(weights(), lr=0.1, friction=0.0, diffusion=0.1),
        lambda: PSGLD(weights(), lr=0.1, alpha=1.0, diffusion=0.1),
        lambda: PSGLD(weights(), lr=0.1, diffusion=0.1).freeze(),
    ):
        with pytest.raises(UsageError, match=r"diffusion|expected|first step"):
            make()
