"""Does the training doctor name planted illnesses, in time, and keep quiet about healthy runs?

Toys of a second or two: 8x8 pictures of a blob at one of eight places, learned by a small adversarial family of this
file and by families of the package. After 40 % of a run an illness is planted: a learning rate, a setting, the pictures
learned from, or what is drawn is changed. Some plantings take a while until they show, and there the truth is looked up
64 times a run by means the doctor does not have: the places of 400 drawn pictures, the discriminator's answers to all
pictures. Right is the illness's own name within 10 % of the run after it was planted, or showed, where there is such a
truth; a planting that never shows counts as not named. What else is named is shown besides. Runs without a planting
must stay without any name, unless the same truth says that it is right.

With `train.doctor = "act"` collapses are planted for a short while and the run goes on to its end. Distances are
Frechet distances between the pixels of 1,000 drawn and 1,000 real pictures, from the last weights.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Row, this_command, write_record
from torch import Tensor, nn

from imagekiln.config import FamilyConfig, Recipe, merge, write_toml
from imagekiln.core import Batch, Condition, Family, Loss, Phase, Progress, mix
from imagekiln.data import to_float
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.engine.generate import draw
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import Diverged
from imagekiln.metrics import FrechetDistance, Statistics, wilson
from imagekiln.nets.adversarial import (
    cross_entropy_critic,
    minimax_generator,
    non_saturating_generator,
    zero_centred_penalty,
)

PLANTED_AT, DEADLINE = 0.4, 0.1
"""Shares of the run: when an illness is planted, and how long the doctor has."""

NAMED, QUIET, HEALED, RATIO = 0.90, 1 / 20, 0.80, 1.2
"""Targets: share named in time, share of false alarms, share of collapses that end within RATIO of the healthy run."""

ILL = 5.0
"""A run that ends so many times as far as usual fell ill without a planting."""

FEW = {"mode collapse": 3, "mode drop": 6}
"""Places that are drawn at most where such a name is right."""

LATELY = 1 / 16
"""A name is right if it was so within this share of the run."""

PLACES, SIDE, HELD_OUT = 8, 8, 512
GENERATED = 1000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=5, help="runs of each planting (5)")
    arguments.add_argument("--first-seed", type=int, default=0, help="of all runs: not those it was tuned on (0)")
    arguments.add_argument("--healthy", type=int, default=20, help="runs without a planting (20)")
    arguments.add_argument("--only", default="", help="plantings whose name holds this text (all)")
    arguments.add_argument("--acts", type=int, default=5, help="collapses to be healed (5)")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


# -- toys -------------------------------------------------------------------------------------------------------------


class Blobs:
    """Pictures of a blob near one of eight places on a ring, the place being the label."""

    def __init__(self, count: int, seed: int, labelled: bool = True) -> None:
        generator = torch.Generator().manual_seed(mix("blobs", seed))
        places_N = torch.arange(count) % PLACES
        angle_N = places_N * (2 * math.pi / PLACES)
        jitter_N2 = 0.25 * torch.randn(count, 2, generator=generator)
        middle = (SIDE - 1) / 2
        centre_N2 = middle + 2.4 * torch.stack([angle_N.cos(), angle_N.sin()], 1) + jitter_N2
        width_N11 = 0.9 + 0.3 * torch.rand(count, 1, 1, generator=generator)
        grid_S = torch.arange(SIDE)
        square_NSS = (grid_S[:, None] - centre_N2[:, 0, None, None]) ** 2 + (grid_S - centre_N2[:, 1, None, None]) ** 2
        light_N11 = 0.6 + 0.4 * torch.rand(count, 1, 1, generator=generator)
        self.images = (255 * light_N11 * torch.exp(-square_NSS / (2 * width_N11**2))).round().to(torch.uint8)[:, None]
        self.labels = places_N
        self.image_shape, self.num_classes = (1, SIDE, SIDE), PLACES if labelled else 0
        self.class_names = tuple(map(str, range(self.num_classes)))
        self.fingerprint = f"blobs-{count}-{seed}"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(list(indices))
        return Batch(self.images[rows], self.labels[rows] if self.num_classes else None)


class GameConfig(FamilyConfig):
    """Settings of the toy."""

    name: str = "game"
    objective: str = "non-saturating"
    gamma: float = 0.1


class Game(Family):
    """Two small networks against each other, with a zero-centred penalty whose weight is a dial."""

    Config = GameConfig
    optimizers = {
        "discriminator": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.99)},
        "generator": {"name": "adam", "lr": 1e-3, "betas": (0.0, 0.99)},
    }
    phases = (Phase("discriminator", trains=("discriminator",)), Phase("generator", trains=("generator",)))
    averaged = ("generator",)
    gamma: Tensor

    def __init__(self, config: GameConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        pixels, width = math.prod(image_shape), 96
        self.generator = nn.Sequential(
            nn.Linear(16 + num_classes, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, pixels)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(pixels, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)
        ).append(nn.Linear(width, 1 + num_classes))
        self.register_buffer("gamma", torch.tensor(config.gamma))

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        real, labels = batch.images, batch.labels
        fake = self._draw(torch.randn(len(real), 16), labels)
        if phase == "generator":
            minimax = self.config.objective == "minimax"
            return Loss((minimax_generator if minimax else non_saturating_generator)(self._judge(fake, labels)))
        on_real, on_fake = self._judge(real, labels), self._judge(fake.detach(), labels)
        penalty = zero_centred_penalty(lambda images: self._judge(images, labels), real)
        total = cross_entropy_critic(on_real, on_fake)
        parts = {"on_real": on_real.mean(), "on_fake": on_fake.mean(), "penalty": penalty, "game": total}
        return Loss(total + self.gamma / 2 * penalty, parts)

    def dials(self) -> dict[str, Tensor]:
        return {"gamma": self.gamma}

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition, options: Any = None) -> Tensor:
        return self._draw(noise, condition.labels)

    def noise_shape(self) -> tuple[int, ...]:
        return (16,)

    def drawing_cost(self) -> float:
        return 1 / 6

    def _draw(self, z: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None:
            z = torch.cat([z, nn.functional.one_hot(labels.clamp(min=0), self.num_classes).to(z)], 1)
        return self.generator(z).tanh().unflatten(1, self.image_shape)

    def _judge(self, images: Tensor, labels: Tensor | None) -> Tensor:
        logits_BK = self.discriminator(images.flatten(1))
        chosen = 0.0 if labels is None else logits_BK.gather(1, 1 + labels.clamp(min=0)[:, None])[:, 0]
        return logits_BK[:, 0] + chosen


class Changed:
    """A source with other rows or labels."""

    def __init__(self, source: Any, rows: Tensor | None = None, labels: Tensor | None = None) -> None:
        self.source, self.rows, self.labels = source, rows, labels
        self.image_shape, self.num_classes = source.image_shape, source.num_classes
        self.class_names, self.fingerprint = source.class_names, f"{source.fingerprint}, changed"

    def __len__(self) -> int:
        return len(self.source) if self.rows is None else len(self.rows)

    def read(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(list(indices))
        batch: Batch = self.source.read((chosen if self.rows is None else self.rows[chosen]).tolist())
        return batch if self.labels is None else batch._replace(labels=self.labels[chosen])


# -- plantings --------------------------------------------------------------------------------------------------------


class Planting(Trainer):
    """A trainer that makes itself ill once `PLANTED_AT` of the run is over; what is rolled back goes another way."""

    plant: Callable[[Any, int], None] | None = None
    """Called before every step from then on, with the number of steps since."""

    truth: Callable[[Any], bool] | None = None
    showed: float | None = None
    """Whether the illness is there, by other means than the doctor's, and after which share of the run."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.gaps: list[float] = []
        self.places: list[tuple[float, int]] = []
        """(share of the run, places drawn) of a run without a planting."""

    def step(self) -> None:
        since_nimg = self.state.nimg - math.ceil(PLANTED_AT * self.total_nimg / self.images_per_step) * (
            self.images_per_step
        )
        if self.plant is not None and since_nimg >= 0 and self.state.attempt == 0:
            self.plant(self, since_nimg // self.images_per_step)
        super().step()
        if self.state.nimg // self.images_per_step % self.steps_in(1 / 64):
            return
        share = self.state.nimg / self.total_nimg
        if self.truth is not None and self.showed is None and since_nimg >= 0 and self.truth(self):
            self.showed = share
        if self.plant is None:
            self.places.append((share, num_places(self)))

    def rate(self, key: str, factor: float) -> None:
        """Multiply a learning rate of the recipe."""
        optimizer = self.recipe.optim[key]
        self.recipe.optim[key] = optimizer.model_copy(update={"lr": optimizer.lr * factor})

    def steps_in(self, share: float) -> int:
        """Steps of this share of the run."""
        return max(1, int(share * self.total_nimg / self.images_per_step))

    def go_back(self, nimg: int) -> None:
        """What was planted is gone with the weights it spoiled."""
        super().go_back(nimg)
        self.recipe.optim.update(self.healthy)

    def fit(self) -> Any:
        self.healthy = dict(self.recipe.optim)
        return super().fit()


def once(change: Callable[[Planting], None]) -> Callable[[Planting, int], None]:
    """A planting that is done at its first step only."""
    return lambda trainer, step: change(trainer) if step == 0 else None


def teach(trainer: Planting, source: Any, known: bool = False) -> None:
    """Learn from another source from now on; `known`: that is the training set now."""
    trainer.loader.source = source
    trainer.loader._permutations.clear()
    if known:
        trainer.train_source = source


def collapse(trainer: Planting, step: int) -> None:
    """For 3 % of the run the discriminator stands still, and the generator runs to where it is happiest."""
    if step in (0, trainer.steps_in(0.03)):
        factor = 30.0 if step == 0 else 1 / 30.0
        trainer.rate("generator", factor)
        trainer.rate("discriminator", factor**-4)


def drop_modes(trainer: Planting) -> None:
    """Half of the places are not shown any more, and both networks learn three times as fast."""
    source: Any = trainer.train_source
    teach(trainer, Changed(source, torch.nonzero(source.labels < PLACES // 2).flatten()))
    trainer.rate("generator", 3.0)
    trainer.rate("discriminator", 3.0)


def few_pictures(trainer: Planting) -> None:
    """Six pictures and no penalty are left, the generator nearly stands, the discriminator learns faster."""
    teach(trainer, Changed(trainer.train_source, torch.arange(6) * 17), known=True)
    trainer.family.gamma.zero_()  # type: ignore[operator]
    trainer.rate("discriminator", 3.0)
    trainer.rate("generator", 1 / 30.0)


def win(trainer: Planting) -> None:
    """The generator starts anew, slowly, against the trained discriminator, without penalty, with a saturating loss."""
    trainer.family.config.__dict__["objective"] = "minimax"
    trainer.family.gamma.zero_()  # type: ignore[operator]
    trainer.rate("discriminator", 3.0)
    trainer.rate("generator", 1 / 30.0)
    for layer in trainer.family.generator:  # type: ignore[union-attr]
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


def oscillate(trainer: Planting, step: int) -> None:
    """Now one network learns alone and fast, then the other."""
    if step % trainer.steps_in(0.025) == 0:
        trainer.recipe.optim.update(trainer.healthy)
        first, second = (
            ("generator", "discriminator") if step // trainer.steps_in(0.025) % 2 else ("discriminator", "generator")
        )
        trainer.rate(first, 10.0)
        trainer.rate(second, 1e-4)


def grid(trainer: Planting) -> None:
    """A pattern of single pixels lies over everything drawn, as a stride that does not divide the kernel leaves it."""
    drawn: Any = trainer.twin.sample
    pattern = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 * 2.0 - 1
    trainer.twin.sample = lambda *given: (drawn(*given) + 0.3 * pattern).clamp(-1, 1)  # type: ignore[method-assign]


def copy_pictures(trainer: Planting) -> None:
    """What is drawn is a training picture, nearly."""
    source = trainer.train_source

    def sample(noise: Tensor, condition: Condition, options: Any = None) -> Tensor:
        rows = (noise.flatten(1)[:, 0].abs() * 1e6).long() % len(source)
        return (to_float(source.read(rows.tolist()).images) + 0.01 * noise[:, :1, None, None]).clamp(-1, 1)

    trainer.twin.sample = sample  # type: ignore[method-assign]


def kill_codes(trainer: Planting) -> None:
    """All codes but one are far away and are not brought back."""
    book: Any = trainer.family.codebook
    book.restart_below = 0.0
    with torch.no_grad():
        book.codes[1:] += 1e3
        book.total[1:] = book.codes[1:] * book.usage[1:, None]


def shuffle_labels(trainer: Planting) -> None:
    """Labels are dealt out at random, and learned ten times as fast."""
    source: Any = trainer.train_source
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    teach(trainer, Changed(source, labels=source.labels[order]))
    for key in trainer.recipe.optim:
        trainer.rate(key, 3.0)


# -- what is true -----------------------------------------------------------------------------------------------------


def places_of(made: Planting, labels: Sequence[int]) -> Tensor:
    """The places of drawn pictures, by the nearest mean of real ones."""
    images = draw(made.inference_twin(), [mix("truth", index) for index in range(len(labels))], labels, batch=400)
    pixels = Blobs(1024, 0).images.flatten(1).float()
    means = torch.stack([pixels[torch.arange(1024) % PLACES == place].mean(0) for place in range(PLACES)])
    return torch.cdist(images.flatten(1).float(), means).argmin(1)


def num_places(made: Planting) -> int:
    """How many places are drawn as often as a fifth of their share."""
    labels = [index % PLACES if made.family.num_classes else -1 for index in range(400)]
    return int((torch.bincount(places_of(made, labels), minlength=PLACES) > 0.2 * 400 / PLACES).sum())


def few_places(most: int) -> Callable[[Planting], bool]:
    """Whether no more than `most` places are drawn."""
    return lambda made: num_places(made) <= most


@torch.no_grad()
def swung(made: Planting) -> bool:
    """Whether what the live discriminator tells real from drawn by went one way, back and on again, by 1 each."""
    game: Any = made.family
    real = to_float(made.train_source.read(range(len(made.train_source))).images)
    fake = game._draw(torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)), None)
    made.gaps.append(float(game._judge(real, None).mean() - game._judge(fake, None).mean()))
    swings, direction, edge = 0, 0.0, made.gaps[0]
    for gap in made.gaps:
        if direction * (gap - edge) > 0:
            edge = gap
        elif abs(gap - edge) > 1:
            swings, direction, edge = swings + 1, gap - edge, gap
    return swings >= 3


def labels_lost(made: Planting) -> bool:
    """Whether fewer than a quarter of the drawn pictures show the place asked for."""
    labels = [index % PLACES for index in range(400)]
    return float((places_of(made, labels) == torch.tensor(labels)).float().mean()) < 0.25


@torch.no_grad()
def overfitted(made: Planting) -> bool:
    """(E D(train) - E D(held out)) / (E D(train) - E D(fake)) > 0.3 on all pictures, for the live discriminator."""
    game: Any = made.family
    train, held_out = (
        float(game._judge(to_float(source.read(range(len(source))).images), None).mean())
        for source in (made.train_source, made.validation.source)
    )
    fake = float(
        game._judge(game._draw(torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)), None), None).mean()
    )
    return train - fake > 0.1 and (train - held_out) / (train - fake) > 0.3


