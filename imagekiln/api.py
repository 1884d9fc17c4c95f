"""The library in six functions: prepare, train, generate, evaluate, compare, export.

>>> import imagekiln
>>> run = imagekiln.train("vae", data="builtin:digits", out=tmp / "run", settings={"train": {"total_kimg": 0.2}})
>>> imagekiln.generate(run, n=4, out=tmp / "pictures", label="3").pictures[0].name
'000000.png'
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from imagekiln import data as datasets
from imagekiln import optim
from imagekiln.config import DataConfig, Recipe, merge, override, parse, write_toml
from imagekiln.core import Family
from imagekiln.engine import compare as comparing
from imagekiln.engine import device, pictures, plan, sheets, starting
from imagekiln.engine import evaluate as evaluation
from imagekiln.engine import generate as generation
from imagekiln.engine import propagate as propagating
from imagekiln.engine import recipe as recipes
from imagekiln.engine import show as showing
from imagekiln.engine.codec import Codec
from imagekiln.engine.continuing import continued
from imagekiln.engine.inputs import begin, companion_hashes, text_remarks, untrained_codec
from imagekiln.engine.models import Model, draw_as, guide_by, open_model
from imagekiln.engine.run import Run, made_folder
from imagekiln.engine.tracker import Several, Silent, TensorBoard
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import ImagekilnError, RecipeError, UsageError
from imagekiln.report import prepared as prepared_page

_PUBLISHED = {"size", "channels", "fit", "background", "buckets", "validation_fraction"}
"""Settings of `prepare` that a published set takes."""

Report = Callable[[int, int], None]
"""Told (done, total) now and then during long work."""


@dataclass(frozen=True)
class Drawn:
    """What `generate` wrote; walk, strip and mix where they were asked for."""

    pictures: list[Path]
    grid: Path
    weights: Path
    walk: Path | None = None
    strip: Path | None = None
    mix: Path | None = None
    understood: dict[str, str] = field(default_factory=dict)
    """What was drawn for each prompt, in the words of the model's phrasebook where it has one."""
    cut: list[str] = field(default_factory=list)
    """Prompts that are longer than the model reads."""


@dataclass(frozen=True)
class Planned:
    """What `train` would do."""

    recipe: Recipe
    summary: str
    parameters: dict[str, int]
    device: str
    precision: str
    notices: list[str] = field(default_factory=list)


