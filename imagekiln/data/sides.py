"""Which pictures are held out: a function of their content, in whole groups, so that nothing is on two sides.

A group (a picture, its copies and near copies) falls where the smallest of its content hashes says, for the number of
different ones, so it does not depend on names, on order, or on which other pictures there are. A group that had a side
keeps it when pictures come and go. Where several sides claim a group it is trained on: a held-out picture must not be
known from training. So is a group that is larger than all that is to be held out: it would take the place of everything
else there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_RANK = {TRAIN: 0, VALIDATION: 1, TEST: 2}
_SMALL = 2  # a pair may always be held out


def assign(
    digests: Sequence[str],
    groups: np.ndarray,
    labels: Sequence[str | None],
    claimed: Sequence[str],
    validation_fraction: float,
    test_fraction: float = 0.0,
) -> list[str]:
    """The side of every picture: "train", "validation" or "test".

    digests: content hashes, 32 hex digits. groups: int64 (N,), equal for pictures that belong together.
    labels: None where unknown. claimed: the side a picture had or its source gave it, "" for none.

    A class that can spare a picture (one or more at these fractions) has at least one held out, the one whose hash is
    nearest to the border, of groups that are not too large; and no side is left empty while there are two groups.

    >>> assign(["00" * 16, "ff" * 16, "80" * 16], np.array([0, 1, 0]), [None] * 3, [""] * 3, 0.5)
    ['validation', 'train', 'validation']
    """
    smallest: dict[int, float] = {}
    different: dict[int, set[str]] = {}
    side: dict[int, str] = {}
    for digest, group, claim in zip(digests, groups.tolist(), claimed, strict=True):
        smallest[group] = min(smallest.get(group, 1.0), int(digest[:13], 16) / 16**13)
        different.setdefault(group, set()).add(digest)
        if claim and (group not in side or _RANK[claim] < _RANK[side[group]]):
            side[group] = claim
    # The smallest of k uniform numbers is below x with probability 1 - (1 - x)^k: so much is a group's place, or large
    # groups would nearly all be held out.
    place = {group: 1 - (1 - x) ** len(different[group]) for group, x in smallest.items()}
    given = set(side)
    largest = max(_SMALL, max(validation_fraction, test_fraction) * len(groups))
    oversized = {group for group, size in Counter(groups.tolist()).items() if size > largest}
    for group, where in place.items():
        if group not in given:
            fits = group not in oversized
            held_out = fits and where < validation_fraction
            tested = fits and validation_fraction <= where < validation_fraction + test_fraction
            side[group] = VALIDATION if held_out else TEST if tested else TRAIN
    _spare(side, place, given, oversized, groups, labels, validation_fraction)
    return [side[group] for group in groups.tolist()]


def _spare(
    side: dict[int, str],
    place: Mapping[int, float],
    given: set[int],
    oversized: set[int],
    groups: np.ndarray,
    labels: Sequence[str | None],
    fraction: float,
) -> None:
    """Hold out one group of every class that has none held out and can spare it, then one of the set.

    oversized: groups that are held out only where the set has no other.
    """
    members: dict[str | None, list[int]] = {}
    for label, group in zip(labels, groups.tolist(), strict=True):
        members.setdefault(label, []).append(group)
    everything = list(dict.fromkeys(groups.tolist()))
    for label, found in [*members.items(), (None, everything)]:
        whole_set = found is everything
        if (label is None and not whole_set) or fraction == 0:
            continue
        distinct = dict.fromkeys(found)
        may = [group for group in distinct if whole_set or group not in oversized]
        free = [group for group in may if group not in given and side[group] == TRAIN]
        kept = sum(side[group] == TRAIN for group in distinct)
        lacking = not any(side[group] == VALIDATION for group in distinct)
        if lacking and free and kept > 1 and (whole_set or len(found) * fraction >= 1):
            side[min(free, key=lambda group: (group in oversized, place[group], group))] = VALIDATION
    if len(everything) > 1 and all(where != TRAIN for where in side.values()) and fraction < 1:
        free = [group for group in everything if group not in given]
        if free:
            side[max(free, key=lambda group: (place[group], group))] = TRAIN
