"""What is kept, on which side, and why: everything that follows from a survey, the settings and the user's edits.

No file of the user is opened here, so a decision can be changed at no cost and without the sources.

Shapes: N files, M usable pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from imagekiln.config import Fit, Fraction, Section
from imagekiln.data import checks, frames, packed, sides
from imagekiln.data.buckets import nearest, shapes
from imagekiln.data.captions import from_template
from imagekiln.data.checks import CleanConfig, Finding
from imagekiln.data.files import printable
from imagekiln.data.found import Picture, class_names
from imagekiln.data.survey import Survey
from imagekiln.errors import DataError

FINDINGS = "findings.jsonl"


class PrepareConfig(Section):
    """How pictures are prepared."""

    size: int = Field(0, ge=0, le=1024, description="height and width in pixels; 0 keeps the set's own size")
    channels: Literal[0, 1, 3, 4] = Field(0, description="1 grey, 3 RGB, 4 RGBA; 0 looks at the pictures")
    fit: Fit = Field(
        "crop", description="how a picture that is not square becomes square; smart crops where most edges are"
    )
    background: str = Field("white", description="colour behind transparent pixels and padding")
    buckets: bool = Field(False, description="also keep pictures in their own proportions, about size x size pixels")
    frames: Literal["first", "all"] = Field("first", description="of animations and of files with several pages")
    repair: bool = Field(False, description="use truncated JPEG files of which nine tenths of the rows are there")
    validation_fraction: Fraction = Field(0.1, description="share held out, by hash of the pixels")
    test_fraction: Fraction = Field(0.0, description="share that neither training nor validation sees")
    caption_encoding: str = Field("utf-8", description="of captions and metadata that are not UTF-8")
    caption_templates: tuple[str, ...] = Field(
        (),
        description="for pictures with a label and no caption, such as 'a photo of a {label}'; picked by name",
    )
    clean: CleanConfig = CleanConfig()


@dataclass(frozen=True)
class Edits:
    """Decisions about single files that were not taken by a check.

    restore: kept although a check would leave them out. drop: left out. labels: proposed ones that were accepted.
    """

    restore: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def then(self, restore: Sequence[str] = (), drop: Sequence[str] = (), labels: Mapping[str, str] = {}) -> Edits:
        """These edits followed by others; the last word on a file counts.

        >>> Edits(drop=("a.png",)).then(restore=["a.png"])
        Edits(restore=('a.png',), drop=(), labels={})
        """
        return Edits(
            tuple(sorted({*self.restore, *restore} - set(drop))),
            tuple(sorted({*self.drop, *drop} - set(restore))),
            {**self.labels, **labels},
        )


class Seen(NamedTuple):
    """What decisions are taken from: no file of the user is opened after this.

    shape: of the array. facts: for `prepare.json`. unread: (file, reason) of what was never a candidate.
    """

    survey: Survey
    shape: tuple[int, ...]
    facts: Mapping[str, Any]
    notices: Sequence[str]
    unread: Sequence[tuple[str, str]]


def write(
    folder: Path, seen: Seen, config: PrepareConfig, edits: Edits, sides_before: Mapping[str, str] | None
) -> None:
    """Write every file of a prepared set but its pixels and its survey.

    sides_before: the side a file had in an earlier set, which it keeps; None where other shares were held out there.

    Raises `DataError` when nothing would be kept.
    """
    survey = seen.survey
    given = dict(zip(survey.names, survey.labels, strict=True))
    # A label that somebody gave since a proposal was accepted is worth more than the proposal.
    proposed = {name: label for name, label in edits.labels.items() if name in given and given[name] is None}
    found = [
        finding
        for finding in checks.run(survey, config.clean)
        if finding.check != "missing_label" or survey.names[finding.index] not in proposed
    ]
    reasons = _reasons_to_leave_out(survey, found, config.clean, edits)
    kept = [index for index in survey.usable.tolist() if index not in reasons]
    if not kept:
        raise DataError("Every picture would be left out. Say which checks may do so with --set clean.leave_out=[...].")
    labels = [proposed.get(name, label) for name, label in given.items()]
    names = class_names([labels[index] for index in kept])
    lost = sorted(set(class_names(labels)) - set(names))
    notices = list(seen.notices)
    if lost:
        notices.append(f"No usable pictures are left of: {', '.join(map(printable, lost))}.")
    if sides_before is None:
        notices.append(
            "Other shares are asked for than before, so sides were chosen anew: what is held out now may have been "
            "trained on."
        )
    groups = checks.groups(survey, found, frames.neighbours(survey.names) if config.frames == "all" else ())
    rows = _rows(survey, kept, labels, names, groups, config, sides_before or {})
    for row in rows:
        if row["file_name"] in proposed:
            row["label_from"] = "proposed"
    if config.buckets:
        notices.append(packed.shapes_kept(rows))
    unusable = [(name, why) for name, why in zip(survey.names, survey.reasons, strict=True) if why]
    left_out: list[tuple[str, ...]] = [*seen.unread, *unusable]
    left_out += [(survey.names[index], *reason) for index, reason in sorted(reasons.items())]
    packed.write_rows(folder / FINDINGS, (_finding_row(survey, finding, reasons) for finding in found))
    about = {
        **seen.facts,
        "num_pictures": len(rows),
        "image_shape": seen.shape[1:],
        "class_names": names,
        "notices": notices,
        "seen_notices": list(seen.notices),
        "unread": [list(pair) for pair in seen.unread],
        "settings": config.model_dump(mode="json"),
        "edits": asdict(edits),
        "counts": _counts(survey, seen.unread, rows),
        "checks": _check_counts(found, reasons, config.clean),
    }
    packed.write_texts(folder, about, rows, left_out)


def _rows(
    survey: Survey,
    kept: Sequence[int],
    labels: Sequence[str | None],
    names: Sequence[str],
    groups: np.ndarray,
    config: PrepareConfig,
    sides_before: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Lines of `metadata.jsonl`: the pictures of the set, each with its side, and its group where it is not alone."""
    where = sides.assign(
        [survey.digests[index] for index in kept],
        groups[list(kept)],
        [labels[index] for index in kept],
        [survey.splits[index] or sides_before.get(survey.names[index], "") for index in kept],
        config.validation_fraction,
        config.test_fraction,
    )
    sizes = Counter(groups[list(kept)].tolist())
    known = shapes(config.size) if config.buckets else []
    rows = []
    for index, side in zip(kept, where, strict=True):
        name, label, text = survey.names[index], labels[index], survey.texts[index]
        if text is None and label is not None and config.caption_templates:
            text = from_template(label, config.caption_templates, 0, name)
        picture = Picture(name, label, text)
        row = packed.row_of(picture, survey.digests[index], names)
        row |= {"row": int(survey.places[index]), "split": side}
        if config.buckets:
            row["shape"] = nearest(known, *(int(survey.measured[index][side]) for side in ("height", "width")))
        row |= {"repaired": True} if "repaired" in survey.notes[index] else {}
        rows.append(row | ({"group": int(groups[index])} if sizes[groups[index]] > 1 else {}))
    return rows


