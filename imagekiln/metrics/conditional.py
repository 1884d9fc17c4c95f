"""Metrics within classes: whether pictures of a class look like that class, and not only like the set as a whole.

intra-class M = mean over classes c of M(generated of c, reference of c)      (Miyato & Koyama 2018, intra FID)

A model that draws good pictures and ignores the label keeps its overall numbers and fails here. Classes with too few
pictures on a side are left out and named; what is left out belongs to the number. Every class counts once, whatever its
size. Most metrics depend on the number of pictures, which is smaller within a class: compare only at equal counts.

Shapes: G and R pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.core import UNLABELLED, Metric
from imagekiln.errors import DataError
from imagekiln.metrics.statistics import Statistics


class ClassScore(NamedTuple):
    """One class's row; value is None where a side has too few pictures."""

    label: int
    name: str
    value: float | None
    num_generated: int
    num_reference: int


class IntraClass(NamedTuple):
    """mean over the classes that have a value; classes: all rows by label; worst: the row farthest from good.

    left_out: names of the classes without a value; num_unlabelled: pictures of both sides that have no label.
    """

    metric: str
    mean: float
    classes: tuple[ClassScore, ...]
    worst: ClassScore
    left_out: tuple[str, ...]
    num_unlabelled: int


def intra_class(
    metric: Metric,
    generated: Statistics,
    reference: Statistics,
    generated_labels: Tensor,
    reference_labels: Tensor,
    class_names: Sequence[str] = (),
    least: int = 2,
) -> IntraClass:
    """The metric within every class that either side has.

    generated_labels, reference_labels: labels_G, labels_R int64, -1 = unlabelled (counted, not used); for generated
        pictures, the class that was asked for. class_names: by label; numbers where it is empty or too short.
    least: pictures a class needs on both sides, at least the metric's own `min_n`.

    Raises DataError for labels of another shape, or when no class has enough pictures.

    >>> from imagekiln.metrics.frechet import FrechetDistance
    >>> rows, labels = torch.tensor([[0.0], [2.0], [10.0], [12.0], [5.0]]), torch.tensor([0, 0, 1, 1, 2])
    >>> generated, reference = Statistics.of(rows + labels[:, None]), Statistics.of(rows)
    >>> found = intra_class(FrechetDistance(), generated, reference, labels, labels)
    >>> round(found.mean, 6), found.worst.name, found.left_out
    (0.5, '1', ('2',))
    """
    sides = ((generated, generated_labels, "generated"), (reference, reference_labels, "reference"))
    for statistics, labels_N, side in sides:
        if tuple(labels_N.shape) != (statistics.n,) or labels_N.is_floating_point():
            raise DataError(
                f"The {side} set has {statistics.n} pictures and labels of shape {tuple(labels_N.shape)} and dtype "
                f"{labels_N.dtype}; it needs one whole number a picture."
            )
    needed = max(least, getattr(metric, "min_n", 1))
    rows = []
    for label in torch.cat([generated_labels, reference_labels]).unique().tolist():
        if label == UNLABELLED:
            continue
        masks = [labels_N == label for _, labels_N, _ in sides]
        num_generated, num_reference = (int(mask_N.sum()) for mask_N in masks)
        value = None
        if min(num_generated, num_reference) >= needed:
            value = metric(generated.subset(masks[0]), reference.subset(masks[1]))
        name = class_names[label] if 0 <= label < len(class_names) else str(label)
        rows.append(ClassScore(label, name, value, num_generated, num_reference))
    found = [(row.value, row) for row in rows if row.value is not None]
    if not found:
        most = max((min(row.num_generated, row.num_reference) for row in rows), default=0)
        raise DataError(
            f"No class has the {needed} pictures on both sides that {metric.name!r} within classes needs (the largest "
            f"has {most}): draw more pictures of every class."
        )
    found.sort(key=lambda pair: pair[0], reverse=metric.lower_is_better)
    return IntraClass(
        metric=metric.name,
        mean=sum(value for value, _ in found) / len(found),
        classes=tuple(rows),
        worst=found[0][1],
        left_out=tuple(row.name for row in rows if row.value is None),
        num_unlabelled=sum(int((labels_N == UNLABELLED).sum()) for _, labels_N, _ in sides),
    )
