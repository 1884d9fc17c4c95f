"""Does diffusion in latents draw better than diffusion in pixels after the same minutes?

One family, `diffusion`, learns the same pictures twice: as they are, and as the latents of an autoencoder. Both hear
the labels where the set has them, both see every picture also mirrored, and both are drawn from with as many steps.
What is fair to both is a preset of its own for each (`PRESETS`). A picture of 64 x 64 has sixteen times the places of
its latents, so pixels get two networks of about the same size with one level more, narrow where places are many, and
the better of the two is the opponent.

The autoencoder is trained before and serves every run. `latents` is given all of the minutes beside it, which is the
question for who has an autoencoder; `latents-counted` is given what the autoencoder has left of them, which is the
question for who has nothing. What the autoencoder alone costs is measured too: the distance of training pictures that
it has given back, which no model of its latents can be expected to beat.

One bench measures all: same features, same held-out reference, the same labels, and the weights that `generate` draws
with. A sheet of every run, and one of all beside real pictures, are written below `--out`. The same command continues
what was interrupted. Seconds are those of the wall, or with `--budget cpu` processor seconds divided by threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import command
import ours
import torch
from gan_league import distance, rows_of_runs, subject_of
from quality_per_minute import Logbook, by_label, measured, our_seconds, train_within
from record import Row, this_command, write_record
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import DataConfig, Recipe
from imagekiln.core import mix
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.bench import BATCH, Bench
from imagekiln.engine.generate import draw, in_parts
from imagekiln.engine.models import Model, hash_of, open_model
from imagekiln.engine.run import Run
from imagekiln.errors import Diverged, UsageError

CODEC = "flowers-autoencoder"
"""Recipe of the autoencoder where none is given."""

COUNTED = "latents-counted"
"""What is given only the minutes that the autoencoder has left."""

ON_A_SHEET, IN_A_ROW = 100, 12
"""Pictures of a run's own sheet, and of a run among all."""

COLUMNS = {"frechet": "FD", "precision": "prec", "recall": "recall", "coverage": "cover", "label_accuracy": "label"}
"""Metrics of the table."""


@dataclass(frozen=True)
class Preset:
    """What is laid over a recipe, and why.

    million: parameters for RGB pictures of 64 pixels, or their latents of 16 x 16 x 8, with 102 classes.
    """

    recipe: str
    settings: tuple[str, ...]
    million: float
    why: str


LATENTS = Preset("flowers-latent", (), 2.92, "the recipe as it is")
PIXELS = ("data.flip=true", "family.attention=[false,false,false,true]", "family.sample.steps=16", "train.batch=32")
"""One level more than the recipe, so that attention looks at 8 x 8; half the batch, for twice the steps."""

PRESETS = {
    "latents": LATENTS,
    COUNTED: LATENTS,
    "pixels": Preset(
        "diffusion",
        ("family.widths=[32,64,64,128]", "optim.unet.lr=1e-3", *PIXELS),
        3.31,
        "the recipe's width where pixels are finest, which is dear; few pictures seen, each learned from well",
    ),
    "pixels-narrow": Preset(
        "diffusion",
        ("family.widths=[16,32,64,128]", "optim.unet.lr=1.5e-3", *PIXELS),
        2.76,
        "half as wide at the finest level: twice as many pictures seen in the same minutes",
    ),
}
"""The arms, those over latents first."""


class Coder(NamedTuple):
    """The autoencoder's run, and how long it took by kind of seconds; of a run from elsewhere only what it logged."""

    run: Run
    seconds: dict[str, float]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", required=True, help="pictures to train on, as `imagekiln train --data` takes them")
    add("--out", type=Path, default=Path("runs/latent-or-pixels"), help="folder of the runs (runs/latent-or-pixels)")
    add("--size", type=int, default=64, help="pixels (64)")
    add("--codec", type=Path, metavar="RUN", help=f"finished run of an autoencoder (one of {CODEC} is trained first)")
    add("--codec-set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the one trained first")
    add("--minutes", type=float, default=60.0, help="minutes of every arm and seed (60)")
    add("--budget", choices=("wall", "cpu"), default="wall", help="which seconds are counted (wall)")
    add("--kimg", type=float, help="thousands of images every arm sees, instead of --minutes")
    add("--arms", nargs="+", choices=list(PRESETS), default=list(PRESETS), metavar="ARM", help="which (all)")
    add("--seeds", type=int, nargs="+", default=[0], help="one training of each arm for every seed (0)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting laid over all presets")
    add("--n", type=int, default=5000, help="pictures drawn by each, at most as many as are held out (5000)")
    add("--features", default="auto", help="where pictures are compared, as `evaluate --features` takes it (auto)")
    add("--metrics", default="default", help="what is measured, as `evaluate --metrics` takes it (default)")
    add("--train-only", action="store_true", help="measure nothing")
    add("--skip-train", action="store_true", help="only measure what has been trained before")
    add("--record", action="store_true", help="also write a record under records/")
    add("--name", default="latent-or-pixels", help="name of the record (latent-or-pixels)")
    add("--records", type=Path, metavar="FOLDER", help="another folder for the record")
    return arguments


