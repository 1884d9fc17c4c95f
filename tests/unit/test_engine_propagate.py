"""Proposed labels: calibration against a grid in float64, keeping back, errors, and digits that lost their labels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imagekiln import data
from imagekiln.core import UNLABELLED, Source
from imagekiln.data import builtin, source
from imagekiln.engine import propagate as module
from imagekiln.engine.propagate import Part, calibration_error, fitted_temperature, propagate
from imagekiln.errors import UsageError
from imagekiln.metrics.share import wilson

SMALL = ("train.total_kimg=5", "family.width=8", "train.batch=32", "optim.network.lr=4e-3")
TINY = ("train.total_kimg=0.2", "family.width=8", "train.batch=16")


def digits(keep: float, n: int = 1797, classes: int = 10, seed: int = 5) -> tuple[data.Dataset, np.ndarray]:
    """scikit-learn's digits with a share of their labels, and all labels by file number."""
    whole = builtin.load("digits", Path("unused"))
    chosen = np.flatnonzero(whole.labels < classes)[:n]
    images_NCHW, truth = whole.images_NHWC[chosen].transpose(0, 3, 1, 2), whole.labels[chosen]
    labels = np.where(np.random.default_rng(seed).random(len(chosen)) < keep, truth, UNLABELLED)
    return dataset_of(images_NCHW, labels), truth


def dataset_of(images_NCHW: np.ndarray, labels: np.ndarray) -> data.Dataset:
    digests = [source.digest(image) for image in images_NCHW]
    files = [f"{index}.png" for index in range(len(labels))]
    table = source.Table(images_NCHW, labels, tuple("0123456789"), digests, files)
    return source.dataset("digits", table, source.split(digests, 0.2), [], [])


@pytest.fixture(scope="module")
def proposal() -> tuple[module.Proposal, data.Dataset, np.ndarray]:
    dataset, truth = digits(keep=0.2)
    return propagate(dataset, 0.9, seeds=(0, 1), settings=SMALL), dataset, truth


# -- a real set -------------------------------------------------------------------------------------------------------


def test_accepted_labels_are_right_as_often_as_promised(proposal):
    found, _, truth = proposal
    right = np.array([truth[int(row.file.removesuffix(".png"))] == row.label for row in found.accepted])
    assert len(right) > 100
    # Three standard errors of a share below the threshold would be bad luck of 1 in 1,000.
    assert right.mean() > 0.9 - 3 * math.sqrt(0.9 * 0.1 / len(right))
    assert found.low - 0.03 <= right.mean()
    assert 0.9 - 3 * math.sqrt(0.9 * 0.1 / found.num_counted) < found.precision


class Tally:
    """What was said of many proposals and what was true."""

    def __init__(self) -> None:
        self.covered = self.said = self.counted = self.right = self.accepted = 0

    def add(self, found: module.Proposal, truth: np.ndarray) -> None:
        hits = sum(int(truth[int(row.file.removesuffix(".png"))]) == row.label for row in found.accepted)
        self.covered += found.low <= hits / len(found.accepted) <= found.high
        self.said, self.counted = self.said + found.precision * found.num_counted, self.counted + found.num_counted
        self.right, self.accepted = self.right + hits, self.accepted + len(found.accepted)

    def bias(self) -> float:
        """What was said minus what was true, in standard deviations of the difference of two shares."""
        share = (self.said + self.right) / (self.counted + self.accepted)
        deviation = math.sqrt(share * (1 - share) * (1 / self.counted + 1 / self.accepted))
        return (self.said / self.counted - self.right / self.accepted) / deviation


def test_what_is_said_of_digits_is_true_and_its_interval_holds():
    tally = Tally()
    for seed in range(4):
        dataset, truth = digits(keep=0.2, seed=seed)
        found = propagate(dataset, 0.9, seeds=(2 * seed, 2 * seed + 1), settings=(*SMALL, "train.total_kimg=3"))
        tally.add(found, truth)
    assert tally.covered >= 3  # at 95 % each, fewer than 3 of 4 would be bad luck of 1 in 70
    assert abs(tally.bias()) < 3


