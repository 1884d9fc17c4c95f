"""Pictures that occur twice: the same pixels, or nearly the same picture.

Near duplicates are found in three steps, each looking closer at fewer pairs: (1) perceptual hashes within a number of
bits, also of the mirrored picture; all pairs are compared, in blocks, with xor and popcount; (2) correlation of 8 x 8
pixels; (3) registration of the small copies (`registration`). What is left is joined into groups.

Sets whose pictures are all alike (clothes on black) have so many pairs within the bits that looking at all of them
would take hours. There fewer bits are allowed, so that at most `_PAIRS_A_PICTURE` pairs a picture are correlated, and
of those that correlate the best are registered, at most `_REGISTERED_A_PICTURE` a picture.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from imagekiln.data.checks.looks import is_blank
from imagekiln.data.checks.registration import agreement_of
from imagekiln.data.checks.thresholds import CleanConfig, Finding
from imagekiln.data.measures import averaged, small_copies
from imagekiln.data.survey import Survey

_PAIRS_A_PICTURE, _REGISTERED_A_PICTURE = 20, 3
_SAMPLE = 500
_ROWS, _COLUMNS = 64, 16_384
_PAIRS, _COARSE_PAIRS, _THUMBS = 128, 8192, 512
_COARSE_SIDE = 8
_LEAST_CORRELATION = 0.75
_THREADS = max(1, min(8, os.cpu_count() or 1))
_REMEMBERED = 2


class Pairs(NamedTuple):
    """Pairs of near duplicates: first < second, residual after registration, and whether one is mirrored."""

    first: np.ndarray
    second: np.ndarray
    residual: np.ndarray
    mirrored: np.ndarray


def duplicate(survey: Survey, config: CleanConfig) -> list[Finding]:
    """The same pixels as an earlier file. value: 0 differing pixels."""
    first: dict[str, int] = {}
    found = []
    for index in survey.usable.tolist():
        other = first.setdefault(survey.digests[index], index)
        if other != index:
            found.append(Finding("duplicate", index, 0.0, 0.0, f"same picture as {survey.names[other]}", other))
    return found


def near_duplicate(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Nearly the same as another picture. value: residual. All of a group but its first are found, each with the one
    it resembles most among those that lead to the first; exact duplicates are represented by their first."""
    pairs = near_pairs(survey, config)
    found = []
    for index, other, at in _trees(len(survey), pairs):
        what = "mirrored copy of" if pairs.mirrored[at] else "nearly the same picture as"
        reason = f"{what} {survey.names[other]}"
        found.append(Finding("near_duplicate", index, float(pairs.residual[at]), config.max_residual, reason, other))
    return sorted(found, key=lambda finding: finding.index)


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """Union-find: (count,) int64, the smallest index of the group of each.

    >>> joined(5, [(1, 4), (4, 3)]).tolist()
    [0, 1, 2, 1, 1]
    """
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(index) for index in range(count)], np.int64)


_remembered: OrderedDict[bytes, Pairs] = OrderedDict()  # two checks need the pairs of one survey


def near_pairs(survey: Survey, config: CleanConfig) -> Pairs:
    """Verified pairs among the first of every digest that is not blank."""
    first: dict[str, int] = {}
    for index in survey.usable.tolist():
        first.setdefault(survey.digests[index], index)
    rows = np.array(list(first.values()), np.int64)
    rows = rows[~is_blank(survey, config)[rows]]
    key = hashlib.blake2b(np.ascontiguousarray(survey.measured[rows]).data)
    key.update(rows.data)
    key.update(repr((config.hash_bits, config.max_residual, config.min_detail)).encode())
    if (known := _remembered.get(key.digest())) is not None:
        return known
    found = _verified(survey, config, rows)
    _remembered[key.digest()] = found
    while len(_remembered) > _REMEMBERED:
        _remembered.popitem(last=False)
    return found


