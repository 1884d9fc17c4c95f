"""Does Langevin noise help a training?

Eight tasks, the strongest controls, paired intervals: wins, ties and losses.

    a  case study of articles, CIFAR-10     b    few pictures            c20 c40  wrong labels
    d  deep plain network, bad start        e    characters of a text    f        tiny GAN
    g  regression against long HMC          h    deep sea exploration

Every method is compared with the same training without noise (D = 0, the same code path, read out in the same way) and
with the strongest control, which is chosen by its test result and so has luck on its side. Each finished training is a
line in STORE/rows.jsonl and is not repeated: the same command continues, and more seeds add to what is there.

    python benchmarks/langevin_tasks.py --cifar10 builtin:cifar10 --fashion builtin:fashion-mnist --minutes 150
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from langevin import deep, deep_sea, gan, pictures, regression, text
from langevin.protocol import Arm, Difference, Metric, Places, Settings, Task, difference, key_of
from record import Row, this_command, write_record

TASKS = {task.name: task for file in (pictures, deep, text, gan, regression, deep_sea) for task in file.TASKS}
TUNING_SEED = 1000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tasks", default=",".join(TASKS), help="names with commas between them (all)")
    arguments.add_argument("--seeds", type=int, default=5, help="seeds of a task at least (5); some tasks have more")
    arguments.add_argument("--minutes", type=float, default=math.inf, help="start no training after so long (no limit)")
    arguments.add_argument("--workers", type=int, default=2, help="processes of one thread each (2); 0 = this one")
    arguments.add_argument("--cifar10", default="builtin:cifar10", help="CIFAR-10, as `imagekiln train` takes it")
    arguments.add_argument("--fashion", default="builtin:fashion-mnist", help="Fashion-MNIST, the same")
    arguments.add_argument("--store", type=Path, default=Path("runs/langevin-tasks"), help="where results are kept")
    arguments.add_argument("--quick", action="store_true", help="a try: sizes of a few seconds, one setting, 2 seeds")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


# -- what has been done, and what is to do ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training."""

    task: str
    settings: Settings
    seed: int

    @property
    def key(self) -> str:
        """The same for the same training."""
        return f"{self.task} {self.seed} {key_of(self.settings)}"


class Store:
    """Finished trainings, a line each; a last line cut short by a stop is made again."""

    def __init__(self, places: Places) -> None:
        self.path = places.store / ("rows-quick.jsonl" if places.quick else "rows.jsonl")
        self.rows: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            try:
                row = json.loads(line)
                self.rows[Job(row["task"], row["settings"], row["seed"]).key] = row
            except (ValueError, KeyError):
                continue

    def add(self, job: Job, scores: Mapping[str, Mapping[str, float]], seconds: float) -> None:
        """Keep a result; numbers that are not finite become null."""
        plain = {
            readout: {name: value if math.isfinite(value) else None for name, value in values.items()}
            for readout, values in scores.items()
        }
        row = {
            "task": job.task,
            "settings": dict(job.settings),
            "seed": job.seed,
            "seconds": round(seconds, 2),
            "scores": plain,
        }
        self.rows[job.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps(row) + "\n")

    def score(self, job: Job, readout: str, name: str, worst: float) -> float | None:
        """A number of a training, or None when it has not been done."""
        row = self.rows.get(job.key)
        if row is None:
            return None
        value = row["scores"][readout][name]
        return worst if value is None else value


