"""Monitoring a released model: have the pictures drifted from what it was trained on, does it still draw the same.

Drift is asked in up to four questions, each with an exact permutation p-value (see `metrics.two_sample`), adjusted
together by Holm, so the chance of a false alarm of the whole answer is at most alpha: the pictures in features, their
brightness, contrast, colour and sharpness, the mix of classes, and the pictures within each class. For generation see
`engine.release`.

Shapes: N pictures, C channels, H rows, W columns, Q qualities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import Recipe, read_toml
from imagekiln.core import mix
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.judges import JUDGE_RECIPE, judge, predicted
from imagekiln.engine.models import Model, open_model
from imagekiln.engine.release import check
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Say
from imagekiln.errors import DataError, UsageError, did_you_mean
from imagekiln.metrics import RandomConv, Statistics, extract, weights_hash
from imagekiln.metrics.two_sample import PERMUTATIONS, category_test, holm, mean_tests, novelty, two_sample

DRIFTED, CHANGED, BOTH = 10, 11, 12
"""Exit codes of `imagekiln monitor`: the pictures drifted, generation changed, both."""

FEWEST = 20
"""Pictures a comparison needs on each side."""

MOST_CLASSES = 10
"""Classes looked into one by one: the most frequent ones of the new pictures."""

LARGEST_COUNT = 20_000
"""Pictures whose labels give the run's own mix of classes; a set with more is sampled."""

BATCH = 100
SHEET_COLUMNS = 10

QUALITIES = (
    ("brightness", "are brighter", "are darker"),
    ("contrast", "have more contrast", "have less contrast"),
    ("sharpness", "are sharper", "are softer"),
    ("colour", "are more colourful", "are less colourful"),
)
_FOUR_QUESTIONS = 4


class Sample(NamedTuple):
    """Some pictures of a set: images_NCHW uint8, labels_N int64 (-1 unknown) or None, and the files' names."""

    images: Tensor
    labels: Tensor | None
    files: list[str]


@dataclass
class Drift:
    """What was found about new pictures against the run's own.

    questions: one row a question, with `p_value` and `adjusted` (Holm over the questions).
    sentences: what was found, for people. qualities, classes, novel: rows with the figures behind them.
    """

    drifted: bool
    alpha: float
    n: int
    n_reference: int
    features: str
    questions: list[dict[str, Any]]
    sentences: list[str] = field(default_factory=list)
    qualities: list[dict[str, Any]] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)
    novel: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    sheet: str | None = None


@dataclass
class Watch:
    """The whole answer: `drift` without new pictures and `generation` of a judge are None."""

    run: str
    data: str | None
    drift: Drift | None
    generation: dict[str, Any] | None

    @property
    def exit_code(self) -> int:
        """0, or one of `DRIFTED`, `CHANGED`, `BOTH`."""
        drifted = self.drift is not None and self.drift.drifted
        changed = self.generation is not None and self.generation["state"] == "changed"
        return BOTH if drifted and changed else DRIFTED if drifted else CHANGED if changed else 0


def monitor(
    run: Run | str | Path,
    data: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    n: int = 1000,
    features: str | None = None,
    alpha: float = 0.01,
    release: bool = False,
    seed: int = 0,
    device_name: str = "auto",
    say: Say | None = None,
) -> Watch:
    """Compare new pictures with those the run was trained on, and its drawing with the day of release.

    data: the new pictures; None looks at generation alone. reference: pictures to compare with instead of the run's
    own. n: most pictures on each side. features: classifier, randconv or auto. alpha: chance of a false alarm.
    release: write a new release record, also where there is one.

    Raises:
        UsageError: no run, no weights, no such data, wrong settings. DataError: too few pictures, or of another size.
    """
    say = say or (lambda sentence: None)
    run = run if isinstance(run, Run) else Run.open(run)
    if not 0.0 < alpha < 1.0 or n < FEWEST:
        raise UsageError(f"alpha = {alpha}, n = {n}: expected 0 < alpha < 1 and at least {FEWEST} pictures.")
    recipe = recipes.complete(read_toml(run.recipe_path))
    wanted = _features_named(features, recipe.eval.features)
    model = open_model(run, device=device_name)
    found = None if data is None else _drift(run, recipe, model, (data, reference), (n, alpha, seed), wanted, say)
    watch = Watch(str(run.path), None if data is None else str(data), found, check(run, model, release, say))
    run.append_check({"unix_sec": round(time.time()), "exit_code": watch.exit_code, **facts(watch)})
    return watch


