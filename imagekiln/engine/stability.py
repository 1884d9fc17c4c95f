"""Stability: runs of one recipe looked at together, across seeds, moments, splits of the data, samplers and steps.

Every run draws from the same seeds with the same labels, so that differences are those of the weights. Measurements
come from the `Bench` of the pictures a run learned from; those that a run already keeps with equal provenance are used
again, and new ones are kept. How two runs are compared is in `engine.agreement`, what the numbers mean in
`engine.verdict`.

Shapes: N pictures of one run, D features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import Recipe, read_toml
from imagekiln.core import Source, mix
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine import verdict as judging
from imagekiln.engine.agreement import differences, paired_distance, same_seed_distance, tiles, unrelated_distance
from imagekiln.engine.bench import BATCH, Bench
from imagekiln.engine.generate import draw, labels_for, options_for
from imagekiln.engine.inputs import in_words
from imagekiln.engine.kept import keep, kept
from imagekiln.engine.models import Model, hash_of, open_model
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Say
from imagekiln.engine.verdict import Ending, Estimate, Pair, RunRow, Spread, Verdict
from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import KernelDistance, Measurement, Statistics, extract, interval

MOST_RUNS = 20
SHOWN = 20
"""Pictures of a run side by side with those of the others."""

MOST_MOMENTS = 6
"""Moments of a run that are shown over time."""

SAMPLING_IMAGES = 100
"""Pictures for every number of steps and every sampler."""

NEARLY = 0.1
"""Pictures this near, in distances of unrelated ones, are nearly the same."""

FEWEST = 20
"""Pictures on a side, below which no interval can be had."""


@dataclass(frozen=True)
class Sheet:
    """Pictures of one run (or real ones) as a PNG file of (width, height) pixels, and what they show."""

    run: str
    shows: str
    png: bytes
    size: tuple[int, int]


@dataclass(frozen=True)
class Sampled:
    """One way of drawing: its kernel distance from real pictures, and how far its pictures lie from those of the most
    steps, seed by seed: root mean square of a pixel in [-1, 1]; `unrelated` is the same between different pictures."""

    sampler: str
    steps: int
    distance: Estimate
    rmse: float
    unrelated: float
    usual: bool


@dataclass(frozen=True)
class Stability:
    """Everything that was found. `rows`, `spreads`, `pairs`, `sampling` are numbers; sheets are for the page."""

    verdict: Verdict
    rows: tuple[RunRow, ...]
    spreads: tuple[Spread, ...]
    pairs: tuple[Pair, ...]
    sampling: tuple[Sampled, ...]
    about: dict[str, Any]
    """n, seed, features, reference, recipe family: what the numbers depend on."""

    side_by_side: tuple[Sheet, ...] = ()
    over_time: tuple[Sheet, ...] = ()
    by_sampling: tuple[Sheet, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All but the pictures, as plain values."""
        names = ("verdict", "rows", "spreads", "pairs", "sampling", "about")
        return {name: judging.plain(getattr(self, name)) for name in names}


def stability(
    runs: Sequence[Run | str | Path],
    data: str | Path | None = None,
    *,
    n: int | None = None,
    features: str | None = None,
    seed: int | None = None,
    say: Say | None = None,
) -> Stability:
    """Look at runs of the same, or nearly the same, recipe together.

    data: real pictures for all of them; None takes those each run learned from.
    n: pictures of a run, at most as many as are held out; features: classifier, randconv or auto.

    Raises:
        UsageError: no runs, no such run, or runs that cannot be compared. DataError: too few pictures.
    """
    say = say or (lambda sentence: None)
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    if not 1 <= len(opened) <= MOST_RUNS:
        raise UsageError(f"{len(opened)} runs were given; stability looks at 1 to {MOST_RUNS} run folders.")
    names = _names(opened)
    all_settings = [recipes.complete(read_toml(run.recipe_path)) for run in opened]
    differs = differences(all_settings, names)
    seed = all_settings[0].eval.seed if seed is None else seed
    benches: dict[str, Bench] = {}
    looks = []
    for run, recipe, name, other in zip(opened, all_settings, names, differs, strict=True):
        config = recipe.data if data is None else all_settings[0].data.model_copy(update={"path": str(data)})
        dataset = datasets.load(config)
        if dataset.fingerprint not in benches:
            kind = features or recipe.eval.features
            benches[dataset.fingerprint] = Bench(dataset, kind, seed, say, "")
        bench = benches[dataset.fingerprint]
        wanted = bench.count(n or recipe.eval.n)
        if wanted < FEWEST:
            raise DataError(
                f"{wanted} pictures of {name} would be compared; intervals need at least {FEWEST}: add pictures."
            )
        look = _Look(run, recipe, name, other, bench, next(iter(benches.values())), wanted)
        say(f"Looking at {name}: {wanted} pictures.")
        look.draw()
        looks.append(look)
    return _together(looks, say)