class Plan:
    """Which trainings a task needs, given those that are done."""

    def __init__(self, tasks: Sequence[Task], store: Store, seeds: int, quick: bool) -> None:
        self.tasks, self.store, self._seeds, self._quick = list(tasks), store, seeds, quick

    def seeds(self, task: Task) -> range:
        """The seeds a task is compared over."""
        return range(2 if self._quick else max(self._seeds, task.num_seeds))

    def trials(self, task: Task, arm: Arm) -> list[Job] | None:
        """Trainings of the settings of an arm; None as long as the arm it starts from has not chosen."""
        before: Settings = {}
        if arm.after:
            base = next(other for other in task.arms if other.name == arm.after)
            chosen = self.chosen(task, base, base.readouts[0])
            if chosen is None:
                return None
            before = chosen
        tried = arm.settings[:1] if self._quick else arm.settings
        return [Job(task.name, {**task.fixed, **before, **settings}, TUNING_SEED) for settings in tried]

    def chosen(self, task: Task, arm: Arm, readout: str) -> Settings | None:
        """The settings with the lowest validation score, the first of equals; None as long as one is missing."""
        jobs = self.trials(task, arm)
        if jobs is None:
            return None
        if len(jobs) == 1:
            return jobs[0].settings
        values = [self.store.score(job, readout, "validation", math.inf) for job in jobs]
        known = [value for value in values if value is not None]
        return jobs[values.index(min(known))].settings if len(known) == len(values) else None

    def missing(self) -> Iterator[Job]:
        """What can be trained now: settings first, then one seed of everything after the other."""
        for task in self.tasks:
            for arm in task.arms:
                jobs = self.trials(task, arm) or []
                yield from (job for job in jobs if len(jobs) > 1 and job.key not in self.store.rows)
        for seed in range(max((len(self.seeds(task)) for task in self.tasks), default=0)):
            for task in self.tasks:
                if seed in self.seeds(task):
                    yield from self._finals(task, seed)

    def _finals(self, task: Task, seed: int) -> Iterator[Job]:
        for arm, readout in task.methods:
            settings = self.chosen(task, arm, readout)
            if settings is not None and (job := Job(task.name, settings, seed)).key not in self.store.rows:
                yield job

    def at_most(self, task: Task) -> tuple[int, int]:
        """(fewest, most) trainings of a task: methods of one arm may choose the same settings or different ones."""
        tuning = sum(len(arm.settings) for arm in task.arms if len(arm.settings) > 1)
        num = len(self.seeds(task))
        most = sum(min(len(arm.readouts), len(arm.settings)) for arm in task.arms)
        return tuning + num * len(task.arms), tuning + num * most

    def results(self, task: Task, arm: Arm, readout: str, metric: str) -> dict[int, float]:
        """A metric of a method by seed, as far as it has been trained."""
        settings = self.chosen(task, arm, readout)
        if settings is None:
            return {}
        worst = task.metrics[metric].worst
        found = {s: self.store.score(Job(task.name, settings, s), readout, metric, worst) for s in self.seeds(task)}
        return {seed: value for seed, value in found.items() if value is not None}


def work(job: Job, places: Places) -> tuple[Job, Any, float]:
    """Do one training."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    scores = TASKS[job.task].train(job.settings, job.seed, places)
    return job, scores, time.perf_counter() - started


def train_all(plan: Plan, places: Places, workers: int, minutes: float) -> None:
    """Train what is missing, until it is all there or the time is up."""
    end = time.monotonic() + 60 * minutes
    failed: set[str] = set()

    def following(running: Sequence[str] = ()) -> Job | None:
        return next((job for job in plan.missing() if job.key not in failed and job.key not in running), None)

    def keep(done: tuple[Job, Any, float]) -> None:
        job, scores, seconds = done
        plan.store.add(job, scores, seconds)
        shown = {name: {k: round(v, 4) for k, v in values.items()} for name, values in scores.items()}
        print(f"{job.key}: {seconds:.1f} s {shown}", file=sys.stderr, flush=True)

    if not workers:
        while time.monotonic() < end and (job := following()) is not None:
            keep(work(job, places))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future, str] = {}
        while True:
            while len(running) < workers and time.monotonic() < end:
                if (job := following(list(running.values()))) is None:
                    break
                running[pool.submit(work, job, places)] = job.key
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                if (error := future.exception()) is None:
                    keep(future.result())
                else:  # the others go on; the same command tries it again
                    failed.add(key)
                    print(f"{key} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


# -- what it says -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One of ours against a control. kind: "D = 0", or "best control"."""

    task: str
    metric: str
    ours: str
    control: str
    kind: str
    found: Difference
    seeds: tuple[int, ...]


def name_of(arm: Arm, readout: str) -> str:
    """A method's name."""
    return f"{arm.name} ({readout})"


