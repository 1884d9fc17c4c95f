"""Runs side by side: their newest measurements, ranked only where provenance agrees and intervals lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagekiln import data as datasets
from imagekiln.config import read_toml
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.kept import Kept, newest
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError
from imagekiln.metrics import Measurement, comparable


def comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run: name, family, images seen, speed, and the newest measurement of every label with its options."""
    rows = []
    for run in runs:
        recipe = recipes.complete(read_toml(run.recipe_path))
        ticks = [row["img_per_sec"] for row in run.stats() if "img_per_sec" in row]
        rows.append(
            {
                "run": str(run.path),
                "family": recipe.family.name,
                "kimg": run.status().get("nimg", 0) / 1000,
                "img_per_sec": sorted(ticks)[len(ticks) // 2] if ticks else None,
                "train_sec": max((row.get("train_sec", 0.0) for row in run.stats()), default=0.0),
                "measurements": {label: one.record() for label, one in newest(run).items()},
            }
        )
    return rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Runs side by side; a measurement is ranked only where its provenance agrees and the intervals do not overlap."""
    width = max(len(Path(row["run"]).name) for row in rows) + 2
    lines = [f"{'run':<{width}}{'family':<12}{'kimg':>9}{'img/s':>9}"]
    for row in rows:
        speed = f"{row['img_per_sec']:.0f}" if row["img_per_sec"] else ""
        lines.append(f"{Path(row['run']).name:<{width}}{Path(row['family']).stem:<12}{row['kimg']:>9.1f}{speed:>9}")
    for label in dict.fromkeys(label for row in rows for label in row["measurements"]):
        lines.append(label)
        have = [row for row in rows if label in row["measurements"]]
        found = [Kept.of(row["measurements"][label]) for row in have]
        reason = next((why for other in found[1:] if (why := _apart(found[0], other))), None)
        best = _best([one.measurement for one in found]) if reason is None else None
        for row, one in zip(have, found, strict=True):
            m, name = one.measurement, Path(row["run"]).name
            interval = f"  ({m.low:.4g} .. {m.high:.4g})" if m.low is not None and m.high is not None else ""
            drawn = f"  drawn with {one.drawn_with}" if one.options else ""
            lines.append(f"  {name:<{width}}{m.value:>10.4g}{interval}{drawn}{'  best' if m is best else ''}")
        if reason is not None:
            lines.append(f"  not ranked: {reason}")
    return "\n".join(lines)


def _apart(a: Kept, b: Kept) -> str | None:
    """Why two measurements may not be ranked against each other, or None when they may."""
    if a.options == b.options:
        return comparable(a.measurement, b.measurement)
    return f"different options of drawing: {a.drawn_with or 'none'} and {b.drawn_with or 'none'}"


def _best(measured: Sequence[Measurement]) -> Measurement | None:
    """The one whose interval lies beyond all others', or nobody."""
    sign = 1 if measured[0].lower_is_better else -1
    first = min(measured, key=lambda m: sign * m.value)
    rest = [m for m in measured if m is not first]
    if not rest or any(m.low is None or m.high is None for m in measured):
        return None
    apart = all((first.high < m.low) if sign > 0 else (first.low > m.high) for m in rest)  # type: ignore[operator]
    return first if apart else None


def side_by_side(runs: Sequence[Run | str | Path], out: Path) -> Path:
    """A picture of every run's newest preview, one under the other."""
    from PIL import Image

    sheets = []
    for item in runs:
        run = item if isinstance(item, Run) else Run.open(item)
        if run.samples():
            with datasets.open_own(run.samples()[-1][1]) as sheet:
                sheets.append(sheet.convert("RGB"))
    if not sheets:
        raise UsageError("None of these runs has drawn a preview yet.")
    total = Image.new("RGB", (max(s.width for s in sheets), sum(s.height + 8 for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        total.paste(sheet, (0, top))
        top += sheet.height + 8
    path = out if out.suffix == ".png" else out / "compare.png"
    pictures.write(total, path)
    return path
