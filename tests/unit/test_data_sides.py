"""Sides: whole groups, by content, stable, and no class without a held-out picture."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.data.sides import TEST, TRAIN, VALIDATION, assign
from imagekiln.data.source import split


def digests(count: int, seed: int = 0) -> list[str]:
    return [hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=16).hexdigest() for index in range(count)]


def alone(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


def test_without_groups_and_labels_the_sides_are_those_of_split() -> None:
    content = digests(500)
    sides = assign(content, alone(500), [None] * 500, [""] * 500, 0.2)
    assert [side == VALIDATION for side in sides] == split(content, 0.2).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from([None, "a", "b"]), st.sampled_from(["", TRAIN, VALIDATION, TEST])),
        min_size=1,
        max_size=40,
    ),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
def test_a_group_is_never_on_two_sides(rows: list[tuple[int, str | None, str]], held: float, tested: float) -> None:
    groups = np.array([group for group, _, _ in rows], np.int64)
    labels, claimed = [label for _, label, _ in rows], [claim for _, _, claim in rows]
    sides = assign(digests(len(rows)), groups, labels, claimed, held, tested)
    for group in set(groups.tolist()):
        here = {side for side, other in zip(sides, groups.tolist(), strict=True) if other == group}
        asked = {claim for claim, other in zip(claimed, groups.tolist(), strict=True) if other == group} - {""}
        assert len(here) == 1
        if asked:
            assert here == {next(side for side in (TRAIN, VALIDATION, TEST) if side in asked)}


def test_shares_are_what_was_asked_for() -> None:
    sides = assign(digests(4000), alone(4000), [None] * 4000, [""] * 4000, 0.1, 0.2)
    share = {side: sides.count(side) / 4000 for side in (TRAIN, VALIDATION, TEST)}
    error = 4 * np.sqrt(np.array([0.09, 0.16]) / 4000)
    assert abs(share[VALIDATION] - 0.1) < error[0] and abs(share[TEST] - 0.2) < error[1]


def test_large_groups_are_held_out_as_often_as_small_ones() -> None:
    """2,000 groups of 20: their share is binomial. By the smallest hash alone 88 % of them would be held out."""
    count, size, share = 2000, 20, 0.1
    groups = np.repeat(np.arange(count), size)
    sides = assign(digests(count * size), groups, [None] * (count * size), [""] * (count * size), share)
    held = sum(side == VALIDATION for side in sides) / len(sides)
    assert abs(held - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_copies_do_not_change_a_groups_side() -> None:
    content, groups = digests(300), alone(300)
    before = assign(content, groups, [None] * 300, [""] * 300, 0.2)
    twice = assign(content * 2, np.tile(groups, 2), [None] * 600, [""] * 600, 0.2)
    assert twice == before * 2


def test_pictures_that_come_later_move_nobody() -> None:
    content = digests(300)
    before = assign(content[:200], alone(200), ["x"] * 200, [""] * 200, 0.1)
    groups = alone(300)
    groups[250:] = np.arange(50)  # fifty near copies of pictures that have a side
    after = assign(content, groups, ["x"] * 300, [*before, *[""] * 100], 0.1)
    assert after[:200] == before
    assert after[250:] == before[:50]


def test_every_class_that_can_spare_a_picture_has_one_held_out() -> None:
    labels = ["many"] * 200 + ["ten"] * 10 + ["three"] * 3
    for seed in range(20):
        sides = assign(digests(213, seed), alone(213), labels, [""] * 213, 0.1)
        held_out = {label for label, side in zip(labels, sides, strict=True) if side == VALIDATION}
        assert {"many", "ten"} <= held_out
        assert all(
            TRAIN in {s for s, name in zip(sides, labels, strict=True) if name == label} for label in set(labels)
        )


def test_two_pictures_are_one_on_each_side() -> None:
    for seed in range(20):
        assert sorted(assign(digests(2, seed), alone(2), [None] * 2, [""] * 2, 0.1)) == [TRAIN, VALIDATION]
    assert assign(digests(2), np.zeros(2, np.int64), [None] * 2, [""] * 2, 0.0) == [TRAIN, TRAIN]


def test_a_group_larger_than_the_held_out_part_is_trained_on() -> None:
    for seed in range(20):
        groups = alone(100)
        groups[:40] = 0
        sides = assign(digests(100, seed), groups, [None] * 100, [""] * 100, 0.2)
        assert sides[:40] == [TRAIN] * 40 and VALIDATION in sides[40:]


def test_what_a_class_or_a_set_spares_is_not_its_largest_group() -> None:
    crowd = np.array([0] * 18 + [1, 2])
    for seed in range(20):
        for labels in ([None] * 20, ["a"] * 20):
            sides = assign(digests(20, seed), crowd, labels, [""] * 20, 0.1)
            assert sides[:18] == [TRAIN] * 18 and VALIDATION in sides[18:]
    # A class of nothing but crowds keeps them; a set of nothing but crowds has to hold one out.
    groups = np.concatenate([np.repeat([0, 1], 10), np.arange(2, 22)])
    sides = assign(digests(40), groups, ["crowds"] * 20 + ["singles"] * 20, [""] * 40, 0.1)
    assert sides[:20] == [TRAIN] * 20 and VALIDATION in sides[20:]
    assert set(assign(digests(20), groups[:20], [None] * 20, [""] * 20, 0.1)) == {TRAIN, VALIDATION}
