"""Plots of measurements: precision against recall, power spectra, and classes one by one.

Rows are read as they lie in the run (`Run.measurements`); the newest row that holds a plot's figures is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagekiln.report.drawing import COLOURS, Chart, Line, drawn

MOST_BARS = 40
"""Classes shown one by one: of more, the worst ones."""

_BARS = {
    "label_accuracy": (
        "Draws what is asked for, by class",
        "Share of drawn pictures of each class in which the independent classifier sees that class.",
        True,
    ),
    "intra_class_frechet": (
        "Distance to real pictures, by class",
        "Drawn and real pictures of one class compared; shorter bars are better.",
        False,
    ),
}
"""Title, meaning, and whether more is better, by metric."""


@dataclass(frozen=True)
class Bar:
    """One class: its value as text, and its length as a share of the longest bar."""

    name: str
    value: str
    share: float


@dataclass(frozen=True)
class Bars:
    """A bar for every class, the worst first."""

    title: str
    meaning: str
    rows: tuple[Bar, ...]


def plots(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The line plots of these measurements; those without figures are left out."""
    return [chart for chart in (_precision_recall(rows), _spectrum(rows)) if chart is not None]


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bars]:
    """Classes one by one, the worst first.

    >>> row = {"metric": "label_accuracy", "details": {"classes": {"cat": 0.5, "dog": 1.0}}}
    >>> [(bar.name, bar.value, bar.share) for bar in bars([row])[0].rows]
    [('cat', '0.5', 0.5), ('dog', '1', 1.0)]
    """
    found = []
    for metric, (title, meaning, more_is_better) in _BARS.items():
        classes = _newest(rows, metric).get("classes")
        classes = classes if isinstance(classes, Mapping) else {}
        values = {str(name): float(value) for name, value in classes.items() if _finite(value)}
        if not values:
            continue
        longest = max(1.0 if more_is_better else 0.0, *values.values()) or 1.0
        worst_first = sorted(values.items(), key=lambda item: item[1] if more_is_better else -item[1])[:MOST_BARS]
        shown = tuple(Bar(name, f"{value:.3g}", max(0.0, value / longest)) for name, value in worst_first)
        found.append(Bars(title, meaning, shown))
    return found


def _precision_recall(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    details = _newest(rows, "precision")
    lines = [
        Line(name, points, colour, dashed=dashed, marked=True)
        for name, key, colour, dashed in (
            ("drawn", "curve", COLOURS[0], False),
            ("other real pictures", "curve_real", COLOURS[1], True),
        )
        if (points := _curve(details.get(key)))
    ]
    if not lines:
        return None
    meaning = (
        "Each point is one size of neighbourhood. Up is real-looking, right is varied; a line below and left of that "
        "of other real pictures lacks something."
    )
    ends = "; ".join(f"{line.name} from {_pair(line.points[0])} to {_pair(line.points[-1])}" for line in lines)
    source = drawn(lines, "recall", (0.0, 1.02), "linear", "precision", (0.0, 1.02))
    return Chart("Precision and recall", meaning, tuple(lines), source, f"Recall and precision: {ends}.")


def _spectrum(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    details = _newest(rows, "spectrum")
    lines = [
        Line(name, points, colour, dashed=dashed)
        for name, key, colour, dashed in (
            ("drawn", "radial", COLOURS[0], False),
            ("real", "radial_real", COLOURS[1], True),
        )
        if len(points := _decibels(details.get(key))) > 1
    ]
    if not lines:
        return None
    meaning = (
        "How much of the pictures is coarse (left) and fine (right), in decibels. Below the real ones on the right "
        "means blurred, above means noisy; a peak is a grid."
    )
    last = max(line.points[-1][0] for line in lines)
    ends = "; ".join(f"{line.name} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines)
    source = drawn(lines, "cycles in the picture", (0.0, last * 1.02), "linear", "decibel")
    return Chart("Coarse and fine", meaning, tuple(lines), source, f"Power in decibels: {ends}.")


def _newest(rows: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any]:
    details = [
        row["details"] for row in rows if row.get("metric") == metric and isinstance(row.get("details"), Mapping)
    ]
    return details[-1] if details else {}


def _curve(points: Any) -> tuple[tuple[float, float], ...]:
    """(recall, precision) of stored (k, precision, recall)."""
    triples = points if isinstance(points, list) else []
    return tuple(
        (recall, precision)
        for _, precision, recall in (p for p in triples if isinstance(p, list) and len(p) == 3)
        if _finite(precision) and _finite(recall)
    )


def _decibels(radial: Any) -> tuple[tuple[float, float], ...]:
    values = radial if isinstance(radial, list) else []
    return tuple((i, 10 * math.log10(value)) for i, value in enumerate(values, 1) if _finite(value) and value > 0)


def _pair(point: tuple[float, float]) -> str:
    return f"{point[0]:.2g} and {point[1]:.2g}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