def prepare(
    source: str | Path | Sequence[str | Path] | None,
    out: str | Path,
    progress: Report | None = None,
    *,
    restore: Sequence[str] = (),
    drop: Sequence[str] = (),
    propagate: float | None = None,
    assignments: Sequence[str] = (),
    report: bool = True,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> datasets.Dataset:
    """Collect, check, clean, split and pack pictures into a folder that trains without decoding again.

    source: one or several of what `docs/guide/prepare.md` lists: folders, archives, shards, parquet files, or
        `builtin:digits|fashion-mnist|cifar10`. None takes those of the prepared set in `out`, and its settings where
        none are given.
    out: the folder. A set that is there is brought up to date; only files that are new or have changed are opened.
    restore, drop: files whose decision is changed: kept although a check would leave them out, or left out.
    propagate: confidence from which a label that classifiers of the labelled pictures propose for an unlabelled one is
        accepted, for example 0.95; `proposals.csv` lists them all. say: is told what is going on meanwhile.
    assignments: settings as text, such as `clean.min_side=32`; settings: fields of `PrepareConfig`, such as `size=64`.
    report: write `report.html` beside the set; a published set, which is packed as it is, has none.

    Raises:
        DataError: no usable picture. DiskError: `out` cannot be written.
        UsageError: no such source, file or setting, or one that does not apply to a published set.
    """
    named = [source] if isinstance(source, str | Path) else list(source or [])
    sources, folder = [str(one) for one in named], Path(out)
    before = {} if sources or not datasets.is_prepared(folder) else datasets.read_about(folder)["settings"]
    config = parse(datasets.PrepareConfig, override(merge(before, settings), assignments), "prepare")
    known = datasets.published(sources[0]) if len(sources) == 1 else None
    if known is not None:
        _require_applicable(sources[0], config, {"restore": restore, "drop": drop, "propagate": propagate is not None})
        return datasets.write_published(*known, DataConfig(**config.model_dump(include=_PUBLISHED)), folder)
    edits = datasets.Edits(tuple(restore), tuple(drop))
    prepared = datasets.prepare(sources, folder, config, edits=edits, progress=progress)
    if propagate is not None:
        prepared = _with_proposed_labels(prepared, config, propagate, say or (lambda sentence: None))
    page = folder / "report.html"
    if report and not page.is_file():  # a set that was changed is a new folder, without the page of the old one
        prepared_page.write(prepared, page)
    del prepared  # what a set of 100,000 pictures is told by twice would be felt
    return datasets.load(DataConfig(path=str(folder), buckets=config.buckets))


def _require_applicable(source: str, config: datasets.PrepareConfig, asked: Mapping[str, object]) -> None:
    """Raises `UsageError` for what cannot be done to a published set: decisions that are asked for, other settings."""
    plain = datasets.PrepareConfig().model_dump(exclude=_PUBLISHED)
    settings = [name for name, value in config.model_dump(exclude=_PUBLISHED).items() if value != plain[name]]
    if given := [*(name for name, wanted in asked.items() if wanted), *settings]:
        raise UsageError(
            f"{source} is a published set, which is packed as it is, and does not take {', '.join(given)}. Leave "
            f"{'it' if len(given) == 1 else 'them'} out."
        )


def _with_proposed_labels(
    prepared: datasets.Prepared, config: datasets.PrepareConfig, threshold: float, say: Callable[[str], None]
) -> datasets.Prepared:
    """The set with the labels that were accepted, and `proposals.csv` beside it."""
    proposal = propagating.propagate(datasets.load(DataConfig(path=str(prepared.folder))), threshold, say=say)
    say(proposal.summary())
    accepted = {row.file: row.name for row in proposal.accepted}
    if accepted:
        prepared = datasets.prepare([], prepared.folder, config, edits=datasets.Edits(labels=accepted))
    propagating.write_csv(proposal, prepared.folder / datasets.PROPOSALS)
    return prepared


def train(
    recipe: str | Recipe,
    data: str | Path,
    out: str | Path,
    *,
    minutes: float | None = None,
    settings: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    begin_with: str | Path | None = None,
    listener: Any = None,
    progress: Report | None = None,
) -> Run:
    """Train a model; the same call continues a run that was interrupted.

    recipe: a recipe's name, a `.toml` file, a family's name or file, or a complete `Recipe`.
    minutes: fixes the length of the run from the speed measured at its start.
    settings, assignments: values laid over the recipe, as a nested mapping or as `"train.batch=32"`.
    begin_with: a run of the same family whose weights, settings and pictures it begins with; `recipe` may be "" then.
    listener: told about ticks and events, see `imagekiln.engine.tracker`.

    Raises:
        RecipeError, UsageError: exit code 2. DataError: 3. OutOfMemory: 4. DiskError: 5. Diverged: 6.
        Interrupted: 75, everything saved.
    """
    listener = listener or Silent()
    wanted = recipe if isinstance(recipe, Recipe) else _resolve(recipe, data, settings, assignments, begin_with)
    run = Run(Path(out))
    with run.lock():
        dataset = _load_data(wanted, listener, progress)
        again = run.started()
        wanted = _with_codec(wanted, dataset, run, listener)
        if again:
            wanted = continued(run, wanted, dataset, minutes)
        else:
            if minutes is not None:
                wanted, rate = plan.within(wanted, dataset, minutes)
                listener.say(
                    f"{rate.img_per_sec:.0f} images/s: {wanted.train.total_kimg:g} kimg in {minutes:g} minutes."
                )
        begun = begin(wanted, dataset, run if again else None)
        if not again:
            run = Run.create(run.path, write_toml(wanted), _meta(wanted, dataset))
            _keep(run, dataset, begun.family.codec)
        listeners = [listener] + ([TensorBoard(run)] if wanted.train.tensorboard else [])
        trainer = Trainer(wanted, *begun, run, Several(listeners))
        for sentence in [*recipes.remarks(wanted), *text_remarks(begun.train, wanted.train.prompts)]:
            listener.say(sentence)
        for key, one in wanted.optim.items():
            if one.langevin.temperature:
                listener.say(f"optim.{key}: Langevin noise with {optim.describe(trainer.optimizers[key])}.")
        try:
            trainer.fit()
        except ImagekilnError:
            raise
        except Exception:
            run.append_log(traceback.format_exc())
            raise
        finally:
            Several(listeners).close()
    return run


def dry_run(
    recipe: str,
    data: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    begin_with: str | Path | None = None,
    progress: Report | None = None,
) -> Planned:
    """Everything `train` checks before its first step, without writing anything."""
    wanted = _resolve(recipe, data, settings, assignments, begin_with)
    where = device.choose(wanted.train.device)
    dataset = datasets.load(wanted.data, progress=progress)
    notices = [*dataset.notices, *recipes.remarks(wanted)]
    if recipes.is_recipe(codec := wanted.data.codec):
        notices.append(f"Before this model its autoencoder is trained, with the recipe {codec}.")
    family = _rehearsed(wanted, dataset)
    precision = "bf16" if device.autocast_dtype(wanted.train.precision, where) else "fp32"
    counts = recipes.parameter_counts(family)
    return Planned(wanted, dataset.summary(), counts, device.describe(where), precision, notices)


def show(
    recipe: str,
    data: str | Path,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    begin_with: str | Path | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Write the first batch `train` would see into the folder `out`, as it is and as `data.augment` changes it.

    Returns what `batch.json` holds. Raises what `train` raises before its first step.
    """
    wanted = _resolve(recipe, data, settings, assignments, begin_with)
    return showing.write(wanted, Path(out), progress=progress)


def generate(
    run: Run | str | Path,
    n: int = 16,
    out: str | Path = "pictures",
    *,
    label: str | None = None,
    prompt: str | Sequence[str] = (),
    as_written: bool = False,
    start: str | Path | None = None,
    mask: str | Path | None = None,
    guide: str | Path | None = None,
    shape: str | None = None,
    seed: int = 0,
    batch: int = 64,
    nimg: int | None = None,
    average: str | None = None,
    device_name: str = "auto",
    grid: str = "plain",
    interpolate: int = 0,
    fps: float = 20.0,
    mix: int = 0,
    crossover: int | None = None,
    progress: Report | None = None,
    **options: Any,
) -> Drawn:
    """Draw `n` pictures into `out`: `000000.png` ... and `grid.png`.

    Picture i depends on (weights, seed, i, label or prompt) alone. Without a label the classes take turns.
    as_written: take prompts as they stand, also where the model has a phrasebook (`data.phrasebook`).
    grid: `plain`, or `class` for a row a class with its name.
    interpolate: frames from each picture to the next in `walk.png`, an animated PNG through all of them and back, `fps`
        frames a second; `strip.png` has the frames in one row.
    mix: draw so many more pictures, and `mix.png`, where rows have the coarse styles of the `n` and columns the fine
        ones of these; the first `crossover` places take the coarse one (half of them if None).
    start: a picture that drawing begins with, of which `strength` is drawn anew; mask: another, black where it stays.
    guide: run or weights file of a weaker model of the same family, which `guidance` then turns away from.
    shape: height and width in pixels, such as `96x64`, for a model with a U-Net; None = as it learned them.
    options: what the family offers, for example `steps=25, guidance=1.5` for diffusion, `truncation=0.7` for styles.

    Raises `UsageError` for a run, label or option that is not there or that the model cannot do, `DataError` where
    `start` or `mask` is no picture, `DiskError` when `out` cannot be written.
    """
    wanted = sheets.Sheets(grid, interpolate, fps, mix, crossover)
    if n < 1 or n + mix > generation.MAX_IMAGES:
        raise UsageError(f"-n {n}: expected a number of pictures from 1 to {generation.MAX_IMAGES}.")
    model = _that_draws(run if isinstance(run, Run) else Run.open(run), nimg, average, device_name)
    chosen = generation.options_for(model.family, options)
    guide_by(model, guide, chosen)
    draw_as(model, shape)
    beginning = starting.begun(model, start, mask, chosen)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    understood = {} if as_written else {one: model.understood(one) for one in prompts}
    wished = model.wishes(n + mix, label, [understood.get(one, one) for one in prompts])
    wanted.require(model, wished, beginning is not None)
    seeds, folder = generation.seeds_for(seed, n + mix), made_folder(out)
    with model.precision():
        drawn = generation.stream(model.family, seeds, wished, chosen, batch, beginning)
        paths, first = pictures.write_all(folder, drawn, wanted.kept(n), n + mix, progress)
        sheet = wanted.write(folder, model, first, seeds, wished, chosen, batch)
    return Drawn(paths, sheet.pop("grid"), model.weights, understood=understood, cut=model.cut(wished, chosen), **sheet)


def _that_draws(run: Run, nimg: int | None, average: str | None, device_name: str) -> Model:
    """The model of a run. Raises `UsageError` where it draws nothing."""
    model = open_model(run, nimg, average, device_name)
    if not model.family.draws:
        raise UsageError(f"{run.path} holds a {model.family.config.name}, which judges pictures and draws none.")
    return model


def evaluate(
    subject: Run | str | Path,
    data: str | Path | None = None,
    *,
    n: int | None = None,
    features: str | None = None,
    metrics: str | None = None,
    seed: int | None = None,
    guide: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> list[Any]:
    """Measure a run, or a folder of pictures from anywhere, against held-out real pictures.

    features: a space of features or several with commas between them, see `imagekiln.engine.bench.Bench`.
    metrics: `default`, `all`, or names with commas between them.
    guide, options: as `generate` takes them.

    Returns `imagekiln.metrics.Measurement`s, each with interval, real-versus-real floor and provenance; a run keeps
    them in its folder.

    Raises:
        UsageError: a folder was given without `data`, there are no such features or metrics, or options of drawing
            were given where nothing is drawn: for a folder, an autoencoder or a judge.
        DataError: too few pictures.
    """
    asked = {"n": n, "features": features, "metrics": metrics, "seed": seed, "guide": guide}
    return evaluation.evaluate(subject, data, **asked, say=progress, options=options)  # type: ignore[arg-type]


def compare(runs: Iterable[Run | str | Path]) -> list[dict[str, Any]]:
    """One row a run: its recipe, speed, and newest measurements; see `engine.compare.comparison`."""
    return comparing.comparison([run if isinstance(run, Run) else Run.open(run) for run in runs])


def export(run: Run | str | Path, to: str, out: str | Path) -> dict[str, Any]:
    """Write a run in another format, load it back, and return the receipt with the numeric difference.

    to: the name of a module in `imagekiln.exporters`: `comfyui`, `diffusers` or `safetensors`.

    Raises:
        UsageError: no such format, or the model does not fit it.
    """
    from imagekiln import exporters

    return exporters.write(run if isinstance(run, Run) else Run.open(run), to, Path(out))


# -- parts ------------------------------------------------------------------------------------------------------------


def _resolve(
    recipe: str,
    data: str | Path,
    settings: Mapping[str, Any] | None,
    assignments: Sequence[str],
    begin_with: str | Path | None = None,
) -> Recipe:
    named = [f"data.path={_absolute(str(data))}"] if data else []
    under = recipes.following(Run.open(begin_with)) if begin_with else None
    wanted = recipes.founded(recipes.resolve(recipe, settings, [*assignments, *named], under))
    device.choose(wanted.train.device)  # a missing GPU is said before pictures are read
    return wanted


def _rehearsed(recipe: Recipe, dataset: datasets.Dataset) -> Family:
    """The family, once everything was tried that can go wrong before a first step, that of its autoencoder included."""
    codec = None
    if recipes.is_recipe(recipe.data.codec):
        codec = untrained_codec(_resolve(recipe.data.codec, recipe.data.path, _shared(recipe), ()), dataset)
    return begin(recipe, dataset, rehearsal=True, codec=codec).family


def _with_codec(recipe: Recipe, dataset: datasets.Dataset, run: Run, listener: Any) -> Recipe:
    """The recipe with its codec as a path; one that names a recipe is trained first, in a run beside this one."""
    recipe = recipes.founded(recipe)
    codec = recipe.data.codec
    if not codec:
        return recipe
    if recipes.is_recipe(codec):
        beside = run.path.with_name(f"{run.path.name}-codec")
        if not run.started():
            _rehearsed(recipe, dataset)
            listener.say(f"First the autoencoder, in {beside}.")
            train(codec, recipe.data.path, beside, settings=_shared(recipe), listener=listener)
            listener.say(f"Now the model itself, in {run.path}.")
        codec = str(beside)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"codec": _absolute(codec)})})


def _shared(recipe: Recipe) -> dict[str, Any]:
    """What a model and the codec that is trained before it have in common: the pictures, and what they run on."""
    train = {key: getattr(recipe.train, key) for key in ("seed", "device", "precision")}
    return {"data": recipe.data.of_pictures(), "train": train}


def _absolute(data: str) -> str:
    return data if ":" in data and not Path(data).exists() else str(Path(data).expanduser().absolute())


def _load_data(recipe: Recipe, listener: Any, progress: Report | None) -> datasets.Dataset:
    if not recipe.data.path:
        raise UsageError("No pictures were named. Give a folder, a zip or builtin:digits with --data.")
    dataset = datasets.load(recipe.data, progress=progress)
    listener.say(dataset.summary())
    for notice in dataset.notices:
        listener.say(notice)
    return dataset


def _meta(recipe: Recipe, dataset: datasets.Dataset) -> dict[str, Any]:
    return {
        "version": metadata.version("imagekiln"),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.describe(device.choose(recipe.train.device)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["imagekiln", *sys.argv[1:]]) if sys.argv[0].endswith("imagekiln") else "python",
        "data_fingerprint": dataset.fingerprint,
        "data_summary": dataset.summary(),
        "companions": companion_hashes(recipe),
        "average": recipe.train.averages[0].name,
    }


def _commit() -> str | None:
    """The commit of the package when it runs from a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _keep(run: Run, dataset: datasets.Dataset, codec: Any) -> None:
    """What a run holds from its start: its codec, and a sheet of training pictures."""
    if isinstance(codec, Codec):
        codec.keep(run)
    source = dataset.train
    images = pictures.of_labels(source, generation.labels_for(40, source.num_classes))
    columns = pictures.columns_for(len(images), source.num_classes)
    pictures.write(pictures.grid(images, columns), run.picture_path("real"))


__all__ = [
    "Drawn",
    "Planned",
    "RecipeError",
    "compare",
    "dry_run",
    "evaluate",
    "export",
    "generate",
    "prepare",
    "show",
    "train",
]
