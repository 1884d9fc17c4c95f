"""How strong must a drift be before `imagekiln monitor` sees it, and how often does it cry wolf?

Held-out pictures are dealt into a reference and new ones, without overlap; a drift of known strength is planted in the
new ones. The answer is that of the monitor's three main questions together (features, qualities, mix of classes), Holm
over the three, alarm at p <= 0.01. The null has nothing planted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from record import Row, this_command, write_record

from imagekiln.config import DataConfig
from imagekiln.core import mix
from imagekiln.data import Dataset, load, to_float
from imagekiln.engine.judges import judge
from imagekiln.engine.monitor import qualities
from imagekiln.metrics import RandomConv, Statistics, extract, wilson
from imagekiln.metrics.two_sample import category_test, holm, mean_tests, two_sample

ALPHA = 0.01
STRENGTHS = {
    "class mix": (0.1, 0.2, 0.3, 0.5),
    "brightness": (0.02, 0.05, 0.1, 0.2),
    "new class": (0.05, 0.1, 0.2),
}
QUESTIONS = ("features", "qualities", "mix", "any")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", default="builtin:cifar10", help="labelled pictures (builtin:cifar10)")
    arguments.add_argument("--held-out", type=float, default=0.1, help="share held out where none is published (0.1)")
    arguments.add_argument("--features", choices=["randconv", "judge"], default="randconv", help="feature network")
    arguments.add_argument("--n", type=int, default=500, help="pictures on each side (500)")
    arguments.add_argument("--draws", type=int, default=25, help="draws of each planted drift (25)")
    arguments.add_argument("--null-draws", type=int, default=200, help="draws without drift (200)")
    arguments.add_argument("--permutations", type=int, default=999, help="permutations of each test (999)")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


class Room:
    """Pictures to draw from, with their features and qualities, also brightened: everything computed once."""

    def __init__(self, dataset: Dataset, features: str) -> None:
        source = dataset.validation
        batch = source.read(range(min(len(source), 5000)))
        if batch.labels is None:
            raise SystemExit("The pictures need labels: a drift of classes is planted.")
        self.labels, self.num_classes = batch.labels, source.num_classes
        self.network: Any = (
            RandomConv(source.image_shape) if features == "randconv" else judge(dataset, 0, lambda said: None).family
        )
        self.views = {0.0: self._view(batch.images)}
        for strength in STRENGTHS["brightness"]:
            brighter = (batch.images.float() * (1 + strength)).round().clamp(0, 255).to(torch.uint8)
            self.views[strength] = self._view(brighter)

    def _view(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = images.split(200)
        return extract(self.network, map(to_float, parts)), torch.cat([qualities(part) for part in parts])

    def deal(self, kind: str, strength: float, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Rows of new pictures, rows of the reference, and how much brighter the new ones are."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        if kind == "brightness":
            return order[:n], order[n : 2 * n], strength
        last = self.labels[order] == self.num_classes - 1
        if kind == "new class":  # the last class is unknown to the reference
            known, unknown = order[~last], order[last][: round(strength * n)]
            return torch.cat([unknown, known[: n - len(unknown)]]), known[n : 2 * n], 0.0
        if kind == "class mix":  # this share of the new pictures is replaced by pictures of the last class
            reference, rest = order[:n], order[n:]
            extra = rest[self.labels[rest] == self.num_classes - 1][: round(strength * n)]
            others = rest[~torch.isin(rest, extra)]
            return torch.cat([extra, others[: n - len(extra)]]), reference, 0.0
        return order[:n], order[n : 2 * n], 0.0

    def ask(self, kind: str, strength: float, n: int, permutations: int, seed: int) -> dict[str, bool]:
        """Which questions raise the alarm in one draw, each alone, and `any`: the monitor's answer."""
        new, reference, brighter = self.deal(kind, strength, n, seed)
        (features, values), (own_features, own_values) = self.views[brighter], self.views[0.0]
        counts = [self.labels[rows].bincount(minlength=self.num_classes).tolist() for rows in (new, reference)]
        means = mean_tests(values[new], own_values[reference], permutations, seed)
        p_values = [
            two_sample(
                Statistics.of(features[new]), Statistics.of(own_features[reference]), permutations, seed=seed
            ).p_value,
            min(holm([test.p_value for test in means])),
            category_test(*counts, permutations, seed).p_value,
        ]
        alarms = [p <= ALPHA for p in p_values] + [min(holm(p_values)) <= ALPHA]
        return dict(zip(QUESTIONS, alarms, strict=True))


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    options = parser().parse_args(given)
    dataset = load(DataConfig(path=options.data, validation_fraction=options.held_out))
    room = Room(dataset, options.features)
    cells = [("nothing", 0.0), *((kind, s) for kind, strengths in STRENGTHS.items() for s in strengths)]
    rows = []
    print(f"{'planted':<22}" + "".join(f"{question:>11}" for question in QUESTIONS), flush=True)
    for kind, strength in cells:
        draws = options.null_draws if kind == "nothing" else options.draws
        alarms = [
            room.ask(kind, strength, options.n, options.permutations, mix("power", kind, round(1000 * strength), draw))
            for draw in range(draws)
        ]
        name = kind if kind == "nothing" else f"{kind} {strength:.0%}"
        shares = {question: sum(alarm[question] for alarm in alarms) for question in QUESTIONS}
        print(f"{name:<22}" + "".join(f"{count / draws:>11.1%}" for count in shares.values()), flush=True)
        rows += [
            Row(f"alarms, {name}, {question}", count / draws, n=options.n, interval=wilson(count, draws))
            for question, count in shares.items()
        ]
    if options.record:
        notes = [
            f"Share of draws with an alarm at p <= {ALPHA:g}; the interval is Wilson's of 95 % over {options.draws} "
            f"draws ({options.null_draws} with nothing planted).",
            "Each question alone at its own p-value; `any` is Holm over the three, as the monitor answers.",
            f"{dataset.name}, held-out pictures, features {options.features}.",
        ]
        name = f"drift-power-{dataset.name}-{options.features}".lower()
        print(write_record(name, this_command(), rows, notes=notes, permutations=options.permutations))


if __name__ == "__main__":
    main()
