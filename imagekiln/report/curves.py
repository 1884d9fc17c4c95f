"""Curves of a run: its rows of numbers over images seen, as small line charts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imagekiln.report.drawing import COLOURS, Chart, Line, drawn

MOST_POINTS = 200
"""Points of a line: a longer run is averaged over neighbours."""

FEWEST_POINTS = 3
"""A line of fewer says nothing; a chart of such lines alone is left out."""

LOG_RANGE = 30.0
"""A log scale helps when the largest value is this many times the smallest."""


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
        over_images(title, meaning, lines, end_nimg, scale)
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
        Line(
            f"noise {name.rsplit('@', 1)[1]}",
            _points(rows, f"validation/{name}"),
            COLOURS[index % len(COLOURS)],
            dashed=index >= len(COLOURS),  # where colours begin again
        )
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


def over_images(title: str, meaning: str, lines: Sequence[Line], end_nimg: float, scale: str) -> Chart:
    """A chart of lines over images seen. scale: as of `drawn`; "log" becomes linear where it would not help."""
    lines = tuple(line for line in lines if line.points)
    values = [value for line in lines for _, value in line.points]
    if scale == "log" and not (min(values) > 0 and max(values) / min(values) > LOG_RANGE):
        scale = "linear"
    ends = "; ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    thousands = [line.scaled(1 / 1000) for line in lines]
    source = drawn(thousands, "thousands of images seen", (0, max(1, end_nimg) / 1000 * 1.02), scale)
    return Chart(title, meaning, lines, source, f"{title}: {ends}.")
