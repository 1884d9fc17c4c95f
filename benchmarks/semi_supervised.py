"""Do pictures without a label help a model to draw what it is asked for, when only a tenth of them has one?

Some pictures of a published set are laid out as files; a random tenth of them has a label in `metadata.csv`. What
`imagekiln prepare` makes of them trains one recipe four times, with equal images seen, and all draw alike:

labelled    the labelled tenth alone
unlabelled  all pictures; those without a label train the null condition
propagated  all pictures, with the labels that `prepare --propagate-labels` proposed and accepted
accepted    the same without the pictures that still have no label

Everything is measured against the publisher's held-out pictures by classifiers that learnt from all of the publisher's
labels, so no judge saw a proposed one. A judge of another kind, the k nearest pictures in pixels, says whether the
first is only agreed with by networks of its own kind. Copying is looked for among the labelled pictures, which all arms
see, and among everything an arm sees. The seed draws the pictures and the tenth, and seeds the training and the
drawing, which is the same for all arms. The same command continues what was interrupted.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import command
import numpy as np
import ours
import torch
from quality_per_minute import Logbook, our_seconds
from record import Row, this_command, write_record
from torch import Tensor

from imagekiln import api
from imagekiln import data as datasets
from imagekiln.config import DataConfig, Recipe
from imagekiln.core import UNLABELLED, mix
from imagekiln.data import builtin
from imagekiln.engine import extractors, pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.bench import BATCH, Bench
from imagekiln.engine.generate import draw
from imagekiln.engine.models import hash_of, open_model
from imagekiln.engine.run import Run, write_whole
from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import Measurement, Statistics, memorization, nearest, weights_hash, wilson

ARMS = ("labelled", "unlabelled", "propagated", "accepted")
ALL, TENTH = "all", "tenth"
NEIGHBOURS = 5
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % by degrees of freedom."""

LONGEST = 200
"""Characters of a command that are shown."""

PER_CLASS = 10
"""Pictures of a class on the sheet of an arm."""

PREPARE = ("clean.hash_bits=0",)
"""Settings of `prepare`: trousers and sandals of so few pixels are alike without being copies of each other, and groups
of alike pictures are held out or trained on as a whole."""