# -- which runs belong together ---------------------------------------------------------------------------------------


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' own names, with the folder above where two are called the same."""
    found = [run.path.resolve() for run in runs]
    names = [path.name for path in found]
    long = [f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 else path.name for path in found]
    if len(set(long)) < len(long):
        twice = next(name for name in long if long.count(name) > 1)
        raise UsageError(f"The run {twice} was given twice. Name every run once.")
    return long


# -- one run ----------------------------------------------------------------------------------------------------------


class _Look:
    """What is drawn from one run and measured on it. shared: the bench in whose features runs are compared."""

    def __init__(
        self, run: Run, recipe: Recipe, name: str, differs: tuple[str, ...], bench: Bench, shared: Bench, count: int
    ) -> None:
        self.run, self.recipe, self.name, self.differs = run, recipe, name, differs
        self.bench, self.shared, self.count = bench, shared, count
        self.model: Model | None = None
        self.features_ND: Tensor | None = None
        self.sheet: Tensor | None = None
        self.row: RunRow | None = None

    def draw(self) -> None:
        """Draw, measure, and fill in `row`; a run that cannot draw gets a fault instead."""
        status, events = self.run.status(), self.run.events()
        kinds = [event.get("kind") for event in events]
        facts: dict[str, Any] = {
            "name": self.name,
            "seed": self.recipe.train.seed,
            "state": str(status.get("state", "unknown")),
            "differs": self.differs,
            "data": self.bench.dataset.fingerprint,
            "left_out": kinds.count("non-finite"),
            "rollbacks": kinds.count("rollback"),
        }
        fault = "it left the finite numbers and was given up" if facts["state"] == "diverged" else ""
        try:
            model: Model | None = open_model(self.run)
        except UsageError:
            model, fault = None, fault or "it has no weights that can be read"
        if model is not None:
            self._refuse_others(model)
            try:
                facts |= self._measured(model) | {"drift": self._drift()}
            except DataError:
                fault = fault or "what it draws is not finite"
        self.row = RunRow(**facts, fault=fault)

    def _refuse_others(self, model: Model) -> None:
        if not model.family.draws:
            raise UsageError(
                f"{self.run.path} holds a {model.recipe.family.name}, which judges pictures and draws none."
            )
        wanted = self.shared.dataset.train.image_shape
        if model.family.picture_shape != wanted:
            raise UsageError(
                f"{self.run.path} draws pictures of {model.family.picture_shape} and the real ones are {wanted} "
                "(channels, height, width); stability compares runs of one size. Leave it out, or give other --data."
            )

    def _measured(self, model: Model) -> dict[str, Any]:
        self.model = model
        labels = self.bench.labels(self.count)
        images = self.drawn(model, "evaluate", labels)
        self.features_ND = _features(self.shared, images)
        chosen = labels_for(SHOWN, model.family.num_classes)
        self.sheet = self.drawn(model, "side by side", chosen)
        rows = _kept(self.run, self.bench, hash_of(model.weights), self.count)
        if not rows:
            self.bench.subject_hash = hash_of(model.weights)
            rows = self.bench.measure(images, labels)
            keep(self.run, rows, {})
        estimates = _estimates(rows, self.bench)
        real = _real(self.shared, self.count)
        variety = float(self.features_ND.double().var(0).sum() / real.double().var(0).sum())
        return {"measured": estimates, "variety": variety, "ending": self._ending(estimates.get("frechet"), labels)}

    def drawn(self, model: Model, purpose: str, labels: Sequence[int], options: Any = None) -> Tensor:
        """Pictures of the seeds `evaluate` uses for this purpose: the same for every run."""
        seeds = [mix(self.bench.seed, purpose, index) for index in range(len(labels))]
        with model.precision():
            wanted = in_words(model.family, self.shared.dataset.validation, labels)
            return draw(model.family, seeds, wanted, options or options_for(model.family, {}), BATCH)

    def _ending(self, at_best: Estimate | None, labels: Sequence[int]) -> Ending | None:
        """The last moment beside the best one; None where they are the same or only one was kept."""
        files = self.run.weights().parent.glob("[0-9]*.safetensors")
        last_nimg = max(int(file.name.split("-", 1)[0]) for file in files)
        best_nimg = self.run.status().get("best_nimg")
        if at_best is None or best_nimg is None or best_nimg == last_nimg:
            return None
        model = open_model(self.run, last_nimg)
        self.bench.subject_hash = hash_of(model.weights)
        found = _estimates(self.bench.measure(self.drawn(model, "evaluate", labels), None), self.bench)
        return Ending(best_nimg, at_best, last_nimg, found["frechet"]) if "frechet" in found else None

    # -- over time ----------------------------------------------------------------------------------------------------

    def moments(self) -> list[tuple[int, Tensor]]:
        """(images seen, pictures of the fixed seeds) of all previews, oldest first; unreadable ones left out."""
        found = []
        for nimg, path in self.run.samples():
            try:
                with datasets.open_own(path) as sheet:
                    cut = tiles(
                        np.array(sheet), self.shared.dataset.train.image_shape, self.bench.dataset.train.num_classes
                    )
            except DataError:
                continue
            if cut is not None:
                found.append((nimg, cut))
        return found

    def _drift(self) -> tuple[tuple[int, float], ...]:
        unrelated = unrelated_distance(_real(self.shared, self.count))
        moments = [(nimg, _features(self.shared, images)) for nimg, images in self.moments()]
        steps = itertools.pairwise(moments)
        return tuple((nimg, same_seed_distance(a, b) / unrelated) for (_, a), (nimg, b) in steps)


