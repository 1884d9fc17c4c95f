"""A tiny generative adversarial network on 25 Gaussians: how many of them it finds, and how well.

Two networks of two hidden layers of 128 units, non-saturating loss, Adam with betas (0.5, 0.9). The Gaussians stand on
a grid of 5 x 5 with distance 1 and deviation 0.05. Shapes: B points of 2 coordinates.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from imagekiln.core import mix
from imagekiln.optim import langevin

from .protocol import Arm, Metric, Places, Scores, Settings, Task
from .training import grid

SIDE, DEVIATION, BATCH, WIDTH, HIDDEN = 5, 0.05, 128, 2, 128
NEAR = 4 * DEVIATION
"""A point within this distance of a Gaussian's centre belongs to it."""

FEW = 0.2
"""A Gaussian that gets less than this share of what is due to it is not found."""

DECAY = 0.998


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))
    )


def centres() -> Tensor:
    """(25, 2), around 0."""
    line = torch.arange(SIDE).float() - SIDE // 2
    return torch.cartesian_prod(line, line)


def real(num: int, generator: torch.Generator) -> Tensor:
    """Points of all Gaussians alike."""
    chosen = torch.randint(0, SIDE * SIDE, (num,), generator=generator)
    return centres()[chosen] + DEVIATION * torch.randn(num, WIDTH, generator=generator)


def found_by(points_B2: Tensor) -> dict[str, float]:
    """modes: Gaussians found. quality: percent of points that belong to one. uneven: KL of shares from even ones."""
    if not bool(torch.isfinite(points_B2).all()):
        return {"modes": math.nan, "quality": math.nan, "uneven": math.nan}
    distance, nearest = torch.cdist(points_B2, centres()).min(1)
    good = nearest[distance < NEAR]
    counts = torch.bincount(good, minlength=SIDE * SIDE).double()
    shares = (counts / max(1, len(good))).clamp_min(1e-12)
    even = 1 / SIDE**2
    return {
        "modes": float((counts >= FEW * even * len(points_B2)).sum()),
        "quality": 100 * len(good) / len(points_B2),
        "uneven": float((shares * (shares / even).log()).sum()) if len(good) else math.log(SIDE**2),
    }


def _penalty(scores_B: Tensor, points_B2: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(scores_B.sum(), points_B2, create_graph=True)
    return gradient.square().sum(1).mean()


def _train(settings: Settings, seed: int, places: Places) -> Scores:
    torch.manual_seed(mix(seed, "initial"))
    makes, judges = _mlp(WIDTH, WIDTH), _mlp(WIDTH, 1)
    average = copy.deepcopy(makes)
    optimizers = [
        torch.optim.Adam(model.named_parameters(), lr=settings["lr"], betas=(0.5, 0.9), eps=1e-6, fused=True)
        for model in (makes, judges)
    ]
    noisy: list[Any] = [optimizers[1], *([optimizers[0]] if settings.get("both") else [])]
    for place, optimizer in enumerate(noisy if settings.get("diffusion") else []):
        langevin(optimizer, diffusion=settings["diffusion"], seed=mix(seed, "noise", place), law="matched")
    generator = torch.Generator().manual_seed(mix(seed, "points"))
    shake, num_steps = settings.get("instance", 0.0), places.num(4000, 40)
    for step in range(num_steps):
        blur = shake * (1 - step / num_steps)

        def blurred(points_B2: Tensor, blur: float = blur) -> Tensor:
            return points_B2 + blur * torch.randn(points_B2.shape, generator=generator) if blur else points_B2

        points = blurred(real(BATCH, generator)).requires_grad_(bool(settings.get("penalty")))
        drawn = makes(torch.randn(BATCH, WIDTH, generator=generator))
        scores = judges(points).squeeze(1)
        loss = softplus(-scores).mean() + softplus(judges(blurred(drawn.detach()))).mean()
        if settings.get("penalty"):
            loss = loss + settings["penalty"] / 2 * _penalty(scores, points)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        softplus(-judges(blurred(makes(torch.randn(BATCH, WIDTH, generator=generator))))).mean().backward()
        optimizers[0].step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(makes.parameters()), 1 - DECAY)
    result: Scores = {}
    with torch.no_grad():
        for name, model in (("last", makes), ("average", average)):
            held, test = (found_by(model(torch.randn(5000, WIDTH, generator=generator))) for _ in range(2))
            result[name] = {"validation": held["uneven"] - held["quality"] / 100, **test}
    return result


GAN = Task(
    "f",
    "Tiny GAN on 25 Gaussians, 4,000 steps",
    {
        "modes": Metric(lower=False, worst=0.0),
        "quality": Metric(lower=False, worst=0.0),
        "uneven": Metric(lower=True, worst=math.log(25)),
    },
    (
        Arm("Adam", grid("lr", (3e-4, 1e-3, 2e-3)), ("last", "average")),
        Arm(
            "Langevin Adam in the discriminator",
            grid("diffusion", (1e-6, 1e-5, 1e-4)),
            ("last", "average"),
            ours=True,
            after="Adam",
        ),
        Arm(
            "Langevin Adam in both",
            grid("diffusion", (1e-6, 1e-5, 1e-4), both=True),
            ("last", "average"),
            ours=True,
            after="Adam",
        ),
        Arm("instance noise", grid("instance", (0.1, 0.3, 1.0)), ("last", "average"), after="Adam"),
        Arm("gradient penalty", grid("penalty", (0.01, 0.1, 1.0)), ("last", "average"), after="Adam"),
    ),
    "Adam",
    _train,
    num_seeds=8,
    expected="noise in the discriminator finds more of the Gaussians",
)

TASKS = (GAN,)
