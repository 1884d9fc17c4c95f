"""How many modes does each family cover where the truth is known?

Two toys, learned by all adversarial families through the real trainer, without and with the training doctor:

gaussians  25 Gaussians in the plane, on a grid of five by five: a point is shown as an 8x8 picture of a blob at that
           place and found again as the place where a blob fits the picture best. A drawn picture is good if it shows
           one blob, within three deviations of a mode (as in VEEGAN, Srivastava et al. 2017, arXiv:1705.07761), and a
           mode is covered if a tenth of its share of the pictures, at least, is good and belongs to it.
digits     Three of scikit-learn's digits as the three colours of an 8x8 picture, 1,000 modes (as in Metz et al. 2017,
           arXiv:1611.02163). A colour is read as the digit that the nearest of the digits learned from shows. A drawn
           picture is good if every colour is as near to a digit learned from as 99 % of the held-out digits are. A
           mode is covered if a good picture shows it. Papers count pictures of any quality ("any"), where noise covers
           much; KL is the divergence of these modes' shares from equal ones.

Every family takes the same number of generator steps with pictures without labels; one that needs labels is told the
row of the grid, or the first digit. Counted is what the last averaged weights draw. What other real pictures score is
written beside. The same command continues what was interrupted, and nothing is trained twice; a run in which the
doctor did not act is the one without it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import command
import torch
from gan_league import rates
from quality_per_minute import Logbook, our_seconds
from record import Row, this_command, write_record
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import DataConfig, Recipe, write_toml
from imagekiln.core import Batch, mix
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.generate import draw
from imagekiln.engine.run import Run, write_whole
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import Diverged, RecipeError
from imagekiln.metrics import Statistics, nearest

SIDE, FIRST, SPACING, SIGMA, RADIUS = 8, 1.0, 1.25, 0.0625, 0.8
"""Of the Gaussians, in pixels: the picture, the first mode, from mode to mode, a mode's deviation, a blob's radius."""

GRID = 5
MODES_M2 = FIRST + SPACING * torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).float()
DARK, FITS = 0.1, 4
"""Light below which a pixel belongs to the background, and steps towards the place where a blob fits best."""

BLOB = 0.8
"""Share of a blob's energy that a picture must have to show one."""

HELD_OUT_DIGITS, NEAR = 0.2, 0.99
SHOWN, DRAWN_AT_ONCE, TRAINING, HELD_OUT = 100, 250, 16_384, 1024

PRESETS = {
    "vanilla_gan": ("family.z_dim=32", "family.width=128", *rates("discriminator", 5e-4)),
    "dcgan": ("family.z_dim=32", *rates("discriminator", 5e-4)),
    "cgan": ("family.z_dim=32", "family.width=64", *rates("discriminator", 5e-4)),
    "wgan": ("family.z_dim=32", "family.width=64", "family.critic_steps=3", *rates("critic", 5e-4)),
    "wgan_gp": ("family.z_dim=32", "family.width=24", "family.critic_steps=2", *rates("critic", 1e-3)),
    "sngan": (
        *("family.z_dim=32", "family.generator_width=24", "family.width=24", "family.critic_steps=1"),
        *rates("discriminator", 1e-3, 5e-4),
    ),
    "biggan": ("family.z_dim=32", "family.critic_steps=1", *rates("discriminator", 1e-3, 5e-4)),
    "pggan": ("family.z_dim=32", "family.width=16"),
    "stylegan1": ("family.z_dim=32", "family.width=16", "family.mapping_layers=2", "family.gamma=0.1"),
    "stylegan2": ("family.z_dim=32", "family.width=16"),
    "r3gan": ("family.z_dim=32", "family.width=16", *rates("discriminator", 1e-3)),
}
"""Networks of tens of thousands of parameters, each family's own betas and penalties; runs are short, so steps are
large."""

DOCTORS = ("off", "act")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--out", type=Path, default=Path("runs/gan-toys"), help="folder of results and sheets (runs/gan-toys)")
    add("--toys", nargs="+", choices=list(TOYS), default=list(TOYS), metavar="TOY", help="which (both)")
    add("--families", nargs="+", choices=list(PRESETS), default=list(PRESETS), metavar="NAME", help="which (all)")
    add("--doctors", nargs="+", choices=DOCTORS, default=list(DOCTORS), metavar="DOCTOR", help="train.doctor (off act)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training of each for every seed (0 1 2)")
    add("--steps", type=int, default=1500, help="generator steps (1500)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting laid over all presets")
    add("--n", type=int, default=10_000, help="pictures drawn and counted (10000)")
    add("--record", action="store_true", help="also write a record under records/")
    add("--name", default="gan-toys", help="name of the record (gan-toys)")
    add("--records", type=Path, metavar="FOLDER", help="another folder for the record")
    return arguments


