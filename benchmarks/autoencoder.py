"""What do a perceptual and an adversarial term do for an autoencoder's reconstructions of held-out pictures?

Three arms from the same seeds: mean absolute error alone; with a distance in the maps of a judge trained on the set;
with a patch discriminator besides. Every arm sees the same number of pictures, or with `--equal time` the faster ones
as many more as fit into the seconds of the slowest, by a probe of each that is kept for the next call. With
`--first-kimg` all arms go on from one training with the perceptual term alone. Reconstructions are compared with their
pictures in pixels and in two networks no arm was trained against: another judge (other seed, other width), in the same
formula as the loss, and fixed random convolutions or whatever `--features` names, as

  mean ||f(x) - f(y)||^2 / mean ||f(x) - f(x')||^2,    x' another real picture: 0 for exact, about 1 for unrelated ones

and as sets, by the Frechet distance of both networks' features: what is blurred costs little against its own picture,
and is seen at once beside others.

The same command continues what was interrupted; arms that are finished are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import command
import torch
from record import Row, this_command, write_record
from torch import Tensor

from imagekiln import api
from imagekiln import data as datasets
from imagekiln.config import Recipe
from imagekiln.core import Family
from imagekiln.engine import pictures, plan
from imagekiln.engine import recipe as recipes
from imagekiln.engine.extractors import open_extractor
from imagekiln.engine.models import Model, open_model
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.metrics import FrechetDistance, Regression, Similarity, Statistics

ARMS = {
    "l1": ("family.adversarial_weight=0",),
    "perceptual": ("family.adversarial_weight=0", "family.perceptual={judge}"),
    "adversarial": ("family.perceptual={judge}",),
}
LOSS_SEED, MEASURING_SEED = 1000, 2000
MEASURING_WIDTH = 24
"""Of the judge that measures; the one in the loss has the recipe's."""