@dataclass(frozen=True)
class Case:
    """One illness: where it is planted, how, by which name it must be called, and how one knows that it is there."""

    name: str
    family: str
    plant: Callable[[Planting, int], None] | None = None
    labelled: bool = False
    truth: Callable[[Planting], bool] | None = None


CASES = (
    Case("mode collapse", "game", collapse, truth=few_places(2)),
    Case("mode drop", "game", once(drop_modes), truth=few_places(6)),
    Case("discriminator overfitting", "game", once(few_pictures), truth=overfitted),
    Case("vanishing gradient", "game", once(win)),
    Case("exploding gradient", "game", once(lambda t: t.rate("discriminator", 300.0))),
    Case("oscillation", "game", oscillate, truth=swung),
    Case("checkerboard", "game", once(grid)),
    Case("memorization", "game", once(copy_pictures)),
    Case("dead code-book", "vqvae", once(kill_codes)),
    Case("posterior collapse", "vae", once(lambda t: t.family.config.__dict__.update(beta=1000.0))),
    Case("divergence", "diffusion", once(lambda t: t.rate("unet", 100.0))),
    Case("ignored labels", "game", once(shuffle_labels), labelled=True, truth=labels_lost),
)
HEALTHY = (Case("", "game"), Case("", "game", labelled=True), Case("", "vae"), Case("", "vqvae"), Case("", "diffusion"))

