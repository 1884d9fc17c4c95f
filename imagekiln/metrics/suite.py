"""The suite: every metric over two sets of features, each with its 95 % interval and its real-versus-real floor.

No single number tells blur, mode loss and copying apart, so the default shows fidelity (precision, density), diversity
(recall, coverage, Vendi score) and two distances together. All metrics depend on how many pictures they see; the sets
are therefore cut to one common size, and the floor is what *real* pictures score at exactly that size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from imagekiln.core import Metric, mix
from imagekiln.errors import UsageError, did_you_mean
from imagekiln.metrics.frechet import FrechetDistance
from imagekiln.metrics.gaussian_kernel import GaussianKernelDistance
from imagekiln.metrics.interval import SPLITS, Interval, interval
from imagekiln.metrics.kernel import KernelDistance
from imagekiln.metrics.manifest import Measurement, Provenance
from imagekiln.metrics.manifold import Coverage, Density, Precision, Recall
from imagekiln.metrics.sliced import SlicedDistance
from imagekiln.metrics.statistics import Statistics, remarks
from imagekiln.metrics.vendi import Vendi

DEFAULT: tuple[Metric, ...] = (
    FrechetDistance(),
    KernelDistance(),
    Precision(),
    Recall(),
    Density(),
    Coverage(),
    Vendi(),
)
BUNDLES: dict[str, tuple[Metric, ...]] = {
    "default": DEFAULT,
    "all": (*DEFAULT, GaussianKernelDistance(), SlicedDistance()),
}
"""Metrics by the name of what is asked for; they share their searches for neighbours, so many cost little more."""


def metrics_named(text: str) -> tuple[Metric, ...]:
    """The metrics of a bundle, or those with these names, separated by commas.

    Raises UsageError for a name that there is not.

    >>> [metric.name for metric in metrics_named("coverage, frechet")]
    ['coverage', 'frechet']
    """
    if text in BUNDLES:
        return BUNDLES[text]
    known = {metric.name: metric for metric in BUNDLES["all"]}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"--metrics {text!r}: no such metric. {did_you_mean(name, [*BUNDLES, *known])}")
    return tuple(known[name] for name in names)


def measure(
    generated: Statistics,
    reference: Statistics,
    real: Statistics | None = None,
    provenance: Provenance | None = None,
    metrics: Sequence[Metric] = DEFAULT,
    seed: int = 0,
) -> list[Measurement]:
    """All metrics of the generated pictures against the reference.

    real: other real pictures, disjoint from the reference, for the floor; None leaves floor and ratio out.
    provenance: of the features; the reference's hash is filled in when it is empty.
    seed: chooses the pictures where a set is larger than the smallest, and cuts the halves of the interval.

    Raises DataError with fewer than 20 pictures in a set, or sets of different features.

    >>> rows = torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0))
    >>> [m.metric for m in measure(*(Statistics.of(side) for side in rows))][:3]
    ['frechet', 'kernel', 'precision']
    """
    provenance = provenance or Provenance("features")
    if not provenance.reference_hash:
        provenance = Provenance(**{**vars(provenance), "reference_hash": reference.hash})
    sides = {"generated": generated, "reference": reference, **({"real": real} if real is not None else {})}
    n = min(side.n for side in sides.values())
    common = {name: _cut(side, n, seed, name) for name, side in sides.items()}
    details: dict[str, Any] = {"interval": "half-splits", "splits": SPLITS}
    if said := remarks(common["generated"], common["reference"]):
        details["remarks"] = said
    details |= {f"{name}_given": side.n for name, side in sides.items() if side.n != n}

    found: list[tuple[Interval, float]] = []
    for metric in metrics:
        started = time.perf_counter()
        result = interval(metric, common["generated"], common["reference"], seed=seed)
        found.append((result, time.perf_counter() - started))
    measurements = []  # floors in a pass of their own: the neighbours of a pair of sets are searched once
    for metric, (result, seconds) in zip(metrics, found, strict=True):
        started = time.perf_counter()
        floor = metric(common["real"], common["reference"]) if real is not None else None
        measurements.append(
            Measurement(
                metric=metric.name,
                value=result.value,
                low=result.low,
                high=result.high,
                n=n,
                n_reference=n,
                floor=floor,
                ratio=result.value / floor if floor is not None and floor > 0.0 else None,
                lower_is_better=metric.lower_is_better,
                provenance=provenance,
                seed=seed,
                seconds=seconds + time.perf_counter() - started,
                details={**details, "settings": _settings(metric)},
            )
        )
    return measurements


def _settings(metric: Metric) -> dict[str, Any]:
    """The metric's settings as JSON gives them back, so that a stored measurement equals a fresh one."""
    plain = {key: value for key, value in vars(metric).items() if key != "min_n"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _cut(side: Statistics, n: int, seed: int, name: str) -> Statistics:
    """n pictures chosen by seed, in their order; the set itself when it has no more."""
    if side.n == n:
        return side
    order = torch.randperm(side.n, generator=torch.Generator().manual_seed(mix(seed, "common size", name)))
    return side.subset(order[:n].sort().values)