def facts(watch: Watch) -> dict[str, Any]:
    """The answer as plain values for JSON."""
    return {
        "run": watch.run,
        "data": watch.data,
        "drift": None if watch.drift is None else dict(vars(watch.drift)),
        "generation": watch.generation,
        "exit_code": watch.exit_code,
    }


def table(watch: Watch) -> str:
    """The answer as text for people."""
    lines = []
    if watch.drift is not None:
        lines += [f"{'question':<28}{'p':>10}{'adjusted':>11}"]
        lines += [f"{q['question']:<28}{q['p_value']:>10.4g}{q['adjusted']:>11.4g}" for q in watch.drift.questions]
        lines += watch.drift.sentences
    if watch.generation is not None:
        lines.append(watch.generation["sentence"])
    return "\n".join(lines)


def _features_named(given: str | None, usual: str) -> str:
    """Which features: the given ones, else those the run is evaluated in where they are of the kinds known here."""
    known = ("auto", "randconv", recipes.resolve(JUDGE_RECIPE).family.name)
    if given is not None and given not in known:
        raise UsageError(f"--features {given!r}: no such features to monitor in. {did_you_mean(given, known)}")
    return given or (usual if usual in known else "auto")


# -- drift ------------------------------------------------------------------------------------------------------------


def _drift(
    run: Run,
    recipe: Recipe,
    model: Model,
    paths: tuple[str | Path, str | Path | None],
    settings: tuple[int, float, int],
    features: str,
    say: Say,
) -> Drift:
    """Load both sides, compare them, and draw the sheet of the most novel pictures."""
    n, alpha, seed = settings
    own = _own(run, recipe, paths[1], say)
    fresh = datasets.load(recipe.data.model_copy(update={"path": str(paths[0]), "validation_fraction": 0.0}))
    _require_fit(own, str(paths[1] or recipe.data.path), model)
    _require_fit(fresh, str(paths[0]), model)
    for notice in fresh.notices:
        if "held out" not in notice:
            say(notice)
    labelled = own.train.num_classes >= 2
    if features not in ("auto", "randconv") and not labelled:
        raise UsageError(f"--features {features} needs a run with labels; use randconv.")
    learned = labelled and features != "randconv"
    network: Any = judge(own, 0, say).family if learned else RandomConv(own.train.image_shape)
    new = sample(_sources(fresh), n, mix(seed, "new"))
    # Features that were learned from the training pictures see these with other eyes: only held-out ones compare.
    reference = sample([own.validation] if learned else [own.validation, own.train], n, mix(seed, "reference"))
    for side, where in ((new, paths[0]), (reference, "the reference")):
        if len(side.images) < FEWEST:
            raise DataError(
                f"{where}: {len(side.images)} pictures; a comparison needs at least {FEWEST}: add pictures."
            )
    labels = _labels(new, fresh, reference, own, network if learned else None, say)
    name = f"judge {weights_hash(network)[:8]}" if learned else RandomConv.name
    found = compare_pictures(new, reference, network, name, labels, alpha, seed, run.picture_path("novel"))
    if fresh.left_out:
        found.left_out = len(fresh.left_out)
        file, why = fresh.left_out[0]
        found.sentences.append(f"Files that could not be used: {found.left_out}, the first one {file}: {why}.")
    return found


class Labels(NamedTuple):
    """Class numbers of both samples, their names, and the counts by class whose mixes are compared."""

    new: Tensor
    reference: Tensor
    names: list[str]
    new_counts: list[int]
    reference_counts: list[int]


