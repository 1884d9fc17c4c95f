"""Checks of single pictures by their measured numbers: small, narrow, blank, dark, bright, blurred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from imagekiln.data.checks.thresholds import CleanConfig, Finding
from imagekiln.data.measures import small_copies
from imagekiln.data.survey import Survey

LARGE_ENOUGH = 64
"""Short side in pixels from which on a picture is not small, however large the others are."""

_BLOCK = 4096


def small(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Short side below `min_side`, or far below the median of the set. value: pixels."""
    rows = survey.usable
    if not len(rows):
        return []
    sides = np.minimum(survey.measured["height"], survey.measured["width"])[rows]
    least = max(config.min_side, min(LARGE_ENOUGH, config.min_side_ratio * float(np.median(sides))))
    measured = survey.measured[rows]
    reasons = [f"small ({entry['width']}x{entry['height']})" for entry in measured]
    return _findings("small", rows, sides, sides < least, least, reasons)


def narrow(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Long side more than `max_aspect` times the short one. value: their ratio."""
    rows = survey.usable
    height, width = (survey.measured[side][rows].astype(float) for side in ("height", "width"))
    aspect = np.maximum(height, width) / np.maximum(1, np.minimum(height, width))
    return _findings("narrow", rows, aspect, aspect > config.max_aspect, config.max_aspect)


def blank(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Nothing to be seen: of one tone. value: contrast, or entropy in bits where that is what is too small."""
    rows = survey.usable
    even, empty = _blank(survey, config, rows)
    measured = survey.measured[rows]
    return sorted(
        _findings("blank", rows, measured["contrast"], even, config.min_contrast)
        + _findings("blank", rows, measured["entropy"], empty & ~even, config.min_entropy),
        key=lambda finding: finding.index,
    )


def is_blank(survey: Survey, config: CleanConfig) -> np.ndarray:
    """Which files `blank` finds: bool, one a file."""
    found = np.zeros(len(survey), bool)
    found[survey.usable] = np.logical_or(*_blank(survey, config, survey.usable))
    return found


def dark(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Even the brighter parts are dark. value: mean luma plus twice its deviation."""
    rows = survey.usable
    value = survey.measured["brightness"][rows] + 2 * survey.measured["contrast"][rows]
    return _findings("dark", rows, value, value < config.dark, config.dark)


def bright(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Even the darker parts are bright. value: mean luma minus twice its deviation."""
    rows = survey.usable
    value = survey.measured["brightness"][rows] - 2 * survey.measured["contrast"][rows]
    return _findings("bright", rows, value, value > config.bright, config.bright)


def blurred(survey: Survey, config: CleanConfig) -> list[Finding]:
    """No fine details for the coarse ones there are; blank pictures have neither. value: sharpness."""
    rows = survey.usable[~is_blank(survey, config)[survey.usable]]
    value = survey.measured["sharpness"][rows]
    return _findings("blurred", rows, value, value < config.min_sharpness, config.min_sharpness)


def _blank(survey: Survey, config: CleanConfig, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the rows are of one tone, and which have hardly two: colours of equal luma count as contrast."""
    measured = survey.measured[rows]
    even, empty = measured["contrast"] < config.min_contrast, measured["entropy"] < config.min_entropy
    doubtful = np.flatnonzero(even | empty)
    for start in range(0, len(doubtful), _BLOCK):
        part = doubtful[start : start + _BLOCK]
        thumbs = small_copies(survey.thumbs, rows[part]).astype(np.float32) / 255
        chroma = thumbs[..., [0, 2]] - thumbs[..., 1:2]
        plain = chroma.std((1, 2)).max(-1) < 2 * config.min_contrast
        even[part] &= plain
        empty[part] &= plain
    return even, empty


def _findings(
    check: str,
    rows: np.ndarray,
    values: np.ndarray,
    found: np.ndarray,
    threshold: float,
    reasons: Sequence[str] | None = None,
) -> list[Finding]:
    return [
        Finding(check, int(rows[at]), float(values[at]), threshold, reasons[at] if reasons else check)
        for at in np.flatnonzero(found).tolist()
    ]
