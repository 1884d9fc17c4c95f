"""How near does a student of one or two steps come to its teacher of 25?

A finished run of a diffusion family is the teacher. Its student learns with the recipe `few-step` for a share of the
seconds that the teacher took. Then both draw the same number of pictures of the same noise, with the labels or captions
of real training pictures, and these are the reference: the half of the set that is asked for. The other half is
measured in the same way, as the floor. What the teacher draws in as few steps as its student is measured too, and in
the ways of `--also`: by default in the even Euler steps that students are shown.

The reference are pictures both were trained on: who knows them by heart comes nearer than the other half. So the
quotients tell what is lost in few steps, and nothing about pictures never seen.

  FD of the student in 2 steps / FD of the teacher in 25   goal 1.3
  FD of the student in 1 step  / FD of the teacher in 25   goal 1.8

The same command continues what was interrupted. Seconds are the processor's; the teacher's are those of its own log,
by the wall, unless a benchmark trained it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import torch
from quality_per_minute import Logbook, our_seconds
from record import Row, this_command, write_record
from torch import Tensor

from imagekiln import api
from imagekiln import data as datasets
from imagekiln.config import DataConfig, read_toml
from imagekiln.core import mix
from imagekiln.engine import extractors, pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.bench import BATCH, Bench
from imagekiln.engine.generate import draw, options_for
from imagekiln.engine.inputs import in_words
from imagekiln.engine.models import Model, open_model
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError
from imagekiln.metrics import Measurement, Statistics, extract, measure

ON_A_SHEET = 16
"""Pictures of each on the sheet, all of the same noise."""

METRICS = ("frechet", "precision", "recall", "coverage")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--teacher", type=Path, required=True, help="a finished run of a diffusion family")
    add("--out", type=Path, default=Path("runs/few-step"), help="folder of the students (runs/few-step)")
    add("--seeds", type=int, nargs="+", default=[0], help="one student for every seed (0)")
    add("--kimg", type=float, help="length of a student's run; the recipe's own if left out")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting laid over the recipe")
    add("--teacher-steps", type=int, default=25, help="steps of the teacher (25)")
    add(
        "--also",
        nargs="*",
        type=way,
        default=[way("4:euler:even")],
        metavar="STEPS:SAMPLER:SPACING",
        help="other ways of drawing with the teacher (4:euler:even)",
    )
    add("--n", type=int, default=1000, help="pictures drawn by each, at most half of the training set (1000)")
    add("--features", default="auto", help="where pictures are compared, as `evaluate --features` takes it (auto)")
    add("--skip-train", action="store_true", help="only measure what has been trained before")
    add("--record", action="store_true", help="also write a record under records/")
    add("--name", default="few-step", help="name of the record (few-step)")
    add("--records", type=Path, metavar="FOLDER", help="another folder for the record")
    return arguments


def way(text: str) -> dict[str, Any]:
    """Options of drawing.

    >>> way("4:euler:even")
    {'steps': 4, 'sampler': 'euler', 'spacing': 'even'}
    """
    steps, sampler, spacing = text.split(":")
    return {"steps": int(steps), "sampler": sampler, "spacing": spacing}


def train(options: argparse.Namespace, seed: int) -> Run:
    """The finished student of a seed."""
    run = Run(options.out / f"student-{seed}")
    if not options.skip_train and run.status().get("state") != "finished":
        length = [f"train.total_kimg={options.kimg}"] if options.kimg else []
        settings = [*options.set, *length, f"train.seed={seed}"]
        logbook = Logbook(run, f"student, seed {seed}")
        try:
            api.train("few-step", "", run.path, assignments=settings, begin_with=options.teacher, listener=logbook)
        finally:
            if run.exists():
                logbook.note()
    if run.status().get("state") != "finished":
        raise UsageError(f"{run.path} is not finished. Leave --skip-train out.")
    return run


class Rig:
    """The two halves of a training set, what they show, and the features that pictures are compared in."""

    def __init__(self, options: argparse.Namespace, data: DataConfig) -> None:
        dataset = datasets.load(data)
        command.say(dataset.summary())
        source = dataset.train
        self.count = min(options.n, len(source) // 2)
        order = sorted(range(len(source)), key=lambda row: mix("few-step", row))
        self.rows, self.dataset = order[: self.count], dataset
        self.network = Bench(dataset, options.features, 0, command.say, "", metrics="frechet").network
        halves = (self.rows, order[self.count : 2 * self.count])
        self.reference, self.floor = (
            self._features(source.read(rows).images, name) for rows, name in zip(halves, ("real", "floor"), strict=True)
        )

    def _features(self, images: Tensor, name: str) -> Statistics:
        return Statistics.of(extract(self.network, extractors.rebatched(images.split(BATCH))), name)

    def drawn(self, model: Model, **options: Any) -> Tensor:
        """Pictures of what the reference shows, in the order of its rows: uint8 (N, C, H, W)."""
        source, family = self.dataset.train, model.family
        labels = getattr(source, "labels_N", None)
        wishes: Sequence[Any] = [-1] * self.count if labels is None else [int(labels[row]) for row in self.rows]
        captions = getattr(source, "captions", None)
        if family.read([""]) is not None:
            wishes = [captions[row] for row in self.rows] if captions else in_words(family, source, wishes)
        seeds = [mix("few-step", "noise", place) for place in range(self.count)]
        with model.precision():
            return draw(family, seeds, wishes, options_for(family, options), BATCH)

    def measured(self, images: Tensor) -> dict[str, Measurement]:
        """What is measured of drawn pictures, by metric."""
        found = measure(self._features(images, "generated"), self.reference, self.floor)
        return {row.metric: row for row in found if row.metric in METRICS}


def compared(options: argparse.Namespace, rig: Rig, teacher: Model, students: Sequence[Model]) -> list[Row]:
    """Rows of the record; writes the sheet."""
    named = {f"teacher, {options.teacher_steps} steps": [rig.drawn(teacher, steps=options.teacher_steps)]}
    for steps in (2, 1):
        named[f"teacher, {steps} steps"] = [rig.drawn(teacher, steps=steps, sampler="euler")]
        named[f"student, {steps} steps"] = [rig.drawn(student, steps=steps) for student in students]
    for other in options.also:
        named[f"teacher, {other['steps']} {other['spacing']} steps of {other['sampler']}"] = [
            rig.drawn(teacher, **other)
        ]
    shown = [images[0][:ON_A_SHEET] for images in named.values()]
    owner = [place for place, images in enumerate(shown) for _ in images]
    pictures.write(pictures.class_rows(torch.cat(shown), owner, list(named)), options.out / "few-step.png")
    rows, distances = [], {}
    for name, sets in named.items():
        found = [rig.measured(images) for images in sets]
        seeds = options.seeds if name.startswith("student") else ()
        for metric in METRICS:
            values = [one[metric].value for one in found]
            rows.append(Row.of(f"{name}, {metric}", values, "", seeds, rig.count))
        distances[name] = [one["frechet"].value for one in found]
    floor = found[0]["frechet"].floor
    best = distances[f"teacher, {options.teacher_steps} steps"][0]
    for steps in (2, 1):
        ratios = [distance / best for distance in distances[f"student, {steps} steps"]]
        rows.append(Row.of(f"student in {steps} / teacher in {options.teacher_steps}", ratios, "times", options.seeds))
    return [*rows, Row("the other half of the set, frechet", float(floor or 0.0), "", rig.count)]


def work(options: argparse.Namespace) -> Path | None:
    """Train, draw, measure, print, write."""
    before = Run.open(options.teacher)
    recipe = recipes.complete(read_toml(before.recipe_path))
    students = [train(options, seed) for seed in options.seeds]
    rows = compared(options, Rig(options, recipe.data), open_model(before), [open_model(run) for run in students])
    its, ours = our_seconds(before), [our_seconds(run) for run in students]
    kind = "cpu" if all("cpu" in one for one in (its, *ours)) else "wall"
    seconds = [one[kind] for one in ours]
    rows.append(Row(f"teacher, training ({kind})", its[kind], "s"))
    rows.append(Row.of(f"student, training ({kind})", seconds, "s", options.seeds))
    rows.append(Row.of("student / teacher, training", [one / its[kind] for one in seconds], "times", options.seeds))
    for row in rows:
        print(f"{row.what:<42}{row.value:>10.4g} {row.unit}")
    if not options.record:
        return None
    notes = [
        "Goals: 1.3 in 2 steps and 1.8 in 1, after at most 0.25 of the teacher's seconds.",
        "The reference is the half of the training set that was asked for, the floor its other half against it.",
    ]
    facts = {"teacher": recipe.model_dump(mode="json", include={"family", "train"}), "settings": list(options.set)}
    folder = {"folder": options.records} if options.records else {}
    return write_record(options.name, this_command(), rows, notes=notes, **folder, **facts)


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


if __name__ == "__main__":
    sys.exit(main())
