"""How good are the pictures after so many minutes of training, ours against diffusers' example on the same machine?

Ours is trained by a recipe through `imagekiln.train`; the peer is diffusers' `train_unconditional.py` loop as shipped
(float32, without labels), its network within 5 % of our parameters at the same picture size. For every seed ours goes
first and the peer is then given the seconds ours took, its planning, previews, validations and checkpoints included,
while of the peer's only its training steps are counted. Both then draw the same number of pictures, and one bench
measures both: same features, same held-out reference. With labels, ours is conditional and also scored on showing the
label that was asked for.

The same command continues what was interrupted. Seconds are those of the wall, or with `--budget cpu` processor seconds
divided by threads, which other work on the machine hardly changes. `--kimg` fixes the images ours sees instead of time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import command
import ours
import peer
import torch
from record import Row, this_command, write_record

from imagekiln import api, signals
from imagekiln import data as datasets
from imagekiln.config import Recipe, read_toml
from imagekiln.core import mix
from imagekiln.engine import plan
from imagekiln.engine import recipe as recipes
from imagekiln.engine.bench import BATCH, Bench
from imagekiln.engine.generate import draw
from imagekiln.engine.inputs import begin
from imagekiln.engine.models import hash_of, open_model
from imagekiln.engine.run import Run, write_whole
from imagekiln.engine.tracker import Silent
from imagekiln.errors import UsageError
from imagekiln.metrics import Measurement, weights_hash

CHECKPOINT_SEC = 60.0
PROBE_SEC, PROBE_WARM_UP_STEPS = 10.0, 3
LARGEST_DIFFERENCE = 0.05
OURS, PEER = "imagekiln", "diffusers"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", required=True, help="pictures to train on, as `imagekiln train --data` takes them")
    add(
        "--out", type=Path, default=Path("runs/quality-per-minute"), help="folder of the runs (runs/quality-per-minute)"
    )
    add("--minutes", type=float, default=20.0, help="minutes of training for a seed (20)")
    add("--kimg", type=float, help="thousands of images ours sees, instead of --minutes")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training of each side for every seed (0 1 2)")
    add("--peer", action="store_true", help="also train and measure diffusers' example")
    add("--budget", choices=("wall", "cpu"), default="wall", help="which seconds are counted (wall)")
    add("--recipe", default="diffusion", help="our recipe (diffusion)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting laid over our recipe")
    add("--n", type=int, default=5000, help="pictures drawn by each, at most as many as are held out (5000)")
    add("--peer-evaluations", type=int, default=100, help="network evaluations of the peer's own sampler (100)")
    add("--features", choices=("auto", "classifier", "randconv"), default="auto", help="where pictures are compared")
    add("--skip-train", action="store_true", help="only measure what has been trained before")
    add("--name", default="quality-per-minute", help="name of the record (quality-per-minute)")
    add("--records", type=Path, metavar="FOLDER", help="folder of the record (records/)")
    return arguments


# -- time -------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds of training by the wall and by the processor; begins where an earlier session stopped."""

    def __init__(self, wall_sec: float = 0.0, cpu_sec: float = 0.0) -> None:
        self._wall_sec, self._cpu_sec = wall_sec - time.monotonic(), cpu_sec - self._processor_sec()

    def read(self) -> dict[str, float]:
        """Both kinds of seconds, under the names `--budget` takes."""
        return {"wall": self._wall_sec + time.monotonic(), "cpu": self._cpu_sec + self._processor_sec()}

    @staticmethod
    def _processor_sec() -> float:
        return time.process_time() / torch.get_num_threads()


