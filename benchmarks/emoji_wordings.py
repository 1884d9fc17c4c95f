"""Concepts of a set of named pictures, and ways to ask for them that training on its captions never shows.

A caption is a name with tags after it, "red apple, fruit, food". Training leaves out parts and words, changes the
order and puts captions into sentences, as its settings say; `Trained` says of any text whether it can be shown. What
never is: other sentences around the name, the name's words in another order, tags before the name or tags alone, and
where these may be shown too, sentences around them. Every choice is a hash of names, the same for everybody.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emoji_matcher import words

from imagekiln.core import mix
from imagekiln.data import captions
from imagekiln.errors import UsageError

KINDS = ("template", "reworded", "tags")
SEEN = "name"
"""A wording of training, for comparison."""
TEMPLATES = ("a picture of {name}", "please draw {name} for me", "this image shows {name}")
OF_A_KIND, WITH = "what i want is a kind of {tag}: {name}", "something that has to do with {tags}"
"""Sentences around what training may show without them."""
FEWEST_TAGS, MOST_TAGS = 3, 5
"""Tags of a prompt without a name; more where so many do not tell the concept from all others."""


class Concept(NamedTuple):
    """A picture of a source with what is known about it."""

    row: int
    name: str
    tags: tuple[str, ...]
    group: str


class Asked(NamedTuple):
    """A concept with its prompts by kind."""

    concept: Concept
    prompts: dict[str, str]


def read_concepts(folder: Path, source: Any) -> list[Concept]:
    """The concepts of a source, one a picture, in its order.

    Raises:
        UsageError: `metadata.csv` is not there, or does not tell the name and group of a picture.
    """
    file = folder / "metadata.csv"
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            told = {row["file_name"]: row for row in csv.DictReader(lines)}
        found = []
        for row, (name, caption) in enumerate(zip(source.files, source.captions, strict=True)):
            text = captions.clean(told[name]["text"])
            tags = captions.tags(caption)[len(captions.tags(text)) :]
            if not caption.startswith(text):
                raise UsageError(f"{file} calls {name} {text!r}, and the prepared set {caption!r}. Prepare it again.")
            found.append(Concept(row, text, tuple(tags), told[name]["group"]))
        return found
    except (OSError, KeyError) as error:
        raise UsageError(f"{file} does not tell name and group of all pictures ({error!r}).") from None


class Trained:
    """Every text that training can make of these captions, compared word by word, whatever their commas.

    kept: so many tags of a caption stay in front; of the others any may go, and they may change places. wordings: texts
    that captions are put into. drops_words: any word may go.

    >>> Trained(["red apple, fruit, food"]).holds("red apple food fruit")
    True
    >>> Trained(["red apple, fruit, food"]).holds("food, red apple")
    False
    >>> Trained(["red apple, fruit"], 0, ["draw {caption}"], drops_words=True).holds("draw fruit, apple")
    True
    """

    def __init__(
        self, told: Sequence[str], kept: int = 1, wordings: Sequence[str] = (), drops_words: bool = False
    ) -> None:
        self._around = [tuple(tuple(words(side)) for side in text.split("{caption}")) for text in wordings]
        self._drops, self._known = drops_words, []
        for caption in dict.fromkeys(told):
            parts = [tuple(words(part)) for part in captions.tags(caption)]
            self._known.append((sum(parts[:kept], ()), parts[kept:]))

    def holds(self, text: str) -> bool:
        """Whether training may have shown this text."""
        told = tuple(words(text))
        inside = [told]
        for before, after in self._around:
            end = len(told) - len(after)
            if len(before) < end and told[: len(before)] == before and told[end:] == after:
                inside.append(told[len(before) : end])
        return any(self._shown(one, fixed, rest) for one in inside for fixed, rest in self._known if fixed or rest)

    def _shown(self, told: tuple[str, ...], fixed: tuple[str, ...], rest: Sequence[tuple[str, ...]]) -> bool:
        starts = range(len(fixed) + 1) if self._drops else [len(fixed)]
        return any(
            _begins(told[:start], fixed, self._drops) and _made_of(told[start:], rest, self._drops) for start in starts
        )


def _begins(told: tuple[str, ...], part: tuple[str, ...], drops: bool) -> bool:
    """Whether these words are the part, or where words may go some of it in its order."""
    left = iter(part)
    return all(word in left for word in told) if drops else told == part


def _made_of(told: tuple[str, ...], parts: Sequence[tuple[str, ...]], drops: bool = False) -> bool:
    """Whether these words are some of the parts one after the other."""
    if not told:
        return True
    for place, part in enumerate(parts):
        others = [*parts[:place], *parts[place + 1 :]]
        for taken in range(1, len(part) + 1) if drops else [len(part)]:
            if taken and _begins(told[:taken], part, drops) and _made_of(told[taken:], others, drops):
                return True
    return False


def choose(concepts: Sequence[Concept], count: int, trained: Trained | None = None) -> list[Asked]:
    """The first `count` concepts, in an order that names alone decide, for which there are all three wordings.

    trained: what training may show; None = captions with the name in front and without wordings.
    """
    trained = trained or Trained([", ".join([concept.name, *concept.tags]) for concept in concepts])
    same_words = Counter(bag(concept.name) for concept in concepts)
    told_N = [{tag.casefold() for tag in (concept.name, *concept.tags)} for concept in concepts]
    found: list[Asked] = []
    for concept in sorted(concepts, key=lambda concept: mix("emoji-text", "concept", concept.name)):
        if len(found) == count:
            break
        if "," in concept.name:
            continue
        others = [told for other, told in zip(concepts, told_N, strict=True) if other is not concept]
        prompts = {
            SEEN: concept.name,
            "template": TEMPLATES[len(found) % len(TEMPLATES)].format(name=concept.name),
            "reworded": reworded(concept, trained, same_words[bag(concept.name)] == 1),
            "tags": tags_alone(concept, trained, others),
        }
        if all(prompts.values()) and not any(trained.holds(prompts[kind] or "") for kind in KINDS):
            found.append(Asked(concept, {kind: text for kind, text in prompts.items() if text}))
    return found


def reworded(concept: Concept, trained: Trained, may_reorder: bool) -> str | None:
    """The words of a name in another order; for one word, and for every second name, two tags before the name, or where
    training may show that, a sentence with one.

    may_reorder: no other name has the same words.
    """
    plain = [part for word in concept.name.split() if (part := word.strip(":.!()“”\"'"))]
    if len(plain) > 1 and may_reorder and mix("emoji-text", "reorder", concept.name) % 2:
        for attempt in range(20):
            text = " ".join(_shuffled(plain, "words", concept.name, attempt))
            if text.casefold() != " ".join(plain).casefold() and not trained.holds(text):
                return text
    before = _shuffled(_own_tags(concept), "before", concept.name)[:2]
    if len(before) < 2:
        return None
    texts = ", ".join([*before, concept.name]), OF_A_KIND.format(tag=before[0], name=concept.name)
    return next((text for text in texts if not trained.holds(text)), None)


def tags_alone(concept: Concept, trained: Trained, others: Sequence[set[str]]) -> str | None:
    """Some of a concept's tags in a random order, as many as no other concept has all of; None where there are none.
    Where training may show tags alone, a sentence with them.

    others: name and tags of all other concepts, in small letters.
    """
    order = _shuffled(_own_tags(concept), "tags", concept.name)
    for count in range(min(MOST_TAGS, len(order)), len(order) + 1):
        some = {tag.casefold() for tag in order[:count]}
        if count >= FEWEST_TAGS and not any(some <= other for other in others):
            texts = ", ".join(order[:count]), WITH.format(tags=" and ".join(order[:count]))
            return next((text for text in texts if not trained.holds(text)), None)
    return None


def _own_tags(concept: Concept) -> list[str]:
    """The tags that do not hold all words of the name, not even as parts of words."""
    named = bag(concept.name)
    return [tag for tag in concept.tags if not all(word in tag.casefold() for word in named)]


def _shuffled(parts: Sequence[str], *keys: Any) -> list[str]:
    order = sorted(range(len(parts)), key=lambda place: mix("emoji-text", *keys, place))
    return [parts[place] for place in order]


def bag(name: str) -> tuple[str, ...]:
    """The words of a name in the order of the alphabet, signs left out."""
    return tuple(sorted(word for word in words(name) if word.isalnum()))


def refuse_trained(asked: Sequence[Asked], trained: Trained) -> None:
    """Raise `UsageError` if a training may have shown a wording that counts as held out."""
    for one in asked:
        for kind in KINDS:
            if trained.holds(one.prompts[kind]):
                raise UsageError(f"{one.prompts[kind]!r} ({kind}) is a caption of training, so it is not held out.")
