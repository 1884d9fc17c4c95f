"""Curves of a run: its rows of numbers as small line charts, each an SVG image inside a data URI.

A chart holds lines and numerals only. Titles and legends are the page's own text, so names that come from a run are
escaped and set in a font that has their letters. Ink and grid follow the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 200
"""Points of a line: a longer run is averaged over neighbours."""

FEWEST_POINTS = 3
"""A line of fewer says nothing; a chart of such lines alone is left out."""

LOG_RANGE = 30.0
"""A log scale helps when the largest value is this many times the smallest."""

ROUND_STEPS = (1, 2, 2.5, 5, 10)
COLOURS = ("#3b7dd8", "#d9772b", "#2f9e77", "#9a63d3", "#c94f6d", "#8a8d3a")
INK, GRID = "#010203", "#040506"  # placeholders: matplotlib writes plain colours, the page wants two sets of them
STYLE = (
    "<style>:root{--ink:#5b6470;--grid:#d8dbe0}"
    "@media(prefers-color-scheme:dark){:root{--ink:#a3acb8;--grid:#3a404a}}"
    "text{font-family:system-ui,sans-serif}</style>"
)


@dataclass(frozen=True)
class Line:
    """One line: (images seen, value) in the order of images seen."""

    name: str
    points: tuple[tuple[int, float], ...]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines that share an axis, drawn. `source` is a data URI; `summary` says in words what a reader would see."""

    title: str
    meaning: str
    lines: tuple[Line, ...]
    source: str
    summary: str


def charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """All curves of a run's rows (see `Run.stats`); what was recorded too seldom has none."""
    phases = list(dict.fromkeys(key.removesuffix("/loss") for key in _keys(rows) if key.endswith("/loss")))
    held_out = _names_after("validation/", rows)
    phases += [p for p in held_out if p not in phases and not _OF_A_PART.search(p)]
    end_nimg = max((row["nimg"] for row in rows if isinstance(row.get("nimg"), int)), default=0)
    pulls = [Line(p, _points(rows, f"{p}/grad_norm"), COLOURS[i % len(COLOURS)]) for i, p in enumerate(phases)]
    plans = [
        ("Loss", _about_loss(len(phases) > 1), _losses(rows, phases), "log"),
        ("Held-out loss by noise level", _ABOUT_LEVELS, _levels(rows, held_out), "log"),
        (
            "Drawn pictures: distance to held-out ones",
            _ABOUT_DRAWN,
            _single(rows, "quality/kernel", "distance"),
            "zero",
        ),
        ("Drawn pictures: kinds reached", _ABOUT_COVERAGE, _single(rows, "quality/coverage", "coverage"), "zero"),
        *[(f"Alongside the loss: {p}", "What is watched besides the loss.", _parts(rows, p), "log") for p in phases],
        ("Speed", "Images learned from per second.", _single(rows, "img_per_sec", "speed"), "zero"),
        ("Learning rate", "How large a step the training takes.", _single(rows, "lr", "learning rate"), "zero"),
        ("Gradient norm", "How strongly each step pulls at the weights; spikes are rough moments.", pulls, "log"),
    ]
    return [
        _chart(title, meaning, lines, end_nimg, scale)
        for title, meaning, lines, scale in plans
        if any(len(line.points) >= FEWEST_POINTS for line in lines)
    ]


_OF_A_PART = re.compile(r"[@\[]")
"""In the name of a held-out loss: at one level, or of another moving average than the first."""

_ABOUT_LEVELS = "The held-out loss at each amount of noise: little noise is about texture, much noise about shape."
_ABOUT_DRAWN = "How far a few hundred drawn pictures are from held-out ones; around 0 means no difference is seen."
_ABOUT_COVERAGE = "Share of held-out pictures with a drawn one close by. A fall means that kinds are being lost."


def _levels(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Line]:
    levels = [name for name in names if "@" in name and "[" not in name]
    return [
        Line(f"noise {name.rsplit('@', 1)[1]}", _points(rows, f"validation/{name}"), COLOURS[index % len(COLOURS)])
        for index, name in enumerate(levels)
    ]


def _about_loss(several: bool) -> str:
    if several:
        return "Several objectives pull at each other here: lines that stay level are normal."
    return "Lower is better. Held-out pictures were never trained on: if their line rises, the model learns by heart."


def _losses(rows: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> list[Line]:
    lines = []
    for index, phase in enumerate(phases):
        colour = COLOURS[index % len(COLOURS)]
        lines.append(Line(f"{phase}, training", _points(rows, f"{phase}/loss"), colour))
        lines.append(Line(f"{phase}, held out", _points(rows, f"validation/{phase}"), colour, dashed=True))
    return lines


def _parts(rows: Sequence[Mapping[str, Any]], phase: str) -> list[Line]:
    names = [name for name in _names_after(f"{phase}/", rows) if name not in ("loss", "grad_norm")]
    return [
        Line(name.replace("_", " "), _points(rows, f"{phase}/{name}"), COLOURS[index % len(COLOURS)])
        for index, name in enumerate(names)
    ]


def _single(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> list[Line]:
    return [Line(name, _points(rows, key), COLOURS[0])]


def _keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _names_after(prefix: str, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [key.removeprefix(prefix) for key in _keys(rows) if key.startswith(prefix)]


def _points(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[tuple[int, float], ...]:
    """The finite values of a key, at most `MOST_POINTS` of them: neighbours are averaged, the last moment is kept."""
    found = [
        (int(row["nimg"]), float(row[key]))
        for row in rows
        if isinstance(row.get("nimg"), int) and isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    width = math.ceil(len(found) / MOST_POINTS)
    chunks = [found[start : start + width] for start in range(0, len(found), width or 1)]
    return tuple((chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks)


def _chart(title: str, meaning: str, lines: Sequence[Line], end_nimg: int, scale: str) -> Chart:
    lines = tuple(line for line in lines if line.points)
    values = [value for line in lines for _, value in line.points]
    if scale == "log" and not (min(values) > 0 and max(values) / min(values) > LOG_RANGE):
        scale = "linear"
    ends = "; ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    return Chart(title, meaning, lines, _data_uri(_svg(lines, end_nimg, scale)), f"{title}: {ends}.")


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _svg(lines: Sequence[Line], end_nimg: int, scale: str) -> str:
    """The lines over thousands of images, from the start of the run to its end.

    scale: "log", "linear", or "zero", which is linear from 0.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.size": 10,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            x, y = zip(*((nimg / 1000, value) for nimg, value in line.points), strict=True)
            marker = "o" if len(x) == 1 else None
            axes.plot(x, y, color=line.colour, linestyle="--" if line.dashed else "-", marker=marker, linewidth=1.8)
        axes.set_xlim(0, max(1, end_nimg) / 1000 * 1.02)
        _axes(axes, scale)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue().replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return re.sub(r"(<svg [^>]*>)", lambda found: found[1] + STYLE, svg[svg.index("<svg ") :], count=1)


def _axes(axes: Any, scale: str) -> None:
    """Ticks that read as plain numbers, a quiet grid, no box."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    if scale == "zero":
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND_STEPS))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.6g}"))
    axes.set_xlabel("thousands of images seen", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