def _reasons_to_leave_out(
    survey: Survey, found: Sequence[Finding], clean: CleanConfig, edits: Edits
) -> dict[int, tuple[str, str]]:
    """(reason, measured value) by file; the first check that leaves a file out is the one that is named."""
    restored, dropped = set(edits.restore), set(edits.drop)
    reasons: dict[int, tuple[str, str]] = {}
    for finding in found:
        if finding.check in clean.leave_out and survey.names[finding.index] not in restored:
            reasons.setdefault(finding.index, (finding.reason, f"{finding.value:.4g}"))
    for index in survey.usable.tolist():
        if survey.names[index] in dropped:
            reasons.setdefault(index, ("dropped by hand", ""))
    return reasons


def _finding_row(survey: Survey, finding: Finding, reasons: Mapping[int, tuple[str, str]]) -> dict[str, Any]:
    """A line of `findings.jsonl`; left_out says whether this very finding is why the file is not in the set."""
    return {
        "file_name": survey.names[finding.index],
        "check": finding.check,
        "value": finding.value,
        "threshold": finding.threshold,
        "reason": finding.reason,
        "other": survey.names[finding.other] if finding.other >= 0 else "",
        "left_out": reasons.get(finding.index, ("",))[0] == finding.reason,
        "row": int(survey.places[finding.index]),
    }


def _counts(survey: Survey, unread: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    by_side = Counter(row["split"] for row in rows)
    files = len(survey) + len(unread)
    return {
        "files": files,
        "usable": len(survey.usable),
        "kept": len(rows),
        "left_out": files - len(rows),
        **{side: by_side[side] for side in (sides.TRAIN, sides.VALIDATION, sides.TEST)},
    }


def _check_counts(
    found: Sequence[Finding], reasons: Mapping[int, tuple[str, str]], clean: CleanConfig
) -> dict[str, dict[str, Any]]:
    """How much every check found, and what it means, for `prepare.json` and the report."""
    table = {}
    for name, (_, meaning) in checks.CHECKS.items():
        mine = [finding for finding in found if finding.check == name]
        table[name] = {
            "found": len({finding.index for finding in mine}),
            "left_out": len({f.index for f in mine if reasons.get(f.index, ("",))[0] == f.reason}),
            "leaves_out": name in clean.leave_out,
            "threshold": mine[0].threshold if mine else None,
            "meaning": meaning,
        }
    return table
