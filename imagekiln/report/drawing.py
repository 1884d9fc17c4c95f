"""Line charts, each an SVG image inside a data URI.

A chart holds lines and numerals only. Titles and legends are the page's own text, so names that come from a run are
escaped and set in a font that has their letters. Ink and grid follow the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """One line through points (x, y); `marked` shows each of them."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: str
    dashed: bool = False
    marked: bool = False

    def scaled(self, factor: float) -> Line:
        """The same line with every x times `factor`."""
        return dataclasses.replace(self, points=tuple((x * factor, y) for x, y in self.points))


@dataclass(frozen=True)
class Chart:
    """Lines that share axes, drawn. `source` is a data URI; `summary` says in words what a reader would see."""

    title: str
    meaning: str
    lines: tuple[Line, ...]
    source: str
    summary: str


def drawn(
    lines: Sequence[Line],
    x_label: str,
    x_limits: tuple[float, float],
    scale: str,
    y_label: str = "",
    y_limits: tuple[float, float] | None = None,
) -> str:
    """The lines as a data URI.

    scale: of y: "log", "linear", or "zero", which is linear from 0. x_label, y_label: plain words of the page's own.
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
            x, y = zip(*line.points, strict=True)
            marker = "o" if line.marked or len(x) == 1 else None
            style = "--" if line.dashed else "-"
            axes.plot(x, y, color=line.colour, linestyle=style, marker=marker, markersize=4, linewidth=1.8)
        axes.set_xlim(*x_limits)
        _axes(axes, x_label, scale)
        axes.set_ylabel(y_label, color=INK)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue().replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"(<svg [^>]*>)", lambda found: found[1] + STYLE, svg[svg.index("<svg ") :], count=1)
    return data_uri("svg+xml", svg.encode())


def data_uri(kind: str, data: bytes) -> str:
    """A picture's file as the source of an <img>. kind: "png", "svg+xml", ..."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _axes(axes: Any, x_label: str, scale: str) -> None:
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
    axes.set_xlabel(x_label, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
