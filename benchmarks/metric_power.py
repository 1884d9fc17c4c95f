"""Which metric sees which fault, from which strength on?

Real pictures are spoilt in graded ways and measured against other real pictures as if a model had drawn them. What a
metric says about unspoilt pictures, in many draws, is its noise: a fault is *seen* when the mean over draws lies more
than `THRESHOLD` standard deviations of that noise away from its mean, in whichever direction. The table names the
weakest strength that is seen; it is written as a record, and `make docs` puts it into the guide.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from record import Row, this_command, write_record
from torch import Tensor
from torch.nn import functional

from imagekiln import data as datasets
from imagekiln.config import DataConfig
from imagekiln.core import mix
from imagekiln.engine.bench import Bench
from imagekiln.metrics import Statistics, extract
from imagekiln.metrics.memorization import memorization
from imagekiln.metrics.spectrum import Spectrum, compare_spectra
from imagekiln.metrics.suite import BUNDLES

THRESHOLD = 3.0
BATCH = 100


class Fault(NamedTuple):
    """A way to spoil pictures. apply(pictures float32 NCHW in [-1, 1], labels N, strength, pool, generator)."""

    name: str
    strengths: tuple[float, ...]
    unit: str
    apply: Callable[[Tensor, Tensor, float, Pool, torch.Generator], Tensor]


@dataclass
class Pool:
    """Real pictures to draw from: `fresh` ones, and those a model would have been trained on."""

    fresh: Tensor
    labels: Tensor
    train: Tensor
    classes: int = field(init=False)

    def __post_init__(self) -> None:
        self.classes = int(self.labels.max()) + 1


# -- faults -----------------------------------------------------------------------------------------------------------


def blur(x: Tensor, labels: Tensor, sigma: float, pool: Pool, generator: torch.Generator) -> Tensor:
    radius = max(1, round(3 * sigma))
    place = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-place.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = functional.conv2d(functional.pad(x, (radius, radius, 0, 0), "reflect"), kernel[:, :, None], groups=x.shape[1])
    return functional.conv2d(functional.pad(x, (0, 0, radius, radius), "reflect"), kernel[..., None], groups=x.shape[1])


def noise(x: Tensor, labels: Tensor, std: float, pool: Pool, generator: torch.Generator) -> Tensor:
    return x + std * torch.randn(x.shape, generator=generator)


def jpeg(x: Tensor, labels: Tensor, loss: float, pool: Pool, generator: torch.Generator) -> Tensor:
    found = []
    for picture in datasets.to_uint8(x).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(picture.squeeze()).save(file, "JPEG", quality=round(100 - loss))
        decoded = np.asarray(Image.open(file)).reshape(picture.shape)
        found.append(torch.from_numpy(decoded.copy()).permute(2, 0, 1))
    return datasets.to_float(torch.stack(found))


def drop_classes(x: Tensor, labels: Tensor, share: float, pool: Pool, generator: torch.Generator) -> Tensor:
    """The pictures of the dropped classes are replaced by fresh ones of the classes that stay."""
    gone = round(share * pool.classes)
    missing, stays = (labels < gone).nonzero().flatten(), (pool.labels >= gone).nonzero().flatten()
    x = x.clone()
    x[missing] = pool.fresh[stays[torch.randperm(len(stays), generator=generator)[: len(missing)]]]
    return x


def copies(x: Tensor, labels: Tensor, share: float, pool: Pool, generator: torch.Generator) -> Tensor:
    count = round(share * len(x))
    x = x.clone()
    x[:count] = pool.train[torch.randperm(len(pool.train), generator=generator)[:count]]
    return x


def repeats(x: Tensor, labels: Tensor, share: float, pool: Pool, generator: torch.Generator) -> Tensor:
    """Twenty pictures make up a share of all, a little noise apart."""
    count = round(share * len(x))
    x = x.clone()
    x[:count] = x[torch.arange(count) % 20] + 0.01 * torch.randn(x[:count].shape, generator=generator)
    return x


def ghosts(x: Tensor, labels: Tensor, share: float, pool: Pool, generator: torch.Generator) -> Tensor:
    """A share of the pictures shows two things at once."""
    count = round(share * len(x))
    x = x.clone()
    x[:count] = (x[:count] + x[torch.randperm(len(x), generator=generator)[:count]]) / 2
    return x


def coarse(x: Tensor, labels: Tensor, share: float, pool: Pool, generator: torch.Generator) -> Tensor:
    """A share of the pictures has half the resolution."""
    count = round(share * len(x))
    x = x.clone()
    small = functional.avg_pool2d(x[:count], 2)
    x[:count] = functional.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
    return x


def brightness(x: Tensor, labels: Tensor, shift: float, pool: Pool, generator: torch.Generator) -> Tensor:
    return x + shift


def contrast(x: Tensor, labels: Tensor, loss: float, pool: Pool, generator: torch.Generator) -> Tensor:
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + (x - middle) * (1 - loss)


def checkerboard(x: Tensor, labels: Tensor, height: float, pool: Pool, generator: torch.Generator) -> Tensor:
    rows, columns = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[3])
    return x + height * (1.0 - 2.0 * ((rows + columns) % 2))


SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
FAULTS = (
    Fault("blur", (0.3, 0.4, 0.5, 0.7, 1.0), "pixels", blur),
    Fault("noise", (0.02, 0.05, 0.1, 0.2, 0.3), "of [-1, 1]", noise),
    Fault("JPEG", (5, 15, 30, 50, 80), "quality lost", jpeg),
    Fault("brightness", (0.02, 0.05, 0.1, 0.2, 0.3), "of [-1, 1]", brightness),
    Fault("contrast", (0.05, 0.1, 0.2, 0.3, 0.5), "lost", contrast),
    Fault("checkerboard", (0.01, 0.02, 0.05, 0.1, 0.2), "of [-1, 1]", checkerboard),
    Fault("half resolution", SHARES, "of pictures", coarse),
    Fault("two in one", SHARES, "of pictures", ghosts),
    Fault("classes dropped", (0.1, 0.2, 0.3, 0.4, 0.5), "of classes", drop_classes),
    Fault("repeats", SHARES, "of pictures", repeats),
    Fault("copies of training", SHARES, "of pictures", copies),
)


# -- measuring --------------------------------------------------------------------------------------------------------


class Scale:
    """All metrics of a bundle, in one space of features."""

    def __init__(self, network: Any, bundle: str, reference: Tensor, train: Tensor, held_out: Tensor) -> None:
        self.network, self.metrics = network, BUNDLES[bundle]
        self.reference, self.train, self.held_out = (self._of(side) for side in (reference, train, held_out))
        self.spectrum = Spectrum().update(reference)

    def measure(self, images: Tensor) -> dict[str, float]:
        """Every metric of these pictures, float32 NCHW in [-1, 1]."""
        images = datasets.to_float(datasets.to_uint8(images.clamp(-1, 1)))
        drawn, spectrum = self._of(images), compare_spectra(Spectrum().update(images), self.spectrum)
        found = {metric.name: metric(drawn, self.reference) for metric in self.metrics}
        copying = memorization(drawn, self.train, self.held_out)
        found["spectrum"], found["nyquist"] = spectrum.distance_db, spectrum.nyquist
        found["copy_ratio"] = copying.ratios[0].ratio
        found["authenticity"] = copying.authenticity.generated.value
        found["copy_test"] = copying.copy_test.overall
        found["copies_per_thousand"] = copying.copies_per_thousand.value
        return found

    def _of(self, images: Tensor) -> Statistics:
        return Statistics.of(extract(self.network, images.split(BATCH)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", required=True, help="labelled pictures, as `imagekiln train --data` takes them")
    add("--features", default="auto", help="where pictures are compared, as for `imagekiln evaluate` (auto)")
    add("--bundle", choices=sorted(BUNDLES), default="default", help="which metrics (default)")
    add("--n", type=int, default=1000, help="pictures on each side (1000)")
    add("--draws", type=int, default=5, help="draws of each fault and strength (5)")
    add("--null-draws", type=int, default=20, help="draws of unspoilt pictures (20)")
    add("--name", default="metric-power", help="name of the record (metric-power)")
    add("--record", action="store_true", help="also write a record under records/")
    return arguments


def work(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Distances from the noise in standard deviations: by fault, metric and strength."""
    dataset = datasets.load(DataConfig(path=options.data))
    bench = Bench(dataset, options.features, 0, say, "")
    rows = torch.randperm(len(dataset.validation), generator=torch.Generator().manual_seed(0)).tolist()
    batch = dataset.validation.read(rows)
    if batch.labels is None or len(rows) < 4 * options.n:
        raise SystemExit(f"{options.data}: this needs labels and at least {4 * options.n} held-out pictures.")
    held = datasets.to_float(batch.images)
    n = options.n
    train = datasets.to_float(dataset.train.read(range(min(len(dataset.train), 5 * n))).images)
    pool = Pool(held[2 * n :], batch.labels[2 * n :], train)
    scale = Scale(bench.network, options.bundle, held[:n], train, held[n : 2 * n])

    def drawn(fault: str, index: int) -> tuple[Tensor, Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(mix("power", fault, index))
        chosen = torch.randperm(len(pool.fresh), generator=generator)[:n]
        return pool.fresh[chosen], pool.labels[chosen], generator

    null = [scale.measure(drawn("none", index)[0]) for index in range(options.null_draws)]
    noise_of = {m: (statistics.fmean(r[m] for r in null), statistics.stdev(r[m] for r in null)) for m in null[0]}
    found: dict[str, dict[str, list[float]]] = {}
    for fault in FAULTS:
        started = time.monotonic()
        table: dict[str, list[float]] = {name: [] for name in noise_of}
        for strength in fault.strengths:
            results = []
            for index in range(options.draws):
                images, labels, generator = drawn(f"{fault.name} {strength}", index)
                results.append(scale.measure(fault.apply(images, labels, strength, pool, generator)))
            for name, (mean, sd) in noise_of.items():
                table[name].append((statistics.fmean(r[name] for r in results) - mean) / max(sd, 1e-12))
        found[fault.name] = table
        say(f"{fault.name}: {time.monotonic() - started:.0f} s")
    return found


def weakest(fault: Fault, distances: Sequence[float]) -> float | None:
    """The weakest strength from which on every strength is seen, or None."""
    seen = None
    for strength, distance in zip(reversed(fault.strengths), reversed(distances), strict=True):
        if abs(distance) <= THRESHOLD:
            break
        seen = strength
    return seen


def say(sentence: str) -> None:
    """Progress, to stderr."""
    print(sentence, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, record."""
    options = parser().parse_args()
    found = work(options)
    rows, missed = [], []
    for fault in FAULTS:
        table = found[fault.name]
        for metric, distances in table.items():
            strength = weakest(fault, distances)
            shown = "not seen" if strength is None else f"from {strength:g} {fault.unit}"
            print(f"{fault.name:<20}{metric:<22}{shown}")
            rows.append(Row(f"{fault.name} / {metric}", distances[-1], "sd at the strongest", options.n, raw=distances))
        if all(weakest(fault, distances) is None for distances in table.values()):
            missed.append(fault.name)
    print(f"Missed by all at the strongest level: {', '.join(missed) or 'none'}.")
    if options.record:
        strengths = {fault.name: {"strengths": fault.strengths, "unit": fault.unit} for fault in FAULTS}
        weak = {f.name: {metric: weakest(f, d) for metric, d in found[f.name].items()} for f in FAULTS}
        notes = [
            f"Seen: more than {THRESHOLD:g} standard deviations of {options.null_draws} draws of unspoilt pictures.",
            f"Mean of {options.draws} draws a strength; raw values follow the strengths under facts.",
        ]
        print(
            write_record(
                options.name,
                this_command(),
                rows,
                notes=notes,
                faults=strengths,
                weakest=weak,
                missed=missed,
                features=options.features,
                n=options.n,
            )
        )


if __name__ == "__main__":
    main()