# -- features ---------------------------------------------------------------------------------------------------------


def _features(bench: Bench, images: Tensor) -> Tensor:
    """features_ND of uint8 pictures. Raises DataError where they are not finite."""
    return Statistics.of(extract(bench.network, (datasets.to_float(p) for p in images.split(BATCH)))).features


def _real(bench: Bench, count: int) -> Tensor:
    held_out: Source = bench.dataset.validation
    return _features(bench, held_out.read(range(min(count, len(held_out)))).images)


def _kept(run: Run, bench: Bench, weights_hash: str, count: int) -> list[Measurement]:
    """The newest measurements of the run that `bench.measure` would give again; [] where one has to be made."""
    found: dict[str, Measurement] = {}
    own = bench.provenance(bench.network_name)
    for row, options in kept(run):
        origin = row.provenance
        same = (origin.weights_hash, origin.reference_hash) == (weights_hash, own.reference_hash)
        seen = (origin.features, origin.features_hash) == (own.features, own.features_hash)
        judged = row.metric == "label_accuracy"
        number = row.n == count or (judged and row.n >= count) or row.metric == "copy_ratio"
        if same and not options and (seen or judged) and number and row.seed == bench.seed:
            found[row.metric] = row
    return list(found.values()) if "frechet" in found else []


def _estimates(rows: Sequence[Measurement], bench: Bench) -> dict[str, Estimate]:
    """What has an interval, in the first space of features and of the judge."""
    own = [row for row in rows if row.provenance.features == bench.network_name or row.metric == "label_accuracy"]
    return {
        row.metric: Estimate(row.value, row.low, row.high, row.floor)
        for row in own
        if row.low is not None and row.high is not None
    }


# -- all of them ------------------------------------------------------------------------------------------------------