class Logbook(Silent):
    """Listens to our training: keeps its seconds in a file beside the run, so that they survive an interruption."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.file, self.name, self._said_sec = run, _seconds_file(run), name, 0.0
        before = our_seconds(run)
        self.stopwatch = Stopwatch(before["wall"], before.get("cpu", 0.0))

    def tick(self, row: Mapping[str, Any]) -> None:
        self.note()
        if "img_per_sec" in row and time.monotonic() - self._said_sec > CHECKPOINT_SEC:
            self._said_sec = time.monotonic()
            done, total = row["nimg"] / 1000, row["total_nimg"] / 1000
            command.say(f"{self.name}: {done:.1f} of {total:.1f} kimg, {row['img_per_sec']} img/s")

    def say(self, sentence: str) -> None:
        command.say(f"{self.name}: {sentence}")

    def note(self) -> None:
        """Write the seconds so far."""
        write_whole(self.file, json.dumps(self.stopwatch.read()) + "\n")


# -- training ---------------------------------------------------------------------------------------------------------


def our_recipe(options: argparse.Namespace, seed: int) -> Recipe:
    """The recipe of one seed, its length not yet fixed."""
    path = options.data if ":" in options.data else str(Path(options.data).expanduser().absolute())
    return recipes.resolve(options.recipe, {"data": {"path": path}}, [*options.set, f"train.seed={seed}"])


def train_ours(options: argparse.Namespace, seed: int, dataset: datasets.Dataset) -> None:
    """Train or continue ours."""
    run = Run(_our_folder(options, seed))
    logbook = Logbook(run, f"{OURS}, seed {seed}")
    train_within(our_recipe(options, seed), dataset, logbook, options.minutes, options.budget, options.kimg)


def train_within(
    recipe: Recipe, dataset: datasets.Dataset, logbook: Logbook, minutes: float, budget: str, kimg: float | None = None
) -> None:
    """Train or continue the logbook's run for a budget, or `kimg`; the length of one that exists is its recipe's."""
    run = logbook.run
    if run.status().get("state") == "finished":
        return
    if run.exists():
        total_kimg = recipes.complete(read_toml(run.recipe_path)).train.total_kimg
    else:
        total_kimg = kimg or planned_kimg(recipe, dataset, minutes, budget)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"total_kimg": total_kimg})})
    try:
        api.train(recipe, "", run.path, listener=logbook)
    finally:
        if run.exists():
            logbook.note()


def planned_kimg(recipe: Recipe, dataset: datasets.Dataset, minutes: float, budget: str) -> float:
    """How much ours sees in the budget, by the trainer's own plan.

    On the processor's clock the wall may take longer, by the share of the machine that a probe was given.
    """
    share = 1.0
    if budget == "cpu":
        stopwatch = Stopwatch()
        plan.measure(recipe, dataset)
        seconds = stopwatch.read()
        share = seconds["cpu"] / seconds["wall"]
    return plan.within(recipe, dataset, minutes / share)[0].train.total_kimg


def peer_loop(recipe: Recipe, dataset: datasets.Dataset, seed: int, total_steps: int) -> peer.PeerLoop:
    """The peer's training for the same pictures, its network of our size.

    Raises:
        UsageError: the recipe is no diffusion model, or the networks differ by more than 5 % in parameters.
    """
    family = begin(recipe, dataset).family
    if recipe.family.name != "diffusion":
        raise UsageError(f"--recipe {recipe.family.name}: only the diffusion family has a peer here; leave --peer out.")
    network = family.get_submodule("unet")
    pictures = dataset.train.read(range(len(dataset.train))).images.numpy()
    config = peer.network_config(network.diffusers_config())
    loop = peer.PeerLoop(config, pictures, batch=recipe.train.batch, total_steps=total_steps, seed=seed)
    difference = ours.parameters(loop.net) / ours.parameters(network) - 1
    if abs(difference) > LARGEST_DIFFERENCE:
        raise UsageError(f"The peer's network has {difference:+.1%} parameters; expected at most 5 % difference.")
    return loop


def train_peer(options: argparse.Namespace, seed: int, dataset: datasets.Dataset) -> None:
    """Train or continue the peer for the seconds ours took; its state is saved every minute."""
    recipe, file = our_recipe(options, seed), _peer_file(options, seed)
    if file.is_file():
        total_steps = peer.stored_state(file)["total_steps"]
    else:
        budget_sec = our_seconds(Run.open(_our_folder(options, seed))).get(options.budget)
        if budget_sec is None:
            raise UsageError(
                f"How long seed {seed} of ours took on the processor's clock is not known; use --budget wall."
            )
        rate = steps_per_sec(lambda: peer_loop(recipe, dataset, seed, 100_000), options.budget)
        total_steps = max(1, round(rate * budget_sec))
        command.say(f"{PEER}, seed {seed}: {rate:.2f} steps/s, {total_steps} steps in {budget_sec / 60:.1f} minutes")
    loop = peer_loop(recipe, dataset, seed, total_steps)
    seconds = loop.restore(file)["seconds"] if file.is_file() else {"wall": 0.0, "cpu": 0.0}
    if loop.steps >= total_steps:
        return
    stopwatch, saved_sec = Stopwatch(seconds["wall"], seconds["cpu"]), time.monotonic()
    with signals.deferred():
        while loop.steps < total_steps:
            loss = loop.step()
            stop = signals.pending() or loop.steps == total_steps
            if stop or time.monotonic() - saved_sec > CHECKPOINT_SEC:
                seconds = stopwatch.read()
                loop.save(file, seconds=seconds, batch=recipe.train.batch)
                stopwatch, saved_sec = Stopwatch(seconds["wall"], seconds["cpu"]), time.monotonic()
                so_far = f"{loop.steps} of {total_steps} steps, {seconds['wall']:.0f} s"
                command.say(f"{PEER}, seed {seed}: {so_far}, loss {loss:.4f}")
            signals.raise_if_pending()


def steps_per_sec(build: Callable[[], peer.PeerLoop], budget: str) -> float:
    """Speed of a loop that is thrown away."""
    loop = build()
    for _ in range(PROBE_WARM_UP_STEPS):
        loop.step()
    stopwatch, steps = Stopwatch(), 0
    while steps < 3 or stopwatch.read()["wall"] < PROBE_SEC:
        loop.step()
        steps += 1
    return steps / stopwatch.read()[budget]


def our_seconds(run: Run) -> dict[str, float]:
    """Seconds of our training by kind; of a run from elsewhere only what its own log says, by the wall."""
    wall_sec = max((row.get("train_sec", 0.0) for row in run.stats()), default=0.0)
    return _read_json(_seconds_file(run)) or {"wall": wall_sec}


# -- measuring --------------------------------------------------------------------------------------------------------


def measure_ours(options: argparse.Namespace, seed: int, bench: Bench) -> dict[str, Any]:
    """Draw with the run's best weights and its own sampling options, and measure."""
    run = Run.open(_our_folder(options, seed))
    model, count = open_model(run), bench.count(options.n)
    labels, sampling = bench.labels(count), model.family.config.sample

    def pictures() -> torch.Tensor:
        with model.precision():
            return draw(model.family, _drawing_seeds(count), labels, sampling, BATCH)

    subject = f"{hash_of(model.weights)}/{sampling.model_dump_json()}"
    return {
        "kimg": run.status().get("nimg", 0) / 1000,
        "seconds": our_seconds(run),
        "parameters": ours.parameters(model.family),
        "sampling": sampling.model_dump(),
        "rows": measured(bench, count, pictures, labels, subject, run.path.with_suffix(".measured.json")),
    }