def compare_pictures(
    new: Sample,
    reference: Sample,
    network: Any,
    features: str,
    labels: Labels | None = None,
    alpha: float = 0.01,
    seed: int = 0,
    sheet: Path | None = None,
) -> Drift:
    """All questions about two samples of pictures; see the top of the file."""
    sides = _features(network, new), _features(network, reference)
    resolved = max(PERMUTATIONS, math.ceil(2 * _FOUR_QUESTIONS / alpha))
    drift = Drift(False, alpha, len(new.images), len(reference.images), features, [])
    p_values = {"pictures": two_sample(*sides, resolved, seed=seed).p_value}
    p_values["brightness, contrast, ..."] = _ask_qualities(drift, new.images, reference.images, alpha, seed)
    if labels is not None:
        mixed = category_test(labels.new_counts, labels.reference_counts, resolved, seed)
        p_values["mix of classes"] = mixed.p_value
        within = _ask_within_classes(drift, sides, labels, alpha, seed)
        p_values |= {} if within is None else {"within classes": within}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    drift.questions = [
        {"question": question, "p_value": p, "adjusted": adjusted[question], "drifted": adjusted[question] <= alpha}
        for question, p in p_values.items()
    ]
    drift.drifted = any(row["drifted"] for row in drift.questions)
    drift.sentences = _sentences(drift, adjusted, labels)
    _find_novel(drift, new, reference, sides, sheet)
    return drift


def _features(network: Any, pictures_of: Sample) -> Statistics:
    parts = pictures_of.images.split(BATCH)
    return Statistics.of(extract(network, (datasets.to_float(part) for part in parts)))


def qualities(images_NCHW: Tensor) -> Tensor:
    """Brightness, contrast, sharpness and, of colour pictures, colour of uint8 pictures: float64 (N, Q), 0 to 255.

    Mean and standard deviation of the luma (Rec. 601), mean absolute step between neighbours, mean spread of channels.

    >>> qualities(torch.tensor([0, 100], dtype=torch.uint8).view(1, 1, 1, 2)).tolist()
    [[50.0, 50.0, 100.0]]
    """
    pixels = images_NCHW.double()
    coloured = pixels.shape[1] >= 3
    luma = torch.einsum("nchw,c->nhw", pixels[:, :3], pixels.new_tensor([0.299, 0.587, 0.114])) if coloured else None
    y = pixels[:, 0] if luma is None else luma
    steps = torch.cat([y.diff(dim=1).abs().flatten(1), y.diff(dim=2).abs().flatten(1)], 1)
    found = [y.mean((1, 2)), y.std((1, 2), correction=0), steps.mean(1)]
    if coloured:
        found.append(pixels[:, :3].std(1, correction=0).mean((1, 2)))
    return torch.stack(found, 1)


def _ask_qualities(drift: Drift, new_NCHW: Tensor, reference_NCHW: Tensor, alpha: float, seed: int) -> float:
    sides = [torch.cat([qualities(part) for part in side.split(BATCH)]) for side in (new_NCHW, reference_NCHW)]
    permutations = max(PERMUTATIONS, math.ceil(2 * _FOUR_QUESTIONS * len(QUALITIES) / alpha))
    tests = mean_tests(sides[0], sides[1], permutations, seed)
    adjusted = holm([test.p_value for test in tests])
    means = [side.mean(0).tolist() for side in sides]
    for index, (test, own) in enumerate(zip(tests, adjusted, strict=True)):
        before, now = means[1][index], means[0][index]
        percent = 100 * (now / before - 1) if before > 0 else None
        drift.qualities.append(
            {
                "quality": QUALITIES[index][0],
                "reference": before,
                "new": now,
                "percent": percent,
                "p_value": test.p_value,
                "adjusted": own,
            }
        )
    return min(adjusted)


