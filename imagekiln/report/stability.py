"""The page of several runs: is this model consistent? One verdict in words, then pictures and numbers behind it.

Everything on it comes from the result it is given (see `engine.stability`), so the same result gives the same bytes.
Names of runs are escaped by the template; charts hold lines and numerals only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagekiln.engine.run import write_whole
from imagekiln.report.curves import LOG_RANGE, over_images
from imagekiln.report.drawing import COLOURS, STYLE, Chart, Line, data_uri
from imagekiln.report.measured import BEST, MEANINGS
from imagekiln.report.page import moment
from imagekiln.report.pictures import Picture
from imagekiln.report.templates import template

if TYPE_CHECKING:
    from imagekiln.engine.stability import Sheet, Stability
    from imagekiln.engine.verdict import Estimate

ANSWERS = {
    "consistent": ("Yes", "good"),
    "shaky": ("Yes, with a stumble", "doubt"),
    "undecided": ("Not known yet", "doubt"),
    "varied": ("No: it depends on luck", "bad"),
    "declining": ("No: it gets worse", "bad"),
    "broken": ("No: something broke", "bad"),
}
"""The short answer to the page's question, and the colour it is set in."""

FIRST = ("frechet", "precision", "coverage", "recall", "label_accuracy")
"""The metrics shown run by run, in this order."""

BAR = (260, 20)
FINE, FAULTY, QUIET = COLOURS[0], COLOURS[4], "#8a93a0"

RELATIONS = {
    "alike": "cannot be told apart",
    "close": "nearer to each other than to real pictures",
    "apart": "further from each other than from real pictures",
}


@dataclass(frozen=True)
class Bar:
    """A run's value of one metric: the number, its interval in words, and both drawn."""

    run: str
    broken: bool
    value: str
    interval: str
    source: str


@dataclass(frozen=True)
class Block:
    """One metric over all runs."""

    name: str
    metric: str
    meaning: str
    better: str
    bars: tuple[Bar, ...]
    floor: str


def write(found: Stability, path: Path) -> Path:
    """Write the page and return its path.

    Raises:
        DiskError: the file cannot be written.
    """
    write_whole(path, render(found).encode(errors="replace"))
    return path


def render(found: Stability) -> str:
    """The page as one string of HTML."""
    answer, mood = ANSWERS[found.verdict.state]
    timelines = {row.name: [_picture(s) for s in found.over_time if s.run == row.name] for row in found.rows}
    return template("stability.html").render(
        answer=answer,
        mood=mood,
        verdict=found.verdict,
        count=len(found.rows),
        rows=[_row(row, found.verdict.broken) for row in found.rows],
        sheets=[(sheet.run, sheet.run in found.verdict.broken, _picture(sheet)) for sheet in found.side_by_side],
        blocks=[block for metric in FIRST if (block := _block(metric, found))],
        spreads=[_spread(one) for one in found.spreads],
        pairs=[(pair, RELATIONS[pair.words], [_text(x) for x in _pair_numbers(pair)]) for pair in found.pairs],
        timelines={name: sheets for name, sheets in timelines.items() if sheets},
        drift=_drift(found),
        sampling=_sampling(found),
        about=found.about,
    )


# -- runs -------------------------------------------------------------------------------------------------------------


def _row(row: Any, broken: Mapping[str, str]) -> dict[str, str]:
    settled = {True: "settled", False: "still changing", None: "too few previews to say"}[row.settled]
    trouble = []
    if row.left_out:
        trouble.append(f"{row.left_out} left out")
    if row.rollbacks:
        trouble.append(f"{row.rollbacks} times back")
    return {
        "name": row.name,
        "seed": str(row.seed),
        "state": "broken" if row.name in broken else row.state,
        "why": broken.get(row.name, ""),
        "differs": "; ".join(row.differs),
        "steps": ", ".join(trouble) or "none",
        "end": f"{row.ending.ratio:.2f} times" if row.ending is not None else "it is its best" if row.measured else "",
        "settled": settled,
        "variety": "" if row.variety is None else f"{row.variety:.2f}",
    }


def _spread(one: Any) -> dict[str, str]:
    if one.metric in BEST:
        words = "measuring explains it" if one.p >= 0.01 else "more than measuring"
    elif one.seed_matters:
        words = "the seed matters"
    else:
        words = "measuring explains it" if one.p >= 0.01 else "real, but small"
    return {
        "name": MEANINGS.get(one.metric, (one.metric.replace("_", " "), ""))[0],
        "metric": one.metric,
        "mean": _text(one.mean),
        "sd": _text(one.sd),
        "range": f"{_text(one.low)} to {_text(one.high)}",
        "measuring": _text(one.measurement_sd),
        "between": _text(one.between_sd),
        "worst": one.worst,
        "words": words,
    }


