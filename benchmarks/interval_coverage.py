"""How often does a 95 % interval hold the value that many fresh evaluations have on average?

Sets are drawn over and over: from normal distributions, and from features of real pictures (random convolutions, then
their first principal components), which take the place of a population. "Generated" sets differ from the real ones in
a known way, or not at all. The expected value of each metric at this number of pictures is the mean over many more
draws. The target is 90 to 98 of 100 intervals.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from record import Row, this_command, write_record
from torch import Tensor

from imagekiln.config import DataConfig
from imagekiln.core import mix
from imagekiln.data import load, to_float
from imagekiln.metrics import DEFAULT, RandomConv, Statistics, extract, interval, wilson
from imagekiln.metrics.memorization import _ratios, authenticity, copies_per_thousand, search

TARGET = (0.90, 0.98)
BANK_SETS = 3
"""Training pictures of the tests of copying, in sets of n."""

COPYING = ("copy_ratio", "auth_pct", "copies_per_thousand")
Sampler = Callable[[int, str], Tensor]
"""Rows of one draw: `sample(draw, side)`."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--data", default="builtin:digits", help="pictures, as `imagekiln train` takes them (digits)"
    )
    arguments.add_argument("--pictures", type=int, default=30000, help="pictures of the population at most (30000)")
    arguments.add_argument("--components", type=int, default=32, help="principal components of their features (32)")
    arguments.add_argument("--n", type=int, default=300, help="pictures of a drawn set (300)")
    arguments.add_argument("--resamplings", type=int, default=200, help="intervals of each metric and case (200)")
    arguments.add_argument("--draws", type=int, default=400, help="further draws that give the expected value (400)")
    arguments.add_argument("--only", default="", help="cases whose name holds this text (all)")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


def normal_cases(n: int) -> dict[str, Sampler]:
    """Normal distributions: equal, shifted and wider, and equal in more dimensions."""

    def case(dim: int, scale: float, shift: float) -> Sampler:
        def sample(draw: int, side: str) -> Tensor:
            num = BANK_SETS * n if side == "train" else n
            rows = torch.randn(num, dim, generator=torch.Generator().manual_seed(mix("normal", draw, side)))
            return rows * scale + shift if side == "generated" else rows

        return sample

    return {
        "normal, 16 dimensions, equal": case(16, 1.0, 0.0),
        "normal, 16 dimensions, wider and shifted": case(16, 1.2, 0.3),
        "normal, 48 dimensions, equal": case(48, 1.0, 0.0),
    }


def picture_cases(population_ND: Tensor, labels_N: Tensor | None, n: int) -> dict[str, Sampler]:
    """Pictures: equal, classes missing, a mixture with shifted ones."""
    bank, rest = population_ND[: BANK_SETS * n], population_ND[BANK_SETS * n :]
    half = len(rest) // 2
    real, other = rest[:half], rest[half:]
    width = population_ND.std(0)

    def case(pool_ND: Tensor, shifted: float) -> Sampler:
        def sample(draw: int, side: str) -> Tensor:
            if side == "train":
                return bank
            generator = torch.Generator().manual_seed(mix("pictures", draw, side))
            pool = pool_ND if side == "generated" else real
            rows = pool[torch.randperm(len(pool), generator=generator)[:n]]
            if side == "generated" and shifted:
                rows[: int(n * shifted)] += 0.5 * width
            return rows

        return sample

    cases = {"pictures, equal": case(other, 0.0), "pictures, 30 % shifted": case(other, 0.3)}
    if labels_N is not None:
        few = labels_N[-len(other) :] < int(labels_N.max() + 1) // 2
        cases["pictures, half of the classes"] = case(other[few], 0.0)
    return cases


def population(options: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """population_ND of the first principal components, and labels_N."""
    source = load(DataConfig(path=options.data)).train
    batch = source.read(range(min(len(source), options.pictures)))
    features_ND = extract(RandomConv(source.image_shape), (to_float(part) for part in batch.images.split(200)))
    centred_ND = features_ND.double() - features_ND.double().mean(0)
    vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND).eigenvectors
    order = torch.randperm(len(features_ND), generator=torch.Generator().manual_seed(0))
    labels_N = batch.labels[order] if batch.labels is not None and int(batch.labels.max()) > 0 else None
    return (centred_ND @ vectors_DD.flip(1)[:, : options.components]).float()[order], labels_N


