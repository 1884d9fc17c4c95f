"""Labels for pictures that have none, proposed by classifiers of those that have one, with confidence one can count on.

Some classifiers learn from the labelled pictures, each from another seed, and judge together: z is the mean of their
scores. Some labelled pictures are kept back, class by class; none of the classifiers sees them, nor those held out. On
these a temperature T is fitted, confidence = max softmax(z / T), by minimising the negative log-likelihood (Guo et al.
2017, "On calibration of modern neural networks", arXiv:1706.04599), after the scores are joined, not before (Rahaman
and Thiery 2021, arXiv:2007.08792). A label is accepted from a threshold on (pseudo-labels: Lee 2013).

The same pictures tell how often accepted labels are right. For this the judges have to be the same: where each labelled
picture is judged by one classifier of a cross-validation and an unlabelled one by the mean of all, more of the accepted
labels are right than is said, because several agree on them.

What is expected holds if pictures with and without labels are of a kind: if a class has no labelled picture at all, its
unlabelled ones get wrong labels.

Shapes: N pictures, K classes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import Recipe, write_toml
from imagekiln.core import UNLABELLED, Batch, Source, mix
from imagekiln.data import cell, printable
from imagekiln.data.source import Pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.judges import BATCH, JUDGE_RECIPE
from imagekiln.engine.models import Model, open_model
from imagekiln.engine.run import Run, write_whole
from imagekiln.engine.tracker import Say, Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import UsageError
from imagekiln.metrics.share import wilson

BINS = 15
"""Of equal width in confidence, for the calibration error (Guo et al. 2017)."""

COLDEST, HOTTEST = 0.05, 20.0
"""Between which the temperature is looked for."""

KEPT_BACK = 0.25
"""Largest share of the labelled pictures to train on that is kept back to be judged."""

MOST_JUDGED = 1000
"""Judged pictures, those held out among them, from which on no more are kept back: the interval is narrow by then."""

PARTS = 5
"""Of the judged pictures; what is said of one rests on a temperature that was fitted on the others."""

FEW = 6
"""Labelled pictures of a class below which its proposals are worth a word."""

SETTINGS = {"train": {"doctor": "off"}}
"""Laid over the recipe of the judges."""


@dataclass(frozen=True)
class Proposed:
    """A label for one file: the class's number and name, how sure it is (calibrated), and whether that is enough."""

    file: str
    label: int
    name: str
    confidence: float
    accepted: bool


@dataclass(frozen=True)
class Proposal:
    """What `propagate` found.

    rows: every unlabelled picture of both sides. num_labelled: labelled pictures; num_judged: those of them that no
    classifier saw; accuracy: share of these that is judged right, whatever the confidence. num_counted: of these, those
    with confidence above the threshold; precision: share of these that is right, with low and high, its 95 % interval,
    all None where there is none. calibration_error, uncalibrated_error: mean gap of confidence and accuracy, with the
    temperature (chosen on other pictures than it is measured on) and without.
    """

    rows: list[Proposed]
    threshold: float
    temperature: float
    num_labelled: int
    num_judged: int
    accuracy: float
    num_counted: int
    precision: float | None
    low: float | None
    high: float | None
    calibration_error: float
    uncalibrated_error: float
    notices: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> list[Proposed]:
        """The rows that are sure enough."""
        return [row for row in self.rows if row.accepted]

    def summary(self) -> str:
        """One sentence or two for a person."""
        line = (
            f"{len(self.accepted):,} of {len(self.rows):,} pictures without a label get one, "
            f"at a confidence of at least {self.threshold:g}."
        )
        if self.precision is None:
            return f"{line} No labelled picture was judged with so much confidence, so how many are right is unknown."
        return (
            f"{line} Expect {self.precision:.1%} of them to be right ({self.low:.1%} to {self.high:.1%}, counted on "
            f"{self.num_counted:,} labelled pictures the classifiers had not seen)."
        )


def write_csv(proposal: Proposal, path: Path) -> None:
    """Every proposal as a table: file, label, confidence, accepted. Raises `DiskError`."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("file", "label", "confidence", "accepted"))
    for row in proposal.rows:
        table.writerow((cell(printable(row.file)), cell(row.name), f"{row.confidence:.4f}", row.accepted))
    write_whole(path, text.getvalue().encode(errors="replace"))


class Part:
    """Some pictures of a source, in order: a `Source` of its own."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.image_shape, self.num_classes = source.image_shape, source.num_classes
        self.class_names = source.class_names
        self._source, self._rows = source, rows
        key = f"{source.fingerprint}:{hashlib.sha256(rows.astype('<i8').tobytes()).hexdigest()}"
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> Batch:
        return self._source.read(self._rows[np.asarray(indices, np.int64)].tolist())