# -- training ---------------------------------------------------------------------------------------------------------


def data_config(options: argparse.Namespace) -> DataConfig:
    """The pictures that every arm learns from."""
    path = options.data if ":" in options.data else str(Path(options.data).expanduser().absolute())
    return DataConfig(path=path, size=options.size)


def coder_of(options: argparse.Namespace, dataset: datasets.Dataset) -> Coder:
    """The autoencoder: the given run, or one trained first, or continued, beside the others.

    Raises:
        UsageError: the given run is not there, or none is given and nothing is to be trained.
    """
    run = Run.open(options.codec) if options.codec else Run(options.out / "codec")
    if not options.codec and not options.skip_train:
        data = data_config(options).model_dump(include={"path", "size"})
        recipe = recipes.resolve(CODEC, {"data": data}, options.codec_set)
        train_within(recipe, dataset, Logbook(run, "autoencoder"), 0.0, options.budget, recipe.train.total_kimg)
    if run.status().get("state") != "finished":
        raise UsageError(
            f"{run.path} holds no finished run of an autoencoder. Leave --skip-train out, or give --codec."
        )
    return Coder(run, our_seconds(run))


def minutes_of(options: argparse.Namespace, arm: str, coder: Coder) -> float | str:
    """The minutes of an arm; or why it has none.

    >>> options = argparse.Namespace(minutes=60.0, kimg=None, budget="cpu")
    >>> coder = Coder(Run(Path("codec")), {"wall": 1820.0, "cpu": 1440.0})
    >>> minutes_of(options, "latents", coder), minutes_of(options, COUNTED, coder)
    (60.0, 36.0)
    """
    if arm != COUNTED:
        return float(options.minutes)
    if options.kimg:
        return "--kimg gives everybody as many images, whatever the autoencoder took."
    seconds = coder.seconds.get(options.budget, 0.0)
    if seconds <= 0:
        return f"how long the autoencoder took is not known ({options.budget})."
    left = float(options.minutes) - seconds / 60
    return left if left > 0 else f"the autoencoder's {seconds / 60:.0f} minutes leave nothing of {options.minutes:g}."


def recipe_of(options: argparse.Namespace, arm: str, seed: int, coder: Coder) -> Recipe:
    """The recipe of an arm and seed, its length not yet fixed."""
    preset, data = PRESETS[arm], data_config(options).model_dump(include={"path", "size"})
    if preset is LATENTS:
        data["codec"] = str(coder.run.path.absolute())
    return recipes.resolve(preset.recipe, {"data": data}, [*preset.settings, *options.set, f"train.seed={seed}"])


def train(options: argparse.Namespace, arm: str, seed: int, dataset: datasets.Dataset, coder: Coder) -> None:
    """Train or continue one run; one that has no minutes is left out, one that left the finite numbers stays."""
    run, minutes = run_of(options, arm, seed), minutes_of(options, arm, coder)
    if isinstance(minutes, str) or run.status().get("state") in ("finished", "diverged"):
        return
    recipe, logbook = recipe_of(options, arm, seed, coder), Logbook(run, f"{arm}, seed {seed}")
    try:
        train_within(recipe, dataset, logbook, minutes, options.budget, options.kimg)
    except Diverged as error:
        command.say(f"{arm}, seed {seed}: {error}")


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """Everything about one finished run; what was drawn and measured before is taken from a file beside it."""
    run = run_of(options, arm, seed)
    model, labels = open_model(run), bench.labels(bench.count(options.n))

    def drawn() -> Tensor:
        images = draw_with(model, labels)
        shown = images[:ON_A_SHEET]
        pictures.write(pictures.grid(shown, pictures.columns_for(len(shown), 0)), run.path.with_suffix(".png"))
        return images

    kimg, seconds = run.status().get("nimg", 0) / 1000, our_seconds(run)
    file = run.path.with_suffix(".measured.json")
    return {
        "kimg": kimg,
        "seconds": seconds,
        "images_per_sec": 1000 * kimg / (seconds.get(options.budget) or seconds["wall"]),
        "parameters": ours.parameters(model.family),
        "sheet": run.path.with_suffix(".png").name,
        "rows": measured(bench, len(labels), drawn, labels, subject_of(model), file),
    }