KIMG = {"game": 128.0, "vae": 16.0, "vqvae": 32.0, "diffusion": 16.0}
"""Long enough that a run has found all places before something is planted."""

SETTINGS: dict[str, dict[str, Any]] = {
    "game": {},
    "vae": {"width": 8, "z_dim": 8},
    "vqvae": {
        "width": 8,
        "num_codes": 16,
        "code_dim": 4,
        "decay": 0.9,  # the book follows an encoder that learns for 500 steps only
        "halvings": 1,
        "prior_width": 16,
        "prior_layers": 1,
    },
    "diffusion": {"widths": [8, 8], "attention": [False, False], "sample": {"steps": 4}},
}


def trainer_of(case: Case, seed: int, folder: Path, **train: Any) -> Planting:
    """A run of a case, ready to start."""
    source, held_out = Blobs(2048, seed, case.labelled), Blobs(HELD_OUT, seed + 1000, case.labelled)
    settings = {
        "seed": seed,
        "total_kimg": KIMG[case.family],
        "batch": 128 if case.family == "game" else 64,
        "precision": "fp32",
        "device": "cpu",
        "compile": "off",
        "schedule": "constant",
        "clip_norm": 0.0,
        "preview_kimg": 1e6,
        "checkpoint_kimg": KIMG[case.family] / 2,
        "validate_kimg": KIMG[case.family] / (4 if case.family == "game" else 16),
        "averages": [{"kind": "exponential", "halflife_kimg": KIMG[case.family] / 200}],
    }
    optim = (
        {"optim": {key: {"lr": 3e-3} for key in registry.load(case.family).optimizers}}
        if case.family == "vqvae"
        else {}
    )
    values = {"family": {"name": case.family, **SETTINGS[case.family]}, "train": merge(settings, train)}
    torch.manual_seed(mix(seed, "initialisation"))
    if case.family == "game":
        config = GameConfig(**values["family"])
        recipe = Recipe.model_validate(values | {"family": config, "optim": Game.optimizers})
        family: Family = Game(config, source.image_shape, source.num_classes)
    else:
        recipe = recipes.resolve(case.family, values | optim)
        family = recipes.build(recipe, source.image_shape, source.num_classes)
    made = Planting(recipe, family, source, held_out, Run.create(folder, write_toml(recipe), {}), Silent())
    made.plant, made.truth = case.plant, case.truth
    return made


