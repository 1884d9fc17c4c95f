"""Regression with honest uncertainty: samplers against a long Hamiltonian Monte Carlo of the same posterior.

One hidden layer of 32 tanh units, forty noisy points of a curve with a gap in their middle, noise of known deviation
0.1, prior N(0, 1) on every weight. Everything is full batch, so what differs is the method and not the data it sees.

    U(theta) = sum_i (y_i - f(x_i))^2 / (2 s^2) + |theta|^2 / 2,   L = U / N,   D = 1 / N at T = 1

Shapes: C chains, P weights, H hidden units, X points.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from imagekiln.core import mix
from imagekiln.optim import BAOAB, langevin
from imagekiln.optim.bank import function_r_hat

from .protocol import Arm, Metric, Places, Scores, Settings, Task
from .training import grid

HIDDEN, NUM, SIGMA = 32, 40, 0.1
NUM_WEIGHTS = 3 * HIDDEN + 1
SAMPLES, ENSEMBLE = 100, 5
LARGEST = math.log(1000)
"""Of an error of a log deviation: an ensemble that agrees with itself everywhere is infinitely wrong."""

LINE = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)


def curve(x: Tensor) -> Tensor:
    """What the points are noisy values of."""
    return 0.7 * torch.sin(4 * x) + 0.3 * x


def points(num: int, seed: int, use: str, gap: bool = True) -> tuple[Tensor, Tensor]:
    """x and y of noisy points on [-1.2, 1.2]; with the gap none lie in [-0.4, 0.4]."""
    generator = torch.Generator().manual_seed(mix(seed, use))
    x = torch.rand(num, generator=generator, dtype=torch.float64) * 2 - 1
    x = torch.where(x >= 0, 0.4 + 0.8 * x, -0.4 + 0.8 * x) if gap else 1.2 * x
    return x, curve(x) + SIGMA * torch.randn(num, generator=generator, dtype=torch.float64)


def network(theta_CP: Tensor, x_X: Tensor, mask_CH: Tensor | None = None) -> Tensor:
    """f of every chain: (C, X). mask: of hidden units."""
    inner, shift, outer = (part[:, None] for part in theta_CP[:, :-1].split(HIDDEN, dim=1))
    hidden_CXH = torch.tanh(3 * inner * x_X[:, None] + 2 * shift)
    weight = 2 / HIDDEN**0.5 * outer * (1 if mask_CH is None else mask_CH[:, None])
    return (hidden_CXH * weight).sum(2) + theta_CP[:, -1:]


def energy(theta_CP: Tensor, x_X: Tensor, y_X: Tensor, mask_CH: Tensor | None = None) -> Tensor:
    """U of every chain: (C,)."""
    misfit = (network(theta_CP, x_X, mask_CH) - y_X).square().sum(1) / (2 * SIGMA**2)
    return misfit + theta_CP.square().sum(1) / 2


def hamiltonian(
    potential: Callable[[Tensor], Tensor], start_CP: Tensor, *, num: int, burn_in: int, leaps: int, seed: int
) -> Tensor:
    """Hamiltonian Monte Carlo (Neal 2011) of exp(-U), many chains at once: (num, C, P).

    The step is tuned in the burn-in to accept 80 %, then stands still but for a jitter of 10 % against resonances.
    """
    generator = torch.Generator().manual_seed(seed)
    theta, step = start_CP.clone(), 0.01

    def slope(theta: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        value = potential(theta)
        return value.detach(), torch.autograd.grad(value.sum(), theta)[0]

    value, gradient = slope(theta)
    kept = []
    for turn in range(burn_in + num):
        momentum = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        now = step * (0.9 + 0.2 * float(torch.rand((), generator=generator)))
        before = value + momentum.square().sum(1) / 2
        there, uphill = theta, gradient
        for _ in range(leaps):
            momentum = momentum - now / 2 * uphill
            there = there + now * momentum
            ended, uphill = slope(there)
            momentum = momentum - now / 2 * uphill
        change = before - ended - momentum.square().sum(1) / 2
        chance = change.nan_to_num(nan=-math.inf).clamp_max(0).exp()
        taken = torch.rand(len(theta), generator=generator, dtype=theta.dtype) < chance
        theta = torch.where(taken[:, None], there, theta)
        gradient, value = torch.where(taken[:, None], uphill, gradient), torch.where(taken, ended, value)
        if turn < burn_in:
            step *= math.exp(0.05 * (float(chance.mean()) - 0.8))
        else:
            kept.append(theta)
    return torch.stack(kept)


def reference(seed: int, places: Places) -> dict[str, Any]:
    """Mean and deviation of f on LINE under the posterior, and the largest R-hat; made once a seed and kept."""
    path = places.store / f"regression-{seed}{'-quick' if places.quick else ''}.json"
    if path.is_file():
        return json.loads(path.read_text())
    x, y = points(NUM, seed, "train")
    generator = torch.Generator().manual_seed(mix(seed, "reference"))
    start = torch.randn(places.num(24, 4), NUM_WEIGHTS, generator=generator, dtype=torch.float64) / 2
    samples = hamiltonian(
        lambda theta: energy(theta, x, y),
        start,
        num=places.num(1000, 10),
        burn_in=places.num(400, 10),
        leaps=places.num(50, 5),
        seed=mix(seed, "hamiltonian"),
    )
    outputs_SCX = torch.stack([network(theta, LINE) for theta in samples])
    found = {
        "mean": outputs_SCX.mean((0, 1)).tolist(),
        "sd": outputs_SCX.std((0, 1)).tolist(),
        "r_hat": float(function_r_hat(outputs_SCX.transpose(0, 1)).max()),
    }
    places.store.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")  # two workers may make the same one at once
    aside.write_text(json.dumps(found))
    aside.replace(path)
    return found


def _optimizer(theta: Parameter, settings: Settings, seed: int) -> torch.optim.Optimizer:
    lr, diffusion = settings["lr"], settings.get("temperature", 0.0) / NUM
    options: dict[str, Any] = {"diffusion": diffusion, "seed": mix(seed, "noise")}
    if settings["method"] == "BAOAB":
        return BAOAB([theta], lr=lr, momentum=0.95, **options)
    if settings["method"] == "adam":
        adam = torch.optim.Adam([theta], lr=lr, eps=1e-3, betas=(0.9, 0.999))
        return langevin(adam, **options) if diffusion else adam
    sgd = torch.optim.SGD([theta], lr=lr, momentum=settings.get("momentum", 0.95))
    return langevin(sgd, **options) if diffusion else sgd


def _train(settings: Settings, seed: int, places: Places) -> Scores:
    x, y = points(NUM, seed, "train")
    held_x, held_y = points(20, seed, "validation")
    test_x, test_y = points(400, seed, "test", gap=False)
    generator = torch.Generator().manual_seed(mix(seed, "initial"))
    chains = ENSEMBLE if settings["method"] == "ensemble" else 1
    theta = Parameter(torch.randn(chains, NUM_WEIGHTS, generator=generator, dtype=torch.float64) / 2)
    optimizer, share = _optimizer(theta, settings, seed), settings.get("dropout", 0.0)
    num_steps = places.num(12_000, 300)
    every, samples, masks = max(1, num_steps * 2 // 3 // SAMPLES), [], []

    def mask() -> Tensor | None:
        kept = torch.rand(chains, HIDDEN, generator=generator, dtype=torch.float64) >= share
        return kept / (1 - share) if share else None

    for step in range(num_steps):
        optimizer.zero_grad()
        (energy(theta, x, y, mask()).sum() / NUM).backward()
        optimizer.step()
        if settings.get("article"):
            noise = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
            theta.data.add_(noise, alpha=(2 * settings["article"]) ** 0.5)
        if step >= num_steps // 3 and (step + 1) % every == 0 and chains == 1 and not share:
            samples.append(theta.detach().clone())
    for _ in range(SAMPLES if share else 1 if chains > 1 else 0):
        samples.append(theta.detach().clone())
        masks.append(mask())
    everywhere = torch.cat([LINE, held_x, test_x])
    outputs_SX = torch.cat([network(one, everywhere, masks[at] if masks else None) for at, one in enumerate(samples)])
    mean, sd = outputs_SX.mean(0), outputs_SX.std(0)
    known = reference(seed, places)
    on_line = slice(0, len(LINE))
    true_mean, true_sd = (torch.tensor(known[name], dtype=torch.float64) for name in ("mean", "sd"))

    def surprise(part: slice, y: Tensor) -> float:
        variance = sd[part].square() + SIGMA**2
        return float(((y - mean[part]).square() / variance + variance.log()).mean() / 2 + math.log(2 * math.pi) / 2)

    found = {
        "validation": surprise(slice(len(LINE), len(LINE) + len(held_x)), held_y),
        "mean_error": float((mean[on_line] - true_mean).square().mean().sqrt()),
        "sd_error": float((sd[on_line] / true_sd).log().abs().clamp_max(LARGEST).mean()),
        "nll": surprise(slice(len(LINE) + len(held_x), len(everywhere)), test_y),
    }
    return {"samples": found | {"r_hat": known["r_hat"]}}


def _arms() -> tuple[Arm, ...]:
    readouts = ("samples",)
    rates = (1e-4, 3e-4, 1e-3)
    return (
        Arm("SGD snapshots", grid("lr", rates, method="sgd"), readouts),
        Arm("Langevin SGD", grid("lr", rates, method="sgd", temperature=1.0), readouts, ours=True),
        Arm("BAOAB", grid("lr", rates, method="BAOAB", temperature=1.0), readouts, ours=True),
        Arm("Adam snapshots", grid("lr", (1e-3, 3e-3, 1e-2), method="adam"), readouts),
        Arm(
            "Langevin Adam",
            grid("lr", (1e-3, 3e-3, 1e-2), method="adam", temperature=1.0),
            readouts,
            ours=True,
            without="Adam snapshots",
        ),
        Arm("ensemble of 5 networks", grid("lr", rates, method="ensemble"), readouts),
        Arm("dropout", grid("dropout", (0.05, 0.1, 0.2), method="sgd", lr=3e-4), readouts),
        Arm("article's loop", grid("article", (1e-7, 1e-6, 1e-5), method="sgd", lr=3e-4), readouts),
    )


REGRESSION = Task(
    "g",
    "Regression with a gap against Hamiltonian Monte Carlo",
    {
        "mean_error": Metric(lower=True, worst=1.0),
        "sd_error": Metric(lower=True, worst=LARGEST),
        "nll": Metric(lower=True, worst=10.0),
    },
    _arms(),
    "SGD snapshots",
    _train,
    num_seeds=8,
    expected="bands agree with those of Hamiltonian Monte Carlo, and the controls' do not",
)

TASKS = (REGRESSION,)
