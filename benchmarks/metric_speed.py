"""How fast are Frechet distance and nearest-neighbour metrics on 2,048 features, and are their values right?

Frechet: against the textbook route, scipy's root of the product of both covariances. Nearest neighbours: against the
`prdc` package where it is importable, else against its published algorithm. Interleaved pairs with the same number of
threads; the peak of memory is taken in processes of their own. Features are mixtures of normal clusters in a curved
sheet of few dimensions plus noise, so neither precision nor recall is near 0 or 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import pairs
import torch
from record import Row, this_command, write_record

from imagekiln.metrics import FrechetDistance, Statistics
from imagekiln.metrics import manifold as ours

FRECHET_TARGET, PRDC_TARGET, MEMORY_TARGET_GB = 10.0, 4.0, 2.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--n", type=int, default=10000, help="pictures of a set for nearest neighbours (10000)")
    arguments.add_argument("--n-frechet", type=int, default=5000, help="pictures of a set for Frechet (5000)")
    arguments.add_argument("--features", type=int, default=2048, help="features of a picture (2048)")
    arguments.add_argument("--rounds", type=int, default=5, help="interleaved pairs (5)")
    arguments.add_argument("--threads", type=int, default=1, help="threads of both sides (1)")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


def features(n: int, dim: int, seed: int, drift: float) -> torch.Tensor:
    """features_ND float32: a sheet of 12 dimensions bent into `dim`, with noise; `drift` moves and widens it."""
    fixed = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, dim, generator=fixed) / 12**0.5
    phase = 6.0 * torch.rand(dim, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 12, generator=generator) * (1.0 + drift) + drift
    return torch.sin(latent @ mixing + phase) + 0.1 * torch.randn(n, dim, generator=generator)


def sides(n: int, dim: int) -> tuple[Statistics, Statistics]:
    """Generated and reference statistics."""
    return Statistics.of(features(n, dim, 1, 0.15)), Statistics.of(features(n, dim, 2, 0.0))


def frechet_by_scipy(generated: Statistics, reference: Statistics) -> float:
    """The textbook route; the covariances are given to both sides."""
    from scipy import linalg

    shift = (generated.mean - reference.mean).square().sum()
    product = (generated.covariance @ reference.covariance).numpy()
    root = linalg.sqrtm(product)
    spread = generated.covariance.trace() + reference.covariance.trace()
    return float(shift + spread) - 2.0 * float(numpy.trace(root).real)


def prdc_of_package(generated: Statistics, reference: Statistics) -> dict[str, float]:
    """Precision, recall, density, coverage by the package, or by its algorithm where it is not installed."""
    fake, real = generated.features.numpy(), reference.features.numpy()
    try:
        import prdc
    except ImportError:
        return _prdc_as_published(fake, real)
    with contextlib.redirect_stdout(io.StringIO()):
        found = prdc.compute_prdc(real, fake, nearest_k=5)
    return {name: float(value) for name, value in found.items()}


def _prdc_as_published(fake: Any, real: Any, k: int = 5) -> dict[str, float]:
    """Three full distance matrices, as Naeem et al. 2020 describe."""
    from sklearn.metrics import pairwise_distances

    real_radius, fake_radius = (numpy.partition(pairwise_distances(rows), k, axis=1)[:, k] for rows in (real, fake))
    table = pairwise_distances(real, fake)
    inside = table < real_radius[:, None]
    return {
        "precision": float(inside.any(0).mean()),
        "recall": float((table < fake_radius).any(1).mean()),
        "density": float(inside.sum(0).mean() / k),
        "coverage": float((table.min(1) < real_radius).mean()),
    }


def prdc_of_ours(generated: Statistics, reference: Statistics) -> dict[str, float]:
    """Ours, without what it remembers of the last comparison."""
    ours._scores.cache_clear()
    return ours.manifold_scores(generated, reference)._asdict()


def peak_gb(work: Callable[..., Any], n: int, dim: int) -> float:
    """Largest resident memory of `work` over that of its inputs, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    theirs, mine = context.Pipe()
    process = context.Process(target=_watched, args=(mine, work, n, dim, torch.get_num_threads()))
    process.start()
    mine.close()
    found = theirs.recv()
    process.join()
    return found


def _watched(pipe: Any, work: Callable[..., Any], n: int, dim: int, threads: int) -> None:
    torch.set_num_threads(threads)
    given = sides(n, dim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(*given)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send(kilobytes * 1024 / 1e9 if sys.platform == "linux" else kilobytes / 1e9)


def duel(
    name: str, mine: Callable[..., Any], other: Callable[..., Any], given: tuple[Statistics, Statistics], rounds: int
) -> tuple[list[Row], float]:
    """Rows of times and ratio, and the largest relative difference of the values."""
    results: dict[str, Any] = {}

    def keep(side: str, work: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            results[side] = work(*given)

        return run

    def say(index: int, seconds: Mapping[str, float]) -> None:
        print(f"{name}, round {index + 1}: " + "   ".join(f"{k} {v:8.2f} s" for k, v in seconds.items()), flush=True)

    cases = {"ours": pairs.timer(keep("ours", mine)), "other": pairs.timer(keep("other", other))}
    seconds = pairs.interleave(cases, rounds, 1, 0, say)
    faster = [b / a for a, b in zip(seconds["ours"], seconds["other"], strict=True)]
    values = [value if isinstance(value, dict) else {name: value} for value in (results["ours"], results["other"])]
    difference = max(abs(values[0][key] - values[1][key]) / abs(values[1][key]) for key in values[1])
    rows = [Row.median(f"{name}, times faster", faster, "ratio"), Row(f"{name}, relative difference", difference)]
    rows += [Row.median(f"{name}, {side}", seconds[side], "s") for side in seconds]
    rows += [Row(f"{name}, value of {key}", value) for key, value in values[0].items()]
    print(f"{name}: {rows[0].value:.2f} times faster, values differ by {difference:.2g} of their size: {values[0]}")
    return rows, rows[0].value


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for; 1 when a target is missed."""
    options = parser().parse_args(given)
    torch.set_num_threads(options.threads)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name) != str(options.threads):
            print(f"Start with {name}={options.threads}: numpy and scipy take their threads from it.", file=sys.stderr)
            return 2
    frechet_sides = sides(options.n_frechet, options.features)
    for side in frechet_sides:
        _ = side.covariance  # a sum over the pictures that both routes need; not what is compared
    rows, frechet = duel("Frechet", FrechetDistance(), frechet_by_scipy, frechet_sides, options.rounds)
    del frechet_sides
    peak = peak_gb(prdc_of_ours, options.n, options.features)
    print(f"nearest neighbours: {peak:.2f} GB over the features at the peak")
    found, manifold = duel(
        "nearest neighbours", prdc_of_ours, prdc_of_package, sides(options.n, options.features), options.rounds
    )
    rows += [*found, Row("nearest neighbours, peak of memory over the features", peak, "GB", options.n)]
    reached = frechet >= FRECHET_TARGET and manifold >= PRDC_TARGET and peak <= MEMORY_TARGET_GB
    print(f"targets: {FRECHET_TARGET:g}, {PRDC_TARGET:g} times faster, {MEMORY_TARGET_GB:g} GB; reached: {reached}")
    if options.record:
        notes = ["Intervals are the smallest and the largest of all rounds; covariances are given to both routes."]
        notes += [f"{options.n_frechet} pictures a side for Frechet, {options.n} for nearest neighbours, "]
        notes[-1] += f"{options.features} features; {options.threads} thread(s)."
        print(write_record("metric-speed", this_command(), rows, notes=notes, reached=reached))
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
