"""Which family draws best after the same minutes?

A league of all adversarial families, with a diffusion model and a VAE beside them for reference. Each trains on the
same pictures for the same time in a small preset of its own (`PRESETS`), planning, previews, validations and
checkpoints included. One bench measures all: same features, same held-out reference, the noise of the same seeds, and
the weights that `generate` draws with, which held-out pictures chose. A sheet of pictures of every run, and one of all
families, are written below `--out`.

GANs fall apart. So the weights of the moments that a run saves are kept beside it, and a few of them are measured, the
last one included: the Frechet distance at the end over the smallest one is 1 where the end is the best moment.

The same command continues what was interrupted. Seconds are those of the wall, or with `--budget cpu` processor seconds
divided by threads: 8 minutes on 2 cores are 16 with one thread. `--train-only` and `--skip-train` part the work, so
that several processes can train different families; only one of them may be the first to measure a set of pictures.
Runs that are not finished are left out of the table and named in the notes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import torch
from quality_per_minute import Logbook, by_label, measured, our_seconds, train_within
from record import Row, this_command, write_record
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import DataConfig, Recipe
from imagekiln.core import Family, mix
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.bench import BATCH, Bench
from imagekiln.engine.generate import draw
from imagekiln.engine.models import Model, hash_of, load_model, open_model
from imagekiln.engine.run import Run
from imagekiln.errors import Diverged, RecipeError, UsageError
from imagekiln.metrics import Measurement

BASELINE = "dcgan"
"""Every other family is compared with it."""

REFERENCES = ("diffusion", "vae")
"""No opponents in them: they are there to compare with."""

GOAL = 1.15
"""The distance at the end over the best one is to be no more than this."""

PER_CLASS, ON_A_SHEET, IN_A_ROW = 10, 100, 16
"""Pictures of a class on a sheet, of a sheet without classes, and of a family among all."""

COLUMNS = {
    "frechet": "FD",
    "precision": "prec",
    "recall": "recall",
    "coverage": "cover",
    "spectrum": "dB",
    "label_accuracy": "label",
}
"""Metrics of the table."""


@dataclass(frozen=True)
class Preset:
    """What is laid over a family's recipe, and why.

    million: parameters of what draws, and of its opponent, for grey pictures of 32 pixels with ten classes.
    """

    settings: tuple[str, ...]
    million: tuple[float, float]
    why: str


def rates(opponent: str, lr: float, generator_lr: float | None = None) -> tuple[str, str]:
    """Settings of both learning rates.

    >>> rates("critic", 1e-3)
    ('optim.critic.lr=0.001', 'optim.generator.lr=0.001')
    """
    return f"optim.{opponent}.lr={lr}", f"optim.generator.lr={generator_lr or lr}"


SMALL_BATCH = ("train.batch=32",)
"""Where a picture takes long to learn from, there are twice as many steps in the same time."""

PRESETS = {
    "vanilla_gan": Preset(
        ("family.width=1024", "family.smooth_real=0.1"),
        (2.24, 2.13),
        "fully connected layers are cheap, so they are wide; it sees every picture often, so its critic is held back",
    ),
    "dcgan": Preset((), (1.20, 0.66), "the published networks, learning rates and betas at 32 pixels"),
    "cgan": Preset(
        ("family.width=64",), (1.08, 0.66), "DCGAN's size; spectral norm lets its discriminator learn faster"
    ),
    "wgan": Preset(
        ("family.width=64", "family.critic_steps=3", *rates("critic", 5e-4)),
        (1.20, 0.66),
        "DCGAN's networks; the paper's 5e-5 and five critic steps are for hours",
    ),
    "wgan_gp": Preset(
        ("family.width=24", "family.critic_steps=2", *SMALL_BATCH, *rates("critic", 5e-4)),
        (0.09, 0.04),
        "one width at all sizes and a second derivative are dear: narrow, fewer critic steps for more of the generator",
    ),
    "sngan": Preset(
        (
            "family.networks=convolutional",
            "family.generator_width=32",
            "family.width=24",
            "family.critic_steps=1",
            *rates("discriminator", 8e-4, 4e-4),
        ),
        (1.22, 0.41),
        "the paper's plain networks, narrower: residual ones that are as fast have 0.09 million parameters; two "
        "learning rates (Heusel et al. 2017) instead of five discriminator steps",
    ),
    "biggan": Preset(
        ("family.critic_steps=1", *rates("discriminator", 1e-3, 5e-4)),
        (0.13, 0.07),
        "the small default; two learning rates instead of four discriminator steps",
    ),
    "pggan": Preset(
        ("family.width=16", *SMALL_BATCH),
        (0.82, 0.56),
        "narrow next to the picture, where it is dear, and the default below; grown over half of the run",
    ),
    "stylegan1": Preset(
        ("family.width=16", "family.gamma=0.1", *SMALL_BATCH),
        (0.50, 0.56),
        "as PGGAN; R1 of 10 is for a million pixels",
    ),
    "stylegan2": Preset(
        ("family.width=16", *SMALL_BATCH),
        (0.44, 0.72),
        "as PGGAN; R1 by the rule 0.0002 pixels / batch",
    ),
    "r3gan": Preset(
        (
            *("family.width=12", "family.widest=128", "family.group_width=256", "family.expansion=1"),
            *("train.end_lr_ratio=0.1", *SMALL_BATCH, *rates("discriminator", 3e-3)),
        ),
        (0.16, 0.15),
        "plain convolutions, for grouped ones of more channels are slow on a CPU; small networks and a short run, so "
        "steps begin at fifteen times the paper's 2e-4, and end near it",
    ),
    "diffusion": Preset(
        ("family.widths=[16,32,64]",), (0.72, 0.0), "for reference: the recipe, narrower, for it is dear"
    ),
    "vae": Preset((), (1.23, 0.0), "for reference: the family as it is"),
}
"""What trains, in the order of their papers, references last."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", required=True, help="pictures to train on, as `imagekiln train --data` takes them")
    add("--out", type=Path, default=Path("runs/gan-league"), help="folder of the runs (runs/gan-league)")
    add("--size", type=int, default=32, help="pixels (32)")
    add("--minutes", type=float, default=8.0, help="minutes of training for a family and seed (8)")
    add("--budget", choices=("wall", "cpu"), default="wall", help="which seconds are counted (wall)")
    add("--kimg", type=float, help="thousands of images every family sees, instead of --minutes")
    add("--families", nargs="+", choices=list(PRESETS), default=list(PRESETS), metavar="NAME", help="which (all)")
    add("--seeds", type=int, nargs="+", default=[0], help="one training of each family for every seed (0)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting laid over all presets")
    add("--n", type=int, default=5000, help="pictures drawn by each, at most as many as are held out (5000)")
    add("--moments", type=int, default=6, help="moments of a GAN's run that are measured beside the best (6)")
    add("--features", default="auto", help="where pictures are compared, as `evaluate --features` takes it (auto)")
    add("--train-only", action="store_true", help="measure nothing")
    add("--skip-train", action="store_true", help="only measure what has been trained before")
    add("--record", action="store_true", help="also write a record under records/")
    add("--name", default="gan-league", help="name of the record (gan-league)")
    add("--records", type=Path, metavar="FOLDER", help="another folder for the record")
    return arguments


