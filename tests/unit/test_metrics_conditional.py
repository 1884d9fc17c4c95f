"""Metrics within classes: ignored labels are seen, small classes are named, nothing is counted twice."""

from __future__ import annotations

import pytest
import torch

from imagekiln.errors import DataError
from imagekiln.metrics import FrechetDistance, Precision, Statistics
from imagekiln.metrics.conditional import intra_class

FD = FrechetDistance()
CENTRES = 8.0 * torch.eye(4)


def drawn(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    return Statistics.of(CENTRES[labels] + torch.randn(len(labels), 4, generator=generator))


LABELS = torch.arange(400) % 4


def test_mean_and_rows_are_the_metric_on_each_class():
    generated, reference = drawn(LABELS, 0), drawn(LABELS, 1)
    found = intra_class(FD, generated, reference, LABELS, LABELS, ("a", "b", "c"))
    direct = [FD(generated.subset(c == LABELS), reference.subset(c == LABELS)) for c in range(4)]
    assert [row.value for row in found.classes] == direct and found.mean == pytest.approx(sum(direct) / 4)
    assert [row.name for row in found.classes] == ["a", "b", "c", "3"] and found.metric == "frechet"
    assert found.worst.value == max(direct) and found.left_out == ()
    assert all((row.num_generated, row.num_reference) == (100, 100) for row in found.classes)


def test_a_model_that_ignores_the_label_fails_here_only():
    reference, honest = drawn(LABELS, 1), drawn(LABELS, 0)
    shuffled = LABELS[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert FD(honest, reference) < 1.0
    ignoring = intra_class(FD, honest, reference, shuffled, LABELS)
    assert ignoring.mean > 20 * intra_class(FD, honest, reference, LABELS, LABELS).mean


def test_small_classes_are_left_out_and_named_and_unlabelled_counted():
    generated_labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 5 + [-1] * 10)
    reference_labels = torch.tensor([0] * 30 + [1] * 3 + [2] * 30 + [3] * 20)
    found = intra_class(
        FD,
        drawn(generated_labels, 0),
        drawn(reference_labels, 1),
        generated_labels,
        reference_labels,
        ("zero", "one", "two", "three"),
        least=10,
    )
    assert found.left_out == ("one", "two", "three") and found.num_unlabelled == 10
    assert found.mean == found.classes[0].value and [row.value for row in found.classes[1:]] == [None] * 3
    assert (found.classes[3].num_generated, found.classes[3].num_reference) == (0, 20)


def test_worst_follows_the_metrics_direction():
    labels = torch.tensor([0] * 40 + [1] * 40)
    generated = Statistics.of(drawn(labels, 0).features + 30.0 * (labels == 1)[:, None])
    found = intra_class(Precision(), generated, drawn(labels, 1), labels, labels)
    assert found.worst.label == 1 and found.worst.value == 0.0 < found.classes[0].value


def test_order_does_not_show():
    generated, reference = drawn(LABELS, 0), drawn(LABELS, 1)
    moved = Statistics.of(generated.features.flip(0))
    want = intra_class(FD, generated, reference, LABELS, LABELS).mean
    assert intra_class(FD, moved, reference, LABELS.flip(0), LABELS).mean == pytest.approx(want, rel=1e-6)


def test_refusals():
    statistics = drawn(LABELS[:8], 0)
    with pytest.raises(DataError, match="one whole number a picture"):
        intra_class(FD, statistics, statistics, LABELS[:7], LABELS[:8])
    with pytest.raises(DataError, match="one whole number a picture"):
        intra_class(FD, statistics, statistics, LABELS[:8], LABELS[:8].float())
    with pytest.raises(DataError, match="largest has 2"):
        intra_class(FD, statistics, statistics, LABELS[:8], LABELS[:8], least=3)
    with pytest.raises(DataError, match="largest has 0"):
        intra_class(FD, statistics, statistics, -torch.ones(8).long(), -torch.ones(8).long())
