"""The page of a run: everything the folder holds, gathered, put into words and rendered.

What a run lacks is left out. Names and sentences that come from files are escaped by the template, and folders of the
machine are cut to their last component. The same folder always gives the same bytes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from statistics import median
from typing import Any

import tomlkit
from safetensors import SafetensorError, safe_open

from imagekiln.config import read_toml
from imagekiln.engine.run import Run, write_whole
from imagekiln.engine.tracker import duration
from imagekiln.errors import UsageError
from imagekiln.report.curves import charts
from imagekiln.report.measured import tables
from imagekiln.report.pictures import Picture, embed
from imagekiln.report.plots import bars, plots
from imagekiln.report.templates import template

MOST_PREVIEWS = 60
"""Thumbnails of the timeline: of a longer one every k-th is shown, the first and the last always."""

LARGE, THUMBNAIL = (1600, 1_500_000), (480, 40_000)
"""Width in pixels above which, and bytes from which on, a picture is made smaller."""

MOST_COLUMNS = 16
"""Sheets of up to this many classes have one column a class (`engine.pictures.columns_for`)."""


@dataclass(frozen=True)
class Sheet:
    """A sheet of pictures with the class of each column above it, or the prompt of each row below it; `upright` where
    the names of classes are short."""

    picture: Picture
    caption: str
    columns: Sequence[str] = ()
    prompts: Sequence[str] = ()

    @property
    def upright(self) -> bool:
        return all(len(name) <= 3 for name in self.columns)


def write(run: Run) -> Path:
    """Write the report into the run folder and return its path.

    Raises:
        UsageError: there is no run. RecipeError: its recipe cannot be read. DiskError: the file cannot be written.

    >>> import tempfile
    >>> run = Run.create(Path(tempfile.mkdtemp()) / "first", recipe_toml="", meta={})
    >>> write(run) == run.report_path
    True
    """
    run = Run.open(run.path)
    write_whole(run.report_path, render(run).encode(errors="replace"))  # file names need not be Unicode
    return run.report_path


def render(run: Run) -> str:
    """The report as one string of HTML."""
    return template("page.html").render(_gather(run))


def _gather(run: Run) -> dict[str, Any]:
    """Everything the template shows."""
    recipe, meta, stats = read_toml(run.recipe_path), run.meta(), _mappings(run.stats())
    name = run.path.resolve().name
    data = str(_section(recipe, "data").get("path", ""))
    clean = _cleaner({str(run.path.resolve()): name, str(run.path.absolute()): name, data: last_component(data)})
    classes = _class_names(run)
    samples, measurements = run.samples(), _mappings(run.measurements())
    prompts = [clean(prompt) for prompt in _strings(_section(recipe, "train").get("prompts"))]
    drawn = (
        _sheet(samples[-1][1], f"Drawn by the model, {moment(samples[-1][0])}", classes, prompts) if samples else None
    )
    real = _sheet(run.picture_path("real"), "Real pictures it learned from", classes)
    neighbours = _sheet(run.picture_path("neighbours"), "Drawn pictures, each above its nearest training picture", ())
    return {
        "name": name,
        "drawn": drawn,
        "real": real,
        "lead": _lead(run, last_component(data), stats, draws=bool(samples)),
        "family": _family_words(str(_section(recipe, "family").get("name", ""))),
        "facts": _facts(run, stats),
        "charts": charts(stats),
        "timeline": _timeline(samples),
        "prompts": prompts,
        "num_previews": len(samples),
        "tables": tables(measurements),
        "plots": plots(measurements),
        "bars": bars(measurements),
        "neighbours": neighbours,
        "events": [
            {"when": moment(row["nimg"]) if isinstance(row.get("nimg"), int) else "", "what": clean(row["sentence"])}
            for row in _mappings(run.events())
            if isinstance(row.get("sentence"), str)
        ],
        "recipe": tomlkit.dumps(_without_folders(recipe)),
        "meta": {key.replace("_", " "): clean(str(value)) for key, value in meta.items() if value is not None},
        "commands": _commands(run, data, classes, draws=bool(samples)),
    }


# -- words ------------------------------------------------------------------------------------------------------------


def moment(nimg: int) -> str:
    """A moment of a run for people.

    >>> moment(0), moment(6016), moment(1_250_000)
    ('before training', 'after 6.02 thousand images', 'after 1,250 thousand images')
    """
    kimg = nimg / 1000
    return f"after {f'{kimg:,.0f}' if kimg >= 100 else f'{kimg:.3g}'} thousand images" if nimg else "before training"


def _lead(run: Run, data: str, stats: Sequence[Mapping[str, Any]], draws: bool) -> list[str]:
    """What was learned, from what, how long, on what."""
    meta, status = run.meta(), run.status()
    source = data.rsplit(":", 1)[-1] or "its pictures"
    goal = f"learned to draw pictures like those of {source}" if draws else f"learned from the pictures of {source}"
    summary = str(meta.get("data_summary", "")).rstrip(".")
    sentences = [f"This model {goal}" + (f" ({summary})." if summary else ".")]
    seen = status.get("nimg", 0)
    if seen:
        spent = f" in {duration(trained_sec)}" if (trained_sec := _largest(stats, "train_sec")) else ""
        where = f" on {meta['device']}" if meta.get("device") else ""
        sentences.append(f"It saw {seen:,} images{spent}{where}.")
    share = f"{min(1.0, seen / status['total_nimg']):.0%}" if status.get("total_nimg") else "part"
    state = {
        "training": f"It is still training, or was cut off: {share} is done.",
        "interrupted": f"It was stopped after {share} and can be continued by the same command.",
        "diverged": "The training left the finite numbers and was given up; what is shown is the last good moment.",
    }.get(str(status.get("state")))
    return [*sentences, state] if state else sentences


def _family_words(name: str) -> str:
    """First line of the docstring of a family of the package; "" for one from outside, whose file is not opened.

    The registry says the same, but loads torch.
    """
    file = resources.files("imagekiln.families") / f"{name}.py"
    if not name.isidentifier() or not file.is_file():
        return ""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]


def _facts(run: Run, stats: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A few numbers at a glance."""
    status = run.status()
    speeds = [row["img_per_sec"] for row in stats if isinstance(row.get("img_per_sec"), int | float)]
    trained_sec, memory_gb = _largest(stats, "train_sec"), _largest(stats, "peak_mem_gb")
    best = status.get("best_nimg")
    finished = status.get("unix_sec") if status.get("state") == "finished" else None
    facts = {
        "images seen": f"{status['nimg']:,}" if status.get("nimg") else "",
        "training time": duration(trained_sec) if trained_sec else "",
        "images a second": f"{median(speeds):,.0f}" if speeds else "",
        "memory": f"{memory_gb:.1f} GB" if memory_gb else "",
        "best moment": moment(best).removeprefix("after ") if isinstance(best, int) else "",
        "finished": datetime.fromtimestamp(finished, UTC).strftime("%Y-%m-%d %H:%M UTC") if finished else "",
    }
    return {key: value for key, value in facts.items() if value}


