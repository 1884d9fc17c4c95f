"""How a set's pictures are spread: histograms, points of a map by class, and how few numbers describe a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from imagekiln.report.drawing import COLOURS, STYLE, Chart, Line, data_uri, drawn

BINS = 24
WIDTH, HEIGHT = 480, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 26
MOST_POINTS = 1500
CLASS_COLOURS = (*COLOURS, "#45a5bd", "#6b6fd6", "#b08d57", "#7a4a63")
OTHERS = "#9aa3ad"


def histogram(
    title: str,
    meaning: str,
    values: np.ndarray,
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    text: Callable[[float], str] | None = None,
) -> Chart | None:
    """Bars of how many pictures have which value; None where there is nothing to show.

    log: bins of equal ratio, for sizes. limits: of the axis, else the ends of the values. text: how a value is written.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values) & (values > 0 if log else True)]
    if not len(values):
        return None
    text = text or (lambda value: f"{value:.3g}")
    low, middle, high = (float(x) for x in np.quantile(values, (0, 0.5, 1)))
    summary = f"{title}: from {text(low)} to {text(high)}, half of the pictures below {text(middle)}."
    if low == high:
        return Chart(title, f"{meaning} All pictures: {text(low)}.", (), "", summary)
    start, end = limits or (low, high)
    edges = np.geomspace(start, end, BINS + 1) if log else np.linspace(start, end, BINS + 1)
    edges[0], edges[-1] = start, end
    counts, _ = np.histogram(values.clip(start, end), edges)
    return Chart(title, meaning, (), _bars(counts, edges, text), summary)


def _bars(counts: np.ndarray, edges: np.ndarray, text: Callable[[float], str]) -> str:
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    most, step = int(counts.max()), width / len(counts)
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = TOP + height * (1 - share)
        label = f"{round(most * share):,}"
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="var(--grid)" stroke-width=".7"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end" {_INK}>{label}</text>')
    for index, count in enumerate(counts.tolist()):
        tall = max(1.5, height * count / most) if count else 0
        x, y = LEFT + index * step + 0.75, TOP + height - tall
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{step - 1.5:.1f}" height="{tall:.1f}" rx="1.5" fill="{COLOURS[0]}"/>'
        )
    ends = {0: "start", len(counts): "end"}
    for index in (0, len(counts) // 2, len(counts)):
        anchor = ends.get(index, "middle")
        x = LEFT + index * step
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}" {_INK}>{text(edges[index])}</text>')
    return _svg(parts, WIDTH, HEIGHT)


def points(coordinates_N2: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> Chart:
    """A point a picture, in the colour of its class; the largest classes have colours, the others share a grey one.

    coordinates_N2: of at most `MOST_POINTS` pictures, more are thinned out evenly. labels: -1 for none.
    """
    kept = np.linspace(0, len(coordinates_N2) - 1, min(len(coordinates_N2), MOST_POINTS)).round().astype(np.int64)
    shown_N2, label_N = coordinates_N2[kept], np.asarray(labels)[kept]
    sizes = np.bincount(label_N[label_N >= 0], minlength=len(class_names))
    largest = [int(k) for k in np.argsort(-sizes, kind="stable")[: len(CLASS_COLOURS)] if sizes[k]]
    colour = {k: CLASS_COLOURS[rank] for rank, k in enumerate(sorted(largest))}
    low, high = np.percentile(shown_N2, [0.5, 99.5], axis=0)
    place_N2 = ((shown_N2 - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
    width, height = 2 * WIDTH, 520
    order = sorted(range(len(label_N)), key=lambda index: (int(label_N[index]) in colour, index * 7919 % len(label_N)))
    parts = [f'<rect width="{width}" height="{height}" rx="8" fill="none" stroke="var(--grid)"/>']
    for index in order:
        x, y = 12 + place_N2[index, 0] * (width - 24), height - 12 - place_N2[index, 1] * (height - 24)
        fill = colour.get(int(label_N[index]), OTHERS)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" fill-opacity=".75"/>')
    lines = tuple(Line(class_names[k], (), colour[k]) for k in sorted(largest))
    if any(int(label) not in colour for label in label_N):
        lines += (Line("all others", (), OTHERS),)
    summary = f"Map of {len(label_N):,} pictures, a point each, in colours of {len(largest)} classes."
    meaning = "The same map with a point for every picture, in the colour of its class."
    return Chart("Classes on the map", meaning, lines, _svg(parts, width, height), summary)


def variance(explained: np.ndarray) -> Chart:
    """Share of the variance that the first components explain together."""
    together = np.concatenate([[0.0], np.cumsum(explained)])
    line = Line("explained", tuple((float(k), 100 * float(share)) for k, share in enumerate(together)), COLOURS[0])
    source = drawn([line], "components", (0.0, len(explained) * 1.02), "zero", "% of the variance", (0.0, 101.0))
    meaning = "How much of what differs between pictures a few directions explain; a steep start means much alike."
    summary = f"{len(explained)} components explain {together[-1]:.0%} of the variance, the first {together[1]:.0%}."
    return Chart("Explained variance", meaning, (), source, summary)


_INK = 'font-size="12" fill="var(--ink)"'


def _svg(parts: Sequence[str], width: int, height: int) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return data_uri("svg+xml", f"{head}{STYLE}{''.join(parts)}</svg>".encode())
