"""What the doctor sees in pictures: a few numbers from a few dozen drawn ones, each relative to real pictures.

A picture is compared after its side is averaged down to at most `SIDE` pixels, except for the grid, which is a matter
of single pixels. Distances are Euclidean.

Shapes: N pictures, M real pictures, C channels, H rows, W columns, D pooled pixels, K kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from imagekiln.core import UNLABELLED, Source, mix
from imagekiln.data import to_float

SIDE = 16
MOST_REAL = 1024
"""Real pictures that drawn ones are compared with."""

AT_ONCE = 64
"""Of them as many are read at a time: whole pictures are large, what is kept of them is small."""

KINDS, ROUNDS, STARTS = 10, 10, 4
"""Groups the real pictures are divided into, rounds of k-means that find them, and starts of which the best is kept."""

RARE = 0.2
"""A kind drawn less than this share as often as it is among real pictures is missing (after NDB, Richardson and Weiss
2018, arXiv:1805.12462)."""

CHANCE = 0.02
"""A kind that comes as rarely by chance with more than this probability is not missing: too few were drawn to say."""

COPY = 0.5
"""Nearer to a training picture than this share of what lies between that one and its nearest neighbour is a copy (a
stricter form of authenticity, Alaa et al. 2022, arXiv:2102.08921)."""

FORGIVEN = 16.0
"""Power of a two-pixel pattern of four grey levels: weaker ones are hardly seen, and young networks all have some."""

CLEAR = 1.1
"""Real pictures of different classes must be this much farther apart than those of one, or labels cannot be seen."""


def pooled(images_NCHW: Tensor) -> Tensor:
    """rows_ND float32 of uint8 pictures, in [-1, 1]."""
    images_NCHW = to_float(images_NCHW)
    if max(images_NCHW.shape[2:]) > SIDE:
        images_NCHW = adaptive_avg_pool2d(
            images_NCHW, (min(SIDE, images_NCHW.shape[2]), min(SIDE, images_NCHW.shape[3]))
        )
    return images_NCHW.flatten(1)


def spread(rows_ND: Tensor, labels_N: Tensor | None = None) -> float:
    """Mean distance between two rows, with labels between two of one class; NaN where there is no such pair.

    >>> rows = torch.tensor([[0.0], [1.0], [10.0], [13.0]])
    >>> spread(rows, torch.tensor([0, 0, 1, 1])), round(spread(rows), 2)
    (2.0, 8.0)
    """
    return float(torch.cdist(rows_ND, rows_ND)[_pairs(rows_ND, labels_N, alike=True)].mean())


def label_effect(rows_ND: Tensor, labels_N: Tensor) -> float:
    """How much farther apart rows of different classes are than rows of one: ratio of mean squares, 1 = not at all."""
    square_NN = torch.cdist(rows_ND, rows_ND).square()
    within = square_NN[_pairs(rows_ND, labels_N, alike=True)].mean()
    return float(square_NN[_pairs(rows_ND, labels_N, alike=False)].mean() / within.clamp(min=1e-12))


def grid_power(images_NCHW: Tensor) -> float:
    """Power of the pattern that repeats every two pixels, across, down and diagonally, in units of grey levels squared.

    The spectrum at Nyquist: what strided transposed convolutions leave behind (Odena et al. 2016, distill.pub
    "Deconvolution and checkerboard artifacts"). Images are uint8.

    >>> column = torch.tensor([0, 255], dtype=torch.uint8).repeat(4)
    >>> grid_power(column.expand(1, 1, 8, 8)), grid_power(column.sort().values.expand(1, 1, 8, 8))
    (16256.25, 0.0)
    """
    x_NCHW = images_NCHW[..., : images_NCHW.shape[2] // 2 * 2, : images_NCHW.shape[3] // 2 * 2].double()
    height, width = x_NCHW.shape[2:]
    down_H1 = 1.0 - 2.0 * (torch.arange(height).double()[:, None] % 2)
    across_W = 1.0 - 2.0 * (torch.arange(width).double() % 2)
    patterns = (down_H1.expand(height, width), across_W.expand(height, width), down_H1 * across_W)
    return float(sum((x_NCHW * pattern).mean((2, 3)).square().mean() for pattern in patterns))


class Real:
    """What drawn pictures are compared with: pictures the model learns from, and what is known of them.

    source: the training pictures; at most `MOST_REAL` of them are used, evenly spaced.
    """

    def __init__(self, source: Source) -> None:
        chosen = range(0, len(source), math.ceil(len(source) / MOST_REAL))
        rows, labels, power = [], [], 0.0
        for at in range(0, len(chosen), AT_ONCE):
            part = source.read(chosen[at : at + AT_ONCE])
            rows.append(pooled(part.images))
            labels += [] if part.labels is None else [part.labels]
            power += grid_power(part.images) * len(part.images)
        self.rows_MD, self.grid_power = torch.cat(rows), power / len(chosen)
        labels_M = torch.cat(labels) if labels else None
        known = labels_M is not None and source.num_classes > 1 and bool((labels_M != UNLABELLED).all())
        self.labels_M = labels_M if known else None
        self.spread = spread(self.rows_MD, self.labels_M)
        self.label_effect = label_effect(self.rows_MD, self.labels_M) if self.labels_M is not None else math.nan
        between_MM = torch.cdist(self.rows_MD, self.rows_MD).fill_diagonal_(math.inf)
        self.nearest_M = between_MM.min(1).values
        self.centres_KD = _centres(self.rows_MD)
        self.kinds_K = self._kinds(self.rows_MD)

    def labels(self, count: int, seed: int) -> list[int]:
        """Labels of `count` pictures to draw, as common as among real ones; -1 where there are none."""
        if self.labels_M is None:
            return [UNLABELLED] * count
        rows = torch.randint(len(self.labels_M), (count,), generator=torch.Generator().manual_seed(seed))
        return self.labels_M[rows].tolist()

    def kinds_of(self, images_NCHW: Tensor) -> Tensor:
        """How many pictures (uint8) belong to each kind: counts_K."""
        return self._kinds(pooled(images_NCHW))

    def _kinds(self, rows_ND: Tensor) -> Tensor:
        return torch.bincount(torch.cdist(rows_ND, self.centres_KD).argmin(1), minlength=len(self.centres_KD))

    def missing(self, drawn_K: Tensor) -> float:
        """Share of real pictures whose kind is (nearly) never drawn, and not by chance."""
        real_K = self.kinds_K.double() / self.kinds_K.sum()
        expected_K = real_K * drawn_K.sum()
        by_chance_K = torch.special.gammaincc(drawn_K.double() + 1, expected_K)  # that so few or fewer come, Poisson
        return float(real_K[(drawn_K < RARE * expected_K) & (by_chance_K < CHANCE)].sum())

    def look_at(self, images_NCHW: Tensor, labels: Sequence[int]) -> dict[str, float]:
        """Numbers of drawn pictures (uint8); what cannot be said of this set is left out.

        diversity: spread of drawn pictures / of real ones, within a class where there are classes.
        grid: power of the two-pixel pattern / that of real pictures and of what is hardly seen.
        copies: share that copies a training picture.
        label_effect: 1 where labels matter as much as among real pictures, 0 where they do not matter.
        """
        rows_ND = pooled(images_NCHW)
        labels_N = torch.tensor(labels) if self.labels_M is not None else None
        found = {
            "diversity": spread(rows_ND, labels_N) / self.spread if self.spread > 0 else math.nan,
            "grid": grid_power(images_NCHW) / (self.grid_power + FORGIVEN),
            "copies": self._copies(rows_ND),
        }
        if labels_N is not None and self.label_effect > CLEAR:
            found["label_effect"] = (label_effect(rows_ND, labels_N) - 1) / (self.label_effect - 1)
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def _copies(self, rows_ND: Tensor) -> float:
        nearest = torch.cdist(rows_ND, self.rows_MD).min(1)
        return float((nearest.values < COPY * self.nearest_M[nearest.indices]).double().mean())


def _pairs(rows_ND: Tensor, labels_N: Tensor | None, alike: bool) -> Tensor:
    """Which pairs of different rows count: mask_NN."""
    mask_NN = torch.ones(len(rows_ND), len(rows_ND), dtype=torch.bool)
    if labels_N is not None:
        mask_NN = (labels_N[:, None] == labels_N[None]) == alike
    return mask_NN.fill_diagonal_(False)


def _centres(rows_MD: Tensor) -> Tensor:
    """The best of a few runs of Lloyd's algorithm, each from starts that lie apart."""
    tried = [_lloyd(rows_MD, _apart(rows_MD, mix("kinds", start))) for start in range(STARTS)]
    return min(tried, key=lambda centres_KD: float(torch.cdist(rows_MD, centres_KD).min(1).values.square().sum()))


def _apart(rows_MD: Tensor, seed: int) -> Tensor:
    """Rows to start from, each drawn by its squared distance from those before (k-means++, Arthur and Vassilvitskii
    2007): starts that lie together would leave groups of pictures without one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows_MD), (1,), generator=generator))]
    while len(chosen) < min(KINDS, len(rows_MD)):
        square_M = torch.cdist(rows_MD, rows_MD[chosen]).min(1).values.double().square()
        if float(square_M.sum()) == 0:
            break
        chosen.append(int(torch.multinomial(square_M, 1, generator=generator)))
    return rows_MD[chosen]


def _lloyd(rows_MD: Tensor, centres_KD: Tensor) -> Tensor:
    """Lloyd's algorithm."""
    for _ in range(ROUNDS):
        index_M = torch.cdist(rows_MD, centres_KD).argmin(1)
        count_K1 = torch.bincount(index_M, minlength=len(centres_KD))[:, None]
        total_KD = torch.zeros_like(centres_KD).index_add_(0, index_M, rows_MD)
        centres_KD = torch.where(count_K1 > 0, total_KD / count_K1.clamp(min=1), centres_KD)
    return centres_KD
