"""Is a model consistent? From measurements of several runs to one word, one sentence and the reasons for it.

Spread between seeds. Run i has the value x_i, known up to a measurement error s_i (its 95 % interval / (2 * 1.96)):

x_i = mu + b_i + e_i,   Var(b) = tau^2 between seeds,   Var(e_i) = s_i^2;   tau^2 = max(0, var(x) - mean(s_i^2))

(random effects with the moment estimator of Hedges 1983). Whether the runs differ by more than measuring explains is
asked by Cochran's Q = sum_i (x_i - m)^2 / s_i^2, m weighted by 1 / s_i^2: chi-squared with k - 1 degrees of freedom
where tau = 0. Runs of one comparison share their reference pictures, which makes their errors alike: the test is on
the safe side and may miss a small spread.

A run is broken when it was given up, cannot draw, draws nearly the same picture every time, or when a metric is worse
than in the better half of all runs *twofold* (a distance over twice their median, a share under half of it) and beyond
all their intervals. The better half is the yardstick so that several broken runs cannot excuse one another; runs that
are bad alike are told from good ones by the real-versus-real floor alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, variance
from typing import Any

from imagekiln.metrics.share import NORMAL_975, wilson

TWOFOLD = 2.0
ENDS_WORSE = 1.15
"""A run that ends so many times worse than its own best is named."""

SAME_PICTURE = 0.1
"""Share of the real pictures' spread below which a model draws the same picture every time."""

NOTICEABLE = 0.1
"""Spread between seeds, relative to the mean, from which on the seed matters in practice."""

SETTLED = 0.25
"""Fixed-seed pictures that change less between two moments, in distances of two unrelated pictures, have settled."""

FAR = 5.0
"""Floors away from real pictures, from which on runs that agree are said to agree on being far."""

LEVEL = 0.05

STATES = {
    "broken": "a run failed, collapsed, or is twofold worse than the others",
    "declining": "a run ends worse than its own best moment",
    "varied": "how good the model gets depends on the seed or on the pictures it learned from",
    "undecided": "too few runs to tell",
    "shaky": "the runs agree, but one left the finite numbers on its way",
    "consistent": "the runs agree",
}
"""The verdicts; where several hold, the first one is given."""

WORSE = {
    "frechet": "its pictures lie {times:.1f} times as far from real ones as those of the better runs",
    "precision": "{value:.0%} of its pictures look real, in the better runs {others:.0%} do",
    "recall": "its pictures span {value:.0%} of the real ones, those of the better runs {others:.0%}",
    "coverage": "it draws {value:.0%} of the kinds of real pictures, the better runs {others:.0%}",
    "label_accuracy": "{value:.0%} of its pictures show what was asked for, in the better runs {others:.0%} do",
}
"""The metrics that decide, and what is said of a run that is worse in one. `frechet` is a distance, the rest shares."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, and what real pictures score."""

    value: float
    low: float
    high: float
    floor: float | None = None

    @property
    def error(self) -> float:
        """Standard error that the interval stands for."""
        return (self.high - self.low) / (2 * NORMAL_975)


@dataclass(frozen=True)
class Ending:
    """The Frechet distance at the best moment a run kept and at its last one."""

    best_nimg: int
    best: Estimate
    last_nimg: int
    last: Estimate

    @property
    def ratio(self) -> float:
        """How many times worse the end is."""
        return self.last.value / self.best.value if self.best.value > 0 else math.inf


