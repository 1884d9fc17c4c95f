"""Looking at a model during its training: held-out losses with standard errors, and a cheap measure of its pictures.

Losses are those of `Family.held_out` on the same held-out pictures with the same noise every time, so two moments of a
run differ by their weights alone. Where a family says at which level (of noise, for one) each value was taken, every
level has its own mean, and the error of the total is that of a stratified sample: sum of (w_l se_l)^2 over the levels.

The pictures a model draws are compared with held-out ones in fixed random convolutions: the kernel distance, which is
unbiased at any number of pictures, and coverage. How many are drawn, and at which validations, is a function of the
recipe alone, chosen so that drawing costs about `SHARE` of the training.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagekiln.core import Family, HeldOut, Progress, Source, mix
from imagekiln.data import to_float, to_uint8
from imagekiln.engine.generate import draw, reconstructed
from imagekiln.engine.inputs import pictures_of, wishes
from imagekiln.metrics import Coverage, KernelDistance, RandomConv, Statistics, extract
from imagekiln.metrics.features import SMALLEST_SIDE

VALIDATIONS = 16
"""Validations of a run, unless its recipe says otherwise."""

IMAGES, BATCH = 512, 64
MOST_DRAWN, FEWEST_DRAWN = 512, 192
SHARE = 0.04
"""Of the training's cost that drawing pictures to look at may take."""


@dataclass(frozen=True)
class Estimate:
    """A mean over held-out pictures and its standard error; the error is NaN for a single value."""

    mean: float
    error: float


class Validation:
    """What a model is looked at with.

    source: the held-out pictures. seed: of the noise. precision: makes the context the model computes in.
    """

    def __init__(self, source: Source, seed: int, device: torch.device, precision: Any) -> None:
        self.source, self.seed, self.device, self._precision = source, seed, device, precision
        self._real: tuple[RandomConv, Statistics] | None = None

    def losses(self, family: Family, progress: Progress) -> dict[str, Estimate]:
        """Held-out losses by name; a value of a level is named `loss@level`."""
        count = min(len(self.source), IMAGES)
        found: dict[str, list[HeldOut]] = {}
        for start in range(0, count, BATCH):
            raw = self.source.read(range(start, min(count, start + BATCH)))
            batch = raw._replace(images=to_float(raw.images)).to(self.device)
            torch.manual_seed(mix(self.seed, "validation", start))
            with self._context():
                values = family.held_out(batch, progress)
            for name, (value, levels) in values.items():
                kept = HeldOut(value.detach().cpu(), None if levels is None else levels.cpu())
                found.setdefault(name, []).append(kept)
        estimates: dict[str, Estimate] = {}
        for name, parts in found.items():
            estimates |= _estimates(name, parts)
        return estimates

    def quality(self, family: Family, count: int) -> dict[str, float]:
        """Kernel distance and coverage of `count` drawn pictures; {} for a family or a size without.

        The seeds are the same every time, and labels come in the order of the held-out pictures.
        """
        if not family.draws or count < 2 or min(family.picture_shape[1:]) < SMALLEST_SIDE:
            return {}
        if self._real is None:
            source = pictures_of(self.source)
            network, rows = RandomConv(source.image_shape), range(min(len(source), IMAGES))
            pictures = source.read(rows).images.split(BATCH)
            self._real = network, Statistics.of(extract(network, (to_float(part) for part in pictures)))
        network, real = self._real
        if real.n < FEWEST_DRAWN // 2:
            return {}
        wanted = wishes(self.source, [index % len(self.source) for index in range(count)])
        seeds = [mix(self.seed, "quality", index) for index in range(count)]
        with self._context():
            images = draw(family, seeds, wanted, batch=BATCH)
        drawn = Statistics.of(extract(network, (to_float(part) for part in images.split(BATCH))))
        return {"kernel": KernelDistance()(drawn, real), "coverage": Coverage()(drawn, real)}

    def as_much(self, coverage: float, best: float) -> bool:
        """Whether a coverage may be as high as the best one: it is higher, or at most two standard errors of the
        difference of two shares, of as many held-out pictures, below it."""
        shared = (coverage + best) / 2
        return best - coverage <= 2 * math.sqrt(2 * shared * (1 - shared) / min(len(self.source), IMAGES))

    @torch.inference_mode()
    def pairs(self, family: Family, count: int, columns: int) -> Tensor:
        """Held-out pictures and what a family makes of them, rows of `columns` in turn: (2 count, C, H, W) uint8."""
        real = self.source.read([index % len(self.source) for index in range(count)]).images
        made = to_uint8(reconstructed(family, to_float(real).to(self.device))).cpu()  # type: ignore[arg-type]
        return torch.cat([part for rows in zip(real.split(columns), made.split(columns), strict=True) for part in rows])

    def _context(self) -> AbstractContextManager[Any]:
        return self._precision()


def affordable(total_nimg: int, drawing_cost: float) -> tuple[int, int]:
    """(pictures to draw, at every which validation) within `SHARE` of the training; (0, 1) where none is affordable.

    drawing_cost: of one picture, in pictures trained on.

    >>> affordable(1_000_000, 1 / 3), affordable(180_000, 8.0), affordable(10_000, 8.0)
    ((512, 1), (225, 4), (0, 1))
    """
    for every in (1, 2, 4, 8):
        count = int(SHARE * total_nimg * every / (VALIDATIONS * drawing_cost))
        if count >= FEWEST_DRAWN:
            return min(count, MOST_DRAWN), every
    return 0, 1


def _estimates(name: str, parts: list[HeldOut]) -> dict[str, Estimate]:
    values = torch.cat([part.values.reshape(-1) for part in parts]).double()
    if parts[0].levels is None:
        return {name: Estimate(float(values.mean()), _error(values))}
    levels = torch.cat([part.levels for part in parts if part.levels is not None])
    by_level = {float(level): values[levels == level] for level in levels.unique()}
    each = {level: Estimate(float(own.mean()), _error(own)) for level, own in by_level.items()}
    total = Estimate(
        sum(estimate.mean for estimate in each.values()) / len(each),
        math.sqrt(sum(estimate.error**2 for estimate in each.values())) / len(each),
    )
    return {name: total, **{f"{name}@{level:.3g}": estimate for level, estimate in each.items()}}


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