# -- training ---------------------------------------------------------------------------------------------------------


class Keeper(Logbook):
    """A logbook that also keeps the weights of every moment, of which a run deletes all but the last and the best."""

    def tick(self, row: Mapping[str, Any]) -> None:
        super().tick(row)
        self.keep()

    def keep(self) -> None:
        """Copy what has been saved since the last call."""
        with contextlib.suppress(UsageError):  # there are no weights yet
            folder = self.run.weights().parent
            for file in folder.glob("[0-9]*.safetensors"):
                _copy(file, moments_folder(self.run) / file.name)


def data_config(options: argparse.Namespace) -> DataConfig:
    """What every family learns from."""
    path = options.data if ":" in options.data else str(Path(options.data).expanduser().absolute())
    return DataConfig(path=path, size=options.size)


def recipe_of(options: argparse.Namespace, family: str, seed: int) -> Recipe:
    """The recipe of a family and seed, its length not yet fixed."""
    data = data_config(options).model_dump(include={"path", "size"})
    return recipes.resolve(family, {"data": data}, [*PRESETS[family].settings, *options.set, f"train.seed={seed}"])


def train(options: argparse.Namespace, family: str, seed: int, dataset: datasets.Dataset) -> None:
    """Train or continue one run; one that left the finite numbers stays as it is."""
    run = run_of(options, family, seed)
    if run.status().get("state") in ("finished", "diverged"):
        return
    logbook = (Logbook if family in REFERENCES else Keeper)(run, f"{family}, seed {seed}")
    recipe = recipe_of(options, family, seed)
    try:
        train_within(recipe, dataset, logbook, options.minutes, options.budget, options.kimg)
    except Diverged as error:
        command.say(f"{family}, seed {seed}: {error}")
    finally:
        if isinstance(logbook, Keeper):
            logbook.keep()


