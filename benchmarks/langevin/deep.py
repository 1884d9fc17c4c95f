"""A deep plain network that starts badly: 20 hidden layers of 50 rectified units, weights from N(0, 0.1^2), biases 0.

After Neelakantan et al. 2015, section 4.1, on the digits of scikit-learn. From this start the signal shrinks by half a
layer, so that gradients vanish. What counts is how often a training gets going at all. Where gradients vanish, Adam's
noise would grow without bound, its P being 1 / eps: with noise its eps is 0.001.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imagekiln.core import mix

from .protocol import Arm, Metric, Places, Scores, Settings, Task
from .training import classified, epochs, fit, grid, readings

LAYERS, WIDTH, BATCH = 20, 50, 100
LEARNS = 50.0
"""Accuracy in percent from which on a training counts as a success; guessing has 10."""


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.from_numpy(np.float32(digits.data / 8 - 1)), torch.from_numpy(digits.target).long()


def network(start: str, seed: int) -> nn.Sequential:
    """start: "bad", N(0, 0.1^2), or "He", variance 2 / inputs."""
    sizes = [64, *[WIDTH] * LAYERS]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    generator = torch.Generator().manual_seed(mix(seed, "initial"))
    for layer in model:
        if isinstance(layer, nn.Linear):
            deviation = 0.1 if start == "bad" else math.sqrt(2 / layer.in_features)
            nn.init.normal_(layer.weight, 0.0, deviation, generator=generator)
            nn.init.zeros_(layer.bias)
    return model


def _train(settings: Settings, seed: int, places: Places) -> Scores:
    x, y = _digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(mix(seed, "split")))
    kept, held, test = order[:1200], order[1200:1400], order[1400:]
    rows = epochs(len(kept), BATCH, seed)

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        chosen = kept[rows(step)]
        return x[chosen], y[chosen]

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    model = network(settings.get("start", "bad"), seed)
    trained = fit(model, batch_of, loss_of, settings, num_steps=places.num(2500, 30), num_data=len(kept), seed=seed)
    probabilities = readings(trained, lambda m: m(x).softmax(1))["last"]
    validation, scores = (classified(probabilities[part], y[part]) for part in (held, test))
    found = {
        "validation": validation["nll"],
        "success": float(scores["accuracy"] >= LEARNS),
        "accuracy": scores["accuracy"],
    }
    return {"last": found}


def _arms() -> tuple[Arm, ...]:
    usual = {"clip_norm": 1.0}
    return (
        Arm("SGD", grid("lr", (0.01, 0.03, 0.1), **usual)),
        Arm("Langevin SGD", grid("diffusion", (3e-5, 1e-4, 3e-4), lr=0.03, heat="cosine", **usual), ours=True),
        Arm("gradient noise", grid("gradient", (0.01, 0.3, 1.0), lr=0.03, **usual)),
        Arm("AdamW", grid("lr", (3e-4, 1e-3, 3e-3), optimizer="adamw", **usual)),
        Arm(
            "Langevin AdamW",
            grid("diffusion", (1e-6, 1e-5, 1e-4), lr=1e-3, eps=1e-3, optimizer="adamw", heat="cosine", **usual),
            ours=True,
            without="AdamW",
        ),
        Arm("article's loop", grid("article", (3e-7, 3e-6, 3e-5), lr=0.03, **usual)),
        Arm("SGD from He's start", grid("lr", (0.01, 0.03, 0.1), start="He", **usual)),
    )


DEEP = Task(
    "d",
    "Deep plain network of 20 layers with a bad start, digits",
    {"success": Metric(lower=False, worst=0.0, yes_no=True), "accuracy": Metric(lower=False, worst=10.0)},
    _arms(),
    "SGD",
    _train,
    num_seeds=20,
    expected="noise raises the success rate by 30 points or more over SGD",
)

TASKS = (DEEP,)
