"""Captions: cleaned, made from classes, varied as tags, or asked of somebody else's program. Text in, text out.

What a person wrote is data: braces, percent signs, brackets and tags of any language stand for themselves. Every choice
is a hash of the seed and of what it is for, the file's name or the position in the run, so nothing depends on order.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from imagekiln.core import mix
from imagekiln.errors import UsageError

MAX_CAPTION = 10_000
"""Characters."""

COMMAS = re.compile("[,\uff0c\u3001\u060c\ufe50\ufe51]")
"""Commas of Latin, Chinese, Japanese and Arabic text."""

CONSONANTS, VOWELS = "bdfghjklmnprstvwz", "aeiou"
MOST_BEFORE, MOST_BEHIND = 4, 2
"""Words without meaning around a caption."""

_MOST_BYTES = 8 * MAX_CAPTION
_JOINERS = "\u200d\ufe0e\ufe0f"  # what ties emoji together


def clean(text: str, lower: bool = False) -> str:
    """One line of text: runs of white space are one space; NUL, control characters, byte-order marks and halves of
    surrogate pairs go; letters and their accents are composed (Unicode NFC). Marks that join or direct letters stay.

    >>> clean("  A cat\\0 on\\n\\ta  chai\\u0308r\\ufeff ")
    'A cat on a chaïr'
    """
    text = " ".join(text.split())
    text = "".join(sign for sign in text if sign != "\ufeff" and unicodedata.category(sign) not in ("Cc", "Cs"))
    text = unicodedata.normalize("NFC", text.lower() if lower else text)
    return " ".join(text.split())


def shorten(text: str, most: int = MAX_CAPTION) -> str:
    """At most this many characters, cut between words; where words are not set apart, between characters.

    >>> shorten("a cat on a chair", 10), shorten("una gatta", 9)
    ('a cat on a', 'una gatta')
    """
    if len(text) <= most:
        return text
    end = most
    while end > 0 and not text[end].isspace():
        end -= 1
    if end < most / 2:  # one long word, or a script without spaces
        end = most
        while end > 0 and _continues(text, end):
            end -= 1
    return text[: end or most].rstrip()


def _continues(text: str, end: int) -> bool:
    """Whether what stands at `end` belongs to the character before it."""
    return unicodedata.combining(text[end]) > 0 or text[end] in _JOINERS or text[end - 1] == "\u200d"


class Cleaned(NamedTuple):
    """Captions ready to be stored, "" where there is none, and what was done to them in plain sentences."""

    captions: list[str]
    notices: list[str]


def cleaned(captions: Iterable[str | None], lower: bool = False, most: int = MAX_CAPTION) -> Cleaned:
    """`clean` and `shorten` over a set; how many captions were cut is said once.

    >>> cleaned(["a cat  ", None, "a very long caption"], most=12)
    Cleaned(captions=['a cat', '', 'a very long'], notices=['1 caption was cut to 12 characters.'])
    """
    whole = [clean(caption or "", lower) for caption in captions]
    short = [shorten(caption, most) for caption in whole]
    cut = sum(before != after for before, after in zip(whole, short, strict=True))
    counted = "1 caption was" if cut == 1 else f"{cut:,} captions were"
    return Cleaned(short, [f"{counted} cut to {most:,} characters."] if cut else [])


def from_template(label: str, templates: Sequence[str], seed: int, name: str) -> str:
    """The caption of a picture of a class: one of the templates, by a hash of the seed and the file's name.

    Only the exact word {label} of a template is replaced; all else, braces too, stays as it is. Raises `UsageError`
    when there is no template.

    >>> from_template("tabby {cat}", ["a photo of a {label}, 100% {real}"], 0, "a.jpg")
    'a photo of a tabby {cat}, 100% {real}'
    """
    if not templates:
        raise UsageError("There is no template for captions. Give at least one, such as 'a photo of a {label}'.")
    return templates[mix(seed, "template", name) % len(templates)].replace("{label}", label)


def tags(text: str) -> list[str]:
    """What stands between commas, empty parts left out.

    >>> tags("cat, sofa,, 猫，沙发")
    ['cat', 'sofa', '猫', '沙发']
    """
    return [tag for part in COMMAS.split(text) if (tag := part.strip())]


def varied(text: str, seed: int, position: int, *, dropout: float = 0.0, shuffle: bool = False, keep: int = 0) -> str:
    """The tags of a caption, some of them left out and in another order, as (seed, position) say.

    dropout: probability of leaving out a tag. keep: the first so many tags stay, and stay first. What is left may be
    nothing, which means that anything may be shown. Without dropout and shuffle the text is given back as it is.

    >>> varied("cat, sofa, window, tail", 0, 7, dropout=0.5, shuffle=True, keep=1)
    'cat, tail'
    """
    if not dropout and not shuffle:
        return text
    found = tags(text)
    rest = list(enumerate(found))[keep:]
    rest = [(i, tag) for i, tag in rest if mix(seed, "tag dropout", position, i) >= dropout * 2.0**63]
    if shuffle:
        rest.sort(key=lambda item: mix(seed, "tag order", position, item[0]))
    return ", ".join([*found[:keep], *(tag for _, tag in rest)])


def reworded(
    text: str,
    seed: int,
    position: int,
    *,
    dropout: float = 0.0,
    wordings: Sequence[str] = (),
    fillers: float = 0.0,
) -> str:
    """A caption with some of its words left out, put into a wording and among others, as (seed, position) say.

    dropout: probability of leaving out a word; where none would be left, all stay. wordings: texts in which {caption}
    stands for the caption; one of them is taken, or the caption as it is, each as often. fillers: probability of words
    that mean nothing, up to 4 of them in front and 2 behind. An empty caption stays empty.

    >>> reworded("a small red cat", 0, 3, dropout=0.4, wordings=("a picture of {caption}",))
    'a picture of red cat'
    >>> reworded("a small red cat", 0, 1, fillers=1.0)
    'a small red cat pumi tufa'
    """
    words = text.split()
    if dropout:
        words = [w for i, w in enumerate(words) if mix(seed, "word dropout", position, i) >= dropout * 2.0**63] or words
    kept = " ".join(words)
    if not kept:
        return ""
    chosen = ("{caption}", *wordings)[mix(seed, "wording", position) % (1 + len(wordings))]
    told = chosen.replace("{caption}", kept)
    if mix(seed, "fillers", position) >= fillers * 2.0**63:
        return told
    before, behind = (
        mix(seed, "before", position) % (MOST_BEFORE + 1),
        mix(seed, "behind", position) % (MOST_BEHIND + 1),
    )
    around = [_filler(seed, position, place) for place in range(before + behind)]
    return " ".join([*around[:before], told, *around[before:]])


def _filler(seed: int, position: int, place: int) -> str:
    """A word of one or two syllables that is no word."""
    drawn, syllables = mix(seed, "filler", position, place), []
    for _ in range(1 + drawn % 2):
        drawn, consonant = divmod(drawn // 2, len(CONSONANTS))
        drawn, vowel = divmod(drawn, len(VOWELS))
        syllables.append(CONSONANTS[consonant] + VOWELS[vowel])
    return "".join(syllables)


# -- captions of somebody else's making -------------------------------------------------------------------------------


class Captioned(NamedTuple):
    """A caption a file, "" where none was made, and why not: (file, reason)."""

    captions: list[str]
    failures: list[tuple[str, str]]


def caption_with(
    how: Sequence[str] | Callable[[str], str],
    files: Iterable[str | os.PathLike[str]],
    timeout_sec: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> Captioned:
    """Ask a function or a program for the caption of every file; what fails leaves the caption empty and is listed.

    how: a function of the path; or the arguments of a command that is run once a file with the path added at the end,
        prints the caption as UTF-8 and ends with code 0. No shell is involved.
    timeout_sec: after which a command is stopped; a function is waited for. progress: told how many files are done.

    Raises `UsageError` when the command is empty or is not there.

    >>> caption_with(lambda path: "a cat" if path.endswith("cat.png") else 1 / 0, ["cat.png", "dog.png"])
    Captioned(captions=['a cat', ''], failures=[('dog.png', 'ZeroDivisionError: division by zero')])
    """
    ask = how if callable(how) else _command(how, timeout_sec)
    captions, failures = [], []
    for number, path in enumerate(files, 1):
        file, caption = os.fspath(path), ""
        try:
            answer = ask(file)
            if not isinstance(answer, str):
                raise _Failed(f"answered with {type(answer).__name__}, not text")
            caption = shorten(clean(answer))
            if not caption:
                raise _Failed("answered with nothing")
        except _Failed as error:
            failures.append((file, str(error)))
        except Exception as error:
            failures.append((file, f"{type(error).__name__}: {error}"))
        captions.append(caption)
        if progress is not None:
            progress(number)
    return Captioned(captions, failures)


class _Failed(Exception):
    """A caption was not made; the text says why."""


def _command(arguments: Sequence[str], timeout_sec: float) -> Callable[[str], str]:
    if isinstance(arguments, str) or not arguments:
        raise UsageError(f"The captioning command {arguments!r}: expected a list, such as ['caption.sh', '--short'].")
    if shutil.which(arguments[0]) is None:
        raise UsageError(f"The captioning command {arguments[0]!r} is not there or may not be run.")

    def ask(file: str) -> str:
        whole = [*arguments, os.path.abspath(file)]  # absolute: a name that begins with "-" is no option
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            whole, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, start_new_session=os.name == "posix"
        )
        return _answer(process, timeout_sec)

    return ask


def _answer(process: subprocess.Popen[bytes], timeout_sec: float) -> str:
    """What a program prints, up to `_MOST_BYTES`, if it ends well and in time; it and its children are stopped."""
    heard: list[bytes] = []

    def listen() -> None:
        with process.stdout as pipe:  # type: ignore[union-attr]
            heard.append(pipe.read(_MOST_BYTES + 1))

    # A thread, because a child of the program may hold the pipe open for ever.
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        listener.join(timeout_sec)
        if listener.is_alive():
            raise _Failed(f"took more than {timeout_sec:g} s")
        if len(heard[0]) > _MOST_BYTES:
            raise _Failed(f"printed more than {_MOST_BYTES:,} bytes")
        code = process.wait(timeout_sec)
    except subprocess.TimeoutExpired:
        raise _Failed(f"took more than {timeout_sec:g} s") from None
    finally:
        _stop(process)
    if code:
        raise _Failed(f"ended with code {code}")
    try:
        return heard[0].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Failed(f"printed something that is not UTF-8 (byte {error.start})") from None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a program that was not waited for, and on POSIX whatever it started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may have ended by itself
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