def test_what_is_said_is_true_whatever_the_classifiers_are_like(monkeypatch):
    """Scores of classifiers that err partly together and partly each on its own, in sets of their own."""
    tally, num_sets, n = Tally(), 40, 1200
    monkeypatch.setattr(module, "_trained", lambda recipe, train, held_out, seed: seed)
    for number in range(num_sets):
        rng = np.random.default_rng(number)
        truth = rng.integers(0, 10, n)
        alike_NK = 4.0 * np.eye(10)[truth] + rng.standard_normal((n, 10))
        scores = {seed: torch.from_numpy(alike_NK + rng.standard_normal((n, 10))) for seed in range(3)}

        def judged(seed, side, scores=scores):
            return scores[seed][[int(file.removesuffix(".png")) for file in side.files]].float()

        monkeypatch.setattr(module, "_logits", judged)
        labels = np.where(rng.random(n) < 0.4, truth, UNLABELLED)
        tally.add(propagate(dataset_of(rng.integers(0, 256, (n, 1, 2, 2), dtype=np.uint8), labels), 0.9), truth)
    assert tally.covered >= 34  # binomial, 40 at 95 %: fewer would be bad luck of 1 in 70
    assert abs(tally.bias()) < 3


def test_every_unlabelled_picture_has_one_row(proposal):
    found, dataset, truth = proposal
    sides = (dataset.train, dataset.validation)
    hidden = {file for side in sides for file, label in zip(side.files, module._labels(side), strict=True) if label < 0}
    assert len(found.rows) == len(hidden) == len(truth) - found.num_labelled
    assert {row.file for row in found.rows} == hidden
    for row in found.rows:
        assert row.name == dataset.train.class_names[row.label]
        assert row.accepted == (row.confidence >= 0.9) and 0.1 <= row.confidence <= 1


def test_calibration_helps(proposal):
    found, _, _ = proposal
    assert found.calibration_error < found.uncalibrated_error
    assert found.temperature != pytest.approx(1, abs=0.05)
    confidence = np.mean([row.confidence for row in found.rows])
    assert abs(confidence - found.accuracy) < 0.12


def test_the_summary_says_what_to_expect(proposal):
    found, _, _ = proposal
    assert f"{len(found.accepted):,} of {len(found.rows):,} pictures without a label" in found.summary()
    assert f"{found.precision:.1%} of them to be right" in found.summary()
    assert (found.low, found.high) == wilson(round(found.precision * found.num_counted), found.num_counted)
    unknown = replace(found, precision=None, low=None, high=None, num_counted=0)
    assert "unknown" in unknown.summary()


def test_the_same_call_gives_the_same_from_the_cache(proposal):
    found, dataset, _ = proposal
    said: list[str] = []
    again = propagate(dataset, 0.9, seeds=(0, 1), settings=SMALL, say=said.append)
    assert again.rows == found.rows and again.temperature == found.temperature
    assert said == [
        f"Training classifier {k} of 2 on {n:,} labelled pictures."
        for k, n in zip((1, 2), _sizes(dataset), strict=True)
    ]


def _sizes(dataset: data.Dataset) -> list[int]:
    labels = [module._labels(side) for side in (dataset.train, dataset.validation)]
    return 2 * [int(((labels[0] != UNLABELLED) & ~module._kept_back(labels)).sum())]


def test_two_labelled_pictures_are_enough_to_begin():
    dataset, truth = digits(keep=0.0, n=40, classes=2)
    labels = np.full(40, UNLABELLED)
    train = {int(file.removesuffix(".png")) for file in dataset.train.files}
    for label in (0, 1):
        labels[next(index for index in np.flatnonzero(truth == label) if index in train)] = label
    found = propagate(dataset_of(builtin_images(truth), labels), 0.99, seeds=(0, 1), settings=TINY)
    assert (found.num_labelled, found.num_judged) == (2, 0) and len(found.rows) == 38
    assert not found.accepted and found.precision is None and "unknown" in found.summary()
    assert all(math.isfinite(row.confidence) for row in found.rows)
    assert any("'2', '3'" in notice for notice in found.notices) and any("least certain" in n for n in found.notices)


def builtin_images(truth: np.ndarray) -> np.ndarray:
    whole = builtin.load("digits", Path("unused"))
    return whole.images_NHWC[np.flatnonzero(whole.labels < 2)[: len(truth)]].transpose(0, 3, 1, 2)


# -- what cannot be done ----------------------------------------------------------------------------------------------


def test_no_label_at_all_is_refused():
    with pytest.raises(UsageError, match="no picture to train on has a label"):
        propagate(digits(keep=0.0, n=30)[0])


def test_one_class_is_refused():
    with pytest.raises(UsageError, match="every label is '0'"):
        propagate(digits(keep=0.5, n=30, classes=1)[0])


def test_nothing_to_propose_is_refused():
    with pytest.raises(UsageError, match="all 30 pictures have a label"):
        propagate(digits(keep=1.0, n=30)[0])


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, math.nan])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(UsageError, match="threshold"):
        propagate(digits(keep=0.5, n=30)[0], threshold)


