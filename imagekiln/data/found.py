"""What a look at DATA finds: pictures by name, with the labels, captions and splits that people gave them.

Nothing is decoded here. Every kind of DATA ends in the same `Found`, whatever it was read from.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from imagekiln.data.files import EMPTY_FOLDER, SUFFIXES, Files, normal, printable
from imagekiln.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FOREIGN = {
    **dict.fromkeys((".heic", ".heif"), "HEIC"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"), "camera RAW"),
    ".avif": "AVIF",
    ".svg": "SVG",
    ".psd": "PSD",
    ".jxl": "JPEG XL",
    ".jp2": "JPEG 2000",
    ".exr": "EXR",
    ".fits": "FITS",
    ".pdf": "PDF",
}


@dataclass(frozen=True)
class Picture:
    """A file that claims to be a picture. `label` and `text` are None where nobody gave them.

    split: "train", "validation" or "test" where the set itself says so, else None.
    """

    name: str
    label: str | None = None
    text: str | None = None
    split: str | None = None


@dataclass
class Found:
    """What DATA holds. left_out: (name, reason) of files that are not used. notices: sentences for the user."""

    files: Files
    pictures: list[Picture]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def named_pictures(files: Files) -> Found:
    """The files that are named like pictures, sorted, with nothing known about them yet.

    What is named like a picture of a format that is not read is left out; what cannot be a picture is passed over.
    """
    found = Found(files, [])
    for name in sorted(files.entries):
        extension = posixpath.splitext(name)[1].lower()
        if extension in EXTENSIONS:
            found.pictures.append(Picture(name))
        elif extension in FOREIGN:
            found.left_out.append((name, f"{FOREIGN[extension]} is not read; convert it to JPEG or PNG"))
    known = (*EXTENSIONS, *FOREIGN)
    found.left_out += [
        (name, why)
        for name, why in files.left_out
        if why != EMPTY_FOLDER and (name.endswith("/") or name.lower().endswith(known))
    ]
    return found


def class_names(labels: Sequence[str | None]) -> tuple[str, ...]:
    """The distinct labels in order: numbers by value, everything else by alphabet.

    >>> class_names(["10", "9", None]), class_names(["dog", "cat", "dog"])
    (('9', '10'), ('cat', 'dog'))
    """
    names = {label for label in labels if label is not None}
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def as_label(value: object, place: str) -> str | None:
    """A label as people write it: a name, or a number where -1 stands for unknown. Raises `DataError`.

    >>> as_label(3, ""), as_label(" cat ", ""), as_label(-1, ""), as_label("", ""), as_label(2.0, "")
    ('3', 'cat', None, None, '2')
    """
    if isinstance(value, float) and value != value:  # a table of numbers writes "unknown" as nan
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{place}: label is {_short(value)}; expected a whole number or a string.")
    name = normal(str(value).strip())
    return None if name in ("", "-1") else name


def as_text(value: object, place: str) -> str | None:
    """A caption as it was given, the first of several, or None. Raises `DataError` for what is no text."""
    if isinstance(value, list) and value:
        value = value[0]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: text is {_short(value)}; expected a string.")
    return value


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names for a sentence, the first few of them.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def drop_lone_train_split(found: Found) -> None:
    """Forget what the pictures say of splits where all that is named is training, or nothing would be held out."""
    if {picture.split for picture in found.pictures} - {None} == {"train"}:
        found.pictures = [replace(picture, split=None) for picture in found.pictures]
        found.notices.append("The set names a split to train on and no other, so its content decides what is held out.")


def mention_passed_over(found: Found) -> None:
    """Say what lies among the files and was not read: hidden pictures and folders, archives, folders without pictures,
    and names that look alike but are written in two Unicode forms."""
    files = found.files
    hidden = [name for name in files.ignored if not name.endswith((".DS_Store", "Thumbs.db", "desktop.ini"))]
    if hidden:
        found.notices.append(f"Hidden files and folders were passed over: {listed(hidden)}.")
    closed = [name for name in sorted(files.entries) if name.lower().endswith(SUFFIXES)]
    if closed:
        found.notices.append(f"Archives among the pictures were not opened: {listed(closed)}. Give them as DATA.")
    tops = {name.split("/", 1)[0] + "/" for name in files.entries if "/" in name}
    tops |= {name for name, why in files.left_out if why == EMPTY_FOLDER}
    folders = {posixpath.dirname(picture.name) for picture in found.pictures}  # few, however many pictures there are
    folders |= {posixpath.dirname(name.rstrip("/")) for name, _ in found.left_out}
    holding = {
        str(place) + "/" for folder in folders for place in (PurePosixPath(folder), *PurePosixPath(folder).parents)
    }
    if bare := sorted(tops - holding - {name for name, _ in found.left_out}):
        found.notices.append(f"Folders that hold no pictures: {listed(bare)}.")
    seen: dict[str, str] = {}
    twins = []
    for picture in found.pictures:
        if not picture.name.isascii() and seen.setdefault(normal(picture.name), picture.name) != picture.name:
            twins.append(picture.name)
    if twins:
        found.notices.append(
            f"{len(twins):,} names differ from another only in how Unicode writes them: {listed(twins)}. Both are kept."
        )


def _short(value: object) -> str:
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:60]}..."