def misfits(options: argparse.Namespace, dataset: datasets.Dataset) -> dict[str, str]:
    """Why some families cannot learn these pictures: those that need labels, or another size."""
    found = {}
    for family in options.families:
        recipe = recipe_of(options, family, 0)
        try:
            recipes.build(recipe, dataset.train.image_shape, dataset.train.num_classes)
        except RecipeError as error:
            found[family] = str(error)
    return found


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, bench: Bench, narrow: Bench, family: str, seed: int) -> dict[str, Any]:
    """Everything about one finished run; what was drawn and measured before is taken from files beside it.

    narrow: a bench of the Frechet distance alone, for the moments.
    """
    run = run_of(options, family, seed)
    model, count = open_model(run), bench.count(options.n)
    labels = bench.labels(count)

    def drawn() -> Tensor:
        images = draw_with(model, labels)
        pictures.write(sheet(images, labels, model.class_names), run.path.with_suffix(".png"))
        return images

    kimg, seconds = run.status().get("nimg", 0) / 1000, our_seconds(run)
    per_sec = {kind: 1000 * kimg / sec for kind, sec in seconds.items() if sec > 0}
    found = {
        "kimg": kimg,
        "best_kimg": int(model.weights.stem.split("-", 1)[0]) / 1000,
        "seconds": seconds,
        "images_per_sec": per_sec.get(options.budget, per_sec.get("wall")),
        "parameters": sides_of(model.family),
        "sheet": run.path.with_suffix(".png").name,
        "rows": measured(bench, count, drawn, labels, subject_of(model), run.path.with_suffix(".measured.json")),
    }
    if family not in REFERENCES:
        found["moments"] = moments(options, narrow, run, labels)
    return found


def moments(options: argparse.Namespace, narrow: Bench, run: Run, labels: Sequence[int]) -> dict[str, float]:
    """Frechet distance by images seen, of the best moment by the run's own account and some others, the last included.

    It is that of the first space of features, from as many pictures as are drawn in all.
    """
    best = run.weights()
    files = {int(file.stem.split("-", 1)[0]): file for file in moments_folder(run).glob("[0-9]*.safetensors")}
    files[int(best.stem.split("-", 1)[0])] = best
    last = max(files)
    chosen = {*spread(sorted(files), options.moments), last, int(best.stem.split("-", 1)[0])}
    distances = {}
    for nimg in sorted(chosen):
        model = load_model(files[nimg])
        file = moments_folder(run) / f"{nimg:09d}.measured.json"
        drawn = functools.partial(draw_with, model, labels)
        rows = measured(narrow, len(labels), drawn, None, subject_of(model), file)
        distances[str(nimg)] = float(rows[0]["value"])
    return distances


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of these, evenly spread, first and last included.

    >>> spread([1, 2, 3, 4, 5], 3), spread([1, 2], 6), spread([1, 2, 3], 1)
    ([1, 3, 5], [1, 2], [3])
    """
    last = len(numbers) - 1
    return sorted({numbers[round(i * last / (count - 1)) if count > 1 else last] for i in range(count)})


def end_over_best(distances: Mapping[str, float]) -> float:
    """The distance of the last moment over the smallest one; 1 where the end is the best.

    >>> end_over_best({"9000": 2.0, "10000": 3.0, "500": 8.0})
    1.5
    """
    return distances[max(distances, key=int)] / min(distances.values())


def draw_with(model: Model, labels: Sequence[int]) -> Tensor:
    """Pictures of the seeds that all families draw with: uint8 (N, C, H, W)."""
    seeds = [mix("gan-league", index) for index in range(len(labels))]
    with model.precision():
        return draw(model.family, seeds, labels, getattr(model.family.config, "sample", None), BATCH)


def subject_of(model: Model) -> str:
    """What is measured: the weights, and how they draw."""
    return f"{hash_of(model.weights)}/{getattr(model.family.config, 'sample', None)!r}"


def sides_of(family: Family) -> dict[str, int]:
    """Trainable parameters of what draws, and of what only judges it."""
    counts = recipes.parameter_counts(family)
    draws = sum(count for name, count in counts.items() if name in family.averaged)
    return {"draws": draws, "opposes": sum(counts.values()) - draws}


# -- pictures ---------------------------------------------------------------------------------------------------------


def sheet(images: Tensor, labels: Sequence[int], names: Sequence[str]) -> Any:
    """A row a class with its name, or a square without classes."""
    if not names:
        return pictures.grid(images[:ON_A_SHEET], pictures.columns_for(min(len(images), ON_A_SHEET), 0))
    rows = [[i for i, own in enumerate(labels) if own == one][:PER_CLASS] for one in sorted(set(labels))]
    chosen = [index for row in rows for index in row]
    return pictures.class_rows(images[chosen], [labels[index] for index in chosen], names)


def league_sheet(options: argparse.Namespace, families: Sequence[str], seed: int, labels: Sequence[int]) -> Path:
    """A row a family, a column a class (or any picture, without classes), all of the same noise."""
    first = {label: index for index, label in reversed(list(enumerate(labels)))}
    chosen = [first[label] for label in sorted(first)] if len(first) > 1 else list(range(len(labels)))
    chosen = chosen[:IN_A_ROW]
    most = max(chosen) + 1
    rows = [draw_with(open_model(run_of(options, family, seed)), labels[:most])[chosen] for family in families]
    file = options.out / f"league-{seed}.png"
    owner = [place for place, row in enumerate(rows) for _ in row]
    pictures.write(pictures.class_rows(torch.cat(rows), owner, families), file)
    return file


# -- the record -------------------------------------------------------------------------------------------------------


Found = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""What was found, by family and seed."""