def comparisons(plan: Plan, task: Task) -> list[Comparison]:
    """All of ours against the same without noise and against the best of the controls, metric by metric."""
    found = []
    control = next(arm for arm in task.arms if arm.name == task.control)
    for metric, about in task.metrics.items():
        values = {method: plan.results(task, *method, metric) for method in task.methods}
        rivals = {m: v for m, v in values.items() if not m[0].ours and len(v) > 1}
        sign = 1 if about.lower else -1
        best = min(rivals, key=lambda m: sign * statistics.fmean(rivals[m].values()), default=None)
        for (arm, readout), results in values.items():
            if not arm.ours:
                continue
            base = next((other for other in task.arms if other.name == (arm.without or arm.after)), control)
            same = (base, readout if readout in base.readouts else base.readouts[0])
            for kind, rival in (("D = 0", same), ("best control", best)):
                seeds = tuple(sorted(set(results) & set(values.get(rival, {})))) if rival else ()
                if len(seeds) > 1 and rival is not None:
                    pair = difference([results[s] for s in seeds], [values[rival][s] for s in seeds], about)
                    names = name_of(arm, readout), name_of(*rival)
                    found.append(Comparison(task.name, metric, *names, kind, pair, seeds))
    return found


def expectations(plan: Plan, found: Sequence[Comparison]) -> list[str]:
    """Three sentences that were said before measuring, and whether they came true; those that can be judged."""
    said = []
    chosen = [c for c in found if (c.task, c.metric, c.kind) == ("d", "success", "D = 0")]
    if chosen:
        best = max(chosen, key=lambda c: c.found.mean)
        true = best.found.mean >= 0.3 and best.found.verdict == "win"
        text = f"success of {best.ours} {100 * best.found.mean:+.0f} points over {best.control}"
        said.append(f"d, noise raises success by 30 points or more: {_came(true)} ({text}).")
    if (low := _calibrated(plan)) is not None:
        said.append(f"b, the ensemble of samples has a lower ECE than every single model: {low}.")
    chosen = [c for c in found if (c.task, c.metric, c.kind) == ("a", "accuracy", "D = 0") and "(last)" in c.ours]
    if chosen:
        true = all(c.found.verdict != "win" for c in chosen)
        text = ", ".join(f"{c.found.mean:+.2f} points" for c in chosen)
        said.append(f"a, noise alone gains nothing: {_came(true)} ({text} of accuracy for the last weights).")
    return said


def _came(true: bool) -> str:
    return "confirmed" if true else "refuted"


def _calibrated(plan: Plan) -> str | None:
    task = next((task for task in plan.tasks if task.name == "b"), None)
    if task is None:
        return None
    metric: Metric = task.metrics["ece"]
    ours = [(a, r, plan.results(task, a, r, "ece")) for a, r in task.methods if a.ours and r == "ensemble"]
    ours = [item for item in ours if len(item[2]) > 1]
    if not ours:
        return None
    arm, readout, values = min(ours, key=lambda item: statistics.fmean(item[2].values()))
    beaten, others = [], []
    for rival, how in task.methods:
        theirs = plan.results(task, rival, how, "ece")
        seeds = sorted(set(values) & set(theirs))
        if rival.ours or how == "ensemble" or len(seeds) < 2:
            continue
        pair = difference([values[s] for s in seeds], [theirs[s] for s in seeds], metric)
        (beaten if pair.verdict == "win" else others).append(name_of(rival, how))
    text = f"{name_of(arm, readout)} beats {len(beaten)} of {len(beaten) + len(others)}"
    return f"{_came(not others)} ({text}{', not ' + ', '.join(others) if others else ''})"


def show(plan: Plan, found: Sequence[Comparison]) -> str:
    """Tables of all methods, then comparisons and their counts."""
    lines = []
    for task in plan.tasks:
        lines += ["", f"{task.name}. {task.title}", f"   expected: {task.expected}"]
        for arm, readout in task.methods:
            parts = []
            for metric in task.metrics:
                values = list(plan.results(task, arm, readout, metric).values())
                sd = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
                parts.append(f"{metric} {statistics.fmean(values):.4g}{sd}" if values else f"{metric} -")
            lines.append(f"   {'*' if arm.ours else ' '} {name_of(arm, readout):<48} {'   '.join(parts)}")
        for c in (c for c in found if c.task == task.name):
            limits = f"{c.found.mean:+.4g} ({c.found.low:+.4g} .. {c.found.high:+.4g})"
            lines.append(f"     {c.found.verdict:<4} {c.metric:<10} {c.ours} - {c.control}, {c.kind}: {limits}")
        lines += [f"     {kind}: {counted}" for kind, counted in tally(found, task.name).items()]
    return "\n".join(lines)


