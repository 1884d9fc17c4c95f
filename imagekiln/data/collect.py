"""Collects the pictures of several sources into one set: folders, archives, shards and parquet files side by side.

Each picture's name begins with a short name of its source. Classes are united by name: `cat` of one source is `cat` of
the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from imagekiln.data import scan, webdataset
from imagekiln.data.files import Files, JoinedFiles, printable, short_names
from imagekiln.data.found import Found, drop_lone_train_split, listed
from imagekiln.data.metadata import known_encoding
from imagekiln.errors import UsageError

ProgressFn = Callable[[int, int], None]


def collect(
    sources: Sequence[str | Path], *, caption_encoding: str = "utf-8", progress: ProgressFn | None = None
) -> Found:
    """The pictures of all sources, source by source, each in the order of `scan.find`.

    sources: what `scan.find` takes. One alone is what `scan.find` says; of several, every name begins with a short name
        of its source and a slash. A split counts where one is named that is not trained on.
    caption_encoding: of captions and metadata that are not UTF-8.
    progress: called as progress(done, total) after every source.

    Raises what `scan.find` raises, and `UsageError` when a source is given twice or lies in another.
    """
    if not sources:
        raise UsageError("No source is given. Give a folder of pictures, a zip, a tar or a parquet file.")
    known_encoding(caption_encoding)
    given = [os.path.expanduser(os.fspath(source)) for source in sources]
    _refuse_repeated(given)
    found = []
    for number, source in enumerate(given, 1):
        found.append(scan.find(source, caption_encoding=caption_encoding))
        if progress is not None:
            progress(number, len(given))
    whole = found[0] if len(found) == 1 else _joined(given, found)
    drop_lone_train_split(whole)
    return whole


def _joined(given: Sequence[str], found: Sequence[Found]) -> Found:
    prefixes = short_names([source if webdataset.is_address(source) else os.path.abspath(source) for source in given])
    parts: dict[str, Files] = {prefix: part.files for prefix, part in zip(prefixes, found, strict=True)}
    whole = Found(
        JoinedFiles(
            Path("+".join(prefixes if len(prefixes) < 5 else [*prefixes[:3], f"{len(prefixes) - 3} more"])), parts
        ),
        [],
    )
    for prefix, part in zip(prefixes, found, strict=True):
        whole.pictures += [replace(picture, name=f"{prefix}/{picture.name}") for picture in part.pictures]
        whole.left_out += [(f"{prefix}/{name}", why) for name, why in part.left_out]
        whole.notices += [f"{printable(prefix)}: {notice}" for notice in part.notices]
    labels = [{picture.label for picture in part.pictures} - {None} for part in found]
    numbered = [
        prefix
        for prefix, names in zip(prefixes, labels, strict=True)
        if names and all(name is not None and name.isascii() and name.isdigit() for name in names)
    ]
    if len(numbered) > 1:
        whole.notices.append(
            f"{listed(numbered)} number their classes; an equal number is taken as the same class in all of them."
        )
    elif numbered and sum(map(bool, labels)) > 1:
        whole.notices.append(f"{listed(numbered)} numbers its classes and other sources name them; they stay apart.")
    without = [prefix for prefix, names in zip(prefixes, labels, strict=True) if not names]
    if without and len(without) < len(found):
        whole.notices.append(f"The pictures of {listed(without)} have no labels; those of the other sources do.")
    return whole


def _refuse_repeated(given: Sequence[str]) -> None:
    """Raises `UsageError` when a source is there twice: by another name, by a pattern, or inside another folder."""
    seen: dict[str, int] = {}
    for number, source in enumerate(given):
        for place in _places(source):
            before = seen.setdefault(place, number)
            if before != number:
                which = "" if given[before] == source else f"; {printable(given[before])} is the same"
                raise UsageError(f"{printable(source)} is given twice{which}. Give it once.")
    for place, number in seen.items():
        around = next((seen[str(outer)] for outer in Path(place).parents if str(outer) in seen), number)
        if around != number and os.path.isdir(place):
            raise UsageError(
                f"{printable(given[number])} lies in {printable(given[around])}, so its pictures would be there twice. "
                "Give the outer one alone."
            )


def _places(source: str) -> list[str]:
    """Files, folders or addresses that a source stands for, each in its one true form."""
    if webdataset.is_address(source):
        return webdataset.expand(source)
    if not os.path.lexists(source) and webdataset.is_pattern(source):
        return [os.path.realpath(name) for name in webdataset.expand(source)]
    return [os.path.realpath(source)]
