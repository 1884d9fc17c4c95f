"""Measuring a run, or any folder of pictures, against real pictures the training never saw.

The reference is the held-out split. Features come from a classifier trained on the training split of the same set (or
fixed random convolutions without labels); a second one, trained from another seed, judges whether a picture shows the
label that was asked for. Both are trained once for a set and kept in the cache.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import DataConfig, read_toml, write_toml
from imagekiln.core import Source, mix
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.generate import Model, draw, open_model, options_for
from imagekiln.engine.plan import build_family
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import (
    Measurement,
    Provenance,
    RandomConv,
    Regression,
    Statistics,
    comparable,
    copy_ratios,
    extract,
    measure,
    nearest,
    weights_hash,
)

JUDGE_RECIPE = "judge"
BATCH = 100
LARGEST_BANK = 20_000
"""Training pictures searched for copies; a set with more is sampled."""

Say = Callable[[str], None]


def evaluate(
    subject: Run | str | Path,
    data: str | Path | None,
    *,
    n: int | None = None,
    features: str | None = None,
    seed: int | None = None,
    say: Say | None = None,
    options: dict[str, Any] | None = None,
) -> list[Measurement]:
    """See `imagekiln.api.evaluate`."""
    say = say or (lambda sentence: None)
    run = subject if isinstance(subject, Run) else Run(Path(subject))
    if run.exists():
        return _evaluate_run(run, data, n, features, seed, say, options or {})
    if data is None:
        raise UsageError(f"{subject} is no run folder. To measure a folder of pictures, name real ones with --data.")
    return _evaluate_folder(run.path, data, n, features, seed or 0, say)


def _evaluate_run(
    run: Run, data: Any, n: int | None, features: str | None, seed: int | None, say: Say, options: dict[str, Any]
) -> list[Measurement]:
    recipe = recipes.complete(read_toml(run.recipe_path))
    model = open_model(run)
    config = recipe.data if data is None else recipe.data.model_copy(update={"path": str(data)})
    dataset = datasets.load(config)
    if dataset.train.image_shape != model.family.image_shape:
        raise UsageError(
            f"The model draws pictures of {model.family.image_shape} and {config.path} holds "
            f"{dataset.train.image_shape} "
            "(channels, height, width). Evaluate on pictures of the same size."
        )
    seed = recipe.eval.seed if seed is None else seed
    bench = Bench(dataset, features or recipe.eval.features, seed, say, hash_of(model.weights))
    rows: list[Measurement] = []
    if model.family.draws:
        count = n or recipe.eval.n
        say(f"Drawing {count} pictures.")
        labels = bench.labels(count)
        seeds = [mix(seed, "evaluate", index) for index in range(count)]
        with model.precision():
            images = draw(model.family, seeds, labels, options_for(model.family, options), BATCH)
        rows += bench.measure(images, labels)
        rows += _reconstruction(model, dataset.validation, bench.provenance("pixels"))
        pictures.write(_neighbour_sheet(bench, images), run.picture_path("neighbours"))
    for row in rows:
        given = {key: value for key, value in options.items() if value is not None}
        run.append_measurement(json.loads(row.to_json()) | {"options": given, "unix_sec": round(time.time())})
    return rows


def _evaluate_folder(
    folder: Path, data: Any, n: int | None, features: str | None, seed: int, say: Say
) -> list[Measurement]:
    dataset = datasets.load(DataConfig(path=str(data)))
    channels, size, _ = dataset.train.image_shape
    drawn = datasets.load(DataConfig(path=str(folder), size=size, channels=channels, validation_fraction=0)).train
    bench = Bench(dataset, features or "auto", seed, say, drawn.fingerprint)
    count = min(n or len(drawn), len(drawn))
    return bench.measure(drawn.read(range(count)).images, None)


class Bench:
    """Everything needed to measure pictures against one data set: splits, feature network, judges.

    Raises:
        DataError: too few held-out pictures.
    """

    def __init__(self, dataset: datasets.Dataset, features: str, seed: int, say: Say, subject_hash: str) -> None:
        self.dataset, self.seed, self.subject_hash, self.say = dataset, seed, subject_hash, say
        labelled = dataset.train.num_classes >= 2
        if features == "classifier" and not labelled:
            raise UsageError("--features classifier needs pictures with labels; use randconv.")
        if labelled and features != "randconv":
            self.network: Any = judge(dataset, 0, say).family
            self.network_name = "classifier"
        else:
            self.network = RandomConv(dataset.train.image_shape)
            self.network_name = self.network.name
        self.judge: Any = judge(dataset, 1, say).family if labelled else None
        self._statistics: dict[tuple[int, ...], Statistics] = {}

    def count(self, wanted: int) -> int:
        """How many pictures can be compared: no more than are held out."""
        return min(wanted, len(self.dataset.validation))

    def labels(self, count: int) -> list[int]:
        """Labels to ask for, in the proportions of the training set."""
        source = self.dataset.train
        if not source.num_classes:
            return [-1] * count
        rows = _rows(len(source), count, mix(self.seed, "labels"))
        known = source.read(rows).labels
        return [-1] * count if known is None else known.tolist()

    def measure(self, images: Tensor, labels: Sequence[int] | None) -> list[Measurement]:
        """All measurements of pictures, uint8 (N, C, H, W), and of whether they show what was asked for."""
        self.say(f"Comparing {len(images)} pictures in features of {self.network_name}.")
        generated = self._of(images)
        reference, real, floor_from = self._real(self.count(len(images)))
        rows = measure(generated, reference, real, self.provenance(self.network_name), seed=self.seed)
        rows = [dataclasses.replace(row, details={**row.details, "floor": floor_from}) for row in rows]
        rows += self._copying(generated)
        if self.judge is not None and labels is not None and self.dataset.train.num_classes:
            rows.append(self._label_accuracy(images, torch.tensor(labels)))
        return rows

    def provenance(self, features: str) -> Provenance:
        """Where a number comes from."""
        own = isinstance(self.network, torch.nn.Module) and features == self.network_name
        return Provenance(
            features=features,
            features_hash=weights_hash(self.network) if own else "",
            reference=f"{self.dataset.name}, held out",
            reference_hash=self.dataset.validation.fingerprint,
            weights_hash=self.subject_hash,
        )

    def nearest_training_pictures(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest training picture of each of these, and the distance: uint8 (N, C, H, W), (N,)."""
        rows = self._bank_rows()
        found = nearest(self._of(images), self._of_source(self.dataset.train, rows))
        return self.dataset.train.read([rows[i] for i in found.indices[:, 0].tolist()]).images, found.distances[:, 0]

    def _real(self, count: int) -> tuple[Statistics, Statistics, str]:
        """The reference, and other real pictures for the floor: held-out ones where there are twice as many."""
        held_out = self.dataset.validation
        order = _rows(len(held_out), len(held_out), mix(self.seed, "reference"))
        reference = self._of_source(held_out, order[:count])
        if len(held_out) >= 2 * count:
            return reference, self._of_source(held_out, order[count : 2 * count]), "held-out pictures"
        train = self.dataset.train
        return reference, self._of_source(train, _rows(len(train), count, mix(self.seed, "floor"))), "training pictures"

    def _copying(self, generated: Statistics) -> list[Measurement]:
        train = self._of_source(self.dataset.train, self._bank_rows())
        held_out = self._of_source(self.dataset.validation, range(min(len(self.dataset.validation), LARGEST_BANK)))
        try:
            ratios = copy_ratios(generated, train, held_out, seed=self.seed)
        except DataError as error:
            self.say(str(error))
            return []
        middle = ratios[-1]
        return [
            Measurement(
                metric="copy_ratio",
                value=middle.ratio,
                low=middle.low,
                high=middle.high,
                n=generated.n,
                n_reference=train.n,
                provenance=self.provenance(self.network_name),
                lower_is_better=False,
                floor=1.0,
                ratio=middle.ratio,
                seed=self.seed,
                details={f"quantile {r.quantile:g}": [r.ratio, r.low, r.high] for r in ratios},
            )
        ]

    def _label_accuracy(self, images: Tensor, labels: Tensor) -> Measurement:
        """Share of pictures whose predicted class is the one asked for; the floor is the judge's own on real ones."""
        started = time.perf_counter()
        asked = labels >= 0
        correct = torch.eq(_predicted(self.judge, images)[asked], labels[asked])
        held_out = self.dataset.validation
        real = held_out.read(range(min(len(held_out), 10_000)))
        truth = torch.full((len(real.images),), -1) if real.labels is None else real.labels
        known = truth >= 0
        on_real = float((_predicted(self.judge, real.images)[known] == truth[known]).double().mean())
        low, high = wilson(int(correct.sum()), len(correct))
        return Measurement(
            metric="label_accuracy",
            value=float(correct.double().mean()),
            low=low,
            high=high,
            n=len(correct),
            n_reference=int(known.sum()),
            provenance=self.provenance("judge"),
            lower_is_better=False,
            floor=on_real,
            ratio=float(correct.double().mean()) / on_real,
            seed=self.seed,
            seconds=time.perf_counter() - started,
            details={"judge_hash": weights_hash(self.judge), "floor": "held-out pictures"},
        )

    def _bank_rows(self) -> list[int]:
        count = min(len(self.dataset.train), LARGEST_BANK)
        return _rows(len(self.dataset.train), count, mix(self.seed, "bank"))

    def _of(self, images: Tensor) -> Statistics:
        return Statistics.of(extract(self.network, (datasets.to_float(part) for part in images.split(BATCH))))

    def _of_source(self, source: Source, rows: Sequence[int]) -> Statistics:
        key = (id(source), len(rows), *rows[:3])
        if key not in self._statistics:
            chunks = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            batches = (datasets.to_float(source.read(chunk).images) for chunk in chunks)
            self._statistics[key] = Statistics.of(extract(self.network, batches))
        return self._statistics[key]