def tally(found: Sequence[Comparison], task: str = "") -> dict[str, str]:
    """Wins, ties and losses by kind of control."""
    counts = {}
    for kind in dict.fromkeys(c.kind for c in found):
        verdicts = [c.found.verdict for c in found if c.kind == kind and task in ("", c.task)]
        numbers = {word: verdicts.count(word) for word in PLURALS}
        counts[kind] = ", ".join(f"{num} {word if num == 1 else PLURALS[word]}" for word, num in numbers.items())
    return counts


PLURALS = {"win": "wins", "tie": "ties", "loss": "losses"}


def rows_of(plan: Plan, found: Sequence[Comparison]) -> list[Row]:
    """Every method and every comparison as rows of a record."""
    rows = []
    for task in plan.tasks:
        for (arm, readout), metric in ((m, x) for m in task.methods for x in task.metrics):
            values = plan.results(task, arm, readout, metric)
            if values:
                what = f"{task.name}: {metric}, {name_of(arm, readout)}"
                rows.append(Row.of(what, list(values.values()), seeds=list(values)))
    for c in found:
        what = f"{c.task}: {c.metric}, {c.ours} minus {c.control} ({c.kind}): {c.found.verdict}"
        rows.append(Row(what, c.found.mean, seeds=c.seeds, interval=(c.found.low, c.found.high)))
    return rows


def record(plan: Plan, found: Sequence[Comparison], said: Sequence[str], left: int) -> Path:
    """Write it all down."""
    notes = [
        "Intervals are of 95 %, paired over seeds: Student's t, for yes and no those of Agresti and Min.",
        "Settings were chosen on a validation split with a seed used for nothing else, equally many for each method.",
        "The best control is the one with the best mean on the test data, which favours the control.",
        *said,
    ]
    if left:
        notes.append(f"{left} trainings or more are missing: methods are compared over the seeds both have.")
    trained = [row for task in plan.tasks for row in plan.store.rows.values() if row["task"] == task.name]
    names = [task.name for task in plan.tasks]
    return write_record(
        "-".join(["langevin-tasks", *(names if set(names) < set(TASKS) else ())]),
        this_command(),
        rows_of(plan, found),
        notes=notes,
        tasks={task.name: {"title": task.title, "expected": task.expected} for task in plan.tasks},
        chosen={
            f"{task.name}: {name_of(arm, readout)}": plan.chosen(task, arm, readout)
            for task in plan.tasks
            for arm, readout in task.methods
        },
        verdicts=tally(found),
        verdicts_by_task={task.name: tally(found, task.name) for task in plan.tasks},
        seconds=round(sum(row["seconds"] for row in trained), 1),
        num_trainings=len(trained),
        text_sha256=text.text_hash(),
    )


def main(given: Sequence[str] | None = None) -> int:
    """Train, compare, print, and write what was asked for."""
    options = parser().parse_args(given)
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names or options.seeds < 2:
        print(f"--tasks {options.tasks} --seeds {options.seeds}: expected 2 seeds or more, and tasks of {list(TASKS)}.")
        return 2
    places = Places(options.cifar10, options.fashion, options.store, options.quick)
    plan = Plan([TASKS[name] for name in names], Store(places), options.seeds, options.quick)
    train_all(plan, places, options.workers, options.minutes)
    found = [c for task in plan.tasks for c in comparisons(plan, task)]
    said, left = expectations(plan, found), sum(1 for _ in plan.missing())
    print(show(plan, found))
    for task in plan.tasks:
        seconds = [row["seconds"] for row in plan.store.rows.values() if row["task"] == task.name]
        fewest, most = plan.at_most(task)
        each = f"{statistics.fmean(seconds):.1f} s each" if seconds else "none yet"
        print(f"{task.name}: {len(seconds)} trainings of {fewest} to {most}, {each}")
    print("\n".join([*said, *(f"{kind}: {counted}" for kind, counted in tally(found).items())]))
    if left:
        print(f"{left} trainings or more are missing; the same command continues.")
    if options.record:
        print(record(plan, found, said, left))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
