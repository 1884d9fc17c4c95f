"""How many pictures a second does StyleGAN2 learn from, ours against the published code without its compiled kernels?

A: `imagekiln`'s trainer with the `stylegan2` family and its defaults (precision "auto", moving average, fused Adam).
B: networks and loss of NVIDIA's stylegan2-ada-pytorch, from a folder that you name: what it computes where its kernels
   cannot be compiled, float32, with its phases, its moving average and its Adam, looped as its training loop does.

Both have the layers of its preset for CIFAR-10: no path length penalty, one style a picture, a plain discriminator, R1
every 16 steps. Parameters must agree to 1 %. Each runs in a process of its own on all threads, interleaved A B A B.
That code may be used for research only, and nothing of it is here: clone it yourself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ours
import pairs
import torch
from record import hardware, this_command, versions, write_record
from torch import Tensor, nn

OURS, PEER = "imagekiln", "stylegan2-ada-pytorch"
PICTURES, STYLE, R1_EVERY, HALF_LIFE = 1024, 256, 16, 20_000
LARGEST_DIFFERENCE = 0.01


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--peer", type=Path, required=True, help="a clone of stylegan2-ada-pytorch")
    add("--rounds", type=int, default=5, help="pairs of measurements (5)")
    add("--steps", type=int, default=1, help="training steps of each measurement (1)")
    add("--warm-up", type=int, default=2, help="steps of each case before the first round (2); the first has R1")
    add("--batch", type=int, default=32, help="pictures a step (32)")
    add("--size", type=int, default=32, help="height and width in pixels (32)")
    add("--width", type=int, default=256, help="channels of all layers (256)")
    add("--record", action="store_true", help="also write a record under records/")
    return arguments


def build_ours(options: argparse.Namespace) -> tuple[Callable[[], object], dict[str, Any]]:
    """Our case, called in its own process."""
    source = ours.in_memory(ours.random_pictures(PICTURES, 3, options.size))
    layers = {"z_dim": STYLE, "width": options.width, "widest": options.width, "discriminator": "plain"}
    values = {
        "family": {"name": "stylegan2", "stddev_group": options.batch, **layers},
        "train": {"batch": options.batch, "total_kimg": 1e6},
    }
    stack = contextlib.ExitStack()  # never closed: the process ends with the benchmark
    trainer = stack.enter_context(ours.trainer(values, source))
    precision = "fp32" if trainer.dtype is None else str(trainer.dtype).removeprefix("torch.")
    parameters = sum(ours.parameters(trainer.family.get_submodule(name)) for name in ("generator", "discriminator"))
    return trainer.step, {"parameters": parameters, "precision": precision}


class PeerLoop:
    """The published training, a step at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        sys.path.insert(0, str(options.peer))
        from training import loss, networks  # type: ignore[import-not-found]

        torch.manual_seed(0)
        self.batch, self.steps = options.batch, 0
        self.pictures = torch.from_numpy(ours.random_pictures(PICTURES, 3, options.size)).float() / 127.5 - 1
        channels = {"channel_base": options.width * options.size, "channel_max": options.width}
        self.generator = networks.Generator(
            STYLE, 0, STYLE, options.size, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=channels
        ).requires_grad_(False)
        self.discriminator = networks.Discriminator(
            0, options.size, 3, architecture="orig", epilogue_kwargs={"mbstd_group_size": options.batch}, **channels
        ).requires_grad_(False)
        self.averaged = copy.deepcopy(self.generator).eval()
        self.loss = loss.StyleGAN2Loss(
            torch.device("cpu"),
            self.generator.mapping,
            self.generator.synthesis,
            self.discriminator,
            style_mixing_prob=0,
            r1_gamma=0.01,
            pl_weight=0,
        )
        lazy = R1_EVERY / (R1_EVERY + 1)
        self.of_generator = torch.optim.Adam(self.generator.parameters(), lr=0.0025, betas=(0.0, 0.99))
        self.of_discriminator = torch.optim.Adam(
            self.discriminator.parameters(), lr=0.0025 * lazy, betas=(0.0, 0.99**lazy)
        )

    def step(self) -> None:
        """All phases that are due, on the same pictures, and the moving average."""
        real = self.pictures[torch.randint(PICTURES, (self.batch,))]
        self._phase("Gmain", self.generator, self.of_generator, real, 1)
        self._phase("Dmain", self.discriminator, self.of_discriminator, real, 1)
        if self.steps % R1_EVERY == 0:
            self._phase("Dreg", self.discriminator, self.of_discriminator, real, R1_EVERY)
        self.steps += 1
        with torch.no_grad():
            decay = 0.5 ** (self.batch / HALF_LIFE)
            for mean, now in zip(self.averaged.parameters(), self.generator.parameters(), strict=True):
                mean.copy_(now.lerp(mean, decay))

    def _phase(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, gain: int) -> None:
        module.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        nothing = torch.zeros(len(real), 0)
        noise = torch.randn(len(real), STYLE)
        self.loss.accumulate_gradients(
            phase=name, real_img=real, real_c=nothing, gen_z=noise, gen_c=nothing, sync=True, gain=gain
        )
        module.requires_grad_(False)
        for parameter in module.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()


def build_peer(options: argparse.Namespace) -> tuple[Callable[[], object], dict[str, Any]]:
    """The peer's case, called in its own process."""
    loop = PeerLoop(options)
    parameters = sum(one.numel() for net in (loop.generator, loop.discriminator) for one in net.parameters())
    return loop.step, {"parameters": parameters, "precision": "fp32"}


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write the record if asked for."""
    options = parser().parse_args(given)
    print(f"torch {versions()['torch']}, {hardware()['processor']}, load {hardware()['load_1min']}")
    workers = {OURS: pairs.Worker(build_ours, options), PEER: pairs.Worker(build_peer, options)}
    found = pairs.race(workers, options.rounds, options.steps, options.warm_up, options.batch)
    rows = found.rows(OURS, options.steps)
    pairs.say(rows)
    mine, theirs = (found.facts[name]["parameters"] for name in (OURS, PEER))
    fair = abs(mine / theirs - 1) <= LARGEST_DIFFERENCE
    if not fair:
        print(f"The networks differ by {mine / theirs - 1:+.1%} in parameters: do not quote this.", file=sys.stderr)
    if options.record and fair:
        notes = [
            "Intervals are the smallest and the largest of all rounds; no step of a round has R1. The aim was 3 times "
            "the images/s of the published code without its compiled kernels.",
        ]
        print(write_record("stylegan2-speed", this_command(), rows, notes=notes, cases=found.facts))
    return 0 if fair else 1


if __name__ == "__main__":
    sys.exit(main())
