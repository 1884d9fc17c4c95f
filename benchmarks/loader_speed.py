"""Does training wait for data, at 32 px and with the steps of the `diffusion` recipe?

Pictures of random blocks are written as PNGs, prepared, and written as shards. The step is the trainer's own, with the
recipe's settings, on random pictures in memory; the loader makes the same number of batches of the same size from the
prepared set (`images.npy`, mapped or in memory as training opens it) and from the shards, where every picture is
decoded again, without threads that read ahead. All are interleaved in one process. The target is 10 batches in the
time of a step.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ours
import pairs
import torch
from PIL import Image
from record import Row, this_command, write_record

from imagekiln import data
from imagekiln.config import DataConfig
from imagekiln.core import Source
from imagekiln.engine import recipe as recipes

SIZE, TARGET = 32, 10.0
STEP = "training step"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--recipe", default="diffusion", help="recipe whose step is timed (diffusion)")
    add("--pictures", type=int, default=2000, help="pictures of the set (2000)")
    add("--rounds", type=int, default=7, help="interleaved rounds (7)")
    add("--steps", type=int, default=4, help="steps, and batches, of each measurement (4)")
    add("--warm-up", type=int, default=2, help="steps of each case before the first round (2)")
    add("--threads", type=int, default=0, help="threads (0 = torch's own choice)")
    add("--record", action="store_true", help="also write a record under records/")
    return arguments


def make_pictures(folder: Path, count: int) -> None:
    """PNGs of 32 x 32 pixels in blocks of 4 x 4, with some noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        blocks = rng.integers(0, 256, (SIZE // 4, SIZE // 4, 3)).repeat(4, 0).repeat(4, 1)
        pixels = np.clip(blocks + rng.normal(0, 8, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png")


def sources(folder: Path, count: int) -> dict[str, Source]:
    """The same pictures as training reads them, by where they lie."""
    make_pictures(folder / "pictures", count)
    data.prepare([str(folder / "pictures")], folder / "set", data.PrepareConfig(size=SIZE))
    prepared = data.load(DataConfig(path=str(folder / "set")))
    data.write_shards(prepared, folder / "shards")
    return {"prepared set": prepared.train, "shards": data.load(DataConfig(path=str(folder / "shards"))).train}


def batches(source: Source, size: int) -> pairs.Timer:
    """A timer of making batches, each the one after the last."""
    loader, numbers = data.Loader(source, 0, size), itertools.count()
    return pairs.timer(lambda: loader.batch(next(numbers) * size))


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options = parser().parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = recipes.resolve(options.recipe)
    memory = ours.in_memory(ours.random_pictures(1024, 3, SIZE))
    with tempfile.TemporaryDirectory() as folder, ours.trainer(recipe.model_dump(mode="json"), memory) as trainer:
        cases = {STEP: pairs.timer(trainer.step)}
        cases |= {
            name: batches(source, recipe.train.batch)
            for name, source in sources(Path(folder), options.pictures).items()
        }

        def say(index: int, seconds: dict[str, float]) -> None:
            each = "   ".join(f"{name} {1e3 * value / options.steps:8.2f} ms" for name, value in seconds.items())
            print(f"round {index + 1}: {each}", flush=True)

        seconds = pairs.interleave(cases, options.rounds, options.steps, options.warm_up, say)
    rows = []
    for name, values in seconds.items():
        rows.append(Row.median(name, [1e3 * value / options.steps for value in values], "ms", recipe.train.batch))
        if name != STEP:
            ratios = [step / mine for step, mine in zip(seconds[STEP], values, strict=True)]
            rows.append(Row.median(f"batches from the {name} in a step", ratios, "batches", options.steps))
    for row in rows:
        print(f"{row.what:<40}{row.value:>10.4g} {row.unit} {row.interval or ''}")
    if options.record:
        notes = [
            f"Recipe {options.recipe}, {SIZE} px, batches of {recipe.train.batch}, {torch.get_num_threads()} threads.",
            "Medians of all rounds, with the smallest and the largest; n is pictures a batch, or batches a round.",
            f"The aim was {TARGET:g} batches in the time of a step.",
        ]
        print(write_record("loader-speed", this_command(), rows, notes=notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
