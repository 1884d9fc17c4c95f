"""The stationary law of every method on quadratics, against its closed form with the bias of a finite step.

Chains are elements of one parameter, and each row has its curvature h. The energy h theta^2 / D, averaged over time, is
an independent number for each chain, so the standard error is known whatever the correlation in time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from imagekiln.optim.adaptive_samplers import PSGLD, SGNHT
from imagekiln.optim.langevin import langevin
from imagekiln.optim.samplers import BAOAB, SGHMC, SGLD, LeimkuhlerMatthews

RUNGS = (0.01, 0.1, 0.5, 1.0, 1.9)
D = 0.01
LR = 0.1
HUGE = 1e7
"""An eps far above any gradient: the preconditioner stands still at 1 / HUGE, and the law is exact."""


def noisy(kind: type[Optimizer], law: str = "matched", **options: object) -> Callable[[list[Parameter]], Optimizer]:
    return lambda parameters: langevin(kind(parameters, **options), diffusion=D, law=law)


def sampler(kind: type[Optimizer], **options: object) -> Callable[[list[Parameter]], Optimizer]:
    return lambda parameters: kind(parameters, **{"lr": LR, "diffusion": D, "law": "matched", **options})


def run(make: Callable, h_R: Tensor, num_chains: int = 3600, num_steps: int = 1200) -> tuple[Tensor, Tensor, Tensor]:
    """Energy and its standard error in units of the target D, and the correlation of neighbouring steps, by row."""
    h = h_R[:, None]
    start = torch.randn(len(h), num_chains, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = Parameter(start * (D / h).sqrt())
    optimizer = make([theta])
    energy, product = torch.zeros_like(theta.data), torch.zeros_like(theta.data)
    burn_in = num_steps // 4
    for step in range(num_steps):
        theta.grad = h * theta.detach()
        before = theta.detach().clone()
        optimizer.step()
        if step >= burn_in:
            energy += h * theta.detach().square() / D / (num_steps - burn_in)
            product += h * theta.detach() * before / D / (num_steps - burn_in)
    return energy.mean(1), energy.std(1) / num_chains**0.5, product.mean(1) / energy.mean(1)


def plain(x: Tensor) -> Tensor:
    return 1 / (1 - x / 2)


def heavy(x: Tensor) -> Tensor:
    return 1 / (1 - x / (2 * 1.9))


def none(x: Tensor) -> Tensor:
    return torch.ones_like(x)


LAWS = {
    "SGLD": (sampler(SGLD, law="gauss"), plain),
    "SGLD matched": (sampler(SGLD), plain),
    "pSGLD": (sampler(PSGLD, lr=LR * HUGE, eps=HUGE), plain),
    "LeimkuhlerMatthews": (sampler(LeimkuhlerMatthews), none),
    "SGHMC": (sampler(SGHMC), heavy),
    "BAOAB": (sampler(BAOAB), none),
    "sgd": (noisy(SGD, lr=LR), plain),
    "sgd momentum": (noisy(SGD, lr=LR, momentum=0.9, law="gauss"), heavy),
    "sgd dampening": (noisy(SGD, lr=4 * LR, momentum=0.9, dampening=0.75), heavy),
    "rmsprop": (noisy(RMSprop, lr=LR * HUGE, eps=HUGE), plain),
    "rmsprop momentum": (noisy(RMSprop, lr=LR * HUGE, eps=HUGE, momentum=0.9), heavy),
    "adam": (noisy(Adam, lr=10 * LR * HUGE, eps=HUGE), heavy),
    "adamw amsgrad": (noisy(AdamW, lr=10 * LR * HUGE, eps=HUGE, amsgrad=True, weight_decay=0), heavy),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_variance_is_the_closed_form_with_its_bias(name):
    make, law = LAWS[name]
    rungs = torch.tensor(RUNGS, dtype=torch.float64)
    measured, error, _ = run(make, rungs / LR)
    scores = (measured - law(rungs)) / error
    assert scores.abs().max() < 4, list(zip(measured.tolist(), law(rungs).tolist(), error.tolist(), strict=True))
    assert (error / measured).max() <= 0.01, "too few chains to tell one law from another"


@pytest.mark.parametrize("name", ["SGLD", "sgd"])
def test_neighbouring_steps_are_correlated_by_one_minus_the_step(name):
    rungs = torch.tensor(RUNGS[:4], dtype=torch.float64)
    _, _, correlation = run(LAWS[name][0], rungs / LR)
    assert torch.allclose(correlation, 1 - rungs, atol=0.01)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_a_moving_preconditioner_is_nearly_right(kind):
    """Gradients have the size sqrt(h D), so a step is eta sqrt(h / D)."""
    eta = 0.01
    rungs = torch.tensor([0.05, 0.2], dtype=torch.float64)
    measured, error, _ = run(noisy(kind, lr=eta, weight_decay=0), D * (rungs / eta) ** 2, num_steps=2000)
    assert ((measured - 1).abs() < 0.04 + 4 * error).all(), measured


def test_a_moving_preconditioner_with_noise_in_the_weights_is_not():
    class Weights(Adam):
        def step(self, closure=None):
            super().step()
            for theta in self.param_groups[0]["params"]:
                second = self.state[theta]["exp_avg_sq"] / (1 - 0.999 ** float(self.state[theta]["step"]))
                kick = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
                theta.data.add_(kick * (2 * 0.01 * D / (second.sqrt() + 1e-8)).sqrt())

    generator = torch.Generator().manual_seed(0)
    rungs = torch.tensor([0.05, 0.2], dtype=torch.float64)
    measured, error, _ = run(lambda p: Weights(p, lr=0.01), D * (rungs / 0.01) ** 2, num_steps=2000)
    assert ((measured - 1) > 0.1 + 10 * error).all(), measured


def test_the_temperature_of_a_posterior_is_that_of_the_number_of_data():
    """Linear regression, full batch: the variance is that of Bayes, with the bias of the step."""
    generator = torch.Generator().manual_seed(0)
    num_data, num_dims, noise, prior = 40, 3, 0.5, 2.0
    x_NK = torch.randn(num_data, num_dims, generator=generator, dtype=torch.float64)
    y_N = x_NK @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    y_N += noise * torch.randn(num_data, generator=generator, dtype=torch.float64)
    precision_KK = x_NK.T @ x_NK / noise**2 + torch.eye(num_dims, dtype=torch.float64) / prior**2
    mean_K = torch.linalg.solve(precision_KK, x_NK.T @ y_N / noise**2)
    for temperature in (0.1, 1.0):
        theta_CK = Parameter(mean_K.repeat(3000, 1))
        optimizer = SGD([theta_CK], lr=0.05, momentum=0.5, weight_decay=1 / (num_data * prior**2))
        langevin(optimizer, temperature=temperature, num_data=num_data)
        samples = []
        for step in range(400):
            theta_CK.grad = (theta_CK.detach() @ x_NK.T - y_N) @ x_NK / (num_data * noise**2)
            optimizer.step()
            if step >= 150 and step % 10 == 0:
                samples.append(theta_CK.detach().clone())
        lam_K, basis_KK = torch.linalg.eigh(precision_KK / num_data)
        draws_SCK = (torch.stack(samples) - mean_K) @ basis_KK
        expected_K = temperature / num_data / (lam_K * (1 - 0.05 * lam_K / (2 * 1.5)))
        per_chain_CK = draws_SCK.square().mean(0)
        error_K = per_chain_CK.std(0) / len(per_chain_CK) ** 0.5
        assert ((per_chain_CK.mean(0) - expected_K).abs() < 4 * error_K).all()
        assert (error_K / expected_K).max() < 0.02


def test_minibatch_noise_adds_the_heat_it_must():
    """Gradient noise of variance s^2 makes 1 + eta s^2 / (2 D) of SGLD's temperature."""
    generator = torch.Generator().manual_seed(0)
    h, extra = 2.0, 0.15
    theta = Parameter(torch.zeros(4000, dtype=torch.float64))
    optimizer = SGLD([theta], lr=LR, diffusion=D)
    energy = torch.zeros(4000, dtype=torch.float64)
    for step in range(600):
        jitter = torch.randn(4000, generator=generator, dtype=torch.float64)
        theta.grad = h * theta.detach() + extra * jitter
        optimizer.step()
        if step >= 100:
            energy += h * theta.detach().square() / 500
    expected = (D + LR * extra**2 / 2) / (1 - LR * h / 2)
    assert abs(float(energy.mean()) - expected) < 4 * float(energy.std()) / 4000**0.5