class Pictures:
    """A source in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None, fingerprint: str) -> None:
        self.images, self.labels, self.fingerprint = images, labels, fingerprint
        _, channels, height, width = images.shape
        self.image_shape = channels, height, width
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.class_names = tuple(map(str, range(self.num_classes)))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(list(indices))
        return Batch(self.images[rows], None if self.labels is None else self.labels[rows])


# -- 25 Gaussians -----------------------------------------------------------------------------------------------------


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """points_N2 (row, column) of the mixture and the number of the mode each came from."""
    generator = torch.Generator().manual_seed(mix("gaussians", seed))
    mode_N = torch.randint(len(MODES_M2), (count,), generator=generator)
    return MODES_M2[mode_N] + SIGMA * torch.randn(count, 2, generator=generator), mode_N


def blobs(points_N2: Tensor) -> Tensor:
    """light_NHW in [0, 1] of blobs at these points."""
    rows_NH1, columns_N1W = _offsets(points_N2)
    return torch.exp(-(rows_NH1.square() + columns_N1W.square()) / (2 * RADIUS**2))


def gaussians(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """images_N1HW uint8 of the mixture, and the row of the grid each lies in."""
    points_N2, mode_N = points(count, seed)
    return (255 * blobs(points_N2)).round().to(torch.uint8)[:, None], mode_N // GRID


def located(images_N1HW: Tensor) -> tuple[Tensor, Tensor]:
    """points_N2 where a blob fits uint8 pictures best, and whether a picture shows one blob there.

    From the centre of light on by Gauss and Newton's steps; the two directions of a blob do not influence each other.
    """
    light_NHW, grid_S = images_N1HW[:, 0].float() / 255, torch.arange(SIDE).float()
    bright_NHW = (light_NHW - DARK).clamp(min=0)
    mass_N1 = bright_NHW.sum((1, 2))[:, None].clamp(min=1e-6)
    points_N2 = torch.stack([bright_NHW.sum(2) @ grid_S, bright_NHW.sum(1) @ grid_S], 1) / mass_N1
    for _ in range(FITS):
        missed_NHW = light_NHW - blobs(points_N2)
        steps = []
        for offset_NHW in _offsets(points_N2):
            slope_NHW = blobs(points_N2) * offset_NHW / RADIUS**2
            steps.append((missed_NHW * slope_NHW).sum((1, 2)) / slope_NHW.square().sum((1, 2)))
        points_N2 = (points_N2 + torch.stack(steps, 1).clamp(-0.5, 0.5)).clamp(0, SIDE - 1)
    blobs_NHW = blobs(points_N2)
    missed_N = (light_NHW - blobs_NHW).square().sum((1, 2)) / blobs_NHW.square().sum((1, 2))
    return points_N2, missed_N <= 1 - BLOB


def _offsets(points_N2: Tensor) -> tuple[Tensor, Tensor]:
    """How far every pixel is from the points, in rows and in columns: (N, H, 1) and (N, 1, W)."""
    grid_S = torch.arange(SIDE)
    return grid_S[:, None] - points_N2[:, 0, None, None], grid_S - points_N2[:, 1, None, None]


def covered(points_N2: Tensor, one_blob_N: Tensor) -> dict[str, float]:
    """Modes that are covered, and the share of good pictures.

    >>> covered(MODES_M2[[0, 0, 0, 7]], torch.tensor([True, True, False, True]))
    {'modes': 2.0, 'good': 0.75}
    """
    far_N, mode_N = torch.cdist(points_N2, MODES_M2).min(1)
    good_N = one_blob_N & (far_N <= 3 * SIGMA)
    counts_M = torch.bincount(mode_N[good_N], minlength=len(MODES_M2))
    modes = counts_M >= len(points_N2) / (10 * len(MODES_M2))
    return {"modes": float(modes.sum()), "good": float(good_N.double().mean())}


def judge_gaussians(images_N1HW: Tensor) -> dict[str, float]:
    """What is counted on the pictures of a toy."""
    return covered(*located(images_N1HW))


# -- stacked digits ---------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """The digits learned from as images_NHW uint8 and labels_N, the held-out ones, and how far is near enough."""

    images_NHW: Tensor
    labels_N: Tensor
    held_out_NHW: Tensor
    held_out_labels_N: Tensor
    near: float


@functools.cache
def digits() -> Digits:
    """scikit-learn's digits, a fifth of them held out."""
    dataset = datasets.load(DataConfig(path="builtin:digits", validation_fraction=HELD_OUT_DIGITS))
    (train, labels), (held_out, truth) = (s.read(range(len(s)))[:2] for s in (dataset.train, dataset.validation))
    assert labels is not None and truth is not None
    far_N, _ = _nearest(held_out[:, 0], train[:, 0])
    return Digits(train[:, 0], labels, held_out[:, 0], truth, float(far_N.quantile(NEAR)))


