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
from collections.abc import Sequence

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
        self._texts, words_N = [], []
        for caption in dict.fromkeys(told):
            text = ", ".join(captions.tags(caption)[:kept])
            if said := words(text):
                self._texts.append(text)
                words_N.append((said, words(caption)))
        counts = Counter(word for _, whole in words_N for word in whole)
        self._weights = {word: math.log1p(len(words_N) / count) for word, count in counts.items()}
        self._words_N = words_N

    def __len__(self) -> int:
        return len(self._texts)

    def say(self, prompt: str) -> str | None:
        """The caption nearest to a prompt, or its beginning, the first of equals; None where none shares a word."""
        asked = words(prompt) & self._weights.keys()
        if not asked:
            return None
        best = max(range(len(self)), key=lambda place: self._shared(asked, *self._words_N[place]))
        return self._texts[best]

    def _shared(self, asked: frozenset[str], said: frozenset[str], whole: frozenset[str]) -> tuple[float, float]:
        """How much a caption shares: once for all of it, and once for what is said, times the share of that which was
        asked for; of equals how little was not asked for."""
        in_said = self._weight(asked & said)
        return self._weight(asked & whole) + in_said**2 / self._weight(said), -self._weight(said - asked)

    def _weight(self, some: frozenset[str]) -> float:
        return math.fsum(self._weights[word] for word in some)


def words(text: str) -> frozenset[str]:
    """The different words of a text, in small letters; signs are none.

    >>> sorted(words("Flag: Côte d'Ivoire"))
    ['côte', 'd', 'flag', 'ivoire']
    """
    return frozenset(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))
