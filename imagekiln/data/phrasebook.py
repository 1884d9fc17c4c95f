"""A prompt in the words of the captions that a model was trained on.

A text encoder that has read a thousand captions and nothing else knows their words and no others: "please draw a red
apple for me" is mostly noise to it. A phrasebook finds the caption that shares most with a prompt, and says that
caption, or its beginning, instead. Words that are shared count ln(1 + N / n), where n of N captions have the word
(inverse document frequency, Spärck Jones 1972): "apple" for much, "of" for little. What no caption says is lost: a blue
apple becomes a red one.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from typing import NamedTuple

from imagekiln.data import captions

MOST_SIGNS = 4_000_000
"""Characters of all captions together that a model keeps."""

_ALONE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese: every sign is a word
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


class Phrasebook:
    """Captions to say things by.

    told: captions. kept: so many of their tags (`captions.tags`) are said, all of them if None.

    >>> book = Phrasebook(["red apple, fruit, food", "green apple, fruit", "red heart, love"], kept=1)
    >>> book.say("please draw a red apple for me"), book.say("fruit, food"), book.say("something else")
    ('red apple', 'red apple', None)
    """

    def __init__(self, told: Sequence[str], kept: int | None = None) -> None:
        self._phrases = []
        for caption in dict.fromkeys(told):
            text = ", ".join(captions.tags(caption)[:kept])
            if said := words(text):
                self._phrases.append(_Phrase(text, said, frozenset(said), frozenset(words(caption))))
        counts = Counter(word for phrase in self._phrases for word in phrase.whole)
        self._weights = {word: math.log1p(len(self) / count) for word, count in counts.items()}

    def __len__(self) -> int:
        return len(self._phrases)

    def say(self, prompt: str) -> str | None:
        """The caption nearest to a prompt, or its beginning, the first of equals; None where none shares a word."""
        told = words(prompt)
        asked = self._weights.keys() & told
        if not asked:
            return None
        return max(self._phrases, key=lambda phrase: (*self._shared(asked, phrase), phrase.stands_in(told))).text

    def _shared(self, asked: Set[str], phrase: _Phrase) -> tuple[float, float]:
        """How much a caption shares: once for all of it, and once for what is said, times the share of that which was
        asked for; of equals how little was not asked for."""
        in_said = self._weight(asked & phrase.said)
        shared = self._weight(asked & phrase.whole) + in_said**2 / self._weight(phrase.said)
        return shared, -self._weight(phrase.said - asked)

    def _weight(self, some: Set[str]) -> float:
        return math.fsum(self._weights[word] for word in some)


class _Phrase(NamedTuple):
    """What is said for a caption: its text and words in order, and the different words of this and of the caption."""

    text: str
    in_order: list[str]
    said: frozenset[str]
    whole: frozenset[str]

    def stands_in(self, told: list[str]) -> bool:
        """Whether these words follow each other in a text."""
        length = len(self.in_order)
        return any(told[place : place + length] == self.in_order for place in range(len(told) - length + 1))


def words(text: str) -> list[str]:
    """The words of a text in small letters; signs are none.

    >>> words("Flag: Côte d'Ivoire")
    ['flag', 'côte', 'd', 'ivoire']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
