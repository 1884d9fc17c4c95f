"""Pictures of a source that are shown: those of the labels asked for, and no others are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from imagekiln.core import Batch
from imagekiln.engine import pictures


class Numbered:
    """Pictures of one pixel, which is their number; every other one is of class 1."""

    image_shape, num_classes, class_names, fingerprint = (1, 1, 1), 2, ("even", "odd"), "numbered"

    def __init__(self, count: int, labelled: bool = True) -> None:
        self.labels_N = torch.arange(count) % 2 if labelled else None
        self.count, self.asked = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Batch:
        self.asked += list(indices)
        images = torch.tensor(list(indices), dtype=torch.uint8)[:, None, None, None]
        return Batch(images, None if self.labels_N is None else self.labels_N[list(indices)])


def numbers(source: Numbered, labels: list[int]) -> list[int]:
    return pictures.of_labels(source, labels).flatten().tolist()


def test_pictures_of_labels_are_different_ones_and_no_more_are_read() -> None:
    source = Numbered(100)
    assert numbers(source, [1, 0, 1, 1, 0]) == [1, 0, 3, 5, 2] == source.asked


def test_where_a_label_has_too_few_others_stand_in() -> None:
    assert numbers(Numbered(3), [1, 1, 1]) == [1, 1, 2]


def test_without_labels_they_are_the_first_ones() -> None:
    source = Numbered(3, labelled=False)
    assert numbers(source, [-1] * 5) == [0, 1, 2] == source.asked