COPYING = ("copy_ratio", "authenticity", "copies_per_thousand", "copy_test")
"""What a bench measures against the publisher's training pictures; here the arm's own are looked at instead."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", type=Path, required=True, help="folder of Fashion-MNIST's or CIFAR-10's published files")
    add("--out", type=Path, default=Path("runs/semi-supervised"), help="folder of the sets and runs")
    add("--size", type=int, default=16, help="pixels (16)")
    add("--pictures", type=int, default=10_000, help="pictures, with and without a label (10000)")
    add("--share", type=float, default=0.1, help="share of them that has a label (0.1)")
    add("--threshold", type=float, default=0.95, help="confidence from which a proposed label is accepted (0.95)")
    add("--kimg", type=float, default=45.0, help="thousands of images every arm sees (45)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which trainings (all four)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training of each arm for every seed (0 1 2)")
    add("--recipe", default="diffusion", help="the recipe (diffusion)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting laid over the recipe")
    add("--n", type=int, default=5000, help="pictures drawn by each, at most as many as are held out (5000)")
    add("--name", default="semi-supervised", help="name of the record (semi-supervised)")
    add("--records", type=Path, metavar="FOLDER", help="folder of the record (records/)")
    add("--no-record", action="store_true", help="only print what was measured")
    return arguments


# -- the pictures -----------------------------------------------------------------------------------------------------


def lay_out(published: datasets.Dataset, options: argparse.Namespace, seed: int) -> None:
    """Write the pictures of a seed as files, once: `all`, where a tenth has a label, and `tenth`, only those."""
    train = published.train
    if options.pictures > len(train):
        raise UsageError(f"--pictures {options.pictures}: {published.name} has {len(train)} to train on.")
    rng = np.random.default_rng([seed, 1])
    rows = rng.choice(len(train), options.pictures, replace=False)
    known = round(options.share * options.pictures)
    for name, some in ((ALL, rows), (TENTH, rows[:known])):
        folder = options.out / str(seed) / name
        if (folder / "metadata.csv").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        batch, table = train.read(some.tolist()), [("file_name", "label")]
        for place, (row, image) in enumerate(zip(some.tolist(), batch.images, strict=True)):
            pictures.write(pictures.to_picture(image), folder / f"{row:06d}.png")
            table.append((f"{row:06d}.png", _truth(published, row) if place < known else ""))
        write_whole(folder / "metadata.csv", _as_csv(table))


def prepare(options: argparse.Namespace, seed: int, arm: str) -> Path:
    """The prepared set of an arm, made by the command line as anyone would."""
    folder = options.out / str(seed)
    out, propagates = folder / f"{arm}-set", arm in ("propagated", "accepted")
    settings = [word for setting in PREPARE for word in ("--set", setting)]
    if not datasets.is_prepared(out):
        run_verb("prepare", folder / (TENTH if arm == "labelled" else ALL), "--out", out, *settings)
    if propagates and not (out / datasets.PROPOSALS).is_file():
        run_verb("prepare", "--out", out, "--propagate-labels", options.threshold)
    if arm == "accepted":
        dropped = [row["file"] for row in proposals(out) if row["accepted"] != "True"]
        if not set(dropped) <= {name for name, _ in datasets.load(DataConfig(path=str(out))).left_out}:
            run_verb("prepare", "--out", out, *(word for name in dropped for word in ("--drop", name)))
    return out


def proposals(out: Path) -> list[dict[str, str]]:
    """Rows of the table of proposed labels of a set."""
    with (out / datasets.PROPOSALS).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_verb(*arguments: object) -> None:
    """Run a verb of the command line; its sentences go on to our stderr."""
    words = [str(word) for word in arguments]
    line = " ".join(["imagekiln", *words])
    command.say(line if len(line) < LONGEST else f"{line[:LONGEST]} ...")
    program = [sys.executable, "-c", "from imagekiln.cli.main import main; main()", *words]
    if subprocess.run(program, stdout=sys.stderr, check=False).returncode:
        raise DataError(f"{line[:LONGEST]} failed; what it said stands above.")


def told(published: datasets.Dataset, dataset: datasets.Dataset, out: Path) -> dict[str, Any]:
    """Counts of what an arm learns from, and how many of its labels are the publisher's."""
    train, labels = dataset.train, dataset.train.labels_N
    assert labels is not None
    known = [
        (train.class_names[label], _truth(published, int(Path(file).stem)))
        for file, label in zip(train.files, labels.tolist(), strict=True)
        if label != UNLABELLED
    ]
    facts: dict[str, Any] = {
        "pictures": len(train),
        "labelled": len(known),
        "labelled_right": sum(given == true for given, true in known),
        "by_class": dict(sorted(Counter(given for given, _ in known).items())),
        "held_out": len(dataset.validation),
        "left_out": len(dataset.left_out),
    }
    if (out / datasets.PROPOSALS).is_file():
        rows = proposals(out)
        accepted = [row for row in rows if row["accepted"] == "True"]
        right = sum(row["label"] == _truth(published, int(Path(row["file"]).stem)) for row in accepted)
        facts["proposed"] = {"pictures": len(rows), "accepted": len(accepted), "right": right}
    return facts


def _truth(published: datasets.Dataset, row: int) -> str:
    labels = published.train.labels_N
    assert labels is not None
    return published.train.class_names[int(labels[row])]


# -- training and drawing ---------------------------------------------------------------------------------------------


def recipe_of(options: argparse.Namespace, seed: int, path: Path) -> Recipe:
    """The recipe of every arm; only the set differs."""
    fixed = [f"train.seed={seed}", f"train.total_kimg={options.kimg}"]
    return recipes.resolve(options.recipe, {"data": {"path": str(path.absolute())}}, [*options.set, *fixed])


def train(options: argparse.Namespace, seed: int, arm: str, path: Path) -> Run:
    """Train or continue an arm."""
    run = Run(options.out / str(seed) / arm)
    if run.status().get("state") != "finished":
        logbook = Logbook(run, f"{arm}, seed {seed}")
        try:
            api.train(recipe_of(options, seed, path), "", run.path, listener=logbook)
        finally:
            if run.exists():
                logbook.note()
    return Run.open(run.path)