def _together(looks: Sequence[_Look], say: Say) -> Stability:
    rows = tuple(look.row for look in looks if look.row is not None)
    bad = judging.broken(rows)
    same = [look for look in looks if not look.differs and look.name not in bad]
    spreads = _spreads([look.row for look in same if look.row is not None])
    pairs = _pairs(same)
    first = next((look for look in [*same, *looks] if look.model is not None), None)
    sampling, by_sampling = _sampling(first, say) if first is not None else ([], [])
    bench = looks[0].shared
    about = {
        "n": looks[0].count,
        "seed": bench.seed,
        "features": bench.network_name,
        "reference": bench.provenance(bench.network_name).reference,
        "classes": bench.dataset.train.num_classes,
        "sampled": first.name if first is not None and sampling else None,
    }
    verdict = judging.judge(rows, spreads, pairs)
    more = _about_sampling(sampling)
    return Stability(
        verdict=dataclasses.replace(verdict, sentences=(*verdict.sentences, *more)),
        rows=rows,
        spreads=tuple(spreads),
        pairs=tuple(pairs),
        sampling=tuple(sampling),
        about=about,
        side_by_side=tuple(_side_by_side(looks)),
        over_time=tuple(sheet for look in looks for sheet in _over_time(look)),
        by_sampling=tuple(by_sampling),
    )


def _spreads(rows: Sequence[RunRow]) -> list[Spread]:
    """Of the runs that learned from the same pictures: the largest such group."""
    sets = [row.data for row in rows]
    group = [row for row in rows if sets.count(row.data) == max(sets.count(data) for data in sets)]
    group = [row for row in group if row.data == group[0].data]
    if len(group) < 2:
        return []
    known = [metric for metric in group[0].measured if all(metric in row.measured for row in group)]
    lower = ("frechet", "kernel")
    return [judging.spread(m, {row.name: row.measured[m] for row in group}, m in lower) for m in known]


def _pairs(looks: Sequence[_Look]) -> list[Pair]:
    """Every two runs against each other, in the features of the first bench."""
    drawn = [(look, look.features_ND) for look in looks if look.features_ND is not None]
    found = []
    for index, (a, x_ND) in enumerate(drawn):
        for b, y_ND in drawn[index + 1 :]:
            n = min(len(x_ND), len(y_ND))
            distance, same = paired_distance(x_ND[:n], y_ND[:n], a.bench.seed)
            real = Statistics.of(_real(a.shared, n))
            to_real = sum(KernelDistance()(Statistics.of(rows[:n]), real) for rows in (x_ND, y_ND)) / 2
            near = same_seed_distance(x_ND[:n], y_ND[:n]) / unrelated_distance(x_ND[:n])
            found.append(Pair(a.name, b.name, distance, same, to_real, near, a.bench is not b.bench))
    return found


