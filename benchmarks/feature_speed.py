"""How many pictures a second do Inception features see, ours against the way pytorch-fid runs the same network?

A: `imagekiln`'s network: normalization folded, channels last, 1x1 convolutions of one input merged.
B: pytorch-fid's way: convolution, normalization and ReLU one after the other, float32, batches of 50, in a plain
   network written out here from the published layer table, so that no other package is needed.
C: A in bfloat16.

All see the same pictures resized to 299 pixels by the same filter, interleaved A B C A B C in
one process. The features of A and B must agree to 1e-6; how far bfloat16 moves a Frechet distance is measured too.
Without the published weights all are run with random ones: the speed is the same, the distances are not "FID".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ours
import pairs
import torch
from record import Row, hardware, this_command, versions, write_record
from torch import Tensor, nn
from torch.nn import functional

from imagekiln import data as datasets
from imagekiln.config import DataConfig
from imagekiln.data import to_float
from imagekiln.metrics import FrechetDistance, Statistics, extract
from imagekiln.metrics.inception import Inception, layers, published_weights, random_weights

OURS, PEER, OURS_BF16 = "imagekiln", "pytorch-fid's way", "imagekiln bf16"
PEER_BATCH = 50
LARGEST_DIFFERENCE = 1e-6


class Plain(nn.Module):
    """The network layer by layer, as pytorch-fid runs it: convolution, normalization, ReLU; NCHW; nothing merged."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {name: name.replace(".", "-") for name in layers()}
        self.convolutions = nn.ModuleDict()
        for name, layer in layers().items():
            convolution = nn.Conv2d(
                layer.inputs, layer.outputs, layer.kernel, layer.stride, padding=layer.padding, bias=False
            )
            norm = nn.BatchNorm2d(layer.outputs, eps=0.001)
            own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            convolution.load_state_dict({"weight": own["conv.weight"]})
            norm.load_state_dict({key[3:]: own[key] for key in own if key.startswith("bn.")}, strict=False)
            self.convolutions[self.names[name]] = nn.Sequential(convolution, norm, nn.ReLU(inplace=True))
        self.eval().requires_grad_(False)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """features_BD of images_BCHW in [-1, 1]; the filter is pytorch-fid's, and so is the scale."""
        x = functional.interpolate((images_BCHW + 1) / 2, (299, 299), mode="bilinear", align_corners=False)
        x = self.run("Conv2d_1a_3x3", 2 * x - 1)
        x = functional.max_pool2d(self.run("Conv2d_2b_3x3", self.run("Conv2d_2a_3x3", x)), 3, 2)
        x = functional.max_pool2d(self.run("Conv2d_4a_3x3", self.run("Conv2d_3b_1x1", x)), 3, 2)
        for block in ("5b", "5c", "5d"):
            x = self.join(block, x, "branch1x1", "branch5x5_1 2", "branch3x3dbl_1 2 3", "average")
        x = self.join("6a", x, "branch3x3", "branch3x3dbl_1 2 3", "shrink")
        for block in ("6b", "6c", "6d", "6e"):
            x = self.join(block, x, "branch1x1", "branch7x7_1 2 3", "branch7x7dbl_1 2 3 4 5", "average")
        x = self.join("7a", x, "branch3x3_1 2", "branch7x7x3_1 2 3 4", "shrink")
        for block, pool in (("7b", "average"), ("7c", "maximum")):
            x = self.join(block, x, "branch1x1", "branch3x3_1 2a|2b", "branch3x3dbl_1 2 3a|3b", pool)
        return functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1)

    def run(self, name: str, x: Tensor) -> Tensor:
        """One layer."""
        return self.convolutions[self.names[name]](x)

    def join(self, block: str, x: Tensor, *branches: str) -> Tensor:
        """The branches of a block side by side."""
        outputs: list[Tensor] = []
        for branch in branches:
            if branch == "shrink":
                outputs.append(functional.max_pool2d(x, 3, 2))
            elif branch == "average":
                pooled = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
                outputs.append(self.run(f"Mixed_{block}.branch_pool", pooled))
            elif branch == "maximum":
                outputs.append(self.run(f"Mixed_{block}.branch_pool", functional.max_pool2d(x, 3, 1, 1)))
            else:
                first, *rest = branch.split()
                stem = first.rpartition("_")[0] or first
                found = [self.run(f"Mixed_{block}.{first}", x)]
                for step in rest:
                    found = [self.run(f"Mixed_{block}.{stem}_{part}", found[0]) for part in step.split("|")]
                outputs += found
        return torch.cat(outputs, 1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of measurements (5)")
    arguments.add_argument(
        "--images", type=int, default=PEER_BATCH, help=f"pictures of each measurement ({PEER_BATCH})"
    )
    arguments.add_argument(
        "--data", metavar="DATA", help="pictures, such as builtin:cifar10; else random ones of 32x32"
    )
    arguments.add_argument("--weights", type=Path, metavar="FILE", help="published Inception weights; else random ones")
    arguments.add_argument(
        "--distance", type=int, default=0, metavar="N", help="pictures of the bf16 distance (0 = none)"
    )
    arguments.add_argument("--threads", type=int, default=0, help="threads of each case (0 = torch's own choice)")
    arguments.add_argument(
        "--cpu-time", action="store_true", help="count processor time: on one thread of a busy machine"
    )
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


def pictures(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Two sets of pictures uint8: the first is also what is timed."""
    count = max(options.images, options.distance)
    if options.data is None:
        both = torch.from_numpy(ours.random_pictures(2 * count, 3, 32))
        return both[:count], both[count:]
    dataset = datasets.load(DataConfig(path=options.data, channels=3))
    return dataset.train.read(range(count)).images, dataset.validation.read(range(count)).images


def networks(options: argparse.Namespace) -> dict[str, Any]:
    """The three cases."""
    weights = published_weights(options.weights) if options.weights else random_weights(0)
    return {
        OURS: Inception(weights, "pytorch-fid"),
        PEER: Plain(weights),
        OURS_BF16: Inception(weights, "pytorch-fid", torch.bfloat16),
    }


def timer(network: Any, images_NCHW: Tensor, cpu_time: bool) -> pairs.Timer:
    """Seconds of features of all the pictures; our network splits them as it likes, the peer by 50."""
    clock: Callable[[], float] = time.process_time if cpu_time else time.perf_counter

    def run(steps: int) -> float:
        start = clock()
        with torch.inference_mode():
            for _ in range(steps):
                for part in to_float(images_NCHW).split(PEER_BATCH):
                    network.features(part)
        return clock() - start

    return run


def disagreement(cases: Mapping[str, Any], images_NCHW: Tensor) -> dict[str, float]:
    """Relative difference of features from the peer's, as norms over all the pictures."""
    found = {name: extract(network, [to_float(images_NCHW)]).double() for name, network in cases.items()}
    return {name: float((found[name] - found[PEER]).norm() / found[PEER].norm()) for name in cases}


def distances(cases: Mapping[str, Any], first: Tensor, second: Tensor) -> dict[str, float]:
    """Frechet distance of the two sets by our network in float32 and in bfloat16."""
    found = {}
    for name in (OURS, OURS_BF16):
        features = [extract(cases[name], (to_float(part) for part in side.split(96))) for side in (first, second)]
        found[name] = FrechetDistance()(*(Statistics.of(rows) for rows in features))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds; returns seconds by case and round, ratios, agreement and distances."""
    cases = networks(options)
    first, second = pictures(options)
    timed = first[: options.images]

    def say(index: int, seconds: Mapping[str, float]) -> None:
        rates = "   ".join(f"{name} {len(timed) / value:7.2f}" for name, value in seconds.items())
        print(f"round {index + 1}, images/s:   {rates}", flush=True)

    differences = disagreement(cases, timed[:10])
    print(
        "relative difference of features from the peer's:", {k: f"{v:.1e}" for k, v in differences.items()}, flush=True
    )
    timers = {name: timer(network, timed, options.cpu_time) for name, network in cases.items()}
    seconds = pairs.interleave(timers, options.rounds, 1, 1, say)
    return {
        "images": len(timed),
        "seconds": seconds,
        "ratios": {name: pairs.ratio(seconds[PEER], seconds[name]) for name in (OURS, OURS_BF16)},
        "differences": differences,
        "distances": distances(cases, first[: options.distance], second[: options.distance])
        if options.distance
        else {},
    }


def rows(found: Mapping[str, Any], options: argparse.Namespace) -> list[Row]:
    """What is measured as rows of a record."""
    rates = {name: [found["images"] / value for value in found["seconds"][name]] for name in found["seconds"]}
    result = [Row.median(f"{name}, Inception features", rates[name], "images/s", found["images"]) for name in rates]
    for name in found["ratios"]:
        values = [mine / theirs for mine, theirs in zip(rates[name], rates[PEER], strict=True)]
        result.append(Row.median(f"{name} / {PEER}", values, "times the images/s", found["images"]))
    result += [Row(f"{name}, features against the peer's", found["differences"][name], "relative") for name in rates]
    for name, value in found["distances"].items():
        result.append(Row(f"{name}, Frechet distance", value, "", options.distance))
    return result


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options = parser().parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    weights = "the published weights" if options.weights else "random weights: distances below are not FID"
    seen = f"pictures of {options.data}" if options.data else "random pictures"
    clock = "processor time" if options.cpu_time else "time on the clock"
    notes = [
        f"{seen}, {weights}; {clock}.",
        "Intervals are the smallest and the largest of all rounds.",
        f"{PEER} is the same network written out in the benchmark, not the package itself.",
    ]
    print(
        f"torch {versions()['torch']}, {hardware()['processor']}, {torch.get_num_threads()} threads, "
        f"load {hardware()['load_1min']}; {notes[0]}",
        flush=True,
    )
    found = measure(options)
    for name, value in found["ratios"].items():
        print(f"{name} / {PEER}: {value} times the images/s, median of {options.rounds} rounds (smallest .. largest)")
    for name, value in found["distances"].items():
        print(f"{name}: Frechet distance {value:.6g} of {options.distance} and {options.distance} pictures")
    same = found["differences"][OURS] <= LARGEST_DIFFERENCE
    if not same:
        print(f"The features differ by {found['differences'][OURS]:.1e}: do not quote this.", file=sys.stderr)
    if options.json:
        text = json.dumps({**found, "notes": notes, "hardware": hardware(), "versions": versions()}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.record and same:
        print(write_record("feature-speed", this_command(), rows(found, options), notes=notes))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