def metrics_of(sample: Sampler, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """(expected value, share of intervals that hold it) of every default metric."""
    values: dict[str, list[float]] = {metric.name: [] for metric in DEFAULT}
    limits: dict[str, list[tuple[float, float]]] = {metric.name: [] for metric in DEFAULT}
    for draw in range(options.resamplings + options.draws):
        generated, reference = (Statistics.of(sample(draw, side)) for side in ("generated", "reference"))
        for metric in DEFAULT:
            if draw < options.resamplings:
                found = interval(metric, generated, reference, seed=draw)
                limits[metric.name].append((found.low, found.high))
                values[metric.name].append(found.value)
            else:
                values[metric.name].append(metric(generated, reference))
    return _held(values, limits)


def copying_of(sample: Sampler, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """The same of the tests of copying, all against one training set."""
    train = Statistics.of(sample(0, "train"))
    values: dict[str, list[float]] = {name: [] for name in COPYING}
    limits: dict[str, list[tuple[float, float]]] = {name: [] for name in COPYING}
    for draw in range(options.resamplings + options.draws):
        generated, held_out = (Statistics.of(sample(draw, side)) for side in ("generated", "held out"))
        found = search(generated, train, held_out)
        ratio = _ratios(found, 200 if draw < options.resamplings else 2, draw)[-1]
        shares = authenticity(found, train).generated, copies_per_thousand(found)
        results = [(ratio.ratio, ratio.low, ratio.high), *shares]
        for name, (value, low, high) in zip(COPYING, results, strict=True):
            values[name].append(value)
            if draw < options.resamplings:
                limits[name].append((low, high))
    return _held(values, limits)


def label_accuracy_of(population_ND: Tensor, labels_N: Tensor, options: argparse.Namespace) -> tuple[float, float]:
    """The same of a share of right labels: those of the nearest class mean, in the whole population."""
    means_KD = torch.stack([population_ND[labels_N == k].mean(0) for k in range(int(labels_N.max()) + 1)])
    right_N = torch.cdist(population_ND, means_KD).argmin(1) == labels_N
    expected, held = float(right_N.double().mean()), 0
    for draw in range(options.resamplings):
        rows = torch.randint(len(right_N), (options.n,), generator=torch.Generator().manual_seed(mix("labels", draw)))
        low, high = wilson(int(right_N[rows].sum()), options.n)
        held += low <= expected <= high
    return expected, held / options.resamplings


def _held(
    values: Mapping[str, Sequence[float]], limits: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, tuple[float, float]]:
    found = {}
    for name, given in values.items():
        expected = sum(given) / len(given)
        found[name] = expected, sum(low <= expected <= high for low, high in limits[name]) / len(limits[name])
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for; 1 when a metric misses the target."""
    options = parser().parse_args(given)
    torch.set_num_threads(1)
    population_ND, labels_N = population(options)
    cases = normal_cases(options.n) | picture_cases(population_ND, labels_N, options.n)
    rows, missed = [], []

    def note(what: str, expected: float, share: float) -> None:
        low, high = wilson(round(share * options.resamplings), options.resamplings)
        verdict = "" if TARGET[0] <= share <= TARGET[1] else "   outside the target"
        missed.extend([what] if verdict else [])
        print(f"  {what:<62} expected {expected:10.4g}   held {100 * share:5.1f} %{verdict}", flush=True)
        rows.append(Row(f"held, {what}", 100 * share, "percent", options.resamplings, (), (100 * low, 100 * high)))

    for name, sample in cases.items():
        if options.only not in name:
            continue
        started = time.perf_counter()
        found = metrics_of(sample, options)
        if name.endswith("equal") or "shifted" in name:
            found |= copying_of(sample, options)
        for metric, (expected, share) in found.items():
            note(f"{metric}, {name}", expected, share)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    if labels_N is not None and not options.only:
        note("label_accuracy, pictures", *label_accuracy_of(population_ND, labels_N, options))
    print(f"{len(rows) - len(missed)} of {len(rows)} within {100 * TARGET[0]:g} to {100 * TARGET[1]:g} %")
    if options.record:
        notes = [
            "Intervals of the rows are Wilson's, for the number of resamplings: a true 95 % gives 92 to 98 of 100.",
            f"Sets of {options.n} pictures; expected values: means over {options.resamplings + options.draws} draws.",
        ]
        print(write_record("interval-coverage", this_command(), rows, notes=notes, missed=missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
