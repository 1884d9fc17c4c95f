"""Pictures that keep their proportions: each in the nearest of a few shapes of about one area, its bucket.

For sets of S x S pixels the sides are multiples of S / 8, and to a width w belongs the largest height h with h w <= S^2
(aspect ratio bucketing, NovelAI 2022). A picture takes the shape whose ln(h / w) is nearest to its own, and what still
overhangs is cut or padded as `data.fit` says. All shapes take about the memory and time of the square.

One batch holds one shape. Whose turn it is at batch t says the golden rotation u_t = u_0 + t (sqrt(5) - 1) / 2 modulo 1
over the shapes' shares of the pictures: after any number of batches every shape has had its share but for a few (Knuth,
The Art of Computer Programming, vol. 3, 6.4), so all pictures are seen about equally often. Within a shape they come in
permutations. All of it is a function of (seed, position), with nothing to restore.

Shapes: N pictures, B of them, C channels, H rows, W columns, P = S^2 numbers a channel, T turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imagekiln.core import mix

PARTS = 8
"""Sides are multiples of one of so many parts of the square's side."""

MAX_ASPECT = 2.5
"""Long side over short side of the narrowest shape; narrower pictures are cut to it."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # (sqrt(5) - 1) / 2 of 2**64

Shape = tuple[int, int]
"""Height and width in pixels."""


def shapes(size: int) -> list[Shape]:
    """The shapes for a set of `size` x `size` pixels, tallest first. size: a multiple of 8.

    >>> shapes(64)
    [(96, 40), (80, 48), (72, 56), (64, 64), (56, 72), (48, 80), (40, 96)]
    """
    step = size // PARTS
    widest: dict[int, int] = {}
    for width in range(step, int(size * MAX_ASPECT), step):
        height = size * size // width // step * step
        if height and max(height, width) <= MAX_ASPECT * min(height, width):
            widest[height] = width  # the last one of a height has the largest area
    return sorted(widest.items(), reverse=True)


def nearest(known: Sequence[Shape], height: int, width: int) -> Shape:
    """The shape with the proportions nearest to those of a picture.

    >>> nearest(shapes(64), 600, 400), nearest(shapes(64), 100, 1000)
    ((80, 48), (40, 96))
    """
    wanted = math.log(height / width)
    return min(known, key=lambda shape: abs(math.log(shape[0] / shape[1]) - wanted))


class Buckets(NamedTuple):
    """Pictures, or latents, of several shapes in rows of one length.

    flat_NC1P: any dtype; the H W numbers of each channel, then zeros. shapes_N2: int64, H and W.
    """

    flat_NC1P: np.ndarray
    shapes_N2: np.ndarray

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The pictures of these rows, which are of one shape: (B, C, H, W). Raises `ValueError` when they are not."""
        height, width = self.shapes_N2[rows[0]].tolist()
        if (self.shapes_N2[rows] != (height, width)).any():
            raise ValueError("Pictures of several shapes were asked for at once.")
        flat_BCP = self.flat_NC1P[rows, :, 0, : height * width]
        return flat_BCP.reshape(len(rows), -1, height, width)


def in_groups(shapes_N2: np.ndarray, at_once: int) -> list[np.ndarray]:
    """All rows, in groups of one shape and at most so many.

    >>> [rows.tolist() for rows in in_groups(np.array([[8, 8], [4, 16], [8, 8], [8, 8]]), 2)]
    [[1], [0, 2], [3]]
    """
    groups = _members(shapes_N2)
    return [part for group in groups for part in np.split(group, range(at_once, len(group), at_once))]


def _members(shapes_N2: np.ndarray) -> list[np.ndarray]:
    """Rows by shape."""
    different, bucket_N = np.unique(shapes_N2, axis=0, return_inverse=True)
    return [np.flatnonzero(bucket_N.ravel() == bucket) for bucket in range(len(different))]


def flattened(pixels_HWC: np.ndarray, length: int) -> np.ndarray:
    """The pixels of a picture one after the other, then zeros: (length, C)."""
    flat_PC = np.zeros((length, pixels_HWC.shape[2]), pixels_HWC.dtype)
    flat_PC[: pixels_HWC.shape[0] * pixels_HWC.shape[1]] = pixels_HWC.reshape(-1, pixels_HWC.shape[2])
    return flat_PC


def shuffled(count: int, *keys: int | str) -> np.ndarray:
    """A permutation of `count` by these keys: int64.

    It sorts raw 64-bit words, whose stream numpy promises never to change, unlike `Generator.permutation`.

    >>> shuffled(5, 0, "order", 0).tolist()
    [4, 0, 2, 3, 1]
    """
    return np.argsort(np.random.PCG64(mix(*keys)).random_raw(count), kind="stable")


class BucketOrder:
    """Which pictures come when, if every stretch of a run is to hold pictures of one shape.

    shapes_N2: the shape of every picture. stretch: pictures of one shape that follow each other, a whole step's batch.

    >>> order = BucketOrder(np.array([[8, 8]] * 30 + [[4, 16]] * 10), seed=0, stretch=4)
    >>> [order.turn(t) for t in range(8)]
    [0, 1, 1, 0, 1, 1, 1, 1]
    >>> [index < 30 for index in order.order(0, 8).tolist()]
    [False, False, False, False, True, True, True, True]
    """

    def __init__(self, shapes_N2: np.ndarray, seed: int, stretch: int) -> None:
        self._members = _members(shapes_N2)
        self._edges = np.cumsum([len(members) for members in self._members])[:-1] / len(shapes_N2)
        self.seed, self.stretch = seed, stretch
        self._start = np.uint64(mix(seed, "buckets"))
        self._bucket_T = self._nth_T = np.zeros(0, np.int64)
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def turn(self, index: int) -> int:
        """The bucket of a stretch."""
        self._count_to(index + 1)
        return int(self._bucket_T[index])

    def order(self, position: int, count: int) -> np.ndarray:
        """Which pictures come at positions `position .. position + count - 1` of the run: int64 indices."""
        turns, places = np.divmod(np.arange(position, position + count, dtype=np.int64), self.stretch)
        self._count_to(int(turns[-1]) + 1 if count else 0)
        indices = np.empty(count, np.int64)
        for bucket in np.unique(self._bucket_T[turns]).tolist():
            members, here = self._members[bucket], np.flatnonzero(self._bucket_T[turns] == bucket)
            epochs, spots = np.divmod(self._nth_T[turns[here]] * self.stretch + places[here], len(members))
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                indices[here[now]] = members[self._permutation(bucket, epoch)[spots[now]]]
        return indices

    def _permutation(self, bucket: int, epoch: int) -> np.ndarray:
        """The last one of every bucket is kept."""
        if self._permutations.get(bucket, (-1,))[0] != epoch:
            count = len(self._members[bucket])
            self._permutations[bucket] = epoch, shuffled(count, self.seed, "order", bucket, epoch)
        return self._permutations[bucket][1]

    def _count_to(self, count: int) -> None:
        """Know the buckets of the first turns, and how many turns each bucket had before them."""
        if count <= len(self._bucket_T):
            return
        turns = np.arange(max(1024, 2 * count), dtype=np.uint64)
        shares = (self._start + turns * _GOLDEN).astype(np.float64) / 2.0**64
        self._bucket_T = np.searchsorted(self._edges, shares, side="right")
        self._nth_T = np.empty(len(turns), np.int64)
        for bucket in range(len(self._members)):
            mine = np.flatnonzero(self._bucket_T == bucket)
            self._nth_T[mine] = np.arange(len(mine))
