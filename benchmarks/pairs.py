"""Timing side by side: A B C A B C ..., so that whatever else the machine does hits all sides alike.

A ratio is taken within a round, between neighbours in time; what is reported is the median of these ratios with the
smallest and the largest. A case that changes its process (allocator settings, global state of a library) runs in one of
its own and waits there without computing while others are timed.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from record import Row

Timer = Callable[[int], float]
"""Does that many steps and returns the seconds they took."""


class Ratio(NamedTuple):
    """Median of the ratios of all rounds, with the smallest and the largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} .. {self.high:.3f})"


def timer(step: Callable[[], object]) -> Timer:
    """A timer of a step in this process."""

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - start

    return run


class Worker:
    """A case in a process of its own.

    build: called there with `arguments`; returns the step to time and facts about the case. A function of a module, so
        that it can be sent.

    Raises:
        RuntimeError: the process ended; its traceback is on stderr.
    """

    def __init__(self, build: Callable[..., tuple[Callable[[], object], dict[str, Any]]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._answer()

    def __call__(self, steps: int) -> float:
        self._pipe.send(steps)
        return self._answer()

    def peak_bytes(self) -> int:
        """The most memory that the process has held at once, from its start on."""
        self._pipe.send(None)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("The process of a case ended before its work was done; see above.") from None


def _serve(pipe: Connection, build: Callable[..., Any], arguments: Sequence[Any]) -> None:
    step, facts = build(*arguments)
    run = timer(step)
    pipe.send(facts)
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        pipe.send(run(steps) if steps is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def interleave(
    cases: Mapping[str, Timer], rounds: int, steps: int, warm_up: int, say: Callable[[int, dict[str, float]], None]
) -> dict[str, list[float]]:
    """Seconds of every case by round; `say` is told (round, seconds by case) after each."""
    for run in cases.values():
        run(warm_up)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds):
        now = {name: run(steps) for name, run in cases.items()}
        for name, value in now.items():
            seconds[name].append(value)
        say(index, now)
    return seconds


class Race(NamedTuple):
    """What `race` measured, by case: seconds of every round, peak bytes, and what the case said of itself."""

    images: int
    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    facts: dict[str, dict[str, Any]]

    def rates(self, name: str) -> list[float]:
        """Images a second of every round."""
        return [self.images / value for value in self.seconds[name]]

    def rows(self, ours: str, steps: int) -> list[Row]:
        """Images a second of every case, and how many times those of each other case ours are, round by round."""
        found = [Row.median(f"{name}, training", self.rates(name), "images/s", steps) for name in self.seconds]
        for theirs in self.seconds:
            if theirs != ours:
                quotients = [mine / other for mine, other in zip(self.rates(ours), self.rates(theirs), strict=True)]
                found.append(Row.median(f"{ours} / {theirs}", quotients, "times the images/s", steps))
        return found


def race(workers: Mapping[str, Worker], rounds: int, steps: int, warm_up: int, batch: int) -> Race:
    """Time trainings side by side, saying how it goes, and end their processes. batch: pictures a step."""
    for name, worker in workers.items():
        print(f"{name:<20}{worker.facts['parameters']:>12,} parameters, {worker.facts['precision']}", flush=True)
    images = steps * batch

    def say(index: int, seconds: Mapping[str, float]) -> None:
        rates = "   ".join(f"{name} {images / value:7.2f}" for name, value in seconds.items())
        print(f"round {index + 1}, images/s:   {rates}", flush=True)

    try:
        seconds = interleave(workers, rounds, steps, warm_up, say)
        peaks = {name: worker.peak_bytes() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return Race(images, seconds, peaks, {name: worker.facts for name, worker in workers.items()})


def say(rows: Sequence[Row]) -> None:
    """Print them, with the smallest and the largest of all rounds."""
    for row in rows:
        low, high = row.interval or (row.value, row.value)
        print(f"{row.what:<40}{row.value:>10.3f} {row.unit} ({low:.3f} .. {high:.3f})")


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The ratios of pairs, round by round.

    >>> ratio([2.0, 6.0, 9.0], [1.0, 2.0, 2.0])
    Ratio(median=3.0, low=2.0, high=4.5)
    """
    found = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))
