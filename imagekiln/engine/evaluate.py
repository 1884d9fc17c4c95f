"""Measuring a run, or any folder of pictures, against real pictures the training never saw."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagekiln import data as datasets
from imagekiln.config import DataConfig, read_toml
from imagekiln.core import Source, mix
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.bench import BATCH, Bench, random_rows
from imagekiln.engine.generate import draw, invents, options_for, reconstructed
from imagekiln.engine.inputs import in_words
from imagekiln.engine.kept import keep
from imagekiln.engine.models import Model, guide_by, hash_of, open_model
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Say
from imagekiln.errors import UsageError
from imagekiln.metrics import Measurement, Provenance, Regression, Similarity
from imagekiln.metrics.similarity import WINDOW


def evaluate(
    subject: Run | str | Path,
    data: str | Path | None,
    *,
    n: int | None = None,
    features: str | None = None,
    metrics: str | None = None,
    seed: int | None = None,
    guide: str | Path | None = None,
    say: Say | None = None,
    options: dict[str, Any] | None = None,
) -> list[Measurement]:
    """See `imagekiln.api.evaluate`."""
    say = say or (lambda sentence: None)
    run = subject if isinstance(subject, Run) else Run(Path(subject))
    drawing = {**(options or {}), "guide": guide and str(guide)}
    drawing = {key: value for key, value in drawing.items() if value is not None}
    if run.exists():
        return _evaluate_run(run, data, n, features, metrics, seed, say, drawing)
    if data is None:
        raise UsageError(f"{subject} is no run folder. To measure a folder of pictures, name real ones with --data.")
    _leave_out(drawing, f"the pictures in {subject} are drawn already")
    return _evaluate_folder(run.path, data, n, features, metrics, seed or 0, say)


def _evaluate_run(
    run: Run,
    data: Any,
    n: int | None,
    features: str | None,
    metrics: str | None,
    seed: int | None,
    say: Say,
    drawing: dict[str, Any],
) -> list[Measurement]:
    recipe = recipes.complete(read_toml(run.recipe_path))
    model = open_model(run)
    if invents(model.family):
        chosen = options_for(model.family, {key: value for key, value in drawing.items() if key != "guide"})
        guide_by(model, drawing.get("guide"), chosen)
    else:
        given = drawing | ({} if n is None else {"n": n})
        _leave_out(given, f"{run.path} is measured without drawing anything")
    config = recipe.data if data is None else recipe.data.model_copy(update={"path": str(data)})
    dataset = datasets.load(config)
    if dataset.train.image_shape != model.family.picture_shape:
        raise UsageError(
            f"The model draws pictures of {model.family.picture_shape} and {config.path} holds "
            f"{dataset.train.image_shape} "
            "(channels, height, width). Evaluate on pictures of the same size."
        )
    seed = recipe.eval.seed if seed is None else seed
    space = features or (recipe.eval.features if invents(model.family) else "randconv")  # trains no judge
    bench = Bench(dataset, space, seed, say, hash_of(model.weights), metrics or recipe.eval.metrics)
    rows: list[Measurement] = []
    if invents(model.family):
        count = n or recipe.eval.n
        say(f"Drawing {count} pictures.")
        labels = bench.labels(count)
        seeds = [mix(seed, "evaluate", index) for index in range(count)]
        with model.precision():
            wanted = in_words(model.family, dataset.validation, labels)
            images = draw(model.family, seeds, wanted, chosen, BATCH)
        rows += bench.measure(images, labels)
        keep(run, rows, drawing)
        pictures.write(_neighbour_sheet(bench, images), run.picture_path("neighbours"))
    given_back = _reconstruction(model, dataset.validation, bench.provenance("pixels")) if model.family.draws else []
    keep(run, given_back, {})
    return rows + given_back


def _evaluate_folder(
    folder: Path, data: Any, n: int | None, features: str | None, metrics: str | None, seed: int, say: Say
) -> list[Measurement]:
    dataset = datasets.load(DataConfig(path=str(data)))
    channels, size, _ = dataset.train.image_shape
    drawn = datasets.load(DataConfig(path=str(folder), size=size, channels=channels, validation_fraction=0)).train
    bench = Bench(dataset, features or "auto", seed, say, drawn.fingerprint, metrics or "default")
    rows = random_rows(len(drawn), n or len(drawn), mix(seed, "folder"))  # the first ones may be of one class
    return bench.measure(drawn.read(sorted(rows)).images, None)


def _leave_out(given: Mapping[str, Any], reason: str) -> None:
    """Raises `UsageError` for what was given and cannot be heeded."""
    for name in given:
        raise UsageError(f"{'-n' if name == 'n' else f'--{name}'}: {reason}. Leave it out.")


def _reconstruction(model: Model, source: Source, provenance: Provenance) -> list[Measurement]:
    """Pixel errors and similarity of what the model makes of held-out pictures; [] where it makes nothing of them."""
    started, regression, similarity = time.perf_counter(), Regression(), Similarity()
    count = min(len(source), 1000)
    for start in range(0, count, BATCH):
        targets = datasets.to_float(source.read(range(start, min(count, start + BATCH))).images)
        with torch.inference_mode(), model.precision():
            predictions = reconstructed(model.family, targets.to(model.device))
        if predictions is None:
            return []
        regression.update(predictions.float().cpu(), targets)
        if min(targets.shape[2:]) >= WINDOW:
            similarity.update(predictions.float().cpu(), targets)
    seconds = time.perf_counter() - started
    scores = regression.scores() | (similarity.scores() if similarity.n else {})
    return [
        Measurement(
            metric=name,
            value=value,
            n=count,
            n_reference=count,
            provenance=provenance,
            seconds=seconds,
            lower_is_better=name not in ("r2", "psnr", "ssim", "ms_ssim"),
            details={"of": "held-out pictures"},
        )
        for name, value in scores.items()
    ]


def _neighbour_sheet(bench: Bench, images: Tensor, columns: int = 10) -> Any:
    """The drawn pictures that lie nearest to a training picture, each above that picture."""
    real, distance = bench.nearest_training_pictures(images)
    closest = distance.argsort()[: 2 * columns]
    rows = [part[chunk] for chunk in closest.split(columns) for part in (images, real)]
    return pictures.grid(torch.cat(rows), columns)
