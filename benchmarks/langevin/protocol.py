"""What a task, an arm and a readout are, and how two methods are compared.

An arm is one way of training with a few settings to choose from; a readout is one way to predict from what it trained:
its last weights, an average of weights, an ensemble of samples. A method is an arm with a readout. Every method chooses
among equally many settings of its own, by the primary metric on a validation split, with a seed that is used for
nothing else; an arm that is another one with something added starts from what that one chose.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagekiln.metrics.interval import student_975

Settings = Mapping[str, Any]
Scores = dict[str, dict[str, float]]
"""Metrics by readout; "validation" is what settings are chosen by, lower is better."""


@dataclass(frozen=True)
class Metric:
    """What is measured. worst: what a training counts that left the finite numbers. yes_no: 0 or 1 for every seed."""

    lower: bool
    worst: float
    yes_no: bool = False


@dataclass(frozen=True, eq=False)
class Arm:
    """One way of training.

    settings: what is tried. ours: whether it has Langevin noise. after: the arm whose chosen settings it starts from.
    without: the arm that is the same at D = 0; as a rule that it starts from, else the control of its task.
    """

    name: str
    settings: tuple[Settings, ...]
    readouts: tuple[str, ...] = ("last",)
    ours: bool = False
    after: str = ""
    without: str = ""


@dataclass(frozen=True)
class Places:
    """Where pictures are, as `imagekiln train` takes them, where things are kept, and whether this is only a try."""

    cifar10: str = "builtin:cifar10"
    fashion: str = "builtin:fashion-mnist"
    store: Path = Path("langevin-tasks")
    quick: bool = False

    def num(self, usual: int, quick: int) -> int:
        """A size: the usual one, or that of a try."""
        return quick if self.quick else usual


@dataclass(frozen=True, eq=False)
class Task:
    """One question. train(settings, seed, places) trains once and scores every readout of the arm.

    control: the arm without noise on the same code path. num_seeds: at least so many. expected: said before measuring.
    """

    name: str
    title: str
    metrics: Mapping[str, Metric]
    arms: tuple[Arm, ...]
    control: str
    train: Callable[[Settings, int, Places], Scores]
    num_seeds: int = 5
    expected: str = ""
    fixed: Settings = field(default_factory=dict)

    @property
    def methods(self) -> list[tuple[Arm, str]]:
        """Every arm with each of its readouts."""
        return [(arm, readout) for arm in self.arms for readout in arm.readouts]


def key_of(settings: Settings) -> str:
    """Settings as text, the same for the same settings."""
    return json.dumps(dict(settings), sort_keys=True)


@dataclass(frozen=True)
class Difference:
    """A method minus a control over common seeds, with a 95 % interval, and win, tie or loss of the method."""

    mean: float
    low: float
    high: float
    num: int
    verdict: str


def difference(ours: Sequence[float], theirs: Sequence[float], metric: Metric) -> Difference:
    """Paired: Student's t over seeds, or for yes and no the interval of Agresti and Min (2005), which adds one pair of
    each kind so that it is not of length 0 where all pairs agree.

    >>> difference([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], Metric(lower=True, worst=9.0)).verdict
    'win'
    >>> difference([1.0] * 20, [0.0] * 20, Metric(lower=False, worst=0.0, yes_no=True)).verdict
    'win'
    """
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    num, mean = len(each), statistics.fmean(each)
    if metric.yes_no:
        # Half a pair more in each of the four cells: b and c, the pairs that differ, get one together, n two.
        total = num + 2
        more, less = (sum(sign * d > 0 for d in each) + 0.5 for sign in (1, -1))
        middle = (more - less) / total
        reach = 1.959964 * math.sqrt(max(0.0, more + less - (more - less) ** 2 / total)) / total
        low, high = max(-1.0, middle - reach), min(1.0, middle + reach)
    else:
        reach = student_975(num - 1) * statistics.stdev(each) / math.sqrt(num) if num > 1 else math.inf
        low, high = mean - reach, mean + reach
    better, worse = (high < 0, low > 0) if metric.lower else (low > 0, high < 0)
    return Difference(mean, low, high, num, "win" if better else "loss" if worse else "tie")
