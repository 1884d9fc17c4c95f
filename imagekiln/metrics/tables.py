"""Measurements as tables: text for a terminal, CSV for a spreadsheet, Markdown for a page, LaTeX for a paper.

Every table says what a number needs to be believed: its interval, the same number between two sets of real pictures
(the floor), the ratio to it, and how many pictures it comes from. CSV keeps the full precision and the provenance; the
others are rounded to four digits. A number that does not exist is an empty cell, never a zero.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from imagekiln.errors import UsageError, did_you_mean
from imagekiln.metrics.manifest import Measurement

CSV_FIELDS = (
    "metric",
    "features",
    "value",
    "low",
    "high",
    "floor",
    "ratio",
    "lower_is_better",
    "n",
    "n_reference",
    "seed",
    "seconds",
    "reference",
    "reference_hash",
    "features_hash",
    "weights_hash",
)
HEAD = ("measure", "value", "95 % interval", "real/real", "ratio", "n")


def table(rows: Sequence[Measurement], kind: str = "text") -> str:
    """Measurements as a table of one of the `KINDS`.

    Raises UsageError for another kind.

    >>> from imagekiln.metrics import Measurement, Provenance
    >>> row = Measurement("coverage", 0.5, 100, 100, Provenance("randconv-v1"), low=0.4, high=0.6, floor=0.9)
    >>> print(table([row], "markdown"))
    | measure | value | 95 % interval | real/real | ratio | n |
    |---|---|---|---|---|---|
    | coverage[randconv-v1] | 0.5 | 0.4 .. 0.6 | 0.9 |  | 100 |
    """
    if kind not in KINDS:
        raise UsageError(f"No table of kind {kind!r}. {did_you_mean(kind, KINDS)}")
    return KINDS[kind](rows)


def _text(rows: Sequence[Measurement]) -> str:
    width = max([26, *(len(row.label) + 2 for row in rows)])
    lines = [f"{'':<{width}}{'value':>10}  {'95 % interval':<22}{'real/real':>10}{'ratio':>8}"]
    for row in rows:
        _, value, interval, floor, ratio, _ = _cells(row)
        lines.append(f"{row.label:<{width}}{value:>10}  {interval:<22}{floor:>10}{ratio:>8}")
    if rows:
        first = rows[0]
        lines.append(
            f"n = {first.n} against {first.n_reference} of {first.provenance.reference}; "
            f"floor from {first.details.get('floor', 'none')}; seed {first.seed}."
        )
    return "\n".join(lines)


def _csv(rows: Sequence[Measurement]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for row in rows:
        values = {**vars(row.provenance), **vars(row)}
        writer.writerow(["" if values[name] is None else values[name] for name in CSV_FIELDS])
    return text.getvalue().rstrip("\n")


def _markdown(rows: Sequence[Measurement]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in [HEAD, *(_cells(row) for row in rows)]]
    head, *body = [f"| {line} |" for line in lines]
    return "\n".join([head, f"|{'---|' * len(HEAD)}", *body])


def _latex(rows: Sequence[Measurement]) -> str:
    lines = [r"\begin{tabular}{lrlrrr}", r"\hline", " & ".join(_escaped(cell) for cell in HEAD) + r" \\", r"\hline"]
    for row in rows:
        cells = [_escaped(cell) for cell in _cells(row)]
        cells[2] = cells[2].replace(" .. ", "--")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"])


def _cells(row: Measurement) -> tuple[str, str, str, str, str, str]:
    interval = f"{row.low:.4g} .. {row.high:.4g}" if row.low is not None and row.high is not None else ""
    floor = f"{row.floor:.4g}" if row.floor is not None else ""
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
    return row.label, f"{row.value:.4g}", interval, floor, ratio, str(row.n)


def _escaped(text: str) -> str:
    """Text as LaTeX prints it literally."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


KINDS: dict[str, Callable[[Sequence[Measurement]], str]] = {
    "text": _text,
    "csv": _csv,
    "markdown": _markdown,
    "latex": _latex,
}