def _pair_numbers(pair: Any) -> tuple[float, ...]:
    return pair.distance, pair.same, pair.to_real, pair.same_seed


# -- one metric over all runs -----------------------------------------------------------------------------------------


def _block(metric: str, found: Stability) -> Block | None:
    """None where fewer than two runs have the metric."""
    known = {row.name: row.measured[metric] for row in found.rows if metric in row.measured}
    if len(known) < 2:
        return None
    floors = [e.floor for e in known.values() if e.floor is not None]
    ends = [x for e in known.values() for x in (e.low, e.value, e.high)] + floors
    scale = _scale(ends)
    name, meaning = MEANINGS.get(metric, (metric, ""))
    bars = tuple(
        Bar(
            run=run,
            broken=run in found.verdict.broken,
            value=_text(e.value),
            interval=f"{_text(e.low)} to {_text(e.high)}",
            source=_bar(e, scale, FAULTY if run in found.verdict.broken else FINE),
        )
        for run, e in known.items()
    )
    better = "lower is better" if metric == "frechet" else "higher is better"
    return Block(name, metric, meaning, better, bars, _text(floors[0]) if floors else "")


def _scale(values: Sequence[float]) -> Any:
    """A function from a value to its place in [0, 1]: logarithmic where values differ much, else linear from 0."""
    high = max(values) or 1.0
    positive = [x for x in values if x > 0]
    if positive and high / min(positive) > LOG_RANGE:
        low = math.log(min(positive))
        width = math.log(high) - low
        return lambda x: max(0.0, (math.log(x) - low) / width) if x > 0 else 0.0
    low = min(0.0, *values)
    return lambda x: (x - low) / ((high - low) or 1.0)


def _bar(one: Estimate, scale: Any, colour: str) -> str:
    """The interval as a line, the value as a dot, what real pictures score as a dashed line."""
    width, height = BAR

    def x(value: float) -> str:
        return f"{8 + scale(value) * (width - 16):.2f}"

    middle = height / 2
    parts = [f'<line x1="8" x2="{width - 8}" y1="{middle}" y2="{middle}" stroke="var(--grid)"/>']
    if one.floor is not None:
        parts.append(
            f'<line x1="{x(one.floor)}" x2="{x(one.floor)}" y1="1" y2="{height - 1}" stroke="{QUIET}" '
            'stroke-width="1.5" stroke-dasharray="3 3"/>'
        )
    parts.append(
        f'<line x1="{x(one.low)}" x2="{x(one.high)}" y1="{middle}" y2="{middle}" stroke="{colour}" '
        'stroke-width="5" stroke-linecap="round" opacity="0.45"/>'
    )
    parts.append(f'<circle cx="{x(one.value)}" cy="{middle}" r="5" fill="{colour}"/>')
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{STYLE}{"".join(parts)}</svg>'
    return data_uri("svg+xml", svg.encode())


# -- over time and over ways of drawing -------------------------------------------------------------------------------


def _drift(found: Stability) -> Chart | None:
    """How much the fixed-seed pictures change from one moment to the next, a line a run."""
    lines = [
        Line(row.name, row.drift, COLOURS[index % len(COLOURS)], dashed=row.name in found.verdict.broken)
        for index, row in enumerate(found.rows)
        if len(row.drift) > 1
    ]
    if not lines:
        return None
    end_nimg = max(line.points[-1][0] for line in lines)
    meaning = (
        "How much the same pictures change from one look to the next; 1 is as much as two unrelated pictures differ."
    )
    return over_images("Change of the pictures", meaning, lines, end_nimg, "zero")


def _sampling(found: Stability) -> list[dict[str, Any]]:
    return [
        {
            "way": sheet.shows,
            "usual": one.usual,
            "distance": _text(one.distance.value),
            "interval": f"{_text(one.distance.low)} to {_text(one.distance.high)}",
            "agreement": f"{one.rmse / one.unrelated:.1%}" if one.unrelated > 0 else "",
            "picture": _picture(sheet),
        }
        for one, sheet in zip(found.sampling, found.by_sampling, strict=True)
    ]


def _picture(sheet: Sheet) -> Picture:
    shows = moment(int(sheet.shows)) if sheet.shows.isdecimal() else sheet.shows
    return Picture(data_uri("png", sheet.png), *sheet.size, shows)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