def _ask_within_classes(
    drift: Drift, sides: tuple[Statistics, Statistics], labels: Labels, alpha: float, seed: int
) -> float | None:
    """One test a class with enough pictures on both sides; the smallest adjusted p-value, or None without classes."""
    totals = sum(labels.new_counts), sum(labels.reference_counts)
    for number, name in enumerate(labels.names):
        counts = labels.new_counts[number], labels.reference_counts[number]
        shares = {"new_share": counts[0] / totals[0], "reference_share": counts[1] / totals[1]}
        drift.classes.append({"class": name, "new": counts[0], "reference": counts[1], **shares, "p_value": None})
    numbers = [c for c in range(len(labels.names)) if min(int((x == c).sum()) for x in labels[:2]) >= FEWEST]
    numbers = sorted(numbers, key=lambda c: -labels.new_counts[c])[:MOST_CLASSES]
    if not numbers:
        return None
    permutations = max(PERMUTATIONS, math.ceil(2 * _FOUR_QUESTIONS * len(numbers) / alpha))
    p_values = []
    for c in numbers:
        pair = sides[0].subset(labels.new == c), sides[1].subset(labels.reference == c)
        p_values.append(two_sample(*pair, permutations, seed=mix(seed, "class", c)).p_value)
    adjusted = holm(p_values)
    for c, p, own in zip(numbers, p_values, adjusted, strict=True):
        drift.classes[c] |= {"p_value": p, "adjusted": own}
    return min(adjusted)


def _sentences(drift: Drift, adjusted: dict[str, float], labels: Labels | None) -> list[str]:
    """What was found, in words; a detail is said only where its question and itself are beyond chance."""
    alpha, least = drift.alpha, min(adjusted.values())
    sizes = f"{drift.n} new pictures against {drift.n_reference}"
    said = [
        f"Drift: the pictures differ from those the model was trained on ({sizes}, adjusted p = {least:.2g})."
        if drift.drifted
        else f"No drift was seen ({sizes}, smallest adjusted p = {least:.2g}, alarm at {alpha:g})."
    ]
    if adjusted["brightness, contrast, ..."] <= alpha:
        for row, (_, more, less) in zip(drift.qualities, QUALITIES, strict=False):
            if row["adjusted"] <= alpha and row["percent"] is not None:
                said.append(
                    f"The new pictures {more if row['percent'] > 0 else less} by {abs(row['percent']):.0f} % "
                    f"(p = {row['adjusted']:.2g})."
                )
    if labels is not None and adjusted["mix of classes"] <= alpha:
        moved = sorted(drift.classes, key=lambda row: -abs(row["new_share"] - row["reference_share"]))
        for row in moved[:3]:
            before = f"were {row['reference_share']:.1%}" if row["reference"] else "were not there before"
            said.append(f"Pictures of class {row['class']!r} are {row['new_share']:.1%} of the new ones and {before}.")
    if adjusted.get("within classes", 1.0) <= alpha:
        for row in drift.classes:
            if row.get("adjusted", 1.0) <= alpha:
                said.append(f"Pictures of class {row['class']!r} look different (p = {row['adjusted']:.2g}).")
    return said


def _find_novel(
    drift: Drift, new: Sample, reference: Sample, sides: tuple[Statistics, Statistics], sheet: Path | None
) -> None:
    """List the most novel pictures, and draw them with the reference picture nearest to each."""
    found = novelty(*sides)
    order = found.ratio_X.argsort(descending=True, stable=True)[: 2 * SHEET_COLUMNS]
    drift.novel = [
        {"file": new.files[i], "ratio": float(found.ratio_X[i]), "p_value": float(found.p_value_X[i])}
        for i in order.tolist()
    ]
    rare = int((found.p_value_X <= 0.01).sum())
    drift.sentences.append(
        f"{rare} of {drift.n} new pictures are stranger than 99 % of the known (about {drift.n / 100:.0f} is chance"
        f"); the strangest is {datasets.printable(drift.novel[0]['file'])}."
    )
    if sheet is not None:
        rows = [
            part[chunk]
            for chunk in order.split(SHEET_COLUMNS)
            for part in (new.images, reference.images[found.nearest_X])
        ]
        pictures.write(pictures.grid(torch.cat(rows), SHEET_COLUMNS), sheet)
        drift.sheet = str(sheet)