def record_rows(found: Found, n: int, budget: str) -> list[Row]:
    """Of every family all that was measured, and its Frechet distance over the baseline's of the same seeds."""
    rows = []
    for family, by_seed in found.items():
        seeds, runs = list(by_seed), list(by_seed.values())
        for side, what in (("draws", "parameters that draw"), ("opposes", "parameters of the opponent")):
            rows.append(Row(f"{family}, {what}", float(runs[0]["parameters"][side])))
        rows += rows_of_runs(family, runs, seeds, budget)
        if all("moments" in run for run in runs):
            ratios = [end_over_best(run["moments"]) for run in runs]
            rows.append(Row.of(f"{family}, FD at the end / at the best moment", ratios, "times", seeds, n))
    for family, by_seed in found.items():
        seeds = [seed for seed in by_seed if family != BASELINE and seed in found.get(BASELINE, {})]
        if seeds:
            quotients = [distance(by_seed[seed]) / distance(found[BASELINE][seed]) for seed in seeds]
            rows.append(Row.of(f"{family} / {BASELINE}, FD", quotients, "times", seeds, n))
    return rows


def rows_of_runs(name: str, runs: Sequence[Mapping[str, Any]], seeds: Sequence[int], budget: str) -> list[Row]:
    """What training cost, and all that was measured."""
    rows = []
    if all(budget in run["seconds"] for run in runs):
        rows.append(Row.of(f"{name}, training ({budget})", [run["seconds"][budget] for run in runs], "s", seeds))
    rows.append(Row.of(f"{name}, images seen", [run["kimg"] for run in runs], "kimg", seeds))
    rows.append(Row.of(f"{name}, training", [run["images_per_sec"] for run in runs], "images/s", seeds))
    for label, found in by_label(runs).items():
        rows += _measurements(f"{name}, {label}", found, seeds)
    return rows


def _measurements(what: str, found: Sequence[Measurement], seeds: Sequence[int]) -> list[Row]:
    """Mean and deviation over the seeds; of a single one the measurement's own interval. Floors besides."""
    row = Row.of(what, [one.value for one in found], "", seeds, found[0].n)
    (first, *others) = found
    if not others and first.low is not None and first.high is not None:
        row = Row(what, first.value, "", first.n, seeds, (first.low, first.high), None, (first.value,))
    floors = [one.floor for one in found if one.floor is not None]
    return [row, Row.of(f"{what}, real pictures", floors, "", seeds, first.n)] if len(floors) == len(found) else [row]


def distance(run: Mapping[str, Any]) -> float:
    """The Frechet distance in the first space of features."""
    return next(float(row["value"]) for row in run["rows"] if row["metric"] == "frechet")


