"""The page of a prepared set: what was found in the pictures, what was done about it, and how to undo it.

Everything on it comes from the prepared folder, so the same folder gives the same bytes. Names and captions come from
outside: the template escapes them, and characters that cannot be seen are spelled out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imagekiln.core import mix
from imagekiln.data.advice import Advice, advise, facts_of
from imagekiln.data.files import printable
from imagekiln.data.measures import small_copies
from imagekiln.data.principal import Principal, channel_statistics, fit
from imagekiln.engine.run import write_whole
from imagekiln.report import decided, spread
from imagekiln.report.drawing import Chart
from imagekiln.report.page import last_component
from imagekiln.report.pictures import Picture
from imagekiln.report.specimens import atlas, sheet
from imagekiln.report.templates import template

if TYPE_CHECKING:
    from imagekiln.data.prepared import Prepared

SHEET_COLUMNS, SHEET_ROWS = 16, 5
"""Pictures on the first sheet; a set of up to as many classes has one column a class."""

MOST_CLASSES, MOST_LEFT_OUT, MOST_CAPTIONS = 40, 200, 8
MOST_MAPPED = 5000
FEWEST_MAPPED = 12
SIDES = {"train": "to learn from", "validation": "held out, to measure on", "test": "set aside for a last test"}

NOTES = {
    "turned": "were turned upright, as their EXIF data says.",
    "place": "say where they were taken (GPS). That is never copied: a prepared set holds pixels, not EXIF data.",
    "profile": "have a colour profile of their own and were converted to sRGB.",
    "cmyk": "have printing colours (CMYK) and were converted.",
    "deep": "have more than 8 bits a colour and were scaled to 8.",
    "alpha": "are partly transparent.",
    "grey": "are grey.",
    "frames": "are animations or have several pages; the first one was taken.",
    "repaired": "were truncated and are used without the rows that are missing.",
    "extension": "are of another format than their name says; they were read as what they are.",
}
"""What the notes of a survey mean, after "12 files ..."."""

_COLOURS = {1: "grey", 3: "in colour", 4: "in colour with transparency"}
_SEVERITY = {"warning": ("look at this", "bad"), "hint": ("good to know", "doubt"), "fine": ("fine", "good")}


@dataclass(frozen=True)
class Row:
    """A bar: a name, its number as text, and its length as a share of the longest one."""

    name: str
    value: str
    share: float


def write(prepared: Prepared, path: Path, basis: Principal | None = None, advice: list[Advice] | None = None) -> Path:
    """Write the page and return its path.

    basis: principal components of the kept pictures, where they are known already. advice: of `data.advice`, likewise.

    Raises:
        DiskError: the file cannot be written.
    """
    write_whole(path, render(prepared, basis, advice).encode(errors="replace"))
    return path


def render(prepared: Prepared, basis: Principal | None = None, advice: list[Advice] | None = None) -> str:
    """The page as one string of HTML."""
    return template("prepared.html").render(_gather(prepared, basis, advice))


def _gather(prepared: Prepared, basis: Principal | None, advice: list[Advice] | None) -> dict[str, Any]:
    about, rows = prepared.about, prepared.rows
    folder = prepared.folder.resolve().name
    sources = [last_component(str(source)) for source in about.get("sources", [])]
    classes = [printable(str(name)) for name in about["class_names"]]
    kept = np.array([int(row["row"]) for row in rows], np.int64)
    gallery = decided.Gallery(prepared)
    groups, num_groups = decided.grouped(prepared, gallery)
    checks = decided.checked(prepared, gallery, folder, sources)
    looks, columns = _looks(prepared, classes)
    if basis is None and len(rows) >= FEWEST_MAPPED:
        basis = fit(prepared.images_NCHW, kept)
    return {
        "name": printable(str(about.get("name") or folder)),
        "lead": _lead(prepared, checks),
        "facts": _facts(prepared, kept, classes),
        "looks": looks,
        "columns": columns,
        "advice": [
            (*_SEVERITY[one.severity], one) for one in (advise(facts_of(prepared)) if advice is None else advice)
        ],
        "checks": checks,
        "not_found": decided.not_found(prepared),
        "groups": groups,
        "num_groups": num_groups,
        "histograms": _histograms(prepared),
        "classes": _class_bars(rows, classes),
        "num_classes": len(classes),
        "split": _split(rows, classes),
        "captions": _captions(prepared, gallery),
        "map": _map(prepared, basis, kept, classes),
        "notes": _notes(prepared),
        "notices": [printable(str(notice)) for notice in about.get("notices", [])],
        "left_out": [(printable(name), printable(reason)) for name, reason in prepared.left_out[:MOST_LEFT_OUT]],
        "num_left_out": len(prepared.left_out),
        "folder": printable(folder),
    }


# -- words and numbers ------------------------------------------------------------------------------------------------


def _lead(prepared: Prepared, checks: Sequence[decided.Check]) -> list[str]:
    counts = prepared.about["counts"]
    sentences = [f"{_files(counts['files'])} looked at, {_pictures(counts['kept'])} kept."]
    if gone := counts["left_out"]:
        why = [(check.title.lower(), check.left_out) for check in checks if check.left_out]
        unread = counts["files"] - counts["usable"]
        why += [("cannot be used", unread)] if unread else []
        by_hand = gone - sum(count for _, count in why)
        why += [("by hand", by_hand)] if by_hand > 0 else []
        reasons = "; ".join(f"{name}: {count:,}" for name, count in why)
        sentences.append(f"{gone:,} {'is' if gone == 1 else 'are'} left out ({reasons}).")
    else:
        sentences.append("Nothing had to be left out.")
    proposed = sum(row.get("label_from") == "proposed" for row in prepared.rows)
    if proposed:
        sentences.append(f"{proposed:,} labels were proposed by a classifier and accepted.")
    sentences.append(
        "Your own files were only read: nothing in them is changed, and every decision here can be undone."
    )
    return sentences


def _files(count: int) -> str:
    return f"{count:,} file was" if count == 1 else f"{count:,} files were"


def _pictures(count: int) -> str:
    return f"{count:,} picture is" if count == 1 else f"{count:,} pictures are"


def _facts(prepared: Prepared, kept: np.ndarray, classes: Sequence[str]) -> dict[str, str]:
    counts, (channels, height, width) = prepared.about["counts"], prepared.about["image_shape"]
    mean, spread_C = channel_statistics(prepared.images_NCHW, kept) if len(kept) else ([], [])
    labels = [int(row.get("label", -1)) for row in prepared.rows] if classes else []
    facts = {
        "pictures": f"{counts['kept']:,}",
        "size": f"{width} by {height} pixels",
        "colours": _COLOURS[channels],
        "classes": f"{len(classes):,}" if classes else "",
        "without a label": f"{sum(label < 0 for label in labels):,}" if any(label < 0 for label in labels) else "",
        "held out": f"{counts.get('validation', 0):,}",
        "mean, from -1 to 1": ", ".join(f"{value:.2f}" for value in mean),
        "standard deviation": ", ".join(f"{value:.2f}" for value in spread_C),
    }
    return {key: value for key, value in facts.items() if value}


def _split(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """(side, what for, pictures, share) of every side that has pictures."""
    sizes = Counter(str(row.get("split", "train")) for row in rows)
    known = [side for side in SIDES if sizes[side]]
    by_side = [(side, SIDES[side], f"{sizes[side]:,}", f"{sizes[side] / len(rows):.1%}") for side in known]
    if len(classes) < 2:
        return [(*row, "") for row in by_side]  # type: ignore[misc]
    found = []
    for row in by_side:
        labels = Counter(int(r.get("label", -1)) for r in rows if str(r.get("split", "train")) == row[0])
        per_class = [labels[number] for number in range(len(classes))]
        found.append((*row, f"{min(per_class):,} to {max(per_class):,}"))
    return found  # type: ignore[return-value]


def _class_bars(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Row]:
    counts = Counter(int(row.get("label", -1)) for row in rows)
    pairs = sorted(((name, counts[number]) for number, name in enumerate(classes)), key=lambda pair: -pair[1])
    if len(pairs) > MOST_CLASSES:  # the largest and the smallest ones tell the most
        pairs = pairs[: MOST_CLASSES // 2] + pairs[-MOST_CLASSES // 2 :]
    if classes and counts[-1]:
        pairs.append(("without a label", counts[-1]))
    most = max((count for _, count in pairs), default=1) or 1
    return [Row(name, f"{count:,}", count / most) for name, count in pairs]


def _notes(prepared: Prepared) -> list[str]:
    counts = Counter(note for notes in prepared.survey.notes for note in notes)
    known = [note for note in NOTES if counts[note]] + sorted(set(counts) - set(NOTES))
    return [f"{counts[note]:,} files {NOTES.get(note, f'are noted as {note}.')}" for note in known]


# -- pictures and charts ----------------------------------------------------------------------------------------------


def _looks(prepared: Prepared, classes: Sequence[str]) -> tuple[Picture | None, list[str]]:
    """A sheet of training pictures and its column names: one column a class, where there are few classes."""
    rows = sorted(
        (row for row in prepared.rows if row.get("split", "train") == "train"),
        key=lambda row: mix("looks", str(row["digest"])),
    )
    if not rows:
        return None, []
    by_class = [[row for row in rows if row.get("label", -1) == number] for number in range(len(classes))]
    if 2 <= len(classes) <= SHEET_COLUMNS and sum(map(len, by_class)) >= len(rows) / 2:
        chosen = [
            by_class[number][line] if line < len(by_class[number]) else None
            for line in range(min(SHEET_ROWS, max(map(len, by_class))))
            for number in range(len(classes))
        ]
        columns, names = len(classes), list(classes)
    else:
        chosen, columns, names = list(rows[: SHEET_COLUMNS * SHEET_ROWS]), min(SHEET_COLUMNS, len(rows)), []
    images = [None if row is None else prepared.images_NCHW[int(row["row"])] for row in chosen]
    shown = sum(image is not None for image in images)
    return sheet(images, columns, f"{shown} pictures of the set, as a model will see them"), names


def _histograms(prepared: Prepared) -> list[Chart]:
    measured = prepared.survey.measured[prepared.survey.usable]
    height, width = measured["height"].astype(np.float64), measured["width"].astype(np.float64)
    charts = [
        spread.histogram(
            "Size of the files' pictures",
            "The shorter side in pixels, before they were brought to one size.",
            np.minimum(height, width),
            log=True,
            text=lambda value: f"{value:,.0f} px",
        ),
        spread.histogram(
            "Shape",
            "Width over height: 1 is square, more is wide, less is tall.",
            width / np.maximum(height, 1),
            log=True,
            text=lambda value: f"{value:.2f}",
        ),
        spread.histogram("Brightness", "From 0, black, to 1, white.", measured["brightness"], limits=(0.0, 1.0)),
        spread.histogram(
            "Sharpness",
            "How strong the finest detail is beside coarser detail; the low end is blurred.",
            measured["sharpness"],
            text=lambda value: f"{value:.2g}",
        ),
    ]
    # Where all pictures have one value there is no chart, only a sentence: it comes last.
    return sorted((chart for chart in charts if chart is not None), key=lambda chart: not chart.source)


def _captions(prepared: Prepared, gallery: decided.Gallery) -> dict[str, Any] | None:
    """Examples from the shortest to the longest caption, and a histogram of their lengths."""
    captioned = [(str(row["text"]), row["file_name"]) for row in prepared.rows if row.get("text")]
    if not captioned:
        return None
    first = {text: file for text, file in reversed(captioned)}
    by_length = sorted(first.items(), key=lambda pair: (len(pair[0]), pair))
    count = min(MOST_CAPTIONS, len(by_length))
    chosen = [by_length[round(index * (len(by_length) - 1) / max(1, count - 1))] for index in range(count)]
    lengths = np.array([len(text.split()) for text, _ in captioned])
    chart = spread.histogram("Length", "Words a caption.", lengths, text=lambda value: f"{value:.0f}")
    return {
        "number": len(captioned),
        "distinct": len(first),
        "missing": len(prepared.rows) - len(captioned),
        "examples": [(gallery.picture(file), printable(text)) for text, file in chosen],
        "chart": chart,
    }


def _map(
    prepared: Prepared, basis: Principal | None, kept: np.ndarray, classes: Sequence[str]
) -> dict[str, Any] | None:
    """The map of the set, the same by class, and the explained variance; None for a set of too few pictures."""
    if basis is None or len(kept) < FEWEST_MAPPED or len(basis.components_KD) < 2:
        return None
    chosen = np.linspace(0, len(kept) - 1, min(len(kept), MOST_MAPPED)).round().astype(np.int64)
    images_NCHW = small_copies(prepared.images_NCHW, kept[chosen])
    coordinates_N2 = basis.transform(images_NCHW)[:, :2]
    labels = [int(prepared.rows[index].get("label", -1)) for index in chosen]
    known = len(classes) > 1 and any(label >= 0 for label in labels)
    needed = [(share, basis.needed(share)) for share in (0.5, 0.9, 0.95)]
    return {
        "picture": atlas(
            coordinates_N2, images_NCHW, np.arange(len(images_NCHW)), "Map of the set: alike lies near alike"
        ),
        "points": spread.points(coordinates_N2, labels, classes) if known else None,
        "variance": spread.variance(basis.explained),
        "needed": [(f"{share:.0%}", count) for share, count in needed if count is not None],
        "numbers": int(np.prod(prepared.about["image_shape"])),
    }