@dataclass(frozen=True)
class Outcome:
    """What became of a run: (name, share of the run) of everything told, and the distance at its end."""

    told: tuple[tuple[str, float], ...]
    distance: float
    sec: float
    showed: float | None
    places: tuple[tuple[float, int], ...] = ()

    def right(self, name: str, share: float) -> bool:
        """Whether what was named after this share of a run without a planting was there, by the places drawn."""
        lately = [count for at, count in self.places if share - LATELY <= at <= share]
        return min(lately, default=PLACES) <= FEW.get(name, -1)

    def named(self, name: str) -> float | None:
        """After which share of the run, counted from `showed`, an illness was first named; below 0 before that."""
        after = [share for what, share in self.told if what == name and share >= PLANTED_AT]
        return None if not after or self.showed is None else max(-PLANTED_AT, min(after) - self.showed)


def outcome(case: Case, seed: int, **train: Any) -> Outcome:
    """Train one run in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        made, clock = trainer_of(case, seed, Path(folder) / "run", **train), time.perf_counter()
        with contextlib.suppress(Diverged):
            made.fit()
        told = [(event["kind"], event["nimg"] / made.total_nimg) for event in made.run.events()]
        showed = made.showed if case.truth is not None else PLANTED_AT
        return Outcome(tuple(told), distance(made), time.perf_counter() - clock, showed, tuple(made.places))


def distance(made: Planting) -> float:
    """Frechet distance of pixels between drawn and fresh real pictures."""
    seeds = [mix("distance", index) for index in range(GENERATED)]
    real = Blobs(GENERATED, 10_000)
    labels = real.labels.tolist() if made.family.num_classes else [-1] * GENERATED
    drawn, pixels = (
        Statistics.of(to_float(images).flatten(1))
        for images in (draw(made.inference_twin(), seeds, labels, batch=250), real.images)
    )
    return float(FrechetDistance()(drawn, pixels))


# -- the three questions ----------------------------------------------------------------------------------------------


def name_them(options: argparse.Namespace) -> tuple[list[Row], bool]:
    """Is every planted illness named in time?"""
    rows, in_time, total = [], 0, 0
    for case in CASES:
        if options.only not in case.name:
            continue
        found = [outcome(case, options.first_seed + number) for number in range(options.seeds)]
        after = [one.named(case.name) for one in found]
        good = sum(share is not None and share <= DEADLINE for share in after)
        hidden = sum(one.showed is None for one in found)
        others = sorted({what for one in found for what, share in one.told if what != case.name})
        early = sum(any(share < PLANTED_AT for _, share in one.told) for one in found)
        in_time, total = in_time + good, total + len(found)
        shown = " ".join("never" if share is None else f"{share:.3f}" for share in after)
        print(
            f"  {case.name:<26} {good} of {len(found)} in time   after {shown}   "
            f"never showed {hidden}   alarms before it {early}   besides: {', '.join(others) or 'nothing'}   "
            f"{sum(one.sec for one in found) / len(found):.1f} s",
            flush=True,
        )
        raw = [-1.0 if share is None else share for share in after]
        rows.append(
            Row(f"named in time, {case.name}", 100 * good / len(found), "percent", len(found), (), None, None, raw)
        )
    if total:
        low, high = wilson(in_time, total)
        print(f"named in time: {in_time} of {total}, {in_time / total:.0%} ({low:.0%} to {high:.0%})")
        rows.append(Row("named in time", 100 * in_time / total, "percent", total, (), (100 * low, 100 * high)))
    return rows, not total or in_time / total >= NAMED


def leave_alone(options: argparse.Namespace) -> tuple[list[Row], bool]:
    """Are healthy runs left alone? One that ends far from the others of its kind fell ill by itself."""
    found: dict[Case, list[tuple[int, Outcome]]] = {case: [] for case in HEALTHY}
    for number in range(options.healthy):
        case, seed = HEALTHY[number % len(HEALTHY)], options.first_seed + 100 + number
        found[case].append((seed, outcome(case, seed)))
    alarms, ill, right = [], 0, 0
    for case, runs in found.items():
        usual = statistics.median([one.distance for _, one in runs]) if runs else 0.0
        for seed, one in runs:
            kind = f"{case.family}, labels {case.labelled}, seed {seed}"
            if one.distance > ILL * usual:
                ill += 1
                print(
                    f"  ill by itself, {kind}: {one.distance / usual:.1f} times the usual distance, {one.told}",
                    flush=True,
                )
                continue
            false = [told for told in one.told if not one.right(*told)]
            alarms.append(float(bool(false)))
            if one.told:
                print(f"  {'false alarm' if false else 'right alarm'}, {kind}: {one.told}", flush=True)
                right += not false
    if not alarms:
        return [], True
    share, (low, high) = sum(alarms) / len(alarms), wilson(int(sum(alarms)), len(alarms))
    print(f"false alarms: {int(sum(alarms))} of {len(alarms)} ({low:.0%} to {high:.0%})")
    row = Row(
        "healthy runs with a false alarm",
        100 * share,
        "percent",
        len(alarms),
        (),
        (100 * low, 100 * high),
        None,
        alarms,
    )
    others = [
        Row("runs without a planting that fell ill", ill, "", options.healthy),
        Row("runs without a planting with right alarms only", right, "", options.healthy),
    ]
    return [row, *others], share <= QUIET


def heal(options: argparse.Namespace) -> tuple[list[Row], bool]:
    """Do planted collapses end close to the healthy run when the doctor may act?"""
    ratios: dict[str, list[float]] = {"watch": [], "act": []}
    seeds = range(options.first_seed, options.first_seed + options.acts)
    for seed in seeds:
        healthy = outcome(Case("", "game"), seed).distance
        for doctor, kept in ratios.items():
            more = {"doctor": doctor, "validate_kimg": KIMG["game"] / 16}
            kept.append(outcome(CASES[0], seed, **more).distance / healthy)
    if not options.acts:
        return [], True
    healed = {doctor: sum(ratio <= RATIO for ratio in kept) for doctor, kept in ratios.items()}
    for doctor, kept in ratios.items():
        shown = " ".join(f"{ratio:.2f}" for ratio in kept)
        print(f"{doctor:<5} {healed[doctor]} of {len(kept)} within {RATIO} of the healthy run: {shown}", flush=True)
    rows = [Row.of(f"distance over the healthy run's, {d}", kept, "ratio", seeds) for d, kept in ratios.items()]
    return rows, healed["act"] / options.acts >= HEALED


def main(given: Sequence[str] | None = None) -> int:
    """Ask, print, and write what was asked for; 1 when a target is missed."""
    options = parser().parse_args(given)
    torch.set_num_threads(1)
    answers = {question.__name__: question(options) for question in (leave_alone, name_them, heal)}
    missed = [name for name, (_, reached) in answers.items() if not reached]
    if options.record:
        notes = [
            f"Planted after {PLANTED_AT:.0%} of the run; in time is within {DEADLINE:.0%} of the run after that.",
            "raw of a planting: share of the run until it was named, -1 = never. Intervals are Wilson's.",
        ]
        rows = [row for rows, _ in answers.values() for row in rows]
        print(write_record("doctor", this_command(), rows, notes=notes, missed=missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