BATCH = 64
SHEET = 10


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", required=True, help="labelled pictures to train on, as `imagekiln train --data` takes them")
    add("--out", type=Path, default=Path("runs/autoencoder"), help="folder of the runs (runs/autoencoder)")
    add("--recipe", default="autoencoder", help="recipe of all arms (autoencoder)")
    add("--kimg", type=float, default=30.0, help="thousands of pictures the slowest arm sees (30)")
    add("--judge-kimg", type=float, default=60.0, help="thousands of pictures each judge sees (60)")
    add("--first-kimg", type=float, help="length of a training with the perceptual term alone that all arms go on from")
    add("--equal", choices=("images", "time"), default="images", help="what all arms get the same of (images)")
    add("--arms", nargs="+", choices=[*ARMS], default=[*ARMS], help="which of them (all)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="one training of every arm for each seed (0 1)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting laid over the recipe")
    add("--adversarial", action="append", default=[], metavar="KEY=VALUE", help="a setting of the adversarial arm")
    add("--then", action="append", default=[], metavar="KEY=VALUE", help="a setting of the arms, not of what is first")
    add("--n", type=int, default=1000, help="held-out pictures, at most as many as there are (1000)")
    add("--features", default="randconv", help="the second network, as `imagekiln evaluate --features` (randconv)")
    add("--name", default="autoencoder", help="name of the record (autoencoder)")
    add("--records", type=Path, metavar="FOLDER", help="folder of the record (records/)")
    return arguments


# -- training ---------------------------------------------------------------------------------------------------------


def train_judge(options: argparse.Namespace, name: str, seed: int, *settings: str) -> Run:
    """A judge of the training split in a run of its own."""
    run = Run(options.out / name)
    fixed = (f"train.seed={seed}", f"train.total_kimg={options.judge_kimg}")
    return _train(recipes.resolve("judge", _data(options), [*settings, *fixed]), run)


def train_first(options: argparse.Namespace, seed: int) -> None:
    """What all arms of a seed go on from, where there is such a thing."""
    if options.first_kimg:
        judge = f"family.perceptual={(options.out / 'judge-loss').absolute()}"
        fixed = ["family.adversarial_weight=0", judge, f"train.seed={seed}", f"train.total_kimg={options.first_kimg}"]
        recipe = recipes.resolve(options.recipe, _data(options), [*options.set, *fixed])
        _train(recipe, Run(options.out / f"first-{seed}"))


def arm_recipe(options: argparse.Namespace, arm: str, seed: int, kimg: float) -> Recipe:
    """The recipe of one arm and seed."""
    own = [setting.format(judge=(options.out / "judge-loss").absolute()) for setting in ARMS[arm]]
    if arm == "adversarial":
        own += options.adversarial
    if options.first_kimg:
        own.append(f"train.start={(options.out / f'first-{seed}').absolute()}")
    fixed = [f"train.seed={seed}", f"train.total_kimg={kimg}"]
    return recipes.resolve(options.recipe, _data(options), [*options.set, *options.then, *own, *fixed])


def lengths(options: argparse.Namespace, dataset: datasets.Dataset) -> dict[str, float]:
    """Thousands of pictures each arm sees: those of the first call, however fast the machine is at the next."""
    if options.equal == "images":
        return dict.fromkeys(options.arms, options.kimg)
    file = options.out / "rates.json"
    rate: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    for arm in options.arms:
        if arm not in rate:
            rate[arm] = plan.measure(arm_recipe(options, arm, options.seeds[0], options.kimg), dataset).img_per_sec
            file.write_text(json.dumps(rate))
        command.say(f"{arm}: {rate[arm]:.1f} img/s")
    slowest = min(rate[arm] for arm in options.arms)
    return {arm: round(options.kimg * rate[arm] / slowest, 3) for arm in options.arms}


def _train(recipe: Recipe, run: Run) -> Run:
    if run.status().get("state") != "finished":
        command.say(f"Training {run.path.name}: {recipe.train.total_kimg:g} kimg.")
        api.train(recipe, "", run.path, listener=Silent())
    return run


def _data(options: argparse.Namespace) -> dict[str, Any]:
    path = options.data if ":" in options.data else str(Path(options.data).expanduser().absolute())
    return {"data": {"path": path}}


# -- measuring --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def reconstructions(model: Model, images: Tensor) -> Tensor:
    """What a model makes of pictures, float32 in [-1, 1], batch by batch."""
    with model.precision():
        parts = [model.family.reconstruct(part.to(model.device)) for part in images.split(BATCH)]
    return torch.cat([part.float().cpu() for part in parts if part is not None])


def maps_distance(judge: Family, x: Tensor, y: Tensor) -> float:
    """Mean over pictures, maps and pixels of squared differences of channels scaled to length 1."""
    total = 0.0
    for real, made in zip(x.split(BATCH), y.split(BATCH), strict=True):
        pairs = list(zip(judge.maps(real), judge.maps(made), strict=True))  # type: ignore[operator]
        each = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
        total += float(torch.stack(each).mean(0).sum())
    return total / len(x)


def features_distances(network: Any, x: Tensor, y: Tensor) -> tuple[float, float]:
    """How far features of reconstructions y are from those of pictures x.

    Picture by picture, the mean squared distance over that of unrelated real pictures; and of the two sets, Frechet's.
    """
    real, made = (torch.cat([network.features(part).float() for part in all_.split(BATCH)]) for all_ in (x, y))
    unrelated = real.roll(len(real) // 2, 0)
    each = (real - made).square().sum(1).mean() / (real - unrelated).square().sum(1).mean()
    return float(each), FrechetDistance()(Statistics.of(made), Statistics.of(real))


@torch.inference_mode()
def measure(x: Tensor, y: Tensor, judge: Family, second: tuple[str, Any]) -> dict[str, float]:
    """Everything that is said about reconstructions y of pictures x. second: name and network."""
    regression, similarity = Regression(), Similarity()
    for real, made in zip(x.split(BATCH), y.split(BATCH), strict=True):
        regression.update(made, real)
        similarity.update(made, real)
    name, network = second
    of_each, of_sets = features_distances(network, x, y)
    return {
        **regression.scores(),
        **similarity.scores(),
        "distance in another judge's maps": maps_distance(judge, x, y),
        f"distance in {name}": of_each,
        "distance of sets in another judge": features_distances(judge, x, y)[1],
        f"distance of sets in {name}": of_sets,
    }


def _unit(map_BCHW: Tensor) -> Tensor:
    map_BCHW = map_BCHW.float()
    return map_BCHW * torch.rsqrt(map_BCHW.square().sum(1, keepdim=True) + 1e-6)


# -- the record -------------------------------------------------------------------------------------------------------


def record_rows(found: Mapping[str, list[dict[str, float]]], seeds: Sequence[int], n: int) -> list[Row]:
    """Every number of every arm, and what the adversarial term changed, seed by seed."""
    rows = [
        Row.of(f"{arm}, {name}", [run[name] for run in runs], _unit_of(name), seeds, n)
        for arm, runs in found.items()
        for name in runs[0]
    ]
    if not {"perceptual", "adversarial"} <= found.keys():
        return rows
    before, after = found["perceptual"], found["adversarial"]
    for name in before[0]:
        pairs = list(zip(before, after, strict=True))
        if name.startswith("distance"):
            rows.append(
                Row.of(f"adversarial / perceptual, {name}", [b[name] / a[name] for a, b in pairs], "times", seeds, n)
            )
        elif name in ("psnr", "ssim"):
            rows.append(
                Row.of(
                    f"adversarial - perceptual, {name}", [b[name] - a[name] for a, b in pairs], _unit_of(name), seeds, n
                )
            )
    return rows


def _unit_of(name: str) -> str:
    return {"psnr": "dB", "kimg": "kimg", "train_sec": "s"}.get(name, "")


def work(options: argparse.Namespace) -> Path:
    """Train, measure, write."""
    dataset = datasets.load(recipes.resolve(options.recipe, _data(options), options.set).data)
    command.say(dataset.summary())
    train_judge(options, "judge-loss", LOSS_SEED)
    other = open_model(
        train_judge(options, "judge-measuring", MEASURING_SEED, f"family.width={MEASURING_WIDTH}"), device="cpu"
    )
    n = min(options.n, len(dataset.validation))
    x = datasets.to_float(dataset.validation.read(range(n)).images)
    network = open_extractor(options.features, dataset.train.image_shape, x, say=command.say)
    second = options.features.partition(":")[0], network
    for seed in options.seeds:
        train_first(options, seed)
    kimg = lengths(options, dataset)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        for arm in options.arms:
            run = _train(arm_recipe(options, arm, seed, kimg[arm]), Run(options.out / f"{arm}-{seed}"))
            y = reconstructions(open_model(run, run.status()["nimg"]), x)  # the end: what all the seconds were for
            seconds = max((row.get("train_sec", 0.0) for row in run.stats()), default=0.0)
            found[arm].append(
                {"kimg": run.status()["nimg"] / 1000, "train_sec": seconds, **measure(x, y, other.family, second)}
            )
            sheet = torch.cat([part[:SHEET] for part in (x, y)])
            pictures.write(pictures.grid(datasets.to_uint8(sheet), SHEET), options.out / f"{arm}-{seed}.png")
    rows = record_rows(found, options.seeds, n)
    for row in rows:
        spread = f" +- {row.sd:.4g}" if row.sd is not None else ""
        print(f"{row.what:<62}{row.value:>12.5g}{spread} {row.unit}")
    return write_record(
        options.name,
        this_command(),
        rows,
        notes=[
            f"Arms were given the same {options.equal}; values are means over the seeds, sd is over the seeds.",
            f"Judges saw {options.judge_kimg:g} kimg; the measuring one has seed {MEASURING_SEED} and width "
            f"{MEASURING_WIDTH}, and its accuracy on held-out pictures is {_accuracy(other, dataset):.3f}.",
        ],
        **({"folder": options.records} if options.records else {}),
        data=dataset.summary(),
        data_fingerprint=dataset.fingerprint,
        arms={arm: [setting for setting in ARMS[arm] if "{" not in setting] for arm in options.arms},
        adversarial=options.adversarial,
    )


@torch.inference_mode()
def _accuracy(judge: Model, dataset: datasets.Dataset) -> float:
    hits = []
    for start in range(0, len(dataset.validation), BATCH):
        batch = dataset.validation.read(range(start, min(start + BATCH, len(dataset.validation))))
        if batch.labels is not None:
            hits += (judge.family.predict(datasets.to_float(batch.images)).argmax(1) == batch.labels).float().tolist()
    return statistics.fmean(hits) if hits else 0.0


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


if __name__ == "__main__":
    sys.exit(main())