def measure(options: argparse.Namespace, bench: Bench, seed: int, arm: str, path: Path) -> dict[str, Any]:
    """Everything about one arm of one seed; kept in a file, so that it is drawn and measured once."""
    run, count = Run.open(options.out / str(seed) / arm), bench.count(options.n)
    model = open_model(run)
    sampling = getattr(model.family.config, "sample", None)
    labels = bench.labels(count)
    file = run.path.with_suffix(".measured.json")
    judges = [weights_hash(bench.network), weights_hash(bench.judge)]
    key = [hash_of(model.weights), repr(sampling), count, bench.seed, *judges]
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"key": None}
    if known["key"] == key:
        return known["found"]
    command.say(f"Drawing {count} pictures: {arm}, seed {seed}.")
    own = [model.class_names.index(bench.dataset.train.class_names[label]) for label in labels]
    started = time.monotonic()
    with model.precision():
        images = draw(model.family, [mix("semi-supervised", seed, i) for i in range(count)], own, sampling, BATCH)
    drawing_sec = time.monotonic() - started
    pictures.write(_sheet(images, labels, bench.dataset.train.num_classes), run.path.with_suffix(".png"))
    bench.subject_hash = key[0]
    rows = [row for row in bench.measure(images, labels) if row.metric not in COPYING]
    dataset = datasets.load(DataConfig(path=str(path)))
    found = {
        "told": told(bench.dataset, dataset, path),
        "kimg": run.status().get("nimg", 0) / 1000,
        "best_kimg": int(model.weights.stem.split("-", 1)[0]) / 1000,
        "parameters": ours.parameters(model.family),
        "seconds": {**our_seconds(run), "drawing": drawing_sec},
        "rows": [json.loads(row.to_json()) for row in rows],
        "copying": copying(bench, images, options.out / str(seed) / "labelled-set", dataset),
        "neighbours": neighbour_accuracy(bench.dataset, images, torch.tensor(labels)),
    }
    write_whole(file, json.dumps({"key": key, "found": found}) + "\n")
    return found


def copying(bench: Bench, images: Tensor, tenth: Path, dataset: datasets.Dataset) -> dict[str, Any]:
    """The tests of copying against the labelled pictures that train, and against all that an arm trains on."""
    network, folder = bench.network, datasets.cache_folder() / "features"

    def of(source: Any) -> Statistics:
        rows = range(len(source))
        batches = (source.read(rows[start : start + BATCH]).images for start in range(0, len(source), BATCH))
        return Statistics.of(extractors.cached_features(network, batches, source.fingerprint, folder), "real")

    generated = Statistics.of(extractors.cached_features(network, images, extractors.images_key(images), folder))
    held_out = of(bench.dataset.validation)
    found = {}
    for name, source in (("the labelled", datasets.load(DataConfig(path=str(tenth))).train), ("all", dataset.train)):
        tested = memorization(generated, of(source), held_out, seed=bench.seed)
        middle = tested.ratios[-1]
        found[name] = {
            "copy_ratio": middle.ratio,
            "copy_ratio_low_quantile": tested.ratios[0].ratio,
            "interval": [middle.low, middle.high],
            "authenticity": tested.authenticity[0].value,
            "authenticity_real": tested.authenticity[1].value,
            "copies_per_thousand": tested.copies_per_thousand.value,
        }
    return found


def neighbour_accuracy(published: datasets.Dataset, images: Tensor, labels: Tensor) -> float:
    """Share of pictures whose k nearest of the publisher's training pictures, in pixels, mostly show their label."""
    return float((_by_neighbours(published, images) == labels).double().mean())


def _by_neighbours(published: datasets.Dataset, images: Tensor) -> Tensor:
    """The most frequent label among the k nearest, the nearer one where two are level: int64 (N,)."""
    truth = published.train.labels_N
    assert truth is not None
    bank = published.train.read(range(len(published.train))).images.flatten(1).float() / 255
    found = nearest(Statistics.of(images.flatten(1).float() / 255), Statistics.of(bank), NEIGHBOURS)
    votes_QK = truth[found.indices]
    weight_K = 1 - torch.arange(NEIGHBOURS) * 1e-3
    counts = torch.zeros(len(images), published.train.num_classes)
    return counts.scatter_add_(1, votes_QK, weight_K.expand(len(images), -1)).argmax(1)


def _sheet(images: Tensor, labels: Sequence[int], num_classes: int) -> Any:
    """A column a class."""
    asked = torch.tensor(labels)
    columns = [torch.nonzero(asked == label).flatten()[:PER_CLASS] for label in range(num_classes)]
    rows = min(map(len, columns))
    return pictures.grid(images[torch.stack([own[:rows] for own in columns], 1).flatten()], num_classes)


# -- the record -------------------------------------------------------------------------------------------------------


