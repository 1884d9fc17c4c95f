"""What does the trainer cost over a bare loop of the same family, at about 20 ms a step?

Both sides train the same network with the same loss, precision, clipping, fused AdamW and moving averages, in one
process, in interleaved pairs. The bare loop has none of what the trainer adds: data order and seeds as functions of
images seen, phases, the finite check, schedules, notes for the log. The target is at most 3 %.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ours
import pairs
import torch
from record import Row, this_command, write_record

from imagekiln import optim
from imagekiln.core import Batch, Progress
from imagekiln.data import to_float
from imagekiln.engine.trainer import Trainer

TARGET_PERCENT = 3.0
TRAINER, BARE = "trainer", "bare loop"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15, help="pairs of measurements (15)")
    arguments.add_argument("--steps", type=int, default=20, help="training steps of each measurement (20)")
    arguments.add_argument("--warm-up", type=int, default=10, help="steps of each side before the first round (10)")
    arguments.add_argument("--batch", type=int, default=16, help="pictures a step (16)")
    arguments.add_argument("--size", type=int, default=16, help="height and width in pixels (16)")
    arguments.add_argument("--widths", type=int, nargs="+", default=[16, 32], help="channels by level (16 32)")
    arguments.add_argument("--threads", type=int, default=0, help="threads (0 = torch's own choice)")
    arguments.add_argument("--profile", action="store_true", help="also print what the trainer's own lines cost")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


def recipe_values(options: argparse.Namespace) -> dict[str, Any]:
    """A small diffusion model with every default of the trainer."""
    attention = [False] * (len(options.widths) - 1) + [True]
    family = {"name": "diffusion", "widths": options.widths, "layers": 1, "attention": attention}
    return {"family": family, "train": {"batch": options.batch, "total_kimg": 1e6}}


def bare_loop(trainer: Trainer, images_NCHW: torch.Tensor) -> Callable[[], object]:
    """The shortest loop that trains a copy of the trainer's family in the same way."""
    family, config = copy.deepcopy(trainer.family).train().requires_grad_(True), trainer.config
    phase = trainer.family.phases[0]
    named = [(name, p) for name, p in family.named_parameters() if name.startswith(f"{phase.trains[0]}.")]
    parameters = [parameter for _, parameter in named]
    optimizer = optim.build(trainer.recipe.optim[phase.optimizer], named)
    averages = [[parameter.detach().clone() for parameter in parameters] for _ in config.averages]
    progress, batch, device = Progress(0, trainer.total_nimg), config.batch, trainer.device

    def step() -> None:
        rows = torch.randint(0, len(images_NCHW), (batch,))
        images_BCHW = to_float(images_NCHW[rows].to(device))
        with torch.autocast(device.type, dtype=trainer.dtype, enabled=trainer.dtype is not None):
            loss = family.loss(phase.name, Batch(images_BCHW), progress).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for average in averages:
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1e-3)

    return step


def profile(trainer: Trainer, steps: int) -> None:
    """Where the time of the trainer's steps goes, by function."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        trainer.step()
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("cumulative").print_stats(
        "imagekiln|clip_grad|manual_seed", 30
    )


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for; 1 when the target is missed."""
    options = parser().parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    pictures = ours.random_pictures(1024, 1, options.size)
    with ours.trainer(recipe_values(options), ours.in_memory(pictures)) as trainer:
        cases = {
            TRAINER: pairs.timer(trainer.step),
            BARE: pairs.timer(bare_loop(trainer, torch.from_numpy(pictures))),
        }

        def say(index: int, seconds: Mapping[str, float]) -> None:
            times = "   ".join(f"{name} {1000 * value / options.steps:7.2f}" for name, value in seconds.items())
            print(f"round {index + 1}, ms/step:   {times}", flush=True)

        seconds = pairs.interleave(cases, options.rounds, options.steps, options.warm_up, say)
        if options.profile:
            profile(trainer, 5 * options.steps)
    percent = [100 * (mine / bare - 1) for mine, bare in zip(seconds[TRAINER], seconds[BARE], strict=True)]
    overhead = Row.median("the trainer over a bare loop", percent, "percent", options.steps)
    low, high = min(percent), max(percent)
    print(
        f"overhead {overhead.value:.2f} % ({low:.2f} .. {high:.2f}), target <= {TARGET_PERCENT:g} %, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if options.record:
        times = [
            Row.median(f"{name}, a step", [1000 * v / options.steps for v in seconds[name]], "ms", options.steps)
            for name in cases
        ]
        notes = ["Intervals are the smallest and the largest of all rounds."]
        print(write_record("trainer-overhead", this_command(), [overhead, *times], notes=notes))
    return 0 if overhead.value <= TARGET_PERCENT else 1


if __name__ == "__main__":
    sys.exit(main())
