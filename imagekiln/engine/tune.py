"""Tuning: successive halving over a few settings of one recipe, with no noise always in the race.

Synchronous successive halving (Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization"; Li et al. 2020, "A system for massively parallel hyperparameter tuning"): all candidates train to the
first rung, the best 1 / reduction of them to the next, which is `reduction` times as long, and so on. A candidate is a
run folder, and a rung continues it by exact resume. What ranks candidates is what ranks moments of a run: its lowest
held-out loss, or for families without one the lowest kernel distance of its pictures, whichever average has it.

A rung is a whole training: schedules of rate and temperature run to their end at its length, so every candidate is
judged annealed; the next rung takes them up again where the longer training stands, alike for all. At the last rung
every finalist is trained with several seeds, each through all rungs, and finalists are compared seed by seed: the
difference of two candidates is known to t s / sqrt(n), s its standard deviation over n seeds, t Student's quantile.

Nothing here depends on a clock or on the order in which runs end, so the same command repeats, and continues where it
was stopped: what candidates reached stands in a file beside them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from imagekiln import data as datasets
from imagekiln.config import Recipe, read_toml
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.engine.run import Run, write_whole
from imagekiln.engine.tracker import Say
from imagekiln.errors import Diverged, UsageError
from imagekiln.metrics.interval import student_975

Train = Callable[[Path, Sequence[str]], Run]
"""Trains the recipe with these assignments laid over it into a folder, or continues the run there."""

HEAT = re.compile(r"optim\.[\w-]+\.langevin\.temperature")
NOT_TUNED = {
    "train.total_kimg": "the rungs decide how long a candidate trains: give --kimg",
    "train.seed": "finalists are trained with several seeds: give --seeds",
    "train.validate_kimg": "candidates have to be looked at alike: give it with --set",
    "train.device": "it is no setting of the model: give --device",
}
NOT_TUNED_SECTIONS = {
    "data": "losses on other pictures cannot be compared",
    "eval": "it is measured after the training",
}
MOST_CANDIDATES, FEWEST_FINALISTS = 81, 2
PLAN = "tune.json"


@dataclass(frozen=True)
class Candidate:
    """Settings that are tried together, by key, and the name of their folder."""

    name: str
    values: Mapping[str, Any]

    @property
    def assignments(self) -> list[str]:
        """As `a.b=value`."""
        return [f"{key}={json.dumps(value)}" for key, value in self.values.items()]

    @property
    def is_control(self) -> bool:
        """Whether temperatures were varied, and all of them are 0 here."""
        heats = [value for key, value in self.values.items() if HEAT.fullmatch(key)]
        return bool(heats) and not any(heats)


@dataclass(frozen=True)
class Row:
    """One candidate in the end.

    rungs: its criterion at each rung it reached with the first seed, inf where it diverged. values: of all seeds at the
        last rung, for finalists. mean, and behind: how far the mean lies behind the winner's, with a 95 % interval.
    """

    name: str
    settings: Mapping[str, Any]
    control: bool
    rungs: tuple[float, ...]
    values: tuple[float, ...] = ()
    mean: float = math.nan
    behind: float = math.nan
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Tuned:
    """What was found: rows with finalists first, and the verdict in words. `tied`: names nobody can tell apart."""

    criterion: str
    rungs_kimg: tuple[float, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    winner: str
    tied: tuple[str, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is None."""
        return json.loads(json.dumps(_finite(asdict(self))))