def measure_peer(options: argparse.Namespace, seed: int, bench: Bench) -> dict[str, Any]:
    """Draw with the peer's averaged weights and its own sampler, and measure."""
    file = _peer_file(options, seed)
    if not file.is_file():
        raise UsageError(f"{file} is missing: the peer of seed {seed} was not trained. Leave --skip-train out.")
    state, evaluations = peer.stored_state(file), options.peer_evaluations
    loop = peer_loop(our_recipe(options, seed), bench.dataset, seed, state["total_steps"])
    loop.restore(file)
    count = bench.count(options.n)

    def pictures() -> torch.Tensor:
        return loop.draw(_drawing_seeds(count), evaluations, BATCH)

    subject = f"{hash_of(file)}/ddpm/{evaluations}"
    return {
        "kimg": loop.steps * state["batch"] / 1000,
        "seconds": state["seconds"],
        "parameters": ours.parameters(loop.net),
        "sampling": {"sampler": "DDPMScheduler", "evaluations": evaluations},
        "rows": measured(bench, count, pictures, None, subject, file.with_suffix(".measured.json")),
    }


def measured(
    bench: Bench,
    count: int,
    pictures: Callable[[], torch.Tensor],
    labels: Sequence[int] | None,
    subject: str,
    file: Path,
) -> list[dict[str, Any]]:
    """Measurements as plain values; those of the same weights, count and features are taken from `file`."""
    key = [subject, count, bench.seed, weights_hash(bench.network), bench.dataset.fingerprint]
    known = _read_json(file)
    if known and known["key"] == key:
        return known["rows"]
    command.say(f"Drawing {count} pictures for {file.name}.")
    bench.subject_hash = subject
    rows = [json.loads(row.to_json()) for row in bench.measure(pictures(), labels)]
    write_whole(file, json.dumps({"key": key, "rows": rows}) + "\n")
    return rows


def evaluations_of(sampling: Mapping[str, Any]) -> int:
    """How often our network is called for a picture."""
    calls = sampling["steps"] * (2 if sampling["sampler"] == "heun" else 1)
    return calls * (1 if sampling["guidance"] == 1 else 2)


# -- the record -------------------------------------------------------------------------------------------------------