@dataclass(frozen=True)
class RunRow:
    """What was seen of one run.

    fault: why nothing can be measured, as the rest of a sentence about "it"; "" where it can.
    differs: settings that are not those of the others, as words; data: fingerprint of the pictures it learned from.
    left_out, rollbacks: steps that were not finite, returns to an earlier checkpoint.
    variety: spread of its pictures' features relative to that of real ones.
    drift: (images seen, change of the fixed-seed pictures since the moment before, in distances of unrelated ones).
    """

    name: str
    seed: int = 0
    state: str = "finished"
    fault: str = ""
    differs: tuple[str, ...] = ()
    data: str = ""
    left_out: int = 0
    rollbacks: int = 0
    variety: float | None = None
    measured: Mapping[str, Estimate] = field(default_factory=dict)
    ending: Ending | None = None
    drift: tuple[tuple[int, float], ...] = ()

    @property
    def settled(self) -> bool | None:
        """Whether the last quarter of the changes was small; None with too few moments to say."""
        if len(self.drift) < 4:
            return None
        last = [change for _, change in self.drift[-max(2, len(self.drift) // 4) :]]
        return fmean(last) < SETTLED


@dataclass(frozen=True)
class Pair:
    """Pictures of two runs against each other, drawn from the same seeds.

    distance: kernel distance between them; same: what it stays below in 95 of 100 cases if both draw alike;
    to_real: mean kernel distance of the two from real pictures; same_seed: distance of the two pictures of one seed, in
    distances of unrelated pictures; other_data: whether the runs learned from different pictures.
    """

    a: str
    b: str
    distance: float
    same: float
    to_real: float
    same_seed: float
    other_data: bool = False

    @property
    def words(self) -> str:
        """How the two relate: "alike", "close" (nearer to each other than to real pictures) or "apart"."""
        if self.distance <= self.same:
            return "alike"
        return "close" if self.distance < self.to_real else "apart"


@dataclass(frozen=True)
class Spread:
    """One metric over the runs of one recipe and one set of pictures, broken ones left out.

    measurement_sd: standard error of one run's number; between_sd: tau, what seeds add to it; p: how probable so large
    a difference is by measuring alone.
    """

    metric: str
    num_runs: int
    mean: float
    sd: float
    low: float
    high: float
    worst: str
    measurement_sd: float
    between_sd: float
    p: float

    @property
    def seed_matters(self) -> bool:
        """More than measuring explains, all deciding metrics asked at once, and enough to notice."""
        return self.p < LEVEL / len(WORSE) and self.between_sd > NOTICEABLE * abs(self.mean)


@dataclass(frozen=True)
class Verdict:
    """One of `STATES`, the sentence to read first, further ones, and why which run is broken."""

    state: str
    headline: str
    sentences: tuple[str, ...]
    broken: Mapping[str, str]


def spread(metric: str, runs: Mapping[str, Estimate], lower_is_better: bool) -> Spread:
    """The spread of a metric over at least two runs by name.

    >>> found = spread("frechet", {"a": Estimate(4, 3, 5), "b": Estimate(8, 7, 9), "c": Estimate(6, 5, 7)}, True)
    >>> found.mean, found.sd, found.worst, round(found.between_sd, 2), found.p < 0.01
    (6.0, 2.0, 'b', 1.93, True)
    """
    values = [run.value for run in runs.values()]
    errors2 = [max(run.error**2, 1e-24) for run in runs.values()]
    middle = sum(x / e for x, e in zip(values, errors2, strict=True)) / sum(1 / e for e in errors2)
    q = sum((x - middle) ** 2 / e for x, e in zip(values, errors2, strict=True))
    sd2 = variance(values)
    sign = 1 if lower_is_better else -1
    return Spread(
        metric=metric,
        num_runs=len(values),
        mean=fmean(values),
        sd=math.sqrt(sd2),
        low=min(values),
        high=max(values),
        worst=max(runs, key=lambda name: sign * runs[name].value),
        measurement_sd=math.sqrt(fmean(errors2)),
        between_sd=math.sqrt(max(0.0, sd2 - fmean(errors2))),
        p=chi_squared_above(q, len(values) - 1),
    )


def chi_squared_above(x: float, freedom: int) -> float:
    """P(chi-squared > x), by the recursion over whole degrees of freedom (Abramowitz & Stegun 26.4.8).

    >>> round(chi_squared_above(3.841, 1), 3), round(chi_squared_above(11.07, 5), 3)
    (0.05, 0.05)
    """
    half = min(x, 1400.0) / 2
    total = math.erfc(math.sqrt(half)) if freedom % 2 else math.exp(-half)
    for k in range(1 if freedom % 2 else 2, freedom, 2):
        total += half ** (k / 2) * math.exp(-half) / math.gamma(k / 2 + 1)
    return total


def broken(rows: Sequence[RunRow]) -> dict[str, str]:
    """Names of the broken runs with the reason, as the rest of a sentence about "it"."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.fault:
            reasons[row.name] = [row.fault]
        elif row.variety is not None and row.variety < SAME_PICTURE:
            reasons[row.name] = ["it draws nearly the same picture every time"]
    for metric, words in WORSE.items():
        have = [row for row in rows if metric in row.measured]
        distance = metric == "frechet"
        have.sort(key=lambda row: row.measured[metric].value * (1 if distance else -1))
        half = [row.measured[metric] for row in have[: math.ceil(len(have) / 2)]]
        for row in have[len(half) :]:
            if _twofold_worse(row.measured[metric], half, distance):
                value, others = row.measured[metric].value, median(e.value for e in half)
                times = value / others if others > 0 else math.inf
                reasons.setdefault(row.name, []).append(words.format(value=value, others=others, times=times))
    return {row.name: "; ".join(reasons[row.name][:2]) for row in rows if row.name in reasons}


def _twofold_worse(one: Estimate, half: Sequence[Estimate], distance: bool) -> bool:
    middle = median(e.value for e in half)
    if distance:
        return one.low > max(e.high for e in half) and one.value > TWOFOLD * middle
    return one.high < min(e.low for e in half) and one.value < middle / TWOFOLD


def judge(rows: Sequence[RunRow], spreads: Sequence[Spread], pairs: Sequence[Pair]) -> Verdict:
    """The verdict over all runs. spreads: of the runs of one recipe that are not broken; pairs: of those too."""
    bad = broken(rows)
    same = [row for row in rows if not row.differs]
    healthy = [row for row in same if row.name not in bad]
    shaky = [row for row in rows if row.name not in bad and (row.left_out or row.rollbacks)]
    worse = [row for row in rows if row.name not in bad and _ends_worse(row)]
    apart = [pair for pair in pairs if pair.words == "apart" and pair.other_data]
    matters = [found for found in spreads if found.metric in WORSE and found.seed_matters]
    if bad:
        state = "broken"
    elif worse:
        state = "declining"
    elif matters or apart:
        state = "varied"
    elif len(healthy) < 2:
        state = "undecided"
    else:
        state = "shaky" if shaky else "consistent"
    among = _among(healthy, spreads, matters, apart)
    if state == "broken":
        others = " The other " + among[4:] if among and len(healthy) < len(rows) else " " + among if among else ""
        headline = _of_broken(bad, rows) + others
    elif state == "declining":
        headline = _of_ending(worse[0]) + (f" {among}" if among else "")
    elif state == "shaky":
        headline = f"{among} But {_runs([row.name for row in shaky])} left the finite numbers on the way."
    else:
        headline = among or "One run cannot tell: train at least two more that differ in train.seed alone."
    return Verdict(state, headline, tuple(_sentences(rows, same, healthy, bad, spreads, pairs)), bad)


# -- words ------------------------------------------------------------------------------------------------------------


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def count_words(number: int, noun: str) -> str:
    """A small number in letters, with its noun.

    >>> count_words(1, "run"), count_words(3, "run"), count_words(12, "run")
    ('one run', 'three runs', '12 runs')
    """
    return f"{NUMBERS[number] if number < len(NUMBERS) else number} {noun}{'' if number == 1 else 's'}"


def listing(names: Sequence[str]) -> str:
    """Names as a sentence has them.

    >>> listing(["a"]), listing(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _runs(names: Sequence[str]) -> str:
    return f"run{'' if len(names) == 1 else 's'} {listing(names)}"


def _ends_worse(row: RunRow) -> bool:
    """By more than the interval of the best moment allows."""
    return row.ending is not None and row.ending.ratio > ENDS_WORSE and row.ending.last.value > row.ending.best.high


def _of_broken(bad: Mapping[str, str], rows: Sequence[RunRow]) -> str:
    if len(bad) == len(rows) > 1:
        return f"All {count_words(len(rows), 'run')} are broken: {'; '.join(f'{n}: {why}' for n, why in bad.items())}."
    return " ".join(f"Run {name} is broken: {why}." for name, why in bad.items())


def _of_ending(row: RunRow) -> str:
    if row.ending is None:
        return ""
    return (
        f"Run {row.name} got worse towards its end: its last pictures lie {row.ending.ratio:.2f} times as far from "
        "real ones as those of its best moment."
    )


def _among(
    healthy: Sequence[RunRow], spreads: Sequence[Spread], matters: Sequence[Spread], apart: Sequence[Pair]
) -> str:
    """What the runs that work say together, beginning with "The"; "" where there are not two of them."""
    if len(healthy) < 2:
        return ""
    who = f"The {count_words(len(healthy), 'run')}"
    if matters:
        found = max(matters, key=lambda one: one.between_sd / abs(one.mean or 1))
        name = PLAIN.get(found.metric, found.metric)
        return (
            f"{who} do not agree: {name} goes from {found.low:.3g} to {found.high:.3g}, "
            "far more than measuring explains, so luck with the seed decides."
        )
    if apart:
        return (
            f"{who} do not agree: trained on other pictures, the model draws other pictures "
            f"({apart[0].a} and {apart[0].b} are further from each other than from real ones)."
        )
    if not spreads:
        return f"{who} agree: trained on different pictures, they draw alike."
    if any(found.p < LEVEL / len(WORSE) for found in spreads if found.metric in WORSE):
        return f"{who} agree: their pictures are about equally good, whatever the seed."
    return f"{who} agree: their pictures are equally good as far as can be measured, whatever the seed."


PLAIN = {
    "frechet": "the distance from real pictures",
    "precision": "the share of pictures that look real",
    "recall": "the share of real pictures within reach",
    "coverage": "the share of kinds that are drawn",
    "label_accuracy": "the share of pictures that show what was asked for",
}


def _sentences(
    rows: Sequence[RunRow],
    same: Sequence[RunRow],
    healthy: Sequence[RunRow],
    bad: Mapping[str, str],
    spreads: Sequence[Spread],
    pairs: Sequence[Pair],
) -> list[str]:
    """What there is to say besides the headline, most important first."""
    found = [
        f"Run {row.name} was trained with other settings: {'; '.join(row.differs)}." for row in rows if row.differs
    ]
    found += _about_quality(healthy)
    found += [_about_spread(one) for one in spreads if one.metric == "frechet"]
    if same:
        failed = [row for row in same if row.name in bad or row.left_out or row.rollbacks]
        low, high = wilson(len(failed), len(same))
        found.append(
            f"{count_words(len(failed), 'run').capitalize()} of {len(same)} with the same recipe went wrong; the "
            f"chance of that for another one lies between {low:.0%} and {high:.0%}."
        )
    for row in rows:
        if row.ending is not None and row.ending.ratio > ENDS_WORSE:
            doubt = "" if _ends_worse(row) else " With so few pictures chance alone could do that."
            found.append(_of_ending(row) + doubt)
        if row.name not in bad and (row.left_out or row.rollbacks):
            steps, back = count_words(row.left_out, "step"), count_words(row.rollbacks, "time")
            found.append(f"Run {row.name} left out {steps} that were not finite and went back {back}.")
        if row.state not in ("finished", "diverged"):
            found.append(f"Run {row.name} is not finished ({row.state}); it may still change.")
        if row.settled is False and row.name not in bad:
            found.append(f"The pictures of run {row.name} were still changing at its end.")
    found += [_about_pair(pair) for pair in pairs if pair.other_data]
    return found


def _about_quality(healthy: Sequence[RunRow]) -> list[str]:
    """Agreement is not quality: how far they all are from real pictures, where that is known."""
    times = [e.value / e.floor for row in healthy if (e := row.measured.get("frechet")) and e.floor and e.floor > 0]
    if len(times) < 2 or median(times) < FAR:
        return []
    return [
        f"Agreeing is not being good: their pictures lie {median(times):.0f} times as far from real ones as other real "
        "pictures do."
    ]


def _about_spread(found: Spread) -> str:
    share = f"{found.sd / abs(found.mean):.0%}" if found.mean else f"{found.sd:.3g}"
    measuring = f"{found.measurement_sd / abs(found.mean):.0%}" if found.mean else f"{found.measurement_sd:.3g}"
    if found.p >= LEVEL / len(WORSE):
        end = "no more than measuring explains"
    else:
        end = "more than measuring explains" + ("" if found.seed_matters else ", but too little to matter")
    return (
        f"Between seeds the distance from real pictures varies by {share} (one standard deviation), and measuring one "
        f"run is itself uncertain by {measuring}: {end}. The worst of them is {found.worst}."
    )


def _about_pair(pair: Pair) -> str:
    how = {
        "alike": "cannot be told apart",
        "close": "are nearer to each other than to real pictures",
        "apart": "are further from each other than from real pictures",
    }[pair.words]
    return f"{pair.a} and {pair.b} learned from different pictures; what they draw: the two {how}."


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numbers as JSON has them; what is not finite becomes None.

    >>> plain(Estimate(1.0, 0.0, float("inf")))
    {'value': 1.0, 'low': 0.0, 'high': None, 'floor': None}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