# -- pictures and labels ----------------------------------------------------------------------------------------------


def sample(sources: Sequence[Any], count: int, seed: int) -> Sample:
    """Up to `count` pictures at random: all of one source are taken before any of the next."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    files: list[str] = []
    for number, source in enumerate(sources):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(mix(seed, number)))
        rows = order[: max(0, count - len(files))].tolist()
        if rows:
            batch = source.read(rows)
            images.append(batch.images)
            labels += [] if batch.labels is None else [batch.labels]
            files += [source.files[row] for row in rows]
    return Sample(torch.cat(images), torch.cat(labels) if labels else None, files)


def _own(run: Run, recipe: Recipe, reference: str | Path | None, say: Say) -> datasets.Dataset:
    """The pictures to compare with: the run's own, or others that were named."""
    try:
        own = datasets.load(
            recipe.data if reference is None else recipe.data.model_copy(update={"path": str(reference)})
        )
    except (UsageError, DataError) as error:
        if reference is not None:
            raise
        raise type(error)(f"{error} Name the pictures the run was trained on with --reference.") from None
    if reference is None and run.meta().get("data_fingerprint") not in (None, own.fingerprint):
        say(f"The pictures at {recipe.data.path} are not those {run.path} was trained on: they have changed since.")
    if own.train is own.validation:
        say("No pictures are held out: the training pictures are compared with.")
    return own


def _sources(dataset: datasets.Dataset) -> list[Any]:
    return [dataset.train] if dataset.train is dataset.validation else [dataset.validation, dataset.train]


def _require_fit(dataset: datasets.Dataset, path: str, model: Model) -> None:
    shape, wanted = tuple(dataset.train.image_shape), tuple(model.family.picture_shape)
    if shape != wanted:
        raise DataError(
            f"{path} holds pictures of {shape} and the model draws {wanted} (channels, height, width): bring them to "
            f"that with `imagekiln prepare {path} --size {wanted[1]} --channels {wanted[0]} --out FOLDER`."
        )


def _labels(
    new: Sample, fresh: datasets.Dataset, reference: Sample, own: datasets.Dataset, network: Any, say: Say
) -> Labels | None:
    """Labels of both sides as one list of classes: given ones, else what the judge sees, else None."""
    names = list(own.train.class_names)
    if not names:
        return None
    if new.labels is not None and reference.labels is not None and set(fresh.train.class_names) & set(names):
        names += [name for name in fresh.train.class_names if name not in names]
        number = torch.tensor([names.index(name) for name in fresh.train.class_names] + [-1])
        new_N, counted_N = number[new.labels], _given(own)
        return _counted(new_N, reference.labels, counted_N, names)
    if new.labels is not None and fresh.train.class_names:
        say("None of the new pictures' classes is one of the run's, so their labels are not used.")
    if network is None:
        say("The new pictures have no labels of the run's classes: the mix of classes is not compared.")
        return None
    say("The new pictures have no labels of the run's classes: a judge says what they show.")
    seen = [predicted(network, side.images) for side in (new, reference)]
    return _counted(seen[0], seen[1], seen[1], names)


def _counted(new: Tensor, reference: Tensor, counted: Tensor, names: list[str]) -> Labels | None:
    counts = [labels[labels >= 0].bincount(minlength=len(names)).tolist() for labels in (new, counted)]
    return Labels(new, reference, names, *counts) if all(map(sum, counts)) else None


def _given(own: datasets.Dataset) -> Tensor:
    """The labels of the run's own pictures, a random part of a large set."""
    parts = []
    for source in _sources(own):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(mix(0, "labels")))[:LARGEST_COUNT]
        parts.append(torch.full((len(order),), -1) if source.labels_N is None else source.labels_N[order])
    return torch.cat(parts)