def stacks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """images_N3HW uint8 of three digits each, all of 1,000 triples equally likely, and the first digit."""
    generator = torch.Generator().manual_seed(mix("stacked digits", seed))
    known = digits()
    own = [torch.nonzero(known.labels_N == digit).flatten() for digit in range(10)]
    digit_N3 = torch.randint(10, (count, 3), generator=generator)
    chance_N3 = torch.rand(count, 3, generator=generator)
    sizes_N3 = torch.tensor([len(rows) for rows in own])[digit_N3]
    starts_N3 = torch.tensor([0, *(len(rows) for rows in own)]).cumsum(0)[digit_N3]
    rows_N3 = torch.cat(own)[starts_N3 + (chance_N3 * sizes_N3).long()]
    return known.images_NHW[rows_N3], digit_N3[:, 0]


def read_digits(images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
    """digit_N3 of pictures, by the nearest digit learned from, and whether all three are near enough."""
    known = digits()
    far_N, row_N = _nearest(images_N3HW.flatten(0, 1), known.images_NHW)
    return known.labels_N[row_N].view(-1, 3), (far_N <= known.near).view(-1, 3).all(1)


def triples(digit_N3: Tensor, good_N: Tensor) -> dict[str, float]:
    """Modes of 1,000 that good pictures show, and any pictures; KL of their shares from equal ones in nats; good share.

    >>> found = triples(torch.tensor([[0, 0, 7], [0, 0, 7], [9, 9, 9], [9, 9, 9]]), torch.tensor([1, 1, 0, 0]).bool())
    >>> found["modes"], found["any"], round(found["kl"], 3) == round(math.log(1000 / 2), 3)
    (1.0, 2.0, True)
    """
    number_N = digit_N3 @ torch.tensor([100, 10, 1])
    shares = torch.bincount(number_N, minlength=1000).double() / len(number_N)
    seen = shares[shares > 0]
    return {
        "modes": float(len(number_N[good_N].unique())),
        "any": float(len(seen)),
        "kl": float((seen * (seen * 1000).log()).sum()),
        "good": float(good_N.double().mean()),
    }


def judge_digits(images_N3HW: Tensor) -> dict[str, float]:
    """What is counted on the pictures of a toy."""
    return triples(*read_digits(images_N3HW))


def _nearest(query_NHW: Tensor, bank_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest picture, in pixels of 0 to 1, and its row."""
    found = nearest(*(Statistics.of(images.flatten(1).float() / 255) for images in (query_NHW, bank_NHW)))
    return found.distances[:, 0], found.indices[:, 0]


@dataclass(frozen=True)
class Toy:
    """A set of pictures whose modes are known. lay: (count, seed) -> pictures and labels; judge: what is counted."""

    num_modes: int
    lay: Callable[[int, int], tuple[Tensor, Tensor]]
    judge: Callable[[Tensor], dict[str, float]]

    def source(self, count: int, seed: int, labelled: bool) -> Pictures:
        """Pictures of a seed."""
        images, labels = self.lay(count, seed)
        return Pictures(images, labels if labelled else None, f"{self.lay.__name__}-{count}-{seed}-{labelled}")


TOYS = {"gaussians": Toy(25, gaussians, judge_gaussians), "digits": Toy(1000, stacks, judge_digits)}
UNITS = {"modes": "modes", "any": "modes", "kl": "nats", "good": "share"}


# -- training ---------------------------------------------------------------------------------------------------------


def recipe_of(options: argparse.Namespace, toy: str, family: str, doctor: str, seed: int) -> Recipe:
    """A complete recipe: so many generator steps, checkpoints and looks at held-out pictures as usual, no previews."""
    fixed = [f"train.seed={seed}", f"train.doctor={doctor}", "train.preview_kimg=1000000"]
    fixed += ["train.compile=off", "train.precision=fp32"]  # nothing is won by less precision at this size
    recipe = recipes.resolve(family, assignments=[*PRESETS[family], *options.set, *fixed])
    shape = TOYS[toy].lay(1, 0)[0].shape[1:]
    phases = recipes.build(recipe, (shape[0], shape[1], shape[2]), 10).phases
    kimg = options.steps * recipe.train.batch * max(phase.repeat for phase in phases) / 1000
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"total_kimg": kimg})})


def trainer_of(recipe: Recipe, toy: Toy, folder: Path) -> Trainer:
    """A training that is new, or stands where it was stopped."""
    seed = recipe.train.seed
    torch.manual_seed(mix(seed, "initialisation"))
    source, held_out = toy.source(TRAINING, seed, False), toy.source(HELD_OUT, seed + 1_000_000, False)
    try:
        family = recipes.build(recipe, source.image_shape, 0)
    except RecipeError:  # it needs labels
        source, held_out = toy.source(TRAINING, seed, True), toy.source(HELD_OUT, seed + 1_000_000, True)
        family = recipes.build(recipe, source.image_shape, source.num_classes)
    run = Run.create(folder, write_toml(recipe), {"average": recipe.train.averages[0].name})
    return Trainer(recipe, family, source, held_out, run, Logbook(run, folder.name))


def folder_of(options: argparse.Namespace, toy: str, family: str, doctor: str, seed: int) -> Path:
    """Where a training is while it lasts; another recipe has another folder."""
    recipe = recipe_of(options, toy, family, doctor, seed)
    key = f"{mix(json.dumps(recipe.model_dump(mode='json'), sort_keys=True), options.n):016x}"[:8]
    return Path(options.out / f"{toy}-{family}-{doctor}-{seed}-{key}")


def kept(options: argparse.Namespace, toy: str, family: str, doctor: str, seed: int) -> dict[str, float] | None:
    """The outcome of a training that is done."""
    file = folder_of(options, toy, family, doctor, seed).with_suffix(".json")
    found: dict[str, float] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def outcome(options: argparse.Namespace, toy: str, family: str, doctor: str, seed: int) -> dict[str, float]:
    """What one training covers; kept in a file, so that it is trained once.

    A doctor that never acted changed nothing, to the last bit: what its run covers holds without a doctor, too.
    """
    twin = kept(options, toy, family, "act", seed) if doctor == "off" else None
    if twin and not twin["acts"]:
        return twin
    found = kept(options, toy, family, doctor, seed)
    if found:
        return found
    recipe = recipe_of(options, toy, family, doctor, seed)
    folder = folder_of(options, toy, family, doctor, seed)
    trainer = trainer_of(recipe, TOYS[toy], folder)
    diverged = False
    try:
        trainer.fit()
    except Diverged:
        diverged = True
    seeds = [mix("gan-toys", index) for index in range(options.n)]
    images = draw(trainer.inference_twin(), seeds, [-1] * options.n, batch=DRAWN_AT_ONCE)
    pictures.write(pictures.grid(images[:SHOWN], math.isqrt(min(SHOWN, options.n))), folder.with_suffix(".png"))
    events = trainer.run.events()
    facts = {
        "told": len({event["kind"] for event in events}),
        "acts": sum("act" in event for event in events),
        "share_trained": trainer.state.nimg / trainer.total_nimg,
        "diverged": float(diverged),
        "seconds": our_seconds(trainer.run)["cpu"],
    }
    found = TOYS[toy].judge(images) | facts
    write_whole(folder.with_suffix(".json"), json.dumps(found) + "\n")
    with contextlib.suppress(OSError):  # only the result is of use from now on
        shutil.rmtree(folder)
        folder.with_suffix(".seconds.json").unlink()
    return found


# -- the record -------------------------------------------------------------------------------------------------------


Found = Mapping[str, Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]]
"""Outcomes by toy, family and doctor, one a seed."""


def record_rows(found: Found, real: Mapping[str, Mapping[str, float]], seeds: Sequence[int], n: int) -> list[Row]:
    """Of every toy what real pictures score, then every family with and without the doctor, and what it changed."""
    rows = []
    for toy, by_family in found.items():
        rows += [Row(f"{toy}, real pictures, {name}", value, UNITS[name], n) for name, value in real[toy].items()]
        for family, by_doctor in by_family.items():
            for doctor, runs in by_doctor.items():
                what = f"{toy}, {family}, doctor {doctor}"
                for name in real[toy]:
                    rows.append(Row.of(f"{what}, {name}", [run[name] for run in runs], UNITS[name], seeds, n))
                rows.append(Row.of(f"{what}, training (processor)", [run["seconds"] for run in runs], "s", seeds))
            if set(DOCTORS) <= set(by_doctor):
                pairs = list(zip(by_doctor["act"], by_doctor["off"], strict=True))
                acts = [run["acts"] for run in by_doctor["act"]]
                rows.append(Row.of(f"{toy}, {family}, acts of the doctor", acts, "acts", seeds))
                more = [act["modes"] - off["modes"] for act, off in pairs]
                rows.append(Row.of(f"{toy}, {family}, modes, doctor act - off", more, "modes", seeds, n))
    return rows


def table(found: Found, real: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for every toy, family and doctor: means over the seeds, the lowest number of modes, acts in all."""
    lines = []
    for toy, by_family in found.items():
        heads = "".join(f"{name:>9}" for name in real[toy])
        lines.append(f"{toy:<14}{'doctor':<8}{heads}{'fewest':>9}{'acts':>6}{'seconds':>9}")
        lines.append(f"{'real pictures':<22}{''.join(f'{value:>9.3f}' for value in real[toy].values())}")
        for family, by_doctor in by_family.items():
            for doctor, runs in by_doctor.items():
                cells = "".join(f"{sum(run[name] for run in runs) / len(runs):>9.3f}" for name in real[toy])
                fewest, acts = min(run["modes"] for run in runs), sum(run["acts"] for run in runs)
                seconds = sum(run["seconds"] for run in runs) / len(runs)
                lines.append(f"{family:<14}{doctor:<8}{cells}{fewest:>9.0f}{acts:>6.0f}{seconds:>9.1f}")
    return lines


def work(options: argparse.Namespace) -> Path | None:
    """Train, count, print, write."""
    found: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    real = {toy: TOYS[toy].judge(TOYS[toy].lay(options.n, 2_000_000)[0]) for toy in options.toys}
    for toy in options.toys:
        for family in options.families:
            for doctor in sorted(options.doctors):  # "act" first: where it did nothing, "off" is done, too
                runs = [outcome(options, toy, family, doctor, seed) for seed in options.seeds]
                found.setdefault(toy, {}).setdefault(family, {})[doctor] = runs
                shown = " ".join(f"{run['modes']:.0f}" for run in runs)
                command.say(f"{toy}, {family}, doctor {doctor}: {shown} of {TOYS[toy].num_modes} modes")
    print("\n".join(table(found, real)))
    if not options.record:
        return None
    rows = record_rows(found, real, options.seeds, options.n)
    if "digits" in options.toys:
        known = digits()
        _, row_N = _nearest(known.held_out_NHW, known.images_NHW)
        right_N = (known.labels_N[row_N] == known.held_out_labels_N).double()
        rows.append(Row("held-out digits that are read right", float(right_N.mean()), "share", len(right_N)))
    notes = [
        f"{options.steps} generator steps each; n pictures of the last averaged weights are counted.",
        "Real pictures: as many other ones of the same toy. Good: see the benchmark's own text.",
        "A run in which the doctor did not act is the run without it, bit for bit, and was trained once.",
        "A family that needs labels (cgan) is told the row of the grid, or the first digit.",
    ]
    folder = {"folder": options.records} if options.records else {}
    facts: dict[str, Any] = {"presets": {name: PRESETS[name] for name in options.families}, "outcomes": found}
    return write_record(options.name, this_command(), rows, notes=notes, **folder, **facts)


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


if __name__ == "__main__":
    sys.exit(main())
