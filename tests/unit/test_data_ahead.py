"""Reading ahead changes when pictures are read, never which: bit-identical for any number of readers, from anywhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.core import Batch
from imagekiln.data.ahead import DEPTH, Ahead, block_order
from imagekiln.data.loader import Loader
from imagekiln.data.shards import Row, ShardSource, write
from imagekiln.errors import DataError


class Numbers:
    """Pictures that are their own index; counts what is asked for."""

    image_shape, num_classes, class_names, fingerprint = (1, 1, 2), 256, (), ""

    def __init__(self, count: int) -> None:
        self.count, self.asked, self._lock = count, 0, threading.Lock()

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Batch:
        with self._lock:
            self.asked += len(indices)
        values = torch.tensor(indices, dtype=torch.uint8)
        return Batch(values[:, None, None, None].repeat(1, 1, 1, 2), values.to(torch.int64))


def equal(ours: Batch, theirs: Batch) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs if a is not None or b is not None)


@given(st.integers(1, 40), st.integers(1, 17), st.sampled_from([0, 1, 2, 4]), st.lists(st.integers(0, 300), max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_positions_in_any_order(count: int, batch: int, readers: int, positions: list[int]) -> None:
    plain, ahead = Loader(Numbers(count), 5, batch), Ahead(Numbers(count), 5, batch, readers=readers)
    steady = range(7, 7 + 4 * batch, batch)
    for position in [*steady, *positions, *steady, *steady]:
        assert equal(ahead.batch(position), plain.batch(position))


@pytest.mark.parametrize("block", [0, 3])
def test_a_run_over_shards_goes_on_exactly_with_other_readers(tmp_path: Path, block: int) -> None:
    """Two and a half epochs: whole, and in two parts cut in the middle of an epoch, by 0, 1, 2 and 4 readers."""
    pictures = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
    given = [Row(image, str(n), n % 2) for n, image in enumerate(pictures)]
    opened = write(given, tmp_path / "set", class_names=("x", "y"), shard_bytes=5000)

    def run(readers: int, start: int, end: int) -> list[Batch]:
        loader = Ahead(ShardSource(opened), 3, 4, flip=True, readers=readers, block=block)
        return [loader.batch(position) for position in range(start, end, 4)]

    whole = run(0, 0, 56)
    if not block:
        plain = Loader(ShardSource(opened), 3, 4, flip=True)
        assert all(equal(batch, plain.batch(4 * step)) for step, batch in enumerate(whole))
    for first, second in ((1, 2), (2, 4), (4, 0)):
        parts = run(first, 0, 32) + run(second, 32, 56)
        assert len(parts) == len(whole) and all(map(equal, parts, whole))


def test_each_picture_is_read_once() -> None:
    """A step that asks twice for one batch, as two phases do, and goes on: nothing is read again."""
    source = Numbers(100)
    loader = Ahead(source, 0, 10, readers=3)
    for position in (0, 0, 10, 10, 20, 20, 30):
        loader.batch(position)
    loader._readers._pool.shutdown(wait=True)  # type: ignore[union-attr]
    assert source.asked == 40 + 10 * DEPTH


def test_what_goes_wrong_ahead_is_said_when_it_is_needed(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    opened = write([Row(image, str(n)) for n, image in enumerate(pictures)], tmp_path / "set")
    order = Loader(Numbers(6), 0, 2).order(0, 6)
    shard, place = tmp_path / "set" / "shard-000000.tar", int(opened.table["offset"][order[5]]) + 60
    raw = bytearray(shard.read_bytes())
    raw[place] ^= 0x55
    shard.write_bytes(bytes(raw))
    loader = Ahead(ShardSource(opened), 0, 2, readers=2)
    for position in (0, 2):
        assert len(loader.batch(position).images) == 2
    for _ in range(2):
        with pytest.raises(DataError, match=f"Picture {order[5]} "):
            loader.batch(4)


def test_no_thread_outlives_its_loader() -> None:
    before = set(threading.enumerate())
    loader = Ahead(Numbers(50), 0, 5, readers=2)
    loader.batch(0)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    del loader
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_block_order_is_a_permutation_that_stays_near(count: int, block: int, window: int, epoch: int) -> None:
    order = block_order(1, epoch, count, block, window)
    assert sorted(order.tolist()) == list(range(count))
    assert (order == block_order(1, epoch, count, block, window)).all()
    groups: list[set[int]] = [set()]
    for index in order.tolist():  # each stretch of `window` blocks holds its pictures and no others
        if len(groups[-1]) == window and index // block not in groups[-1]:
            groups.append(set())
        groups[-1].add(index // block)
    num_blocks = -(-count // block)
    assert sum(map(len, groups)) == num_blocks and len(groups) == -(-num_blocks // window)


def test_a_block_order_is_this_one_for_ever_and_mixes() -> None:
    """A golden order: it may only change together with the major version, because it changes every resumed run."""
    assert block_order(7, 0, 12, 3, 2).tolist() == [8, 6, 3, 7, 5, 4, 0, 9, 2, 10, 11, 1]
    one, other = block_order(0, 0, 4000, 10), block_order(0, 1, 4000, 10)
    assert (one == other).mean() < 0.01
    # within a stretch every place is as likely: neighbours in the order are rarely neighbours in the set
    assert np.mean(np.abs(np.diff(one)) == 1) < 0.05