def propagate(
    dataset: datasets.Dataset,
    threshold: float = 0.95,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[str] = (),
    say: Say = lambda sentence: None,
) -> Proposal:
    """Propose labels for the unlabelled pictures of both sides of a set.

    seeds: one a classifier, at least two. settings: `a.b=value`, laid over the recipe of the judges.

    Raises:
        UsageError: no picture is labelled, all of them are, or only one class is known; or the threshold is no share.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold {threshold:g}: expected a confidence above 0 and at most 1, such as 0.95.")
    if len(set(seeds)) < 2:
        raise UsageError(f"seeds {list(seeds)}: expected at least two different ones, one for each classifier.")
    sides = [dataset.train] if dataset.train is dataset.validation else [dataset.train, dataset.validation]
    labels = [_labels(side) for side in sides]
    _check(dataset, labels)
    known, kept_back = labels[0] != UNLABELLED, _kept_back(labels)
    learnt = Part(dataset.train, np.flatnonzero(known & ~kept_back))
    recipe = recipes.resolve(JUDGE_RECIPE, SETTINGS, settings)
    scores = [torch.zeros(len(side), dataset.train.num_classes) for side in sides]
    for number, seed in enumerate(seeds, 1):
        say(f"Training classifier {number} of {len(seeds)} on {len(learnt):,} labelled pictures.")
        held_out = Part(dataset.train, np.flatnonzero(kept_back)) if kept_back.any() else learnt
        model = _trained(recipe, learnt, held_out, seed)
        for score_NK, side in zip(scores, sides, strict=True):
            score_NK += _logits(model, side) / len(seeds)
    unseen = [kept_back, *(side != UNLABELLED for side in labels[1:])]
    judged = torch.cat([score[torch.from_numpy(rows)] for score, rows in zip(scores, unseen, strict=True)])
    truth = torch.cat([torch.from_numpy(side[rows]) for side, rows in zip(labels, unseen, strict=True)])
    temperature = fitted_temperature(judged, truth)
    confidence, label = _cross_fitted(judged, truth).max(1)
    hit = label == truth
    counted, hits = int((confidence >= threshold).sum()), int(hit[confidence >= threshold].sum())
    interval = wilson(hits, counted) if counted else None
    return Proposal(
        rows=_proposed(dataset, sides, labels, scores, temperature, threshold),
        threshold=threshold,
        temperature=temperature,
        num_labelled=sum(int((side != UNLABELLED).sum()) for side in labels),
        num_judged=len(truth),
        accuracy=float(hit.double().mean()) if len(hit) else math.nan,
        num_counted=counted,
        precision=hits / counted if counted else None,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        calibration_error=calibration_error(confidence, hit),
        uncalibrated_error=calibration_error(judged.softmax(1).max(1).values, judged.argmax(1) == truth),
        notices=_notices(dataset, labels),
    )


# -- calibration ------------------------------------------------------------------------------------------------------


def fitted_temperature(logits_NK: Tensor, labels_N: Tensor) -> float:
    """The temperature T that minimises the negative log-likelihood of softmax(z / T): one scalar (Guo et al. 2017).

    The loss is convex in 1 / T, so that it has one minimum in log T, which golden section finds. One wrong judgement
    with the mean gap of scores is added to it (as in Laplace's rule of succession), so that a few pictures that are all
    judged right do not make the next one certain. Of no pictures at all the hottest one is taken: nothing is certain.

    >>> scores = torch.tensor([[4.0, 0.0]]).repeat(4000, 1)
    >>> odds_3_to_1 = torch.tensor([0, 0, 0, 1]).repeat(1000)
    >>> round(4 / fitted_temperature(scores, odds_3_to_1) / math.log(3), 2)
    1.0
    """
    if not len(labels_N):
        return HOTTEST
    logits_NK = logits_NK.double()
    mean_gap = (logits_NK.max(1).values - logits_NK.mean(1)).mean().clamp(min=1e-6)

    def loss(log_t: float) -> float:
        scaled_NK = logits_NK / math.exp(log_t)
        likelihood = torch.nn.functional.cross_entropy(scaled_NK, labels_N, reduction="sum")
        return float(likelihood + torch.nn.functional.softplus(mean_gap / math.exp(log_t)))

    return math.exp(_golden(loss, math.log(COLDEST), math.log(HOTTEST)))


def calibration_error(confidence_N: Tensor, right_N: Tensor) -> float:
    """Expected calibration error: mean gap between confidence and accuracy in `BINS` bins, weighted by their pictures.

    >>> round(calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False])), 6)
    0.4
    """
    bin_N = (confidence_N.double() * BINS).ceil().clamp(1, BINS).long() - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bin_N, right_N.double() - confidence_N.double())
    return float(gaps.abs().sum() / max(1, len(confidence_N)))


def _golden(f: Callable[[float], float], low: float, high: float, steps: int = 32) -> float:
    """Where a function with one minimum has it, by golden section: each step keeps 0.618 of the interval."""
    share = (math.sqrt(5) - 1) / 2
    a, b = high - share * (high - low), low + share * (high - low)
    at_a, at_b = f(a), f(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - share * (high - low)
            at_a = f(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + share * (high - low)
            at_b = f(b)
    return (low + high) / 2


def _probabilities(logits_NK: Tensor, temperature: float) -> Tensor:
    return (logits_NK.double() / temperature).softmax(1)


def _cross_fitted(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Probabilities of judged pictures, each with the temperature of the parts it is not in: (N, K) float64."""
    part_N = torch.arange(len(labels_N)) % PARTS
    found_NK = torch.zeros_like(logits_NK, dtype=torch.float64)
    for part in range(PARTS):
        others = part_N != part
        temperature = fitted_temperature(logits_NK[others], labels_N[others])
        found_NK[~others] = _probabilities(logits_NK[~others], temperature)
    return found_NK