def _commands(run: Run, data: str, classes: Sequence[str], draws: bool) -> list[tuple[str, list[str]]]:
    """(what for, commands): as it was started, the same again, and what can be done with the run."""
    name, started = run.path.resolve().name, str(run.meta().get("command", ""))
    again = ["train", f"{name}/{run.recipe_path.name}", "--data", last_component(data), "--out", f"{name}-again"]
    found = [("It was started with", [started])] if started.startswith("imagekiln ") else []
    found.append(("The same model again", [_command(again)]))
    if draws:
        more = ["generate", name, "-n", "16", "--out", "pictures"]
        label = [_command([*more, "--label", classes[0]])] if classes else []
        found.append(("Draw more pictures; another --seed draws others", [_command(more), *label]))
        found.append(("Measure it against pictures it never saw", [_command(["evaluate", name])]))
    return found


def _command(words: Sequence[str]) -> str:
    return shlex.join(["imagekiln", *words])


# -- pictures ---------------------------------------------------------------------------------------------------------


def _sheet(path: Path, caption: str, classes: Sequence[str], prompts: Sequence[str] = ()) -> Sheet | None:
    picture = embed(path, caption, *LARGE)
    columns = classes if 2 <= len(classes) <= MOST_COLUMNS and not prompts else ()
    return None if picture is None else Sheet(picture, caption, columns, prompts)


def _timeline(samples: Sequence[tuple[int, Path]]) -> list[Picture]:
    """Thumbnails in order, at most `MOST_PREVIEWS` evenly chosen ones; a single picture is no timeline."""
    last = len(samples) - 1
    shown = min(len(samples), MOST_PREVIEWS)
    chosen = [samples[round(index * last / (shown - 1))] for index in range(shown)] if shown > 1 else []
    found = [embed(path, moment(nimg), *THUMBNAIL) for nimg, path in chosen]
    return [picture for picture in found if picture is not None]


def _class_names(run: Run) -> tuple[str, ...]:
    """The classes the model knows, from the metadata of its weights; none without weights or labels."""
    try:
        with safe_open(run.weights(), "np") as file:
            names = json.loads((file.metadata() or {}).get("class_names", "[]"))
    except (UsageError, SafetensorError, OSError, ValueError):
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


# -- plain values -----------------------------------------------------------------------------------------------------


def last_component(path: str) -> str:
    """What a path is called, whichever system wrote it.

    >>> last_component("/home/ada/flowers/"), last_component("builtin:digits")
    ('flowers', 'builtin:digits')
    """
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _without_folders(value: Any) -> Any:
    """The recipe with every absolute path cut to its last component."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    absolute = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute())
    return last_component(value) if absolute else value


def _cleaner(names: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces folders of this machine in a sentence: these by their names, the home folder by `~`."""
    absolute = {path: name for path, name in names.items() if os.path.isabs(path)}
    home = os.path.expanduser("~")
    if len(home) > 1:  # "/" in a container would hit every path
        absolute.setdefault(home, "~")
    pattern = "|".join(re.escape(path) for path in sorted(absolute, key=len, reverse=True))

    def clean(text: str) -> str:
        return re.sub(rf"({pattern})(?![\w.-])", lambda found: absolute[found[1]], text)

    return clean


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, Mapping) else {}


def _largest(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return max((row[key] for row in rows if isinstance(row.get(key), int | float)), default=0.0)


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _mappings(rows: Sequence[Any]) -> list[Mapping[str, Any]]:
    return [row for row in rows if isinstance(row, Mapping)]
