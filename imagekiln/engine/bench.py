"""The bench: everything needed to measure pictures against one data set.

The reference is the held-out split. Features come from a classifier trained on the training split of the same set (or
fixed random convolutions without labels); see `engine.judges`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.core import Source, mix
from imagekiln.engine.judges import judge, predicted
from imagekiln.engine.tracker import Say
from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import (
    Measurement,
    Provenance,
    RandomConv,
    Statistics,
    copy_ratios,
    extract,
    measure,
    nearest,
    weights_hash,
    wilson,
)

BATCH = 100
LARGEST_BANK = 20_000
"""Training pictures searched for copies; a set with more is sampled."""


class Bench:
    """Everything needed to measure pictures against one data set: splits, feature network, judges.

    Raises:
        DataError: too few held-out pictures.
    """

    def __init__(self, dataset: datasets.Dataset, features: str, seed: int, say: Say, subject_hash: str) -> None:
        self.dataset, self.seed, self.subject_hash, self.say = dataset, seed, subject_hash, say
        labelled = dataset.train.num_classes >= 2
        if features == "classifier" and not labelled:
            raise UsageError("--features classifier needs pictures with labels; use randconv.")
        if labelled and features != "randconv":
            self.network: Any = judge(dataset, 0, say).family
            self.network_name = "classifier"
        else:
            self.network = RandomConv(dataset.train.image_shape)
            self.network_name = self.network.name
        self.judge: Any = judge(dataset, 1, say).family if labelled else None
        self._statistics: dict[tuple[int, ...], Statistics] = {}

    def count(self, wanted: int) -> int:
        """How many pictures can be compared: no more than are held out."""
        return min(wanted, len(self.dataset.validation))

    def labels(self, count: int) -> list[int]:
        """Labels to ask for, in the proportions of the training set."""
        source = self.dataset.train
        if not source.num_classes:
            return [-1] * count
        rows = _rows(len(source), count, mix(self.seed, "labels"))
        known = source.read(rows).labels
        return [-1] * count if known is None else known.tolist()

    def measure(self, images: Tensor, labels: Sequence[int] | None) -> list[Measurement]:
        """All measurements of pictures, uint8 (N, C, H, W), and of whether they show what was asked for."""
        self.say(f"Comparing {len(images)} pictures in features of {self.network_name}.")
        generated = self._of(images)
        reference, real, floor_from = self._real(self.count(len(images)))
        rows = measure(generated, reference, real, self.provenance(self.network_name), seed=self.seed)
        rows = [dataclasses.replace(row, details={**row.details, "floor": floor_from}) for row in rows]
        rows += self._copying(generated)
        if self.judge is not None and labels is not None and self.dataset.train.num_classes:
            rows.append(self._label_accuracy(images, torch.tensor(labels)))
        return rows

    def provenance(self, features: str) -> Provenance:
        """Where a number comes from."""
        own = isinstance(self.network, torch.nn.Module) and features == self.network_name
        return Provenance(
            features=features,
            features_hash=weights_hash(self.network) if own else "",
            reference=f"{self.dataset.name}, held out",
            reference_hash=self.dataset.validation.fingerprint,
            weights_hash=self.subject_hash,
        )

    def nearest_training_pictures(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest training picture of each of these, and the distance: uint8 (N, C, H, W), (N,)."""
        rows = self._bank_rows()
        found = nearest(self._of(images), self._of_source(self.dataset.train, rows))
        return self.dataset.train.read([rows[i] for i in found.indices[:, 0].tolist()]).images, found.distances[:, 0]

    def _real(self, count: int) -> tuple[Statistics, Statistics, str]:
        """The reference, and other real pictures for the floor: held-out ones where there are twice as many."""
        held_out = self.dataset.validation
        order = _rows(len(held_out), len(held_out), mix(self.seed, "reference"))
        reference = self._of_source(held_out, order[:count])
        if len(held_out) >= 2 * count:
            return reference, self._of_source(held_out, order[count : 2 * count]), "held-out pictures"
        train = self.dataset.train
        return reference, self._of_source(train, _rows(len(train), count, mix(self.seed, "floor"))), "training pictures"

    def _copying(self, generated: Statistics) -> list[Measurement]:
        train = self._of_source(self.dataset.train, self._bank_rows())
        held_out = self._of_source(self.dataset.validation, range(min(len(self.dataset.validation), LARGEST_BANK)))
        try:
            ratios = copy_ratios(generated, train, held_out, seed=self.seed)
        except DataError as error:
            self.say(str(error))
            return []
        middle = ratios[-1]
        return [
            Measurement(
                metric="copy_ratio",
                value=middle.ratio,
                low=middle.low,
                high=middle.high,
                n=generated.n,
                n_reference=train.n,
                provenance=self.provenance(self.network_name),
                lower_is_better=False,
                floor=1.0,
                ratio=middle.ratio,
                seed=self.seed,
                details={f"quantile {r.quantile:g}": [r.ratio, r.low, r.high] for r in ratios},
            )
        ]

    def _label_accuracy(self, images: Tensor, labels: Tensor) -> Measurement:
        """Share of pictures whose predicted class is the one asked for; the floor is the judge's own on real ones."""
        started = time.perf_counter()
        asked = labels >= 0
        correct = torch.eq(predicted(self.judge, images)[asked], labels[asked])
        held_out = self.dataset.validation
        real = held_out.read(range(min(len(held_out), 10_000)))
        truth = torch.full((len(real.images),), -1) if real.labels is None else real.labels
        known = truth >= 0
        on_real = float((predicted(self.judge, real.images)[known] == truth[known]).double().mean())
        low, high = wilson(int(correct.sum()), len(correct))
        return Measurement(
            metric="label_accuracy",
            value=float(correct.double().mean()),
            low=low,
            high=high,
            n=len(correct),
            n_reference=int(known.sum()),
            provenance=self.provenance("judge"),
            lower_is_better=False,
            floor=on_real,
            ratio=float(correct.double().mean()) / on_real,
            seed=self.seed,
            seconds=time.perf_counter() - started,
            details={"judge_hash": weights_hash(self.judge), "floor": "held-out pictures"},
        )

    def _bank_rows(self) -> list[int]:
        count = min(len(self.dataset.train), LARGEST_BANK)
        return _rows(len(self.dataset.train), count, mix(self.seed, "bank"))

    def _of(self, images: Tensor) -> Statistics:
        return Statistics.of(extract(self.network, (datasets.to_float(part) for part in images.split(BATCH))))

    def _of_source(self, source: Source, rows: Sequence[int]) -> Statistics:
        key = (id(source), len(rows), *rows[:3])
        if key not in self._statistics:
            chunks = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            batches = (datasets.to_float(source.read(chunk).images) for chunk in chunks)
            self._statistics[key] = Statistics.of(extract(self.network, batches))
        return self._statistics[key]


def _rows(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` indices in random order, a function of the seed alone."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
