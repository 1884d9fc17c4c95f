"""Checks of what others in the set have: a label, a caption."""

from __future__ import annotations

from collections.abc import Sequence

from imagekiln.data.checks.thresholds import CheckName, CleanConfig, Finding
from imagekiln.data.survey import Survey


def label(survey: Survey, config: CleanConfig) -> list[Finding]:
    """No label, in a set where others have one. value: 0."""
    return _missing("missing_label", survey, survey.labels, "no label")


def caption(survey: Survey, config: CleanConfig) -> list[Finding]:
    """No caption, in a set where others have one. value: 0."""
    return _missing("missing_caption", survey, survey.texts, "no caption")


def _missing(check: CheckName, survey: Survey, values: Sequence[str | None], reason: str) -> list[Finding]:
    if all(value is None for value in values):
        return []
    return [Finding(check, index, 0.0, 1.0, reason) for index in survey.usable.tolist() if values[index] is None]
