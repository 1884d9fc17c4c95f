"""How the temperature changes over a training: factors of D as functions of progress in [0, 1], and cyclical sampling.

    constant      1
    linear        1 - p
    cosine        (1 + cos(pi p)) / 2
    polynomial    (1 - p)^power
    cyclical      0 while a cycle explores, 1 while it samples                            Zhang et al. 2020
    annealed      1 until `hot`, then half a cosine down to 0 at `cold`, 0 for the rest, whose weights are averaged

A factor acts on D, so the noise's deviation goes with its root. The learning rate is another dial: it sets how fast the
law is reached, not which law. When it falls to 0 the weights stop moving, whatever D is, so that a fixed D and a
falling rate already end in a quiet training, and lowering both does it twice; `anneals_twice` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from imagekiln.core import half_cosine
from imagekiln.errors import UsageError, did_you_mean

Schedule = Callable[[float], float]
"""Factor of D, at least 0, as a function of progress in [0, 1]."""


def constant() -> Schedule:
    """Always 1."""
    return lambda progress: 1.0


def linear() -> Schedule:
    """From 1 to 0 along a line.

    >>> linear()(0.25)
    0.75
    """
    return lambda progress: 1.0 - _clamped(progress)


def cosine() -> Schedule:
    """From 1 to 0 along half a cosine.

    >>> round(cosine()(0.5), 12)
    0.5
    """
    return lambda progress: half_cosine(1.0, 0.0, _clamped(progress))


def polynomial(power: float = 2.0) -> Schedule:
    """From 1 to 0 as (1 - progress)^power, power > 0.

    >>> polynomial(2.0)(0.5)
    0.25
    """
    if not (power > 0 and math.isfinite(power)):
        raise UsageError(f"power is {power}; expected a finite number above 0.")
    return lambda progress: (1.0 - _clamped(progress)) ** power


@dataclass(frozen=True)
class Cycles:
    """Cyclical stochastic-gradient MCMC (Zhang et al. 2020, "Cyclical stochastic gradient MCMC", algorithm 1).

    Each cycle starts at the full learning rate, without noise, to find a new mode; from `explore` of the cycle on it
    samples at temperature 1 while the rate goes to 0. Called with progress it is the factor of D.

    num: cycles in the run. explore: share of a cycle without noise, in [0, 1).

    >>> cycles = Cycles(num=4, explore=0.5)
    >>> cycles(0.1), cycles(0.2), round(cycles.lr(0.125), 9), cycles.lr(0.25)
    (0.0, 1.0, 0.5, 1.0)
    """

    num: int = 4
    explore: float = 0.8

    def __post_init__(self) -> None:
        if self.num < 1 or not 0 <= self.explore < 1:
            raise UsageError(f"{self}: expected num of at least 1 and explore in [0, 1).")

    def __call__(self, progress: float) -> float:
        return 1.0 if self.position(progress) >= self.explore else 0.0

    def lr(self, progress: float) -> float:
        """Factor of the learning rate: (1 + cos(pi r)) / 2, r the position in the cycle (equation 1 of the paper)."""
        return (1 + math.cos(math.pi * self.position(progress))) / 2

    def position(self, progress: float) -> float:
        """Where in its cycle the run is, in [0, 1); the end of the run is the end of the last cycle, 1."""
        inside = _clamped(progress) * self.num
        # The end of a cycle is the start of the next, also where rounding puts it a little before.
        return 1.0 if inside >= self.num else (inside + 1e-12) % 1.0

    def collects(self, step: int, num_steps: int, per_cycle: int = 3) -> bool:
        """Whether to keep a sample after this step (0 .. num_steps - 1): the last of per_cycle equal parts of sampling.

        >>> [step for step in range(20) if Cycles(num=2, explore=0.5).collects(step, 20, per_cycle=2)]
        [7, 9, 17, 19]
        """
        before, after = (self._samples(at / num_steps, per_cycle) for at in (step, step + 1))
        return after > before

    def _samples(self, progress: float, per_cycle: int) -> int:
        whole, inside = divmod(_clamped(progress) * self.num + 1e-12, 1.0)
        # A part ends where a little more than its last step is done, so that the cycle's end closes the last one.
        return int(whole) * per_cycle + int(max(0.0, inside - self.explore) / (1 - self.explore) * per_cycle + 1e-9)


def cyclical(num: int = 4, explore: float = 0.8) -> Cycles:
    """`Cycles` as a schedule."""
    return Cycles(num, explore)


@dataclass(frozen=True)
class Annealed:
    """Hot, then cooled to 0, then cold for the rest: average the weights of the cold part.

    hot: progress at which cooling begins. cold: progress at which D is 0; 0 <= hot <= cold <= 1.

    >>> schedule = Annealed(hot=0.5, cold=0.9)
    >>> schedule(0.4), round(schedule(0.7), 12), schedule(0.9), schedule.averages(0.95)
    (1.0, 0.5, 0.0, True)
    """

    hot: float = 0.5
    cold: float = 0.85

    def __post_init__(self) -> None:
        if not 0 <= self.hot <= self.cold <= 1:
            raise UsageError(f"{self}: expected 0 <= hot <= cold <= 1.")

    def __call__(self, progress: float) -> float:
        progress = _clamped(progress)
        if progress >= self.cold:
            return 0.0
        if progress <= self.hot:
            return 1.0
        return (1 + math.cos(math.pi * (progress - self.hot) / (self.cold - self.hot))) / 2

    def averages(self, progress: float) -> bool:
        """Whether the weights of now belong to the tail average."""
        return progress >= self.cold


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "cyclical": cyclical,
    "annealed": Annealed,
}


def schedule(name: str) -> Schedule:
    """The schedule of this name with its defaults; `UsageError` for an unknown one.

    >>> schedule("cosine")(1.0)
    0.0
    """
    if name not in SCHEDULES:
        raise UsageError(f"No temperature schedule is called {name!r}. {did_you_mean(name, SCHEDULES)}")
    return SCHEDULES[name]()


def anneals_twice(temperature: Schedule, rate: Schedule, num: int = 64) -> str | None:
    """A sentence when both D and the learning rate go to (nearly) 0 over the run, or else None.

    >>> anneals_twice(constant(), cosine()) is None, anneals_twice(cosine(), cosine()) is None
    (True, False)
    """
    if isinstance(temperature, Cycles):
        return None
    ends = []
    for factor in (temperature, rate):
        values = [factor(at / num) for at in range(num + 1)]
        ends.append(values[-1] <= 0.01 * max(values) if max(values) > 0 else False)
    if not all(ends):
        return None
    return (
        "The learning rate falls to 0 and so does the temperature: the noise's size goes with the root of their "
        "product, so it is annealed twice; keep one of the two constant unless that is meant."
    )


def _clamped(progress: float) -> float:
    if math.isnan(progress):
        raise UsageError("The progress of a temperature schedule is nan; expected a number in [0, 1].")
    return min(1.0, max(0.0, progress))