def judge(dataset: datasets.Dataset, number: int, say: Say) -> Model:
    """A classifier of the set's training split, from the cache or trained now; `number` picks an independent one."""
    recipe = recipes.resolve(JUDGE_RECIPE, {"train": {"seed": number}})
    key = f"{mix(dataset.fingerprint, write_toml(recipe)):016x}"
    run = Run(datasets.cache_folder() / "judges" / key)
    with run.lock():
        if run.status().get("state") != "finished":
            say(f"Training judge {number + 1} of 2 on {len(dataset.train)} real pictures (once for this set).")
            run = Run.create(run.path, write_toml(recipe), {"average": recipe.train.averages[0].name})
            epochs = max(recipe.train.total_kimg, 3 * len(dataset.train) / 1000)
            longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"total_kimg": epochs})})
            family = build_family(longer, dataset)
            Trainer(longer, family, dataset.train, dataset.validation, run, Silent()).fit()
    return open_model(run)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), honest also near 0 and 1.

    >>> low, high = wilson(10, 10); round(low, 2), high
    (0.72, 1.0)
    """
    z, share = 1.959964, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At the ends the formula gives 0 and 1 up to rounding.
    return (0.0 if not successes else centre - half), (1.0 if successes == n else centre + half)


def hash_of(path: Path) -> str:
    """sha256 of a weights file."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reconstruction(model: Model, source: Source, provenance: Provenance) -> list[Measurement]:
    """MSE, RMSE, MAE, PSNR and R2 of what the model makes of held-out pictures; [] where it makes nothing of them."""
    started, regression = time.perf_counter(), Regression()
    count = min(len(source), 1000)
    for start in range(0, count, BATCH):
        targets = datasets.to_float(source.read(range(start, min(count, start + BATCH))).images)
        with torch.inference_mode(), model.precision():
            predictions = model.family.reconstruct(targets.to(model.device))
        if predictions is None:
            return []
        regression.update(predictions.float().cpu(), targets)
    seconds = time.perf_counter() - started
    return [
        Measurement(
            metric=name,
            value=value,
            n=count,
            n_reference=count,
            provenance=provenance,
            seconds=seconds,
            lower_is_better=name not in ("r2", "psnr"),
            details={"of": "held-out pictures"},
        )
        for name, value in regression.scores().items()
    ]


