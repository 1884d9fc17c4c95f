"""The bench: everything needed to measure pictures against one data set.

The reference is the held-out split. Pictures are compared in one space of features or in several; the first also serves
to look for copies. Its default is a classifier trained on the training split of the same set (see `engine.judges`), or
fixed random convolutions where there are no labels; `engine.extractors` knows the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.core import Source, mix
from imagekiln.engine import extractors
from imagekiln.engine.judges import judge, predicted
from imagekiln.engine.tracker import Say
from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import (
    BUNDLES,
    FrechetDistance,
    InceptionScore,
    Measurement,
    Provenance,
    Spectrum,
    Statistics,
    compare_spectra,
    extract,
    frechet_infinity,
    inception_score,
    intra_class,
    measure,
    memorization,
    metrics_named,
    nearest,
    precision_recall_curve,
    weights_hash,
    wilson,
)
from imagekiln.metrics.features import SMALLEST_SIDE

BATCH = 100
LARGEST_BANK = 20_000
"""Training pictures searched for copies; a set with more is sampled."""

FEWEST_OF_A_CLASS = 20

CURVE_PICTURES = 2000
"""Pictures on each side of a precision-recall curve: it is for looking at."""


class Space(NamedTuple):
    """A feature network, what its numbers are labelled with, and the sha256 of its weights."""

    name: str
    network: Any
    hash: str


class Bench:
    """Measures pictures against one data set.

    features: a space of features, or several with commas between them: `classifier`, or what `engine.extractors` knows;
        `auto` takes the classifier where there are labels and `randconv` elsewhere.
    metrics: names of metrics with commas between them, `default`, or `all`.

    Raises:
        UsageError: features or metrics that do not exist, or that these pictures cannot have.
        DataError: a weights file that is missing or damaged.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        features: str,
        seed: int,
        say: Say,
        subject_hash: str,
        metrics: str = "default",
    ) -> None:
        self.dataset, self.seed, self.subject_hash, self.say = dataset, seed, subject_hash, say
        self.metrics, self.thorough, self.chosen = metrics_named(metrics), metrics == "all", metrics not in BUNDLES
        self.labelled = dataset.train.num_classes >= 2
        self.spaces = [self._space(name.strip()) for name in features.split(",")]
        self._statistics: dict[str, Statistics] = {}

    @functools.cached_property
    def judge(self) -> Any:
        """What says which class a picture shows, trained when it is first asked; None for a set without labels."""
        return judge(self.dataset, 1, self.say).family if self.labelled else None

    def _space(self, name: str) -> Space:
        if name == "auto":
            name = "classifier" if self.labelled else "randconv"
        if name == "classifier":
            if not self.labelled:
                raise UsageError("--features classifier needs pictures with labels; use randconv.")
            network: Any = judge(self.dataset, 0, self.say).family
            return Space(name, network, weights_hash(network))
        held_out = self.dataset.validation
        reference = held_out.read(range(min(len(held_out), 5000))).images if name == "pixels" else None
        network = extractors.open_extractor(name, self.dataset.train.image_shape, reference, say=self.say)
        return Space(network.name, network, network.hash)

    @property
    def network(self) -> Any:
        """The first space's feature network."""
        return self.spaces[0].network

    @property
    def network_name(self) -> str:
        """The first space's name."""
        return self.spaces[0].name

    def count(self, wanted: int) -> int:
        """How many pictures can be compared: no more than are held out."""
        return min(wanted, len(self.dataset.validation))

    def labels(self, count: int) -> list[int]:
        """Labels to ask for: every class as often as its share of the training set says, in random order.

        Shares are met as nearly as whole numbers can (largest remainders): labels drawn at random would add the chance
        of their own shares to every distance.
        """
        known = self.dataset.train.labels_N
        if known is None:
            return [-1] * count
        names, found = known.unique(return_counts=True)
        exact = found.double() * count / len(known)
        counts = exact.floor().long()
        rest = (counts - exact).argsort(stable=True)[: count - int(counts.sum())]
        counts[rest] += 1
        labels = names.repeat_interleave(counts)
        return labels[torch.tensor(random_rows(count, count, mix(self.seed, "labels")), dtype=torch.int64)].tolist()

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self, images: Tensor, labels: Sequence[int] | None) -> list[Measurement]:
        """All measurements of pictures, uint8 (N, C, H, W), and of whether they show what was asked for."""
        rows: list[Measurement] = []
        for space in self.spaces:
            self.say(f"Comparing {len(images)} pictures in features of {space.name}.")
            rows += self._in_space(space, images, labels)
        if self.chosen:
            return rows
        rows += self._copying(self._of(images, self.spaces[0]))
        rows += self._spectrum(images)
        if labels is not None and self.labelled:
            rows.append(self._label_accuracy(images, torch.tensor(labels)))
        return rows

    def provenance(self, features: str) -> Provenance:
        """Where a number comes from."""
        known = {space.name: space.hash for space in self.spaces}
        return Provenance(
            features=features,
            features_hash=known.get(features, ""),
            reference=f"{self.dataset.name}, held out",
            reference_hash=self.dataset.validation.fingerprint,
            weights_hash=self.subject_hash,
        )

    def nearest_training_pictures(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest training picture of each of these, and the distance: uint8 (N, C, H, W), (N,)."""
        rows = self._bank_rows()
        found = nearest(self._of(images, self.spaces[0]), self._of_source(self.dataset.train, rows, self.spaces[0]))
        return self.dataset.train.read([rows[i] for i in found.indices[:, 0].tolist()]).images, found.distances[:, 0]

    def _in_space(self, space: Space, images: Tensor, labels: Sequence[int] | None) -> list[Measurement]:
        generated = self._of(images, space)
        reference_rows, real_source, real_rows, floor_from = self._real(self.count(len(images)))
        reference = self._of_source(self.dataset.validation, reference_rows, space)
        real = self._of_source(real_source, real_rows, space)
        provenance = self.provenance(space.name)
        rows = measure(generated, reference, real, provenance, self.metrics, seed=self.seed)
        rows = [_with_curve(row, generated, reference, real) if row.metric == "precision" else row for row in rows]
        if self.thorough:
            rows += self._extrapolated(generated, reference, real, provenance)
            rows += self._within_classes(generated, reference, reference_rows, labels, provenance)
            rows += self._inception_score(space, images, real_source.read(real_rows).images, provenance)
        return [dataclasses.replace(row, details={**row.details, "floor": floor_from}) for row in rows]

    def _row(self, metric: str, value: float, n: int, provenance: Provenance, **more: Any) -> Measurement:
        floor = more.pop("floor", None)
        return Measurement(
            metric=metric,
            value=value,
            n=n,
            provenance=provenance,
            floor=floor,
            ratio=value / floor if floor is not None and floor > 0 else None,
            seed=self.seed,
            **{"n_reference": n, **more},
        )

    def _extrapolated(
        self, generated: Statistics, reference: Statistics, real: Statistics, provenance: Provenance
    ) -> list[Measurement]:
        """The Frechet distance at infinitely many pictures, with its own error; [] where there are too few."""
        started, n = time.perf_counter(), min(generated.n, reference.n)
        if n < 60:
            return []
        found = frechet_infinity(generated, reference, seed=self.seed)
        reach = 1.96 * found.standard_error
        row = self._row(
            "frechet_infinity",
            found.value,
            n,
            provenance,
            low=found.value - reach,
            high=found.value + reach,
            details={"sizes": list(found.sizes), "interval": "delete-a-block jackknife"},
            seconds=time.perf_counter() - started,
        )
        return [row]

    def _within_classes(
        self,
        generated: Statistics,
        reference: Statistics,
        reference_rows: Sequence[int],
        labels: Sequence[int] | None,
        provenance: Provenance,
    ) -> list[Measurement]:
        """The mean Frechet distance within classes, each class's own in the details."""
        truth = self.dataset.validation.read(reference_rows).labels
        if labels is None or truth is None or not self.labelled:
            return []
        started, names = time.perf_counter(), self.dataset.train.class_names
        asked = torch.tensor(labels)
        try:
            found = intra_class(FrechetDistance(), generated, reference, asked, truth, names, FEWEST_OF_A_CLASS)
        except DataError as error:
            self.say(str(error))
            return []
        row = self._row(
            "intra_class_frechet",
            found.mean,
            generated.n,
            provenance,
            n_reference=reference.n,
            details={
                "classes": {row.name: row.value for row in found.classes},
                "worst": found.worst.name,
                "left_out": list(found.left_out),
            },
            seconds=time.perf_counter() - started,
        )
        return [row]

    def _inception_score(self, space: Space, images: Tensor, real: Tensor, provenance: Provenance) -> list[Measurement]:
        """The Inception score where the network has class scores without bias; the floor is that of real pictures."""
        network = getattr(space.network, "network", space.network)
        if not hasattr(network, "features_and_logits"):
            return []
        started = time.perf_counter()

        def score(pictures: Tensor) -> InceptionScore:
            parts = extractors.rebatched(pictures.split(BATCH))
            logits = [network.features_and_logits(extractors.in_colour(part))[1] for part in parts]
            return inception_score(torch.cat(logits))

        ours, theirs = score(images), score(real)
        row = self._row(
            "inception_score",
            ours.mean,
            len(images),
            provenance,
            lower_is_better=False,
            floor=theirs.mean,
            details={"splits": ours.splits, "sd_over_splits": ours.std},
            seconds=time.perf_counter() - started,
        )
        return [row]

    def _copying(self, generated: Statistics) -> list[Measurement]:
        """Whether the pictures are copies: four tests that share one search for neighbours."""
        started, space = time.perf_counter(), self.spaces[0]
        train = self._of_source(self.dataset.train, self._bank_rows(), space)
        held_out = self._of_source(
            self.dataset.validation, range(min(len(self.dataset.validation), LARGEST_BANK)), space
        )
        try:
            found = memorization(generated, train, held_out, seed=self.seed)
        except DataError as error:
            self.say(str(error))
            return []
        shared = {"n_reference": train.n, "seconds": time.perf_counter() - started, "lower_is_better": False}
        provenance = self.provenance(space.name)

        def row(metric: str, value: float, **more: Any) -> Measurement:
            return self._row(metric, value, generated.n, provenance, **{**shared, **more})

        middle, (own, fresh) = found.ratios[-1], found.authenticity
        copies, test = found.copies_per_thousand, found.copy_test
        ratios = {f"quantile {r.quantile:g}": [r.ratio, r.low, r.high] for r in found.ratios}
        at_chance = {"by_cell": test.by_cell, "cells": test.cells, "meaning": "z; below -3 = copies"}
        held_out_pictures = {"floor": "held-out pictures"}
        return [
            row("copy_ratio", middle.ratio, low=middle.low, high=middle.high, floor=1.0, details=ratios),
            row("authenticity", own.value, low=own.low, high=own.high, floor=fresh.value, details=held_out_pictures),
            row("copies_per_thousand", copies.value, low=copies.low, high=copies.high, lower_is_better=True),
            row("copy_test", test.overall, details=at_chance),
        ]

    def _spectrum(self, images: Tensor) -> list[Measurement]:
        """How far the power spectrum of the pictures is from that of real ones, and grids in it."""
        if min(images.shape[2:]) < SMALLEST_SIDE:
            return []
        started = time.perf_counter()
        reference_rows, real_source, real_rows, floor_from = self._real(self.count(len(images)))
        own, reference, real = Spectrum(), Spectrum(), Spectrum()
        for spectrum, pictures in (
            (own, images),
            (reference, self.dataset.validation.read(reference_rows).images),
            (real, real_source.read(real_rows).images),
        ):
            for part in pictures.split(BATCH):
                spectrum.update(datasets.to_float(part))
        found, floor = compare_spectra(own, reference), compare_spectra(real, reference)
        row = self._row(
            "spectrum",
            found.distance_db,
            len(images),
            self.provenance("pixels"),
            n_reference=len(reference_rows),
            floor=floor.distance_db,
            details={
                "bands": found.bands,
                "nyquist": found.nyquist,
                "floor": floor_from,
                "radial": own.radial.tolist(),
                "radial_real": reference.radial.tolist(),
            },
            seconds=time.perf_counter() - started,
        )
        return [row]

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
        names = self.dataset.train.class_names
        by_class = {
            names[label]: float(correct[labels[asked] == label].double().mean())
            for label in labels[asked].unique().tolist()
        }
        return self._row(
            "label_accuracy",
            float(correct.double().mean()),
            len(correct),
            self.provenance("judge"),
            low=low,
            high=high,
            n_reference=int(known.sum()),
            lower_is_better=False,
            floor=on_real,
            seconds=time.perf_counter() - started,
            details={"judge_hash": weights_hash(self.judge), "floor": "held-out pictures", "classes": by_class},
        )

    # -- real pictures ------------------------------------------------------------------------------------------------

    def _real(self, count: int) -> tuple[list[int], Source, list[int], str]:
        """Rows of the reference, and source and rows of other real pictures for the floor, and where those are from.

        They are held-out pictures where there are twice as many as are compared, else training pictures.
        """
        held_out, train = self.dataset.validation, self.dataset.train
        order = random_rows(len(held_out), len(held_out), mix(self.seed, "reference"))
        if len(held_out) >= 2 * count:
            return order[:count], held_out, order[count : 2 * count], "held-out pictures"
        return order[:count], train, random_rows(len(train), count, mix(self.seed, "floor")), "training pictures"

    def _bank_rows(self) -> list[int]:
        count = min(len(self.dataset.train), LARGEST_BANK)
        return random_rows(len(self.dataset.train), count, mix(self.seed, "bank"))

    def _of(self, images: Tensor, space: Space) -> Statistics:
        key = f"{space.name}:{extractors.images_key(images)}"
        if key not in self._statistics:
            features = extract(space.network, extractors.rebatched(images.split(BATCH)))
            self._statistics[key] = Statistics.of(features, "generated")
        return self._statistics[key]

    def _of_source(self, source: Source, rows: Sequence[int], space: Space) -> Statistics:
        """Features of these pictures, kept on disk: they are the same in every evaluation."""
        chosen = hashlib.sha256(",".join(map(str, rows)).encode()).hexdigest()
        key = f"{source.fingerprint}:{chosen}"
        if f"{space.name}:{key}" not in self._statistics:
            chunks = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
            batches = (source.read(chunk).images for chunk in chunks)
            folder = datasets.cache_folder() / "features"
            features = extractors.cached_features(space.network, batches, key, folder, self.say)
            self._statistics[f"{space.name}:{key}"] = Statistics.of(features, "real")
        return self._statistics[f"{space.name}:{key}"]


def _with_curve(row: Measurement, generated: Statistics, reference: Statistics, real: Statistics) -> Measurement:
    """The row with (k, precision, recall) for balls of several sizes, also of real pictures, for the report."""
    count = min(CURVE_PICTURES, generated.n, reference.n, real.n)
    own, other, fresh = (side.subset(torch.arange(count)) for side in (generated, reference, real))
    curves = {"curve": precision_recall_curve(own, other), "curve_real": precision_recall_curve(fresh, other)}
    plain = {name: [list(point) for point in points] for name, points in curves.items()}
    return dataclasses.replace(row, details={**row.details, **plain})


def random_rows(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` indices in random order, a function of the seed alone."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
