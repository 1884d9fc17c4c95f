"""Classifying pictures: the case study of articles, few pictures, and wrong labels.

The network is the small one of tutorials: convolutions 3-6-16 of 5 x 5 with pooling, fully connected 120-84-10; about
62,000 weights for CIFAR-10.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imagekiln.config import DataConfig
from imagekiln.core import Source, mix
from imagekiln.data import load, to_float

from .protocol import Arm, Metric, Places, Scores, Settings, Task
from .training import classified, epochs, fit, grid, in_parts, readings

METRICS = {
    "accuracy": Metric(lower=False, worst=10.0),
    "nll": Metric(lower=True, worst=2.303),
    "ece": Metric(lower=True, worst=90.0),
}
ALL = ("last", "average", "ensemble")
BATCH = 100


class SmallCNN(nn.Sequential):
    """The small convolutional network. dropout: share left out before each of the last two layers."""

    def __init__(self, channels: int, side: int, dropout: float = 0.0) -> None:
        flat = 16 * ((side - 4) // 2 - 4) ** 2 // 4
        super().__init__(
            *(nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(flat, 120), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(120, 84), nn.ReLU(), nn.Dropout(dropout), nn.Linear(84, 10)),
        )


@lru_cache(maxsize=2)
def _read(path: str, num_train: int, num_test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """images and labels of the training and the test split, the same pictures every time."""
    dataset = load(DataConfig(path=path))

    def some(source: Source, num: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:num]
        batch = source.read(order.sort().values.tolist())
        shuffled = torch.randperm(len(batch.images), generator=torch.Generator().manual_seed(1))
        return to_float(batch.images[shuffled]), batch.labels[shuffled]

    return *some(dataset.train, num_train), *some(dataset.validation, num_test)


def _train(
    path: str, settings: Settings, seed: int, *, num: int, num_validation: int, num_test: int, num_steps: int
) -> Scores:
    """Train on `num` pictures chosen by the seed, and score on a validation split and test pictures.

    wrong: share of labels replaced by another class, of training and validation pictures alike: nobody has clean ones.
    """
    images, labels, test_images, test_labels = _read(path, num + num_validation, num_test)
    generator = torch.Generator().manual_seed(mix(seed, "split"))
    order = torch.randperm(len(images), generator=generator)
    labels = labels.clone()
    wrong = torch.rand(len(labels), generator=generator) < settings.get("wrong", 0.0)
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    kept, held = order[:num], order[num : num + num_validation]
    torch.manual_seed(mix(seed, "initial"))
    model = SmallCNN(images.shape[1], images.shape[2], settings.get("dropout", 0.0))
    rows, smoothing = epochs(num, BATCH, seed), settings.get("smoothing", 0.0)

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        chosen = kept[rows(step)]
        return images[chosen], labels[chosen]

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)

    trained = fit(model, batch_of, loss_of, settings, num_steps=num_steps, num_data=num, seed=seed)
    inputs = torch.cat([images[held], test_images])
    found: Scores = {}
    for name, probabilities in readings(trained, lambda m: in_parts(lambda x: m(x).softmax(1), inputs)).items():
        validation = classified(probabilities[: len(held)], labels[held])
        scores = classified(probabilities[len(held) :], test_labels)
        chosen_by = -validation["accuracy"] if settings["chosen_by"] == "accuracy" else validation["nll"]
        found[name] = {"validation": chosen_by, "train_loss": trained.loss, **scores}
    return found


# -- A ----------------------------------------------------------------------------------------------------------------


def _case_study(settings: Settings, seed: int, places: Places) -> Scores:
    num = places.num(45_000, 300)
    return _train(
        places.cifar10,
        {"rate": "constant", "chosen_by": "accuracy", **settings},
        seed,
        num=num,
        num_validation=places.num(5000, 200),
        num_test=places.num(10_000, 200),
        num_steps=places.num(10 * num // BATCH, 12),
    )


CASE_STUDY = Task(
    "a",
    "Case study: CIFAR-10, small CNN, batch 100, rate 0.001, momentum 0.9, 10 epochs",
    METRICS,
    (
        Arm("SGD", grid("weight_decay", (0.0, 5e-4, 5e-3), lr=1e-3), ALL),
        Arm("Langevin SGD", grid("temperature", (0.01, 0.1, 1.0), lr=1e-3), ALL, ours=True),
        Arm("article's loop", grid("article", (1e-8, 1e-6, 1e-5), lr=1e-3)),
        Arm("article's loop, its own D", ({"article": 5e-5, "lr": 1e-3},)),  # a deviation of 0.01 a step
        Arm("SGD, other rates", grid("lr", (3e-3, 1e-2, 3e-2))),
        Arm("AdamW", grid("lr", (3e-4, 1e-3, 3e-3), optimizer="adamw", weight_decay=0.01)),
    ),
    "SGD",
    _case_study,
    expected="nothing gained by noise alone; the article's loop loses at its own D",
)

# -- B ----------------------------------------------------------------------------------------------------------------


def _small(settings: Settings, seed: int, places: Places) -> Scores:
    return _train(
        places.cifar10,
        {"chosen_by": "nll", **settings},
        seed,
        num=places.num(3000, 200),
        num_validation=places.num(1000, 100),
        num_test=places.num(4000, 100),
        num_steps=places.num(1800, 24),
    )


SMALL_DATA = Task(
    "b",
    "Small data: 3,000 pictures of CIFAR-10, 60 epochs",
    METRICS,
    (
        Arm("SGD", grid("lr", (0.003, 0.01, 0.03)), ALL),
        Arm("Langevin SGD", grid("temperature", (0.1, 0.3, 1.0)), ALL, ours=True, after="SGD"),
        Arm("SGD, cycles", grid("lr", (0.01, 0.03, 0.06), rate="cycles"), ("ensemble",)),
        Arm(
            "Langevin SGD, cycles",
            grid("temperature", (0.1, 0.3, 1.0), rate="cycles"),
            ("ensemble",),
            ours=True,
            after="SGD, cycles",
        ),
        Arm("weight decay", grid("weight_decay", (1e-3, 1e-2, 3e-2)), after="SGD"),
        Arm("dropout", grid("dropout", (0.2, 0.4, 0.6)), after="SGD"),
        Arm("SAM", grid("rho", (0.05, 0.1, 0.3)), after="SGD"),
        Arm("AdamW", grid("lr", (3e-4, 1e-3, 3e-3), optimizer="adamw", weight_decay=0.01)),
        Arm("article's loop", grid("article", (1e-8, 1e-7, 1e-6)), after="SGD"),
    ),
    "SGD",
    _small,
    expected="the ensemble of samples has a lower ECE than every single model",
)

# -- C ----------------------------------------------------------------------------------------------------------------


def _label_noise(settings: Settings, seed: int, places: Places) -> Scores:
    return _train(
        places.fashion,
        {"chosen_by": "nll", **settings},
        seed,
        num=places.num(5000, 200),
        num_validation=places.num(1000, 100),
        num_test=places.num(4000, 100),
        num_steps=places.num(1200, 24),
    )


def _noisy_labels(name: str, share: float) -> Task:
    return Task(
        name,
        f"Label noise: 5,000 pictures of Fashion-MNIST with {100 * share:g} % wrong labels, 24 epochs",
        METRICS,
        (
            Arm("SGD", grid("lr", (0.003, 0.01, 0.03)), ALL),
            Arm("Langevin SGD", grid("temperature", (0.1, 0.5, 1.0)), ALL, ours=True, after="SGD"),
            Arm("label smoothing", grid("smoothing", (0.1, 0.2, 0.4)), after="SGD"),
            Arm("weight decay", grid("weight_decay", (1e-3, 1e-2, 3e-2)), after="SGD"),
            Arm("dropout", grid("dropout", (0.2, 0.4, 0.6)), after="SGD"),
            Arm("AdamW", grid("lr", (3e-4, 1e-3, 3e-3), optimizer="adamw", weight_decay=0.01)),
        ),
        "SGD",
        _label_noise,
        expected="noise resists wrong labels, but less than label smoothing",
        fixed={"wrong": share},
    )


TASKS = (CASE_STUDY, SMALL_DATA, _noisy_labels("c20", 0.2), _noisy_labels("c40", 0.4))