@pytest.mark.parametrize("extra", [0.0, 0.15])
def test_the_thermostat_takes_gradient_noise_out(extra):
    """One curvature a tensor: mean h theta^2 is D whatever the step, and the friction grows by eta s^2 / (2 D)."""
    generator = torch.Generator().manual_seed(0)
    rungs = torch.tensor(RUNGS[1:4], dtype=torch.float64)
    thetas = [Parameter(torch.zeros(4000, dtype=torch.float64)) for _ in rungs]
    optimizer = SGNHT(thetas, lr=LR, friction=0.2, diffusion=D, law="matched")
    energy = torch.zeros(len(thetas), 4000, dtype=torch.float64)
    for step in range(1500):
        for theta, h in zip(thetas, rungs / LR, strict=True):
            jitter = torch.randn(4000, generator=generator, dtype=torch.float64) if extra else 0.0
            theta.grad = h * theta.detach() + extra * jitter
        optimizer.step()
        if step >= 700:
            for row, theta, h in zip(energy, thetas, rungs / LR, strict=True):
                row += h * theta.detach().square() / D / 800
    for row, theta, x in zip(energy, thetas, rungs, strict=True):
        assert abs(float(row.mean()) - 1) < 4 * float(row.std()) / 4000**0.5 < 0.04
        # D (A + eta s^2 / (2 D)) / z over 1 - x / (2 (2 - z)) is D, solved for z by stepping
        wanted, z = 0.2 + LR * extra**2 / (2 * D), 0.2
        for _ in range(100):
            z = wanted / (1 - float(x) / (2 * (2 - z)))
        assert float(optimizer.state[theta]["friction"]) == pytest.approx(z, rel=0.1)