def values_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Everything that is compared of one arm of one seed, by name."""
    rows = [Measurement.from_json(json.dumps(row)) for row in found["rows"]]
    values = {row.label: row.value for row in rows}
    values |= {f"{row.label} / real pictures": row.ratio for row in rows if row.metric == "frechet" and row.ratio}
    values["label accuracy, nearest in pixels"] = found["neighbours"]
    for among, tested in found["copying"].items():
        for name in ("copy_ratio", "copy_ratio_low_quantile", "authenticity", "copies_per_thousand"):
            values[f"{name} among {among}"] = tested[name]
    return values


def paired(what: str, differences: Sequence[float], seeds: Sequence[int], n: int) -> Row:
    """The mean difference of pairs with its 95 % interval by Student's t, where there are two pairs or more.

    >>> [round(end, 3) for end in paired("a - b", [1.0, 2.0, 3.0], [0, 1, 2], 100).interval]
    [-0.484, 4.484]
    """
    row = Row.of(what, differences, "", seeds, n)
    if not 2 <= len(differences) <= len(T_975):
        return row
    reach = T_975[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    ends = (row.value - reach, row.value + reach)
    return Row(what, row.value, "", n, tuple(seeds), ends, row.sd, tuple(differences))


def record_rows(arms: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int], n: int) -> list[Row]:
    """Each arm's means over the seeds, then the paired differences from the labelled tenth alone."""
    rows, values = [], {arm: [values_of(found) for found in runs] for arm, runs in arms.items()}
    for arm, runs in arms.items():
        told_N = [found["told"] for found in runs]
        rows.append(Row.of(f"{arm}, pictures trained on", [facts["pictures"] for facts in told_N], "", seeds))
        rows.append(Row.of(f"{arm}, with a label", [facts["labelled"] for facts in told_N], "", seeds))
        right = [facts["labelled_right"] / facts["labelled"] for facts in told_N]
        rows.append(Row.of(f"{arm}, labels that are right", right, "", seeds))
        for kind in ("cpu", "drawing"):
            seconds = [found["seconds"][kind] for found in runs if kind in found["seconds"]]
            if len(seconds) == len(runs):
                rows.append(Row.of(f"{arm}, seconds ({kind})", seconds, "s", seeds))
        rows.append(Row.of(f"{arm}, images seen by the weights drawn with", _of(runs, "best_kimg"), "kimg", seeds))
        rows += [Row.of(f"{arm}, {name}", [own[name] for own in values[arm]], "", seeds, n) for name in values[arm][0]]
    for arm in [arm for arm in arms if "labelled" in arms and arm != "labelled"]:
        for name in values[arm][0]:
            differences = [a[name] - b[name] for a, b in zip(values[arm], values["labelled"], strict=True)]
            rows.append(paired(f"{arm} - labelled, {name}", differences, seeds, n))
    return rows


def _of(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(found[name]) for found in runs]


def real_pictures(published: datasets.Dataset, n: int) -> Row:
    """What the judge of another kind says of held-out pictures."""
    batch = published.validation.read(range(min(n, len(published.validation))))
    assert batch.labels is not None
    hits = int((_by_neighbours(published, batch.images) == batch.labels).sum())
    what, count = "real pictures, label accuracy, nearest in pixels", len(batch.labels)
    return Row(what, hits / count, "", count, (), wilson(hits, count), None, (hits / count,))


def work(options: argparse.Namespace) -> Path | None:
    """Lay out, prepare, train, measure, write."""
    if builtin.recognise(options.data) is None:
        raise UsageError(f"--data {options.data}: expected the published files of Fashion-MNIST or CIFAR-10.")
    published = datasets.load(DataConfig(path=str(options.data.absolute()), size=options.size))
    bench = Bench(published, "classifier", 0, command.say, "")
    arms: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        lay_out(published, options, seed)
        sets = {arm: prepare(options, seed, arm) for arm in dict.fromkeys(["labelled", *options.arms])}
        for arm in options.arms:
            train(options, seed, arm, sets[arm])
            arms[arm].append(measure(options, bench, seed, arm, sets[arm]))
    count = bench.count(options.n)
    rows = [*record_rows(arms, options.seeds, count), real_pictures(published, count)]
    for row in rows:
        ends = f" [{row.interval[0]:.4g}, {row.interval[1]:.4g}]" if row.interval else ""
        print(f"{row.what:<72}{row.value:>12.5g}{f' +- {row.sd:.3g}' if row.sd is not None else ''}{ends}")
    if options.no_record:
        return None
    notes = [
        "Values are means over the seeds; sd is over the seeds. Intervals of differences are 95 % by Student's t.",
        "All arms see as many images, have one recipe, one sampler, one guidance, and the noise of one seed.",
        "Each draws with the weights that its own held-out pictures found best, as `generate` does.",
        "Copying: ratios about 1 are what fresh pictures give; well below 1 are copies.",
    ]
    folder = {"folder": options.records} if options.records else {}
    about = {"data": published.summary(), "data_fingerprint": published.fingerprint, "arms": arms}
    return write_record(options.name, this_command(), rows, notes=notes, **folder, **about)


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


# -- small parts ------------------------------------------------------------------------------------------------------


def _as_csv(table: Sequence[tuple[str, ...]]) -> str:
    quoted = (",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in table)
    return "\n".join(quoted) + "\n"


if __name__ == "__main__":
    sys.exit(main())