def tune(
    recipe: str,
    over: Sequence[str],
    out: str | Path,
    train: Train,
    *,
    data: str = "",
    assignments: Sequence[str] = (),
    kimg: float | None = None,
    seeds: int = 3,
    reduction: int = 3,
    say: Say | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Find the best of a few settings; the same call continues what was interrupted.

    recipe, assignments: as for `api.train`. over: `a.b=v1,v2,...`.
    data: the pictures that `train` knows, so that a tuning on others is not continued; "" = nobody asks.
    progress: told (done, total) while they are read.
    kimg: length of the last rung; None takes the recipe's. seeds: of the finalists, the recipe's own seed first.
    reduction: one in so many goes on, and a rung is so many times longer than the one before.

    Raises:
        UsageError: nothing to choose from, a setting that cannot be tuned, or a folder with another tuning.
        RecipeError: an unknown setting. Diverged: every candidate did. What `train` raises, but for Diverged.
    """
    if seeds < 2 or reduction < 2:
        raise UsageError(f"--seeds {seeds}, --reduction {reduction}: both are at least 2; one seed tells no luck.")
    grid = candidates(over)
    whole = [recipes.resolve(recipe, None, [*assignments, *one.assignments]) for one in grid]
    length = whole[0].train.total_kimg if kimg is None else kimg
    rungs_kimg = rungs(length, len(grid), reduction)
    images = max(one.train.batch for one in whole)
    if not rungs_kimg[0] * 1000 >= images:
        raise UsageError(
            f"The first rung of {len(grid)} candidates would last {rungs_kimg[0] * 1000:.0f} images, less than a step "
            f"of {images}. Give a larger --kimg or fewer values."
        )
    config = whole[0].data.model_copy(update={"path": data})
    fingerprint = datasets.load(config, progress=progress).fingerprint if data else ""
    first = whole[0].train.seed
    race = _Race(grid, rungs_kimg, [first + number for number in range(seeds)], Path(out), train, list(assignments))
    race.claim(recipe, fingerprint, whole[0].model_dump(mode="json", exclude={"data": {"path"}}))
    found = race.run(reduction, ranked_by(whole[0].family.name), say or (lambda sentence: None))
    race.write(found.to_json())
    return found


# -- what is tried ----------------------------------------------------------------------------------------------------


def candidates(over: Sequence[str]) -> list[Candidate]:
    """Every combination of the values, in the order given; a varied temperature always has a 0, as the first one.

    >>> [one.name for one in candidates(["optim.network.langevin.temperature=0.01,0.1"])]
    ['temperature-0', 'temperature-0.01', 'temperature-0.1']
    """
    axes: dict[str, list[Any]] = {}
    for text in over:
        key, equals, values = (part.strip() for part in text.partition("="))
        reason = NOT_TUNED.get(key) or NOT_TUNED_SECTIONS.get(key.split(".")[0])
        if not equals or not key or not values:
            raise UsageError(f"--over {text!r}: expected key=value,value, for example --over train.batch=32,64.")
        if reason is not None or key in axes:
            raise UsageError(f"--over {key}: {reason or 'it was given twice; put all its values behind one'}.")
        axes[key] = _values(values)
        if HEAT.fullmatch(key):
            axes[key] = [0, *(value for value in axes[key] if value != 0)]
    short = {key: key.rsplit(".", 1)[-1] for key in axes}
    twice = {word for word in short.values() if list(short.values()).count(word) > 1}
    label = {key: key if word in twice else word for key, word in short.items()}
    found: list[Candidate] = []
    for combined in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combined, strict=True))
        name = re.sub(r"[^\w.,+-]+", "_", ",".join(f"{label[key]}-{value}" for key, value in chosen.items()))
        used = any(one.name == name for one in found)
        found.append(Candidate(f"{name}-{len(found)}" if used else name, chosen))
    if not 2 <= len(found) <= MOST_CANDIDATES:
        raise UsageError(
            f"--over gives {len(found)} candidate{'s' if len(found) != 1 else ''}; expected 2 to {MOST_CANDIDATES}, "
            "for example --over optim.network.langevin.temperature=0.01,0.1."
        )
    return sorted(found, key=lambda one: not one.is_control)


def _values(text: str) -> list[Any]:
    try:
        found = tomllib.loads(f"value = [{text}]")["value"]
        json.dumps(found)
    except (ValueError, TypeError):  # words without quotes
        found = [part.strip() for part in text.split(",") if part.strip()]
    return [value for at, value in enumerate(found) if value not in found[:at]]


def rungs(length_kimg: float, num: int, reduction: int) -> tuple[float, ...]:
    """Lengths of the rungs: the last is `length_kimg`, each a `reduction`-th of the next, as many as `num` can fill.

    >>> rungs(90.0, 9, 3), rungs(90.0, 2, 3)
    ((10.0, 30.0, 90.0), (90.0,))
    """
    halvings = 0
    while num // reduction ** (halvings + 1) >= 1:
        halvings += 1
    return tuple(round(length_kimg / reduction**power, 6) for power in range(halvings, -1, -1))


# -- the race ---------------------------------------------------------------------------------------------------------


class _Race:
    """Trains and ranks. values[name][rung] is the criterion with the first seed."""

    def __init__(
        self,
        grid: Sequence[Candidate],
        rungs_kimg: Sequence[float],
        seeds: Sequence[int],
        out: Path,
        train: Train,
        assignments: Sequence[str],
    ) -> None:
        self.grid, self.rungs_kimg, self.seeds = list(grid), tuple(rungs_kimg), tuple(seeds)
        self.out, self._train, self._assignments = out, train, assignments
        self.plan: dict[str, Any] = {}
        self.reached: dict[str, float | None] = {}
        self.values: dict[str, list[float]] = {one.name: [] for one in grid}

    def claim(self, recipe: str, data: str, settings: Mapping[str, Any]) -> None:
        """Write what the folder is tuned with, or see that it is what it was, and take up what has been reached.

        data: fingerprint of the pictures. settings: those of the first candidate, all of them.
        """
        self.plan = {
            "recipe": recipe,
            "data": data,
            "candidates": [dict(one.values) for one in self.grid],
            "rungs_kimg": list(self.rungs_kimg),
            "seeds": list(self.seeds),
            "settings": settings,
        }
        path = self.out / PLAN
        if not path.is_file():
            if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
                raise UsageError(f"{self.out} holds files but no tuning. Name an empty or new folder with --out.")
            self.write()
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key, value in self.plan.items() if known["plan"].get(key) != value]
            self.reached = dict(known["reached"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} cannot be read. Delete it, or name another folder with --out.") from None
        if differing:
            raise UsageError(
                f"{self.out} holds a tuning with other {differing[0]}. Give the same command to continue it, or "
                "another --out."
            )

    def write(self, result: Any = None) -> None:
        """The plan, what has been reached, and the result once there is one."""
        text = json.dumps({"plan": self.plan, "reached": self.reached, "result": result}, indent=1)
        write_whole(self.out / PLAN, text + "\n")

    def run(self, reduction: int, ranked: str, say: Say) -> Tuned:
        """All rungs, then the other seeds of the finalists."""
        running = self.grid
        for at, kimg in enumerate(self.rungs_kimg):
            say(f"Rung {at + 1} of {len(self.rungs_kimg)}: {len(running)} candidates to {kimg:g} kimg.")
            for one in running:
                self.values[one.name].append(self.reach(one, at, 0))
                say(f"  {one.name}: {self.values[one.name][-1]:.5g}")
            last = at + 2 >= len(self.rungs_kimg)
            running = self.survivors(running, len(running) // reduction, last)
        finalists = [one for one in running if math.isfinite(self.values[one.name][-1])]
        if not finalists:
            raise Diverged(f"Every candidate in {self.out} left the finite numbers. Lower the rates or temperatures.")
        results: dict[str, list[float]] = {}
        for one in finalists:
            results[one.name] = [self.values[one.name][-1]]
            for number in range(1, len(self.seeds)):
                say(f"Finalist {one.name}, seed {self.seeds[number]}.")
                found = [self.reach(one, at, number) for at in range(len(self.rungs_kimg))]
                results[one.name].append(found[-1])
        return self._judged(results, ranked)

    def survivors(self, running: Sequence[Candidate], count: int, last: bool) -> list[Candidate]:
        """The best `count` and the best control, in the order of the grid; at least two before the last rung."""
        order = sorted(running, key=lambda one: (self.values[one.name][-1], self.grid.index(one)))
        kept = order[: max(count, FEWEST_FINALISTS if last else 1)]
        kept += [one for one in order if one.is_control and not any(other.is_control for other in kept)][:1]
        return sorted(kept, key=self.grid.index)

    def reach(self, one: Candidate, at: int, number: int) -> float:
        """Train a candidate to a rung with the seed of this number, unless it has been there, and its criterion."""
        name = one.name if number == 0 else f"{one.name}-seed-{self.seeds[number]}"
        key = f"{name} at {self.rungs_kimg[at]:g} kimg"
        if key not in self.reached:
            length = [f"train.total_kimg={self.rungs_kimg[at]}", f"train.seed={self.seeds[number]}"]
            run = Run(self.out / name)
            try:
                if run.status().get("state") == "diverged":
                    raise Diverged(f"{run.path} has diverged before.")
                self.reached[key] = criterion(self._train(run.path, [*self._assignments, *one.assignments, *length]))
            except Diverged:
                self.reached[key] = None
            self.write()
        value = self.reached[key]
        return math.inf if value is None else value

    def _judged(self, results: Mapping[str, Sequence[float]], ranked: str) -> Tuned:
        order = sorted(results, key=lambda name: (fmean(results[name]), list(results).index(name)))
        winner = order[0]
        rows, tied = [], []
        for name in [*order, *(one.name for one in self.grid if one.name not in results)]:
            one = next(candidate for candidate in self.grid if candidate.name == name)
            row = Row(name, one.values, one.is_control, tuple(self.values[name]))
            if name in results:
                behind, interval = _difference(results[name], results[winner])
                mean = fmean(results[name])
                row = replace(row, values=tuple(results[name]), mean=mean, behind=behind, interval=interval)
                if name != winner and interval is not None and interval[0] <= 0:
                    tied.append(name)
            rows.append(row)
        said = verdict(rows, winner, tied)
        return Tuned(ranked, self.rungs_kimg, self.seeds, tuple(rows), winner, tuple(tied), said)


def ranked_by(family: str) -> str:
    """The name of the number a family's runs are ranked by: lower is better."""
    monitor = registry.load(family).monitor
    return "quality/kernel" if monitor is None else f"validation/{monitor}"


def criterion(run: Run) -> float:
    """The lowest value of `ranked_by` in a run so far, of whichever moving average.

    Raises:
        UsageError: the recipe leaves nothing to rank by.
    """
    recipe: Recipe = recipes.complete(read_toml(run.recipe_path))
    name = ranked_by(recipe.family.name)
    keys = [name, *(f"{name}[{average.name}]" for average in recipe.train.averages[1:])]
    values = [row[key] for row in run.stats() for key in keys if key in row]
    if not values:
        raise UsageError(
            f"{run.path} has no {name} to rank candidates by: its training is too short for it. Give a larger --kimg."
        )
    return min((value for value in values if not math.isnan(value)), default=math.inf)


# -- what it means ----------------------------------------------------------------------------------------------------


def _difference(values: Sequence[float], best: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean difference over common seeds and its 95 % interval; None when a run diverged."""
    each = [a - b for a, b in zip(values, best, strict=True)]
    if not all(math.isfinite(value) for value in each):
        return math.inf, None
    reach = quantile(len(each) - 1) * stdev(each) / len(each) ** 0.5
    return fmean(each), (fmean(each) - reach, fmean(each) + reach)


def quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, where the expansion is not.

    >>> [round(quantile(freedom), 2) for freedom in (1, 2, 3)]
    [12.71, 4.3, 3.16]
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    return student_975(freedom)


def verdict(rows: Sequence[Row], winner: str, tied: Sequence[str]) -> str:
    """The result in words: who wins, whether that is more than chance, and what becomes of no noise."""
    first = next(row for row in rows if row.name == winner)
    control = next((row for row in rows if row.control and row.values), None)
    num = len(first.values)
    if not math.isfinite(first.mean):
        return "A seed of every finalist left the finite numbers: none of them can be recommended."
    said = f"{winner} is best, and its differences from the others over {num} seeds are more than chance."
    if tied:
        said = f"{winner} is lowest, but over {num} seeds it cannot be told from {_and(tied)}: their intervals overlap."
    if control is None:
        return said
    if control.name == winner:
        return f"{said} D = 0 wins: on these pictures noise {'gains nothing that can be seen' if tied else 'costs'}."
    if control.name in tied:
        return f"{said} D = 0 is among them, so there is no evidence for noise; leave it out, or give more seeds."
    return f"{said} It is better than D = 0 by {control.behind:.3g}."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def table(found: Tuned) -> str:
    """Rows for a person, finalists first, and the verdict."""
    width = max(len("candidate"), *(len(row.name) for row in found.rows)) + 2
    head = "".join(f"{f'{kimg:g} kimg':>13}" for kimg in found.rungs_kimg)
    lines = [
        f"{found.criterion}, lower is better; the last columns are over the seeds {', '.join(map(str, found.seeds))}",
        f"{'candidate':<{width}}{head}{'mean':>12}   behind the first, 95 %",
    ]
    for row in found.rows:
        rungs = "".join(f"{value:>13.5g}" for value in row.rungs) + " " * 13 * (len(found.rungs_kimg) - len(row.rungs))
        end = ""
        if row.values:
            limits = "" if row.interval is None else f" ({row.interval[0]:.3g} .. {row.interval[1]:.3g})"
            end = f"{row.mean:>12.5g}" + ("" if row.name == found.winner else f"   {row.behind:.3g}{limits}")
        lines.append(f"{row.name:<{width}}{rungs}{end}".rstrip())
    return "\n".join([*lines, found.verdict])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