def test_one_seed_judges_nobody():
    with pytest.raises(UsageError, match="two different"):
        propagate(digits(keep=0.5, n=30)[0], seeds=(3, 3))


# -- calibration ------------------------------------------------------------------------------------------------------


def drawn(temperature: float, n: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores whose softmax is right when divided by `temperature`."""
    generator = torch.Generator().manual_seed(1)
    fair_NK = 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(fair_NK.softmax(1), 1, generator=generator)[:, 0]
    return fair_NK * temperature, labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_made_the_scores_is_found(temperature):
    scores, labels = drawn(temperature)
    found = fitted_temperature(scores, labels)
    assert found == pytest.approx(temperature, rel=0.04)
    after = (scores / found).softmax(1)
    assert calibration_error(after.max(1).values, after.argmax(1) == labels) < 0.015


def test_the_temperature_is_the_best_one_of_a_grid():
    scores, labels = drawn(2.0, n=3000)
    grid = torch.logspace(-1, 1, 4001, dtype=torch.float64)
    log_likelihood = torch.stack([(scores / t).log_softmax(1).gather(1, labels[:, None]).sum() for t in grid])
    assert fitted_temperature(scores, labels) == pytest.approx(float(grid[log_likelihood.argmax()]), rel=0.005)


def test_a_few_right_pictures_make_nothing_certain():
    scores = torch.tensor([[3.0, 0.0, 0.0]]).repeat(4, 1)
    sure = (scores / fitted_temperature(scores, torch.zeros(4, dtype=torch.int64))).softmax(1).max()
    assert 0.6 < sure < 0.97


def test_the_calibration_error_is_that_of_bins_counted_by_hand():
    generator = np.random.default_rng(0)
    confidence = np.concatenate([generator.random(500), [0.0, 1.0, 1 / 15, 2 / 15]])
    right = generator.random(504) < 0.5
    expected = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        inside |= (confidence == 0) & (k == 0)
        if inside.any():
            expected += inside.sum() / 504 * abs(right[inside].mean() - confidence[inside].mean())
    found = calibration_error(torch.from_numpy(confidence), torch.from_numpy(right))
    assert found == pytest.approx(expected, abs=1e-12)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_share_of_every_class_is_kept_back_and_never_all_of_it():
    labels = np.array([0] * 10 + [1] * 4 + [2, 3] + [UNLABELLED] * 4 + [4] * 82)
    kept = module._kept_back([labels])
    assert [int(kept[labels == k].sum()) for k in range(-1, 5)] == [0, 2, 1, 0, 0, 21]
    assert (module._kept_back([labels]) == kept).all()
    assert not module._kept_back([np.array([0, 1, UNLABELLED])]).any()


def test_no_more_are_kept_back_than_are_of_use():
    labels = np.repeat(np.arange(10), 1000)
    for held_out, expected in ((0, 1000), (400, 600), (1000, 0), (5000, 0)):
        assert module._kept_back([labels, np.zeros(held_out, np.int64)]).sum() == expected


def test_judged_pictures_were_seen_by_no_classifier(monkeypatch):
    seen: list[set[int]] = []
    trained = module._trained

    def watched(recipe, train, held_out, seed):
        seen.append(set(train._rows.tolist()))
        return trained(recipe, train, held_out, seed)

    monkeypatch.setattr(module, "_trained", watched)
    dataset, _ = digits(keep=0.5, n=60)
    found = propagate(dataset, 0.9, seeds=(0, 1), settings=TINY)
    labels = [module._labels(side) for side in (dataset.train, dataset.validation)]
    kept = set(np.flatnonzero(module._kept_back(labels)).tolist())
    known = set(np.flatnonzero(labels[0] != UNLABELLED).tolist())
    assert seen == [known - kept] * 2 and 0 < len(kept) < len(known)
    assert found.num_judged == len(kept) + int((labels[1] != UNLABELLED).sum())
    assert found.num_labelled == len(known) + int((labels[1] != UNLABELLED).sum())


def test_a_part_is_a_source_with_its_own_fingerprint():
    dataset, _ = digits(keep=0.5, n=50)
    part = Part(dataset.train, np.array([7, 3]))
    assert isinstance(part, Source) and len(part) == 2
    assert torch.equal(part.read([1]).images, dataset.train.read([3]).images)
    assert part.fingerprint != Part(dataset.train, np.array([3, 7])).fingerprint != dataset.train.fingerprint