def test_a_frozen_preconditioner_is_exact_and_a_live_one_is_not():
    """A preconditioner learnt from gradients of the size sqrt(h D), then frozen: SGLD with the rates eta G."""
    eta, h = 2e-4, 0.5
    readings = []
    for frozen in (True, False):
        theta = Parameter(torch.zeros(20_000, dtype=torch.float64))
        sampler = PSGLD([theta], lr=eta, alpha=0.9, diffusion=D, law="matched")
        energy, expected = torch.zeros_like(theta.data), torch.ones_like(theta.data)
        for step in range(500):
            theta.grad = h * theta.detach()
            sampler.step()
            if step == 99 and frozen:
                sampler.freeze()
                root = (sampler.state[theta]["square_avg"] / (1 - 0.9**100)).sqrt() + 1e-5
                expected = 1 / (1 - eta * h / root / 2)
                theta.data.copy_(theta.data.sign() * (D / h * expected).sqrt())
            if step >= 100:
                energy += h * theta.detach().square() / D / 400
        score = (energy - expected).mean() / (energy - expected).std() * 20_000**0.5
        readings.append(abs(float(score)))
    assert readings[0] < 4 and readings[1] > 10, readings


def test_the_rate_of_escape_from_a_double_well_is_the_exact_one():
    """U = (x^2 - 1)^2: mean first passage from -1 to 1, (1 / D) int e^(U/D) int e^(-U/D), by quadrature."""
    heat, eta = 0.4, 0.01
    # Passages are looked for once a step: the barrier seems 0.5826 sqrt(2 D eta) farther (Broadie et al. 1997).
    end = 1 + 0.5826 * (2 * heat * eta) ** 0.5
    grid = np.linspace(-4, end, 200_001)
    potential = (grid**2 - 1) ** 2 / heat
    inner = np.cumsum(np.exp(-potential)) * (grid[1] - grid[0])
    outer = np.exp(potential[grid >= -1]) * inner[grid >= -1]
    exact = outer.sum() * (grid[1] - grid[0]) / heat
    theta = Parameter(torch.full((6000,), -1.0))
    sampler = LeimkuhlerMatthews([theta], lr=eta, diffusion=heat, law="matched")
    passages, num_steps, burn_in = 0, 5000, 1500
    for step in range(num_steps):
        x = theta.detach()
        theta.grad = 4 * x * (x.square() - 1)
        sampler.step()
        there = theta.detach() >= 1
        passages += int(there.sum()) if step >= burn_in else 0
        theta.data.masked_fill_(there, -1.0)
    measured = 6000 * (num_steps - burn_in) * eta / passages  # renewals, once started at random, come at this rate
    assert measured == pytest.approx(exact, rel=0.05)
