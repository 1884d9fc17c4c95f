"""How many pictures a second does training see, ours against diffusers' example with and without its bf16 flag?

A: `imagekiln`'s trainer with its own defaults (precision "auto", moving average, fused AdamW).
B: diffusers' `train_unconditional.py` loop through accelerate as shipped: float32, attention heads of 8 channels.
C: the same with `--mixed_precision bf16`.

All three train a U-Net of the same widths, layers and attention on the same random pictures, each in a process of its
own on all threads, interleaved A B C A B C. Parameters agree to 5 %; ours has scale-and-shift time conditioning and
wider attention heads, its defaults, so this compares trainings as shipped and not the same arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ours
import pairs
import peer
import torch
from record import Row, hardware, this_command, versions, write_record

OURS, PEER, PEER_BF16 = "imagekiln", "diffusers fp32", "diffusers bf16"
PICTURES = 1024
LARGEST_DIFFERENCE = 0.05


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5, help="pairs of measurements (5)")
    arguments.add_argument("--steps", type=int, default=4, help="training steps of each measurement (4)")
    arguments.add_argument("--warm-up", type=int, default=2, help="steps of each case before the first round (2)")
    arguments.add_argument("--batch", type=int, default=64, help="pictures a step (64)")
    arguments.add_argument("--size", type=int, default=32, help="height and width in pixels (32)")
    arguments.add_argument(
        "--widths", type=int, nargs="+", default=[64, 128, 256], help="channels by level (64 128 256)"
    )
    arguments.add_argument("--layers", type=int, default=2, help="residual blocks a level (2)")
    arguments.add_argument("--threads", type=int, default=0, help="threads of each case (0 = torch's own choice)")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


def recipe_values(options: argparse.Namespace) -> dict[str, Any]:
    """Our recipe: the size of the network is given, everything else is the diffusion family's default."""
    attention = [level > 0 for level in range(len(options.widths))]
    family = {"name": "diffusion", "widths": options.widths, "layers": options.layers, "attention": attention}
    return {"family": family, "train": {"batch": options.batch, "total_kimg": 1e6}}


def build_ours(options: argparse.Namespace) -> tuple[Callable[[], object], dict[str, Any]]:
    """Our case, called in its own process."""
    _use_threads(options.threads)
    source = ours.in_memory(ours.random_pictures(PICTURES, 3, options.size))
    stack = contextlib.ExitStack()  # never closed: the process ends with the benchmark
    trainer = stack.enter_context(ours.trainer(recipe_values(options), source))
    precision = "fp32" if trainer.dtype is None else str(trainer.dtype).removeprefix("torch.")
    return trainer.step, {
        "parameters": ours.parameters(trainer.family.get_submodule("unet")),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "network": trainer.family.get_submodule("unet").diffusers_config(),
    }


def build_peer(
    options: argparse.Namespace, network: Mapping[str, Any], mixed_precision: str
) -> tuple[Callable[[], object], dict[str, Any]]:
    """The peer's case, called in its own process."""
    _use_threads(options.threads)
    pictures = ours.random_pictures(PICTURES, 3, options.size)
    loop = peer.PeerLoop(
        peer.network_config(network),
        pictures,
        batch=options.batch,
        total_steps=100_000,
        mixed_precision=mixed_precision,
    )
    precision = "bfloat16" if mixed_precision == "bf16" else "fp32"
    facts = {"parameters": ours.parameters(loop.net), "precision": precision, "threads": torch.get_num_threads()}
    return loop.step, facts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds; returns facts by case, seconds by case and round, and the ratios."""
    workers = {OURS: pairs.Worker(build_ours, options)}
    network = workers[OURS].facts.pop("network")
    workers[PEER] = pairs.Worker(build_peer, options, network, "no")
    workers[PEER_BF16] = pairs.Worker(build_peer, options, network, "bf16")
    for name, worker in workers.items():
        print(
            f"{name:<16}{worker.facts['parameters']:>12,} parameters, {worker.facts['precision']}, "
            f"{worker.facts['threads']} threads",
            flush=True,
        )
    images = options.steps * options.batch

    def say(index: int, seconds: Mapping[str, float]) -> None:
        rates = "   ".join(f"{name} {images / value:7.2f}" for name, value in seconds.items())
        print(f"round {index + 1}, images/s:   {rates}", flush=True)

    try:
        seconds = pairs.interleave(workers, options.rounds, options.steps, options.warm_up, say)
    finally:
        for worker in workers.values():
            worker.close()
    facts = {name: worker.facts for name, worker in workers.items()}
    ratios = {name: pairs.ratio(seconds[name], seconds[OURS]) for name in (PEER, PEER_BF16)}
    return {"cases": facts, "images_a_round": images, "seconds": seconds, "ratios": ratios}


def rows(found: Mapping[str, Any], options: argparse.Namespace) -> list[Row]:
    """What is measured as rows of a record."""
    rates = {name: [found["images_a_round"] / value for value in found["seconds"][name]] for name in found["seconds"]}
    result = [Row.median(f"{name}, training", rates[name], "images/s", options.steps) for name in rates]
    for name in found["ratios"]:
        values = [mine / theirs for mine, theirs in zip(rates[OURS], rates[name], strict=True)]
        result.append(Row.median(f"{OURS} / {name}", values, "times the images/s", options.steps))
    return result


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options = parser().parse_args(given)
    print(f"torch {versions()['torch']}, {hardware()['processor']}, load {hardware()['load_1min']}")
    found = measure(options)
    for name, value in found["ratios"].items():
        print(f"{OURS} / {name}: {value} times the images/s, median of {options.rounds} pairs (smallest .. largest)")
    mine, theirs = found["cases"][OURS]["parameters"], found["cases"][PEER]["parameters"]
    fair = abs(mine / theirs - 1) <= LARGEST_DIFFERENCE
    if not fair:
        print(f"The networks differ by {mine / theirs - 1:+.1%} in parameters: do not quote this.", file=sys.stderr)
    if options.json:
        text = json.dumps(
            {**found, "hardware": hardware(), "versions": versions(), "options": vars(options)}, indent=1, default=str
        )
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.record and fair:
        notes = [
            "Intervals are the smallest and the largest of all rounds.",
            "Trainings as shipped, not the same arithmetic: our attention heads have 64 channels, the peer's 8.",
        ]
        print(write_record("train-speed", this_command(), rows(found, options), notes=notes, cases=found["cases"]))
    return 0 if fair else 1


def _use_threads(count: int) -> None:
    if count:
        torch.set_num_threads(count)


if __name__ == "__main__":
    sys.exit(main())
