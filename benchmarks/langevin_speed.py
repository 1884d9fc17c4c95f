"""What does a step with Langevin noise cost over the same step without?

A network of about five million weights in 49 tensors, gradients that stand still, nothing but `step()` in the clock,
all cases interleaved in one process. The bare cases are torch's optimizers; the loop is the one that articles show.
Peers (posteriors, torch-sgld) are timed when they can be imported; neither is a dependency. On a busy machine,
`--clock cpu` with one thread counts the processor's time instead of the wall's.

Targets: SGD with noise of the law "matched" at most 2 times SGD, and at least 10 times faster than the loop; AdamW with
noise at most 1.3 times AdamW, both as torch's defaults build it on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pairs
import torch
from record import Row, this_command, write_record
from torch import Tensor
from torch.nn import Parameter

from imagekiln.optim import kernels
from imagekiln.optim.langevin import langevin
from imagekiln.optim.samplers import BAOAB, SGLD

LR, D = 1e-3, 1e-6
RATIOS = (
    ("SGD foreach + matched", "SGD foreach", 2.0),
    ("SGD foreach + gauss", "SGD foreach", None),
    ("SGLD matched", "SGD foreach", None),
    ("BAOAB matched", "SGD momentum fused", None),
    ("AdamW + matched", "AdamW", 1.3),
    ("AdamW + gauss", "AdamW", None),
    ("AdamW fused + matched", "AdamW fused", None),
    ("AdamW fused + gauss", "AdamW fused", None),
)
LOOP, FASTEST, WANTED = "the loop of articles", "SGD foreach + matched", 10.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15, help="rounds of all cases (15)")
    arguments.add_argument("--steps", type=int, default=5, help="steps of each case in a round (5)")
    arguments.add_argument("--threads", type=int, default=0, help="threads (0 = torch's own choice)")
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what is counted (wall)")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


def weights() -> list[Parameter]:
    """4,853,760 weights in 49 tensors, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(512, 384)] * 24 + [(384,)] * 24 + [(125_952,)]
    found = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return found


def loop() -> Callable[[], object]:
    """`p.data += -lr * g + normal(0, D)`, a tensor at a time."""
    parameters = weights()

    def step() -> None:
        for p in parameters:
            p.data += -LR * p.grad + torch.normal(0.0, D, size=p.shape)

    return step


def cases() -> dict[str, Callable[[], object]]:
    """Every case as a function that does one step."""
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    bare: dict[str, Any] = {
        "SGD foreach": lambda: sgd(weights(), lr=LR, foreach=True),
        "SGD momentum fused": lambda: sgd(weights(), lr=LR, momentum=0.9, fused=True),
        "AdamW": lambda: adamw(weights(), lr=LR),
        "AdamW fused": lambda: adamw(weights(), lr=LR, fused=True),
    }
    found = {name: make().step for name, make in bare.items()}
    for name in ("SGD foreach", "AdamW", "AdamW fused"):
        for law in ("gauss", "matched"):
            found[f"{name} + {law}"] = langevin(bare[name](), diffusion=D, law=law).step
    found["SGLD matched"] = SGLD(weights(), lr=LR, diffusion=D, law="matched").step
    found["BAOAB matched"] = BAOAB(weights(), lr=LR, diffusion=D, law="matched").step
    found[LOOP] = loop()
    return found | peers()


def peers() -> dict[str, Callable[[], object]]:
    """The peers that are installed."""
    found: dict[str, Callable[[], object]] = {}
    try:
        from torch_sgld import SGLD as PeerSGLD

        found["torch-sgld"] = PeerSGLD(weights(), lr=LR, temperature=D).step
    except ImportError:
        pass
    try:
        import posteriors
    except ImportError:
        return found
    parameters = {str(place): parameter.detach() for place, parameter in enumerate(weights())}

    def log_posterior(values: Mapping[str, Tensor], batch: object) -> tuple[Tensor, Tensor]:
        return -torch.stack([value.sum() for value in values.values()]).sum(), torch.tensor([])

    transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=LR, temperature=D)
    state = transform.init(parameters)

    def step() -> None:
        transform.update(state, None, inplace=True)

    found["posteriors (with a trivial gradient)"] = step
    return found


def cpu_timer(step: Callable[[], object]) -> pairs.Timer:
    """A timer of the processor time of this process, all its threads together."""

    def run(steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            step()
        return time.process_time() - start

    return run


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for; 1 when a target is missed."""
    options = parser().parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    library = kernels.library()
    print(f"native kernel: {'no, ' + library if isinstance(library, str) else 'yes'}", flush=True)
    clock = pairs.timer if options.clock == "wall" else cpu_timer
    timers = {name: clock(step) for name, step in cases().items()}
    seconds = pairs.interleave(timers, options.rounds, options.steps, 2, lambda index, now: None)
    rows, met = [], True
    for name, values in seconds.items():
        ms = [1000 * value / options.steps for value in values]
        rows.append(Row.median(f"{name}, a step", ms, "ms", options.steps))
        print(f"{name:40s} median {rows[-1].value:8.2f} ms   fastest {min(ms):8.2f} ms")
    targets = [(a, b, target, 1) for a, b, target in RATIOS] + [(LOOP, FASTEST, WANTED, -1)]
    for above, below, target, sign in targets:
        each = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        row = Row.median(f"{above} over {below}", each, "ratio", options.steps)
        fastest = min(seconds[above]) / min(seconds[below])
        rows += [row, Row(f"{above} over {below}, fastest rounds", fastest, "ratio", options.steps)]
        said = "" if target is None else f"   target {'<=' if sign > 0 else '>='} {target:g}"
        met &= target is None or sign * row.value <= sign * target
        print(f"{row.what:60s} {row.value:6.2f} ({min(each):.2f} .. {max(each):.2f}), fastest {fastest:.2f}{said}")
    if options.record:
        notes = [f"Intervals are the smallest and the largest of all rounds. Times are {options.clock} times."]
        print(write_record("langevin-speed", this_command(), rows, notes=notes, threads=torch.get_num_threads()))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