def standings(found: Found, budget: str) -> list[str]:
    """The table, best first: means over the seeds, of the end over the best moment the largest."""
    heads = "".join(f"{name:>9}" for name in COLUMNS.values())
    lines = [
        f"{'family':<12}{'M drawing':>10}{'minutes':>9}{'kimg':>8}{'images/s':>10}{heads}{'end/best':>10}{'seeds':>7}"
    ]

    def mean_distance(family: str) -> float:
        return statistics.fmean(distance(run) for run in found[family].values())

    for family in sorted(found, key=mean_distance):
        runs = list(found[family].values())
        cells = [f"{runs[0]['parameters']['draws'] / 1e6:>10.2f}"]
        seconds = [run["seconds"].get(budget, run["seconds"]["wall"]) for run in runs]
        cells.append(f"{statistics.fmean(seconds) / 60:>9.1f}")
        cells.append(f"{statistics.fmean(run['kimg'] for run in runs):>8.0f}")
        cells.append(f"{statistics.fmean(run['images_per_sec'] for run in runs):>10.0f}")
        for metric in COLUMNS:
            values = [float(row["value"]) for run in runs for row in run["rows"] if row["metric"] == metric]
            cells.append(f"{statistics.fmean(values):>9.3f}" if values else f"{'':>9}")
        ratios = [end_over_best(run["moments"]) for run in runs if "moments" in run]
        cells.append(f"{max(ratios):>10.2f}" if ratios else f"{'':>10}")
        lines.append(f"{family:<12}{''.join(cells)}{len(runs):>7}")
    return lines


def write(
    options: argparse.Namespace, found: Found, dataset: datasets.Dataset, n: int, left_out: Sequence[str]
) -> Path:
    """One record of everything, raw values and presets included."""
    budget = f"{options.kimg:g} kimg each" if options.kimg else f"{options.minutes:g} minutes each ({options.budget})"
    notes = [
        f"{budget}, planning, looking and saving included. Critic steps count as images seen.",
        "Of one seed intervals are those of the measurement; of several, values are means, with their deviation.",
        "Weights are those that `generate` draws with. Real pictures: other real pictures measured in the same way.",
        f"The end over the best moment is to be at most {GOAL}; moments and sheets are named under facts.",
        *left_out,
    ]
    presets = {family: {"settings": PRESETS[family].settings, "why": PRESETS[family].why} for family in found}
    return write_record(
        options.name,
        this_command(),
        record_rows(found, n, options.budget),
        notes=notes,
        **({"folder": options.records} if options.records else {}),
        data=dataset.summary(),
        data_fingerprint=dataset.fingerprint,
        presets=presets,
        runs={family: {str(seed): run for seed, run in by_seed.items()} for family, by_seed in found.items()},
    )


def work(options: argparse.Namespace) -> Path | None:
    """Train, measure, print, write."""
    dataset = datasets.load(data_config(options))
    command.say(dataset.summary())
    unfit = misfits(options, dataset)
    families = [family for family in options.families if family not in unfit]
    left_out = [f"{family} was left out: {sentence}" for family, sentence in unfit.items()]
    for seed in options.seeds if not options.skip_train else ():
        for family in families:
            train(options, family, seed, dataset)
    if options.train_only:
        return None
    bench = Bench(dataset, options.features, 0, command.say, "")
    narrow = Bench(dataset, options.features, 0, command.say, "", metrics="frechet")
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in options.seeds:
        for family in families:
            state = run_of(options, family, seed).status().get("state", "missing")
            if state == "finished":
                found.setdefault(family, {})[seed] = measure(options, bench, narrow, family, seed)
            else:
                left_out.append(f"{family}, seed {seed}, was left out: its run is {state}.")
        drawn = [family for family in families if seed in found.get(family, {})]
        if drawn:
            league_sheet(options, drawn, seed, bench.labels(bench.count(options.n)))
    if not found:
        raise UsageError(f"{options.out} holds no finished run of this league. Leave --skip-train out.")
    print("\n".join([*standings(found, options.budget), *left_out]))
    return write(options, found, dataset, bench.count(options.n), left_out) if options.record else None


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


# -- small parts ------------------------------------------------------------------------------------------------------


def run_of(options: argparse.Namespace, family: str, seed: int) -> Run:
    """The run of a family and seed, which may not be there yet."""
    return Run(options.out / f"{family}-{seed}")


def moments_folder(run: Run) -> Path:
    """Where the weights of a run's moments are kept."""
    return run.path.with_suffix(".moments")


def _copy(file: Path, kept: Path) -> None:
    """Copy a file whole, unless it is there already."""
    with contextlib.suppress(FileNotFoundError):  # deleted between listing and reading
        if kept.is_file() and kept.stat().st_mtime_ns == file.stat().st_mtime_ns:
            return
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(".aside")
        shutil.copy2(file, aside)
        aside.replace(kept)


if __name__ == "__main__":
    sys.exit(main())
