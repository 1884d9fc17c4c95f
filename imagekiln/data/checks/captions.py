"""Checks of captions: empty, nearly all the same, too long, damaged."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from imagekiln.data.checks.thresholds import CleanConfig, Finding
from imagekiln.data.survey import Survey

_FEWEST = 10
"""Captions a set must have before one of them can be said too often."""

# UTF-8 read as Windows-1252: a lead byte looks like one of these letters, and a sign or a capital never follows it.
_WRONG_ENCODING = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
    "|\u00e2\u20ac[\u0080-\u00bf\u0152\u0153\u02dc\u2013-\u203a\u20ac\u2122]|\u00ef\u00bf\u00bd|\u00ef\u00bb\u00bf|\ufffd"
)


def empty(survey: Survey, config: CleanConfig) -> list[Finding]:
    """A caption of nothing but blanks. value: 0 characters."""
    return [Finding("empty_caption", index, 0.0, 1.0, "empty caption") for index, text in _captions(survey) if not text]


def repeated(survey: Survey, config: CleanConfig) -> list[Finding]:
    """One caption for more than `max_caption_repeats` of all that have one. value: its share."""
    counts = Counter(text for _, text in _captions(survey) if text)
    total = counts.total()
    if total < _FEWEST:
        return []
    limit = config.max_caption_repeats
    return [
        Finding("repeated_caption", index, counts[text] / total, limit, f"caption of {counts[text]} pictures")
        for index, text in _captions(survey)
        if counts[text] > limit * total
    ]


def too_long(survey: Survey, config: CleanConfig) -> list[Finding]:
    """More than `max_caption_chars` characters. value: characters."""
    return [
        Finding("long_caption", index, len(text), config.max_caption_chars, f"caption of {len(text)} characters")
        for index, text in _captions(survey)
        if len(text) > config.max_caption_chars
    ]


def odd(survey: Survey, config: CleanConfig) -> list[Finding]:
    """Control characters, or what UTF-8 looks like when it was read as Windows-1252. value: such places."""
    found = []
    for index, text in _captions(survey):
        controls = sum(unicodedata.category(sign) in ("Cc", "Cs", "Co") and sign not in "\t\n\r" for sign in text)
        wrong = len(_WRONG_ENCODING.findall(text))
        if controls or wrong:
            reason = "control characters in the caption" if controls else "caption read in a wrong encoding"
            found.append(Finding("odd_caption", index, controls + wrong, 0.0, reason))
    return found


def _captions(survey: Survey) -> list[tuple[int, str]]:
    """Index and caption, without blanks around it, of every usable file that has one."""
    rows = survey.usable.tolist()
    return [(index, text.strip()) for index in rows if (text := survey.texts[index]) is not None]
