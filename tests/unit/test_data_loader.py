"""Order and mirroring are pure functions of (seed, position); pixels survive the way to float and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.core import Batch
from imagekiln.data import Loader, to_float, to_uint8
from imagekiln.data.source import MemmapSource, Table
from imagekiln.errors import DataError


def source(count: int, class_names: tuple[str, ...] = ("x", "y")) -> MemmapSource:
    images = np.random.default_rng(count).integers(0, 256, (count, 3, 4, 6), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % 2
    table = Table(images, labels, class_names, [f"{n:032x}" for n in range(count)], [str(n) for n in range(count)])
    return MemmapSource(table, np.arange(count))


def test_every_byte_survives_the_way_to_float_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_float(every).min() == -1 and to_float(every).max() == 1
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0], dtype=torch.bfloat16)).tolist() == [0, 128, 255]


@given(st.integers(1, 50), st.integers(0, 2**31 - 1), st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    loader = Loader(source(count), seed, 1)
    assert sorted(loader.order(epoch * count, count).tolist()) == list(range(count))


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 500), st.integers(1, 70)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_order_does_not_depend_on_what_was_asked_before(count: int, asked: list[tuple[int, int]]) -> None:
    used = Loader(source(count), 3, 1)
    whole = Loader(source(count), 3, 1).order(0, 600)
    for position, length in asked:
        assert (used.order(position, length) == whole[position : position + length]).all()


def test_the_order_is_this_one_for_ever() -> None:
    """A golden number: it may only change together with the major version, because it changes every resumed run."""
    assert Loader(source(8), 0, 1).order(0, 16).tolist() == [4, 0, 2, 5, 6, 3, 7, 1, 2, 3, 0, 6, 5, 7, 4, 1]


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(Loader(source(20), seed, 1).order(epoch * 20, 20)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_batch_is_the_pictures_of_its_positions() -> None:
    data = source(10)
    loader = Loader(data, 1, 4)
    batch = loader.batch(8)  # crosses the border between the first and the second epoch
    expected = data.read(loader.order(8, 4).tolist())
    assert batch.images.dtype == torch.float32 and batch.images.shape == (4, 3, 4, 6)
    assert torch.equal(to_uint8(batch.images), expected.images)
    assert batch.labels is not None and expected.labels is not None
    assert torch.equal(batch.labels, expected.labels)


def test_a_set_smaller_than_the_batch_repeats() -> None:
    loader = Loader(source(3), 0, 8)
    assert loader.batch(0).images.shape[0] == 8
    assert np.bincount(loader.order(0, 9)).tolist() == [3, 3, 3]


def test_mirroring_is_fair_and_a_function_of_seed_and_position() -> None:
    data = source(5)
    plain, mirrored = Loader(data, 7, 1000), Loader(data, 7, 1000, flip=True)
    before, after = plain.batch(0).images, mirrored.batch(0).images
    same = (before == after).flatten(1).all(1)
    turned = (before.flip(-1) == after).flatten(1).all(1)
    assert bool((same ^ turned).all())
    assert abs(int(turned.sum()) - 500) < 5 * np.sqrt(250)
    halves = torch.cat([Loader(data, 7, 500, flip=True).batch(position).images for position in (0, 500)])
    assert torch.equal(halves, after)
    assert (Loader(data, 8, 1000, flip=True)._mirrored(0) != mirrored._mirrored(0)).any()


def test_unlabelled_sources_and_text_pass_through() -> None:
    assert Loader(source(4, ()), 0, 2).batch(0).labels is None

    class Told:
        image_shape, num_classes, class_names, fingerprint = (3, 4, 6), 0, (), "told"

        def __len__(self) -> int:
            return 3

        def read(self, indices: Sequence[int]) -> Batch:
            return Batch(torch.zeros(len(indices), 3, 4, 6, dtype=torch.uint8), None, torch.tensor(indices)[:, None])

    loader = Loader(Told(), 0, 3)
    text = loader.batch(0).text
    assert text is not None and text[:, 0].tolist() == loader.order(0, 3).tolist()


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="no pictures to train on"):
        Loader(source(0), 0, 4)


def test_only_two_permutations_are_kept() -> None:
    loader = Loader(source(6), 0, 4)
    for position in range(0, 600, 4):
        loader.batch(position)
    assert len(loader._permutations) <= 2


def test_mirroring_is_this_one_for_ever() -> None:
    """A golden number, like the order."""
    mirrored = Loader(source(8), 0, 16, flip=True)._mirrored(1000)
    assert "".join(map(str, mirrored.astype(int))) == "1110010000100110"


def test_what_is_done_to_pictures_is_done_last_and_told() -> None:
    asked = []

    def darker(images: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((position, images))
        return images / 2, torch.full((len(images), 2), float(position))

    data = source(10)
    flipped, changed = Loader(data, 1, 4, flip=True), Loader(data, 1, 4, flip=True, augment=darker)
    expected, batch = flipped.batch(8), changed.batch(8)
    assert asked[0][0] == 8 and torch.equal(asked[0][1], expected.images)
    assert torch.equal(batch.images, expected.images / 2)
    assert batch.augment is not None and batch.augment.tolist() == [[8.0, 8.0]] * 4
    assert expected.augment is None and batch.labels is not None and torch.equal(batch.labels, expected.labels)