def record_rows(sides: Mapping[str, list[dict[str, Any]]], seeds: Sequence[int], n: int) -> list[Row]:
    """Mean and standard deviation over the seeds of everything that was measured, floors, and the sides' ratio."""
    rows = []
    for side, runs in sides.items():
        for kind in ("wall", "cpu"):
            seconds = [run["seconds"][kind] for run in runs if kind in run["seconds"]]
            if len(seconds) == len(runs):
                rows.append(Row.of(f"{side}, training ({kind})", seconds, "s", seeds))
        rows.append(Row.of(f"{side}, images seen", [run["kimg"] for run in runs], "kimg", seeds))
        for label, found in by_label(runs).items():
            rows.append(Row.of(f"{side}, {label}", [m.value for m in found], "", seeds, n))
            floors = [m.floor for m in found if m.floor is not None]
            if len(floors) == len(found):
                rows.append(Row.of(f"{side}, {label}, real pictures", floors, "", seeds, n))
            ratios = [m.ratio for m in found if m.ratio is not None]
            if len(ratios) == len(found):
                rows.append(Row.of(f"{side}, {label} / real pictures", ratios, "times", seeds, n))
    if PEER in sides:
        theirs = by_label(sides[PEER])
        for label, found in by_label(sides[OURS]).items():
            pairs = list(zip(found, theirs.get(label, []), strict=False))
            if len(pairs) == len(found) and all(other.value for _, other in pairs):
                values = [mine.value / other.value for mine, other in pairs]
                rows.append(Row.of(f"{OURS} / {PEER}, {label}", values, "times", seeds, n))
    return rows


def by_label(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Measurement]]:
    """Measurements by label, one a seed; labels that some seed lacks are left out."""
    found: dict[str, list[Measurement]] = {}
    for run in runs:
        for row in run["rows"]:
            measurement = Measurement.from_json(json.dumps(row))
            found.setdefault(measurement.label, []).append(measurement)
    return {label: measured for label, measured in found.items() if len(measured) == len(runs)}


def write(
    options: argparse.Namespace, sides: Mapping[str, list[dict[str, Any]]], dataset: datasets.Dataset, n: int
) -> Path:
    """One record of everything, raw values included."""
    notes = [
        "Values are means over the seeds; sd is over the seeds. Intervals of single measurements are under facts.",
        f"Seconds counted: {options.budget}. Ours: the whole of train(), looking and saving included. Peer: its steps.",
        "Real pictures: other real pictures measured in the same way, n against n.",
    ]
    if PEER in sides:
        notes.append("The peer is unconditional, as shipped. Ours is conditional where the set has labels.")
    folder = {"folder": options.records} if options.records else {}
    return write_record(
        options.name,
        this_command(),
        record_rows(sides, options.seeds, n),
        notes=notes,
        **folder,
        data=dataset.summary(),
        data_fingerprint=dataset.fingerprint,
        sides=dict(sides),
    )


def work(options: argparse.Namespace) -> Path:
    """Train, measure, write."""
    recipe = our_recipe(options, options.seeds[0])
    dataset = datasets.load(recipe.data)
    command.say(dataset.summary())
    sampling = recipe.family.model_dump().get("sample", {})
    if options.peer and sampling and evaluations_of(sampling) > options.peer_evaluations:
        raise UsageError(
            f"--peer-evaluations {options.peer_evaluations}: ours uses {evaluations_of(sampling)} evaluations a "
            "picture; the peer must not be given fewer."
        )
    for seed in options.seeds if not options.skip_train else ():
        train_ours(options, seed, dataset)
        if options.peer:
            train_peer(options, seed, dataset)
    bench = Bench(dataset, options.features, recipe.eval.seed, command.say, "")
    sides = {OURS: [measure_ours(options, seed, bench) for seed in options.seeds]}
    if options.peer:
        sides[PEER] = [measure_peer(options, seed, bench) for seed in options.seeds]
    for row in record_rows(sides, options.seeds, bench.count(options.n)):
        spread = f" +- {row.sd:.4g}" if row.sd is not None else ""
        print(f"{row.what:<52}{row.value:>12.5g}{spread} {row.unit}")
    return write(options, sides, dataset, bench.count(options.n))


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


# -- small parts ------------------------------------------------------------------------------------------------------


def _our_folder(options: argparse.Namespace, seed: int) -> Path:
    return options.out / f"{OURS}-{seed}"


def _peer_file(options: argparse.Namespace, seed: int) -> Path:
    return options.out / f"{PEER}-{seed}.safetensors"


def _seconds_file(run: Run) -> Path:
    return run.path.with_suffix(".seconds.json")


def _drawing_seeds(count: int) -> list[int]:
    return [mix("quality-per-minute", index) for index in range(count)]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main())
