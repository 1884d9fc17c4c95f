"""How many pictures a second does a GAN learn from, ours against the steps of PyTorch's DCGAN example?

A: `imagekiln`'s trainer with the `dcgan` family and its defaults (precision "auto", moving average, fused Adam).
B: the step of PyTorch's DCGAN example as shipped: float32, NCHW, real and fake pictures one after the other, one fake
   batch for both networks, Adam without fusion. The networks are ours, which have the example's layers to the last
   parameter; the loop is written out here.

Each runs in a process of its own on all threads, interleaved A B A B.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ours
import pairs
import torch
from record import hardware, this_command, versions, write_record
from torch import nn

from imagekiln.nets.dcgan import Discriminator, Generator

OURS, PEER = "imagekiln", "PyTorch's example"
PICTURES = 1024
Z_DIM, WIDTH = 100, 64


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7, help="pairs of measurements (7)")
    arguments.add_argument("--steps", type=int, default=4, help="training steps of each measurement (4)")
    arguments.add_argument("--warm-up", type=int, default=2, help="steps of each case before the first round (2)")
    arguments.add_argument("--batch", type=int, default=64, help="pictures a step (64)")
    arguments.add_argument("--size", type=int, default=64, help="height and width in pixels (64)")
    arguments.add_argument("--threads", type=int, default=0, help="threads of each case (0 = torch's own choice)")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


def build_ours(options: argparse.Namespace) -> tuple[Callable[[], object], dict[str, Any]]:
    """Our case, called in its own process."""
    _use_threads(options.threads)
    source = ours.in_memory(ours.random_pictures(PICTURES, 3, options.size))
    values = {
        "family": {"name": "dcgan", "z_dim": Z_DIM, "width": WIDTH},
        "train": {"batch": options.batch, "total_kimg": 1e6},
    }
    stack = contextlib.ExitStack()  # never closed: the process ends with the benchmark
    trainer = stack.enter_context(ours.trainer(values, source))
    precision = "fp32" if trainer.dtype is None else str(trainer.dtype).removeprefix("torch.")
    return trainer.step, _facts([trainer.family], precision)


def build_peer(options: argparse.Namespace) -> tuple[Callable[[], object], dict[str, Any]]:
    """The example's case, called in its own process."""
    _use_threads(options.threads)
    shape = (3, options.size, options.size)
    pictures = torch.from_numpy(ours.random_pictures(PICTURES, *shape[:2])).float() / 127.5 - 1
    generator, discriminator = Generator(Z_DIM, shape, WIDTH), Discriminator(shape, WIDTH)
    settings = {"lr": 2e-4, "betas": (0.5, 0.999)}
    of_generator = torch.optim.Adam(generator.parameters(), **settings)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), **settings)
    loss_of, real_label, fake_label = nn.BCELoss(), torch.ones(options.batch), torch.zeros(options.batch)

    def answer(images_BCHW: torch.Tensor) -> torch.Tensor:
        return discriminator(images_BCHW).sigmoid()

    def step() -> None:
        real = pictures[torch.randint(PICTURES, (options.batch,))]
        discriminator.zero_grad()
        loss_of(answer(real), real_label).backward()
        fake = generator(torch.randn(options.batch, Z_DIM))
        loss_of(answer(fake.detach()), fake_label).backward()
        of_discriminator.step()
        generator.zero_grad()
        loss_of(answer(fake), real_label).backward()
        of_generator.step()

    return step, _facts([generator, discriminator], "fp32")


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write the record if asked for."""
    options = parser().parse_args(given)
    print(f"torch {versions()['torch']}, {hardware()['processor']}, load {hardware()['load_1min']}")
    workers = {OURS: pairs.Worker(build_ours, options), PEER: pairs.Worker(build_peer, options)}
    found = pairs.race(workers, options.rounds, options.steps, options.warm_up, options.batch)
    rows = found.rows(OURS, options.steps)
    pairs.say(rows)
    fair = found.facts[OURS]["parameters"] == found.facts[PEER]["parameters"]
    if not fair:
        print("The networks differ in parameters: do not quote this.", file=sys.stderr)
    if options.record and fair:
        notes = ["Intervals are the smallest and the largest of all rounds."]
        print(write_record("gan-speed", this_command(), rows, notes=notes, cases=found.facts))
    return 0 if fair else 1


def _facts(modules: Sequence[nn.Module], precision: str) -> dict[str, Any]:
    parameters = sum(ours.parameters(module) for module in modules)
    return {"parameters": parameters, "precision": precision, "threads": torch.get_num_threads()}


def _use_threads(count: int) -> None:
    if count:
        torch.set_num_threads(count)


if __name__ == "__main__":
    sys.exit(main())