@torch.inference_mode()
def _predicted(judge_family: Any, images: Tensor) -> Tensor:
    device = next(judge_family.parameters()).device
    parts = [judge_family.predict(datasets.to_float(part).to(device)).argmax(1).cpu() for part in images.split(BATCH)]
    return torch.cat(parts)


def _rows(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` indices in random order, a function of the seed alone."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def _neighbour_sheet(bench: Bench, images: Tensor, columns: int = 10) -> Any:
    """The drawn pictures that lie nearest to a training picture, each above that picture."""
    real, distance = bench.nearest_training_pictures(images)
    closest = distance.argsort()[: 2 * columns]
    rows = [part[chunk] for chunk in closest.split(columns) for part in (images, real)]
    return pictures.grid(torch.cat(rows), columns)


# -- tables -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Measurement]) -> str:
    """Measurements as text for people."""
    lines = [f"{'':<26}{'value':>10}  {'95 % interval':<22}{'real/real':>10}{'ratio':>8}"]
    for row in rows:
        interval = f"{row.low:.4g} .. {row.high:.4g}" if row.low is not None and row.high is not None else ""
        floor = f"{row.floor:.4g}" if row.floor is not None else ""
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        lines.append(f"{row.label:<26}{row.value:>10.4g}  {interval:<22}{floor:>10}{ratio:>8}")
    if rows:
        first = rows[0]
        lines.append(
            f"n = {first.n} against {first.n_reference} of {first.provenance.reference}; "
            f"floor from {first.details.get('floor', 'none')}; seed {first.seed}."
        )
    return "\n".join(lines)


def newest(run: Run) -> dict[str, Measurement]:
    """The newest measurement of every label."""
    found = {}
    for row in run.measurements():
        fields = {key: value for key, value in row.items() if key not in ("options", "unix_sec")}
        measurement = Measurement.from_json(json.dumps(fields))
        found[measurement.label] = measurement
    return found


def comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run: name, family, images seen, speed, and the newest measurement of every label."""
    rows = []
    for run in runs:
        recipe = recipes.complete(read_toml(run.recipe_path))
        ticks = [row["img_per_sec"] for row in run.stats() if "img_per_sec" in row]
        rows.append(
            {
                "run": str(run.path),
                "family": recipe.family.name,
                "kimg": run.status().get("nimg", 0) / 1000,
                "img_per_sec": sorted(ticks)[len(ticks) // 2] if ticks else None,
                "train_sec": max((row.get("train_sec", 0.0) for row in run.stats()), default=0.0),
                "measurements": {label: json.loads(m.to_json()) for label, m in newest(run).items()},
            }
        )
    return rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Runs side by side; a measurement is ranked only where its provenance agrees and the intervals do not overlap."""
    width = max(len(Path(row["run"]).name) for row in rows) + 2
    lines = [f"{'run':<{width}}{'family':<12}{'kimg':>9}{'img/s':>9}"]
    for row in rows:
        speed = f"{row['img_per_sec']:.0f}" if row["img_per_sec"] else ""
        lines.append(f"{Path(row['run']).name:<{width}}{Path(row['family']).stem:<12}{row['kimg']:>9.1f}{speed:>9}")
    for label in dict.fromkeys(label for row in rows for label in row["measurements"]):
        lines.append(label)
        have = [row for row in rows if label in row["measurements"]]
        measured = [_read(row["measurements"][label]) for row in have]
        reason = next((why for other in measured[1:] if (why := comparable(measured[0], other))), None)
        best = _best(measured) if reason is None else None
        for row, m in zip(have, measured, strict=True):
            interval = f"  ({m.low:.4g} .. {m.high:.4g})" if m.low is not None and m.high is not None else ""
            name = Path(row["run"]).name
            lines.append(f"  {name:<{width}}{m.value:>10.4g}{interval}{'  best' if m is best else ''}")
        if reason is not None:
            lines.append(f"  not ranked: {reason}")
    return "\n".join(lines)


def _read(row: dict[str, Any]) -> Measurement:
    return Measurement.from_json(json.dumps(row))


def _best(measured: Sequence[Measurement]) -> Measurement | None:
    """The one whose interval lies beyond all others', or nobody."""
    sign = 1 if measured[0].lower_is_better else -1
    first = min(measured, key=lambda m: sign * m.value)
    rest = [m for m in measured if m is not first]
    if not rest or any(m.low is None or m.high is None for m in measured):
        return None
    apart = all((first.high < m.low) if sign > 0 else (first.low > m.high) for m in rest)  # type: ignore[operator]
    return first if apart else None


def side_by_side(runs: Sequence[Run | str | Path], out: Path) -> Path:
    """A picture of every run's newest preview, one under the other."""
    from PIL import Image

    sheets = []
    for item in runs:
        run = item if isinstance(item, Run) else Run.open(item)
        if run.samples():
            with datasets.open_own(run.samples()[-1][1]) as sheet:
                sheets.append(sheet.convert("RGB"))
    if not sheets:
        raise UsageError("None of these runs has drawn a preview yet.")
    total = Image.new("RGB", (max(s.width for s in sheets), sum(s.height + 8 for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        total.paste(sheet, (0, top))
        top += sheet.height + 8
    path = out if out.suffix == ".png" else out / "compare.png"
    pictures.write(total, path)
    return path
