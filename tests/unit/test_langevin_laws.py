"""The stationary law of every method on quadratics, against its closed form with the bias of a finite step.

Chains are elements of one parameter, and each row has its curvature h. The energy h theta^2 / D, averaged over time, is
an independent number for each chain, so the standard error is known whatever the correlation in time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from imagekiln.optim.langevin import langevin
from imagekiln.optim.samplers import BAOAB, SGHMC, SGLD, LeimkuhlerMatthews

RUNGS = (0.01, 0.1, 0.5, 1.0, 1.9)
D = 0.01
LR = 0.1
HUGE = 1e7
"""An eps far above any gradient: the preconditioner stands still at 1 / HUGE, and the law is exact."""


def noisy(kind: type[Optimizer], **options: object) -> Callable[[list[Parameter]], Optimizer]:
    return lambda parameters: langevin(kind(parameters, **options), diffusion=D)


def sampler(kind: type[Optimizer], **options: object) -> Callable[[list[Parameter]], Optimizer]:
    return lambda parameters: kind(parameters, lr=LR, diffusion=D, **options)


def run(make: Callable, h_R: Tensor, num_chains: int = 2000, num_steps: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Energy and its standard error in units of the target D, and the correlation of neighbouring steps, by row."""
    h = h_R[:, None]
    start = torch.randn(len(h), num_chains, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = Parameter(start * (D / h).sqrt())
    optimizer = make([theta])
    energy, product = torch.zeros_like(theta.data), torch.zeros_like(theta.data)
    burn_in = num_steps // 2
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
    "SGLD": (sampler(SGLD), plain),
    "LeimkuhlerMatthews": (sampler(LeimkuhlerMatthews), none),
    "SGHMC": (sampler(SGHMC), heavy),
    "BAOAB": (sampler(BAOAB), none),
    "sgd": (noisy(SGD, lr=LR), plain),
    "sgd momentum": (noisy(SGD, lr=LR, momentum=0.9), heavy),
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
    assert (error / measured).max() < 0.02, "too few chains to tell one law from another"


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
