"""Checks of a set of pictures: each reads the survey, names what it found and by which number, and changes nothing.

A check is a function `check(survey, config) -> list[Finding]`; `run` calls all of them. Whether what is found is left
out or only mentioned is decided by `CleanConfig.leave_out` alone, so that every decision can be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from imagekiln.data.checks import captions, duplicates, labels, looks, missing, outliers
from imagekiln.data.checks.thresholds import CheckName, CleanConfig, Finding
from imagekiln.data.survey import Survey

__all__ = ["CHECKS", "Check", "CheckName", "CleanConfig", "Finding", "groups", "run"]

Check = Callable[[Survey, CleanConfig], list[Finding]]

CHECKS: Mapping[str, tuple[Check, str]] = {
    "small": (looks.small, "Much smaller than the others: enlarged, they would teach blur. Get larger copies."),
    "narrow": (looks.narrow, "Much longer than wide or wider than long: squares show only a part. Crop them by hand."),
    "blank": (looks.blank, "Of one tone: there is nothing to learn. Look whether the files are damaged."),
    "dark": (looks.dark, "Dark all over. Keep them if nights are what the set is about, else brighten or drop them."),
    "bright": (looks.bright, "Nearly white all over. Look whether they are overexposed or lines on white."),
    "blurred": (
        looks.blurred,
        "Out of focus, shaken or enlarged: a model learns to blur from them. Drop what you can.",
    ),
    "duplicate": (
        duplicates.duplicate,
        "The same pixels as another file: one is enough, or the model learns it twice.",
    ),
    "near_duplicate": (
        duplicates.near_duplicate,
        "Nearly the same as another picture (cropped, recompressed, brightened, mirrored): they stay together in the "
        "split. Drop them where one is enough.",
    ),
    "outlier": (outliers.outlier, "Unlike the rest of the set. Look whether they belong to it."),
    "missing_label": (missing.label, "Without a label where others have one: they train without a condition."),
    "few_in_class": (labels.few_in_class, "Their class has too few pictures to be learned. Add some or join classes."),
    "two_labels": (labels.two_labels, "The same picture stands under two labels: at most one is right. Correct them."),
    "suspicious_label": (
        labels.suspicious_label,
        "A classifier trained on the other pictures is sure of another label. Look at these first; it may be wrong.",
    ),
    "missing_caption": (missing.caption, "Without a caption where others have one: they train without a condition."),
    "empty_caption": (captions.empty, "The caption is empty: they train without a condition."),
    "repeated_caption": (captions.repeated, "Most captions are this one: it tells the model nothing."),
    "long_caption": (captions.too_long, "Longer than a text encoder reads: the rest is cut. Shorten them."),
    "odd_caption": (
        captions.odd,
        "Control characters, or letters as they look when text is read in a wrong encoding. Save it as UTF-8.",
    ),
}
"""Name -> (function, what a finding means and what to do)."""


def run(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Findings of every check, in the order of the checks.

    >>> from imagekiln.data.survey import MEASURES
    >>> measured = np.zeros(1, MEASURES)
    >>> measured["height"], measured["width"] = 9, 9
    >>> survey = Survey(["a"], [None], [None], [""], ["d"], measured, np.zeros((1, 32, 32, 3), np.uint8))
    >>> [finding.check for finding in run(survey, CleanConfig(min_side=16))]
    ['small', 'blank', 'dark']
    """
    return [finding for check, _ in CHECKS.values() for finding in check(survey, config)]


def groups(survey: Survey, findings: Iterable[Finding], together: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """Content groups: (N,) int64, the smallest index among a file and its exact and near duplicates, of any degree.

    Files of one group must fall on one side of a split. together: further pairs that belong into one group.
    """
    pairs = [(f.index, f.other) for f in findings if f.check in ("duplicate", "near_duplicate") and f.other >= 0]
    return duplicates.joined(len(survey), [*pairs, *together])