def draw_with(model: Model, labels: Sequence[int]) -> Tensor:
    """Pictures of the same seeds and labels for every arm: uint8 (N, C, H, W)."""
    seeds = [mix("latent-or-pixels", index) for index in range(len(labels))]
    with model.precision():
        return draw(model.family, seeds, labels, model.family.config.sample, BATCH)


def given_back(options: argparse.Namespace, narrow: Bench, coder: Coder) -> list[dict[str, Any]]:
    """The Frechet distance of training pictures that went through the autoencoder.

    narrow: a bench of that distance alone.
    """
    model, source = open_model(coder.run), narrow.dataset.train
    count = min(narrow.count(options.n), len(source))
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count].tolist()

    def made() -> Tensor:
        images = datasets.to_float(source.read(chosen).images)
        with model.precision():
            return torch.cat(list(in_parts(lambda some: _reconstructed(model, images[some]), count, BATCH)))

    file = options.out / "given-back.measured.json"
    return measured(narrow, count, made, None, f"{hash_of(model.weights)}/given back", file)


def _reconstructed(model: Model, images: Tensor) -> Tensor:
    made = model.family.reconstruct(images.to(model.device))
    if made is None:
        raise UsageError(f"--codec: a {model.family.config.name} model gives no pictures back. Name an autoencoder.")
    return made.clamp(-1, 1)


def sheet(options: argparse.Namespace, arms: Sequence[str], seed: int, bench: Bench) -> Path:
    """A row an arm and one of held-out pictures, a column a label; the same labels for all."""
    labels = bench.labels(bench.count(options.n))[:IN_A_ROW]
    rows = [draw_with(open_model(run_of(options, arm, seed)), labels) for arm in arms]
    rows.append(pictures.of_labels(bench.dataset.validation, labels))
    names = [*arms, "real"]
    owner = [place for place, row in enumerate(rows) for _ in row]
    file = options.out / f"all-{seed}.png"
    pictures.write(pictures.class_rows(torch.cat(rows), owner, names), file)
    return file


# -- the record -------------------------------------------------------------------------------------------------------