def _sampling(look: _Look, say: Say) -> tuple[list[Sampled], list[Sheet]]:
    """Distance and agreement by sampler and steps, where the family has such options."""
    model = look.model
    usual = getattr(model.family.config, "sample", None) if model is not None else None
    fields = type(usual).model_fields if usual is not None else {}
    if model is None or usual is None or "steps" not in fields:
        return [], []
    samplers = [str(name) for name in get_args(fields["sampler"].annotation)] if "sampler" in fields else []
    sampler = getattr(usual, "sampler", "") if samplers else ""
    ladder = sorted({max(1, usual.steps // 4), max(1, usual.steps // 2), usual.steps, 2 * usual.steps}, reverse=True)
    ways = [(sampler, steps) for steps in ladder]
    ways += [(name, usual.steps) for name in samplers if name != sampler]
    labels = look.bench.labels(min(look.count, SAMPLING_IMAGES))
    real = Statistics.of(_real(look.bench, look.count))
    best: Tensor | None = None
    found, sheets = [], []
    for name, steps in ways:
        try:
            options = options_for(model.family, {"steps": steps, "sampler": name or None})
            say(f"Drawing {len(labels)} pictures with {steps} steps{f' of {name}' if name else ''}.")
            images = look.drawn(model, "evaluate", labels, options)
        except UsageError:  # more steps than the family allows, or not with this sampler
            continue
        best = images if best is None else best
        rough = interval(KernelDistance(), Statistics.of(_features(look.bench, images)), real, seed=look.bench.seed)
        distance = Estimate(rough.value, rough.low, rough.high)
        usually = (name, steps) == (sampler, usual.steps)
        found.append(Sampled(name, steps, distance, _rmse(images, best), _rmse(images, images.roll(1, 0)), usually))
        sheets.append(_sheet(look.name, f"{steps} steps{f', {name}' if name else ''}", images[:10], 10))
    return found, sheets


def _about_sampling(ways: Sequence[Sampled]) -> list[str]:
    """The fewest steps that draw nearly the pictures of the most, with the sampler the run draws with."""
    sampler = next((one.sampler for one in ways if one.usual), None)
    own = [one for one in ways if one.sampler == sampler]
    near = [one.steps for one in own if one.rmse < NEARLY * one.unrelated]
    if len(own) < 2 or not near:
        return []
    most = max(one.steps for one in own)
    if min(near) == most:
        return [f"Fewer than {most} steps draw clearly other pictures: more of them may still help."]
    return [f"{min(near)} steps draw nearly the same pictures as {most}."]


def _rmse(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()) / 127.5).square().mean().sqrt())


# -- pictures ---------------------------------------------------------------------------------------------------------


def _sheet(run: str, shows: str, images: Tensor, columns: int) -> Sheet:
    picture = pictures.grid(images, columns)
    return Sheet(run, shows, pictures.encode(picture), picture.size)


def _side_by_side(looks: Sequence[_Look]) -> list[Sheet]:
    """Real pictures of the same labels, then every run's pictures of the same seeds."""
    source = looks[0].shared.dataset.validation
    drawn = next((look.sheet for look in looks if look.sheet is not None), None)
    if drawn is None:
        return []
    labels = labels_for(SHOWN, source.num_classes)
    columns = pictures.columns_for(len(labels), source.num_classes)
    columns = columns if source.num_classes else 10
    found = [_sheet("real pictures", "Real pictures, for comparison", pictures.of_labels(source, labels), columns)]
    for look in looks:
        if look.sheet is not None:
            found.append(_sheet(look.name, f"Drawn by {look.name}", look.sheet, columns))
    return found


def _over_time(look: _Look) -> list[Sheet]:
    """A few moments of a run: the first pictures of its fixed seeds."""
    moments = look.moments()
    last = len(moments) - 1
    chosen = sorted({round(i * last / (MOST_MOMENTS - 1)) for i in range(MOST_MOMENTS)}) if last > 0 else []
    return [_sheet(look.name, str(moments[i][0]), moments[i][1][:10], 10) for i in chosen]


# -- for people -------------------------------------------------------------------------------------------------------


def table(found: Stability) -> str:
    """The verdict, then a line a run, then the spread of every metric, as text."""
    shown = [m for m in judging.WORSE if any(m in row.measured for row in found.rows)]
    width = max(len(row.name) for row in found.rows) + 2
    lines = [found.verdict.headline, *found.verdict.sentences, ""]
    lines.append(f"{'run':<{width}}{'seed':>6}  {'state':<12}" + "".join(f"{name:>15}" for name in shown))
    for row in found.rows:
        values = [f"{row.measured[m].value:.4g}" if m in row.measured else "" for m in shown]
        state = "broken" if row.name in found.verdict.broken else row.state
        lines.append(f"{row.name:<{width}}{row.seed:>6}  {state:<12}" + "".join(f"{value:>15}" for value in values))
    if found.spreads:
        lines += ["", f"{'metric':<16}{'mean':>10}{'sd':>10}{'measuring':>11}{'seeds':>10}{'worst':>10}"]
    for one in found.spreads:
        worst = one.high if one.metric in ("frechet", "kernel") else one.low
        numbers = f"{one.mean:>10.4g}{one.sd:>10.3g}{one.measurement_sd:>11.3g}{one.between_sd:>10.3g}{worst:>10.4g}"
        lines.append(f"{one.metric:<16}{numbers}  ({one.worst})")
    about = found.about
    lines.append(f"n = {about['n']} against {about['reference']}, features {about['features']}, seed {about['seed']}.")
    return "\n".join(lines)