def within(hashes: np.ndarray, others: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs i < j with hashes[i] and others[j] differing in at most `bits` bits: two int32 arrays.

    >>> [pairs.tolist() for pairs in within(np.array([1, 7, 3], np.uint64), np.array([1, 7, 3], np.uint64), 1)]
    [[0, 1], [2, 2]]
    """

    def block(start: int) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = [], []
        for left in range(start, len(others), _COLUMNS):
            part = others[left : left + _COLUMNS]
            near = np.bitwise_count(hashes[start : start + _ROWS, None] ^ part) <= bits
            row, column = np.divmod(np.flatnonzero(near), len(part))
            later = column + left > row + start
            rows.append((row[later] + start).astype(np.int32))
            columns.append((column[later] + left).astype(np.int32))
        return np.concatenate(rows), np.concatenate(columns)

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(block, range(0, len(hashes), _ROWS)))
    nothing = np.zeros(0, np.int32)
    return np.concatenate([nothing, *(part[0] for part in parts)]), np.concatenate(
        [nothing, *(part[1] for part in parts)]
    )


def affordable_bits(hashes: np.ndarray, mirrored: np.ndarray, bits: int) -> int:
    """The largest number of bits, up to `bits`, at which a picture has few enough others within them."""
    count = len(hashes)
    chosen = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)
    within_N = np.zeros(65, np.int64)
    for index in chosen:
        for others in (hashes, mirrored):
            within_N += np.bincount(np.bitwise_count(others ^ hashes[index]), minlength=65)
    share = np.cumsum(within_N) / max(1, len(chosen)) / 2  # a pair is seen from both ends, and looked at once
    while bits > 0 and share[bits] - 0.5 > _PAIRS_A_PICTURE:
        bits -= 1
    return bits


def _verified(survey: Survey, config: CleanConfig, rows: np.ndarray) -> Pairs:
    first, second, mirrored = _alike(survey, config, rows)

    # Neighbours in this order share pictures, of which what is needed is read and computed once.
    order = np.lexsort((mirrored, second, first))

    def verify(start: int) -> tuple[np.ndarray, np.ndarray]:
        part = order[start : start + _PAIRS]
        asked = np.concatenate([2 * first[part], 2 * second[part] + mirrored[part]])
        pictures, places = np.unique(asked, return_inverse=True)
        thumbs = small_copies(survey.thumbs, pictures // 2)
        turned = pictures % 2 == 1
        thumbs[turned] = thumbs[turned, :, ::-1]
        found = agreement_of(thumbs, *places.reshape(2, -1))
        good = np.flatnonzero((found.residual <= config.max_residual) & (found.detail >= config.min_detail))
        return part[good], found.residual[good]

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.float32)), *pool.map(verify, range(0, len(first), _PAIRS))]
    at, residual = (np.concatenate(column) for column in zip(*parts, strict=True))
    sorted_at = np.argsort(at)
    at, residual = at[sorted_at], residual[sorted_at]
    return Pairs(first[at], second[at], residual, mirrored[at])


def _alike(survey: Survey, config: CleanConfig, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs near in hash whose 8 x 8 pixels correlate, the best where there are too many: first, second, mirrored."""
    hashes, reflections = (np.ascontiguousarray(survey.measured[name][rows]) for name in ("hash", "mirrored"))
    bits = affordable_bits(hashes, reflections, config.hash_bits)
    coarse = _coarse(survey, rows)
    ones, twos, likeness, turns = [], [], [np.zeros(0, np.float32)], []
    for turned, others in ((False, hashes), (True, reflections)):
        first, second = within(hashes, others, bits)
        correlation = np.empty(len(first), np.float32)
        for start in range(0, len(first), _COARSE_PAIRS):
            part = slice(start, start + _COARSE_PAIRS)
            target = coarse[second[part]].reshape(-1, _COARSE_SIDE, _COARSE_SIDE, 3)
            target = (target[:, :, ::-1] if turned else target).reshape(len(target), -1)
            correlation[part] = np.einsum("pd,pd->p", coarse[first[part]], target, dtype=np.float32)
        good = correlation >= _LEAST_CORRELATION
        ones.append(first[good])
        twos.append(second[good])
        likeness.append(correlation[good])
        turns.append(np.full(len(ones[-1]), turned))
    order = np.argsort(-np.concatenate(likeness), kind="stable")[: _REGISTERED_A_PICTURE * len(rows)]
    return rows[np.concatenate(ones)[order]], rows[np.concatenate(twos)[order]], np.concatenate(turns)[order]


def _coarse(survey: Survey, rows: np.ndarray) -> np.ndarray:
    """Small copies averaged to 8 x 8, each channel's mean taken away, length 1: (N, 192) float16."""
    out = np.empty((len(rows), 3 * _COARSE_SIDE**2), np.float16)
    for start in range(0, len(rows), _THUMBS):
        small = averaged(small_copies(survey.thumbs, rows[start : start + _THUMBS]), _COARSE_SIDE)
        small = (small - small.mean((1, 2), keepdims=True)).reshape(len(small), -1)
        out[start : start + _THUMBS] = small / np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)
    return out


def _trees(count: int, pairs: Pairs) -> Iterator[tuple[int, int, int]]:
    """(index, the one it hangs on, number of the pair): the trees of least residuals, grown from their first index."""
    group = np.arange(count)
    branches: dict[int, list[tuple[int, int]]] = {}

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = int(group[index])
        return index

    for at in np.argsort(pairs.residual, kind="stable").tolist():
        one, two = int(pairs.first[at]), int(pairs.second[at])
        low, high = sorted((root(one), root(two)))
        if low != high:
            group[high] = low
            branches.setdefault(one, []).append((two, at))
            branches.setdefault(two, []).append((one, at))
    for start in sorted(branches):
        if root(start) != start:
            continue
        todo, done = [start], {start}
        while todo:
            here = todo.pop()
            for there, at in branches[here]:
                if there not in done:
                    done.add(there)
                    todo.append(there)
                    yield there, here, at