Found = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""What was found, by arm and seed."""


def record_rows(found: Found, n: int, budget: str) -> list[Row]:
    """Of every arm all that was measured, and the distances over latents over those of the better arm over pixels."""
    rows = []
    for arm, by_seed in found.items():
        seeds, runs = list(by_seed), list(by_seed.values())
        rows.append(Row(f"{arm}, parameters", float(runs[0]["parameters"])))
        rows += rows_of_runs(arm, runs, seeds, budget)
    opponent = best_of_pixels(found)
    for arm in ("latents", COUNTED):
        seeds = [seed for seed in found.get(arm, {}) if opponent and seed in found[opponent]]
        if opponent and seeds:
            quotients = [distance(found[arm][seed]) / distance(found[opponent][seed]) for seed in seeds]
            rows.append(Row.of(f"{arm} / {opponent}, FD", quotients, "times", seeds, n))
    return rows


def best_of_pixels(found: Found) -> str | None:
    """The arm over pixels of the smallest mean distance; None where there is none."""
    arms = [arm for arm in found if PRESETS[arm] is not LATENTS]
    return min(arms, key=lambda arm: mean_distance(found[arm]), default=None)


def mean_distance(by_seed: Mapping[int, Mapping[str, Any]]) -> float:
    """Mean Frechet distance over the seeds."""
    return statistics.fmean(distance(run) for run in by_seed.values())


def standings(found: Found, budget: str) -> list[str]:
    """The table, best first: means over the seeds."""
    heads = "".join(f"{name:>9}" for name in COLUMNS.values())
    lines = [f"{'arm':<16}{'million':>9}{'minutes':>9}{'kimg':>8}{heads}{'seeds':>7}"]
    for arm in sorted(found, key=lambda one: mean_distance(found[one])):
        runs = list(found[arm].values())
        seconds = [run["seconds"].get(budget, run["seconds"]["wall"]) for run in runs]
        cells = f"{runs[0]['parameters'] / 1e6:>9.2f}{statistics.fmean(seconds) / 60:>9.1f}"
        cells += f"{statistics.fmean(run['kimg'] for run in runs):>8.0f}"
        for metric in COLUMNS:
            values = [float(row["value"]) for run in runs for row in run["rows"] if row["metric"] == metric]
            cells += f"{statistics.fmean(values):>9.3f}" if values else f"{'':>9}"
        lines.append(f"{arm:<16}{cells}{len(runs):>7}")
    return lines


def write(
    options: argparse.Namespace,
    found: Found,
    coder: Coder,
    back: Sequence[Mapping[str, Any]],
    bench: Bench,
    left_out: Sequence[str],
) -> Path:
    """One record of everything, raw values and presets included."""
    n, took = bench.count(options.n), coder.seconds.get(options.budget, 0.0) / 60
    budget = f"{options.kimg:g} kimg each" if options.kimg else f"{options.minutes:g} minutes each ({options.budget})"
    notes = [
        f"{budget}, planning, looking and saving included; latents are made in the first arm that needs them.",
        f"The autoencoder took {took:.1f} minutes ({options.budget}): `latents` had its minutes beside these, "
        f"`{COUNTED}` only what they leave.",
        "Over pixels the better of two widths is the opponent, chosen by the same distance.",
        "Of one seed intervals are those of the measurement; of several, values are means, with their deviation.",
        *left_out,
    ]
    rows = record_rows(found, n, options.budget)
    for label, (one,) in by_label([{"rows": back}]).items():
        rows.append(Row(f"training pictures given back by the autoencoder, {label}", one.value, "", one.n))
    return write_record(
        options.name,
        this_command(),
        rows,
        notes=notes,
        **({"folder": options.records} if options.records else {}),
        data=bench.dataset.summary(),
        data_fingerprint=bench.dataset.fingerprint,
        codec={"seconds": coder.seconds, "kimg": coder.run.status().get("nimg", 0) / 1000},
        presets={arm: {"recipe": p.recipe, "settings": p.settings, "why": p.why} for arm, p in PRESETS.items()},
        runs={arm: {str(seed): run for seed, run in by_seed.items()} for arm, by_seed in found.items()},
    )


def work(options: argparse.Namespace) -> Path | None:
    """Train, measure, print, write."""
    dataset = datasets.load(data_config(options))
    command.say(dataset.summary())
    coder = coder_of(options, dataset)
    for seed in options.seeds if not options.skip_train else ():
        for arm in options.arms:
            train(options, arm, seed, dataset, coder)
    if options.train_only:
        return None
    bench = Bench(dataset, options.features, 0, command.say, "", metrics=options.metrics)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    left_out = []
    for seed in options.seeds:
        for arm in options.arms:
            minutes, state = (
                minutes_of(options, arm, coder),
                run_of(options, arm, seed).status().get("state", "missing"),
            )
            if state == "finished":
                found.setdefault(arm, {})[seed] = measure(options, bench, arm, seed)
            else:
                why = minutes if isinstance(minutes, str) else f"its run is {state}."
                left_out.append(f"{arm}, seed {seed}, was left out: {why}")
        if drawn := [arm for arm in options.arms if seed in found.get(arm, {})]:
            sheet(options, drawn, seed, bench)
    if not found:
        raise UsageError(f"{options.out} holds no finished run. Leave --skip-train out.")
    back = given_back(options, Bench(dataset, options.features, 0, command.say, "", metrics="frechet"), coder)
    alone = f"autoencoder alone: FD {float(back[0]['value']):.3f}"
    print("\n".join([*standings(found, options.budget), alone, *left_out]))
    return write(options, found, coder, back, bench, left_out) if options.record else None


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


# -- small parts ------------------------------------------------------------------------------------------------------


def run_of(options: argparse.Namespace, arm: str, seed: int) -> Run:
    """The run of an arm and seed, which may not be there yet."""
    return Run(options.out / f"{arm}-{seed}")


if __name__ == "__main__":
    sys.exit(main())