# -- pictures and classifiers -----------------------------------------------------------------------------------------


def _labels(source: Pictures) -> np.ndarray:
    return np.full(len(source), UNLABELLED, np.int64) if source.labels_N is None else source.labels_N.numpy()


def _check(dataset: datasets.Dataset, labels: list[np.ndarray]) -> None:
    """Raises UsageError where there is nothing to learn from, or nothing to propose."""
    every = np.concatenate(labels)
    known = labels[0][labels[0] != UNLABELLED]
    if not len(known):
        raise UsageError(
            f"{dataset.name}: no picture to train on has a label, so there is nothing to propose labels from. "
            "Give some of them one: folders named after their class, or metadata.csv."
        )
    if len(np.unique(known)) < 2:
        only = dataset.train.class_names[int(known[0])]
        raise UsageError(f"{dataset.name}: every label is {only!r}. Label pictures of at least one other class, too.")
    if not (every == UNLABELLED).any():
        raise UsageError(f"{dataset.name}: all {len(every):,} pictures have a label; there is nothing to propose.")


def _kept_back(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Which pictures to train on are kept back to be judged: bool, one a picture of the first side.

    labels: of every side. Of each class the same share is kept back, rounded so that the sums are right, and never all.
    """
    known = np.flatnonzero(labels[0] != UNLABELLED)
    wanted = MOST_JUDGED - sum(int((side != UNLABELLED).sum()) for side in labels[1:])
    share = min(KEPT_BACK, max(0, wanted) / max(1, len(known)))
    kept_N, due = np.zeros(len(labels[0]), np.bool_), 0.0
    for label in np.unique(labels[0][known]):
        own = np.flatnonzero(labels[0] == label)
        due += share * len(own)
        count = min(int(due + 1e-9), len(own) - 1)
        due -= count
        kept_N[own[np.argsort([mix("keep back", int(row)) for row in own], kind="stable")[:count]]] = True
    return kept_N


def _trained(recipe: Recipe, train: Source, held_out: Source, seed: int) -> Model:
    """A classifier, from the cache or trained now."""
    longer = max(recipe.train.total_kimg, 3 * len(train) / 1000)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed, "total_kimg": longer})})
    settings = json.dumps(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    key = f"{mix(train.fingerprint, recipe.family.name, settings):016x}"
    run = Run(datasets.cache_folder() / "proposals" / key)
    with run.lock():
        if run.status().get("state") != "finished":
            run = Run.create(run.path, write_toml(recipe), {"average": recipe.train.averages[0].name})
            torch.manual_seed(mix(seed, "initialisation"))
            family = recipes.build(recipe, train.image_shape, train.num_classes)
            Trainer(recipe, family, train, held_out, run, Silent()).fit()
    return open_model(run)


@torch.inference_mode()
def _logits(model: Model, source: Source) -> Tensor:
    """Class scores of every picture of a source: (N, K) float32 on the CPU."""
    parts = []
    for start in range(0, len(source), BATCH):
        images = source.read(range(start, min(len(source), start + BATCH))).images
        parts.append(model.family.predict(datasets.to_float(images.to(model.device))).float().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, source.num_classes)


def _proposed(
    dataset: datasets.Dataset,
    sides: Sequence[Pictures],
    labels: list[np.ndarray],
    scores: list[Tensor],
    temperature: float,
    threshold: float,
) -> list[Proposed]:
    found = []
    for side, source in enumerate(sides):
        rows = np.flatnonzero(labels[side] == UNLABELLED)
        confidence, label = _probabilities(scores[side][torch.from_numpy(rows)], temperature).max(1)
        for row, sure, number in zip(rows.tolist(), confidence.tolist(), label.tolist(), strict=True):
            name = dataset.train.class_names[number]
            found.append(Proposed(source.files[row], number, name, sure, sure >= threshold))
    return found


def _notices(dataset: datasets.Dataset, labels: list[np.ndarray]) -> list[str]:
    counts = np.bincount(labels[0][labels[0] != UNLABELLED], minlength=dataset.train.num_classes)
    names = dataset.train.class_names
    found = []
    if missing := [names[k] for k in np.flatnonzero(counts == 0)]:
        found.append(f"No picture to train on is labelled {_some(missing)}: no label is proposed for such pictures.")
    if few := [names[k] for k in np.flatnonzero((counts > 0) & (counts < FEW))]:
        found.append(f"Fewer than {FEW} pictures are labelled {_some(few)}: their labels are the least certain.")
    return found


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
