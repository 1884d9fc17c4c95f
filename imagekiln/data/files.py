"""Files of a folder by name, safely: nothing outside is ever read, nothing special is ever opened.

Names are relative to the root, with forward slashes. What lies in archives has the same shape, `Files`, and comes from
`imagekiln.data.archives`; `JoinedFiles` makes one set of several sources.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from imagekiln.data.decode import Unusable
from imagekiln.errors import DataError, UsageError

SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""Folder names that stand for a split of the set, and which."""
EMPTY_FOLDER = "empty folder"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SUFFIXES = (".zip", ".parquet", *TAR_SUFFIXES)
"""Endings of files that are read like folders."""
_IGNORED = {"__MACOSX", "Thumbs.db", "desktop.ini"}


class Entry(NamedTuple):
    """Size in bytes and time of the last change: with the name they stand for the content in the cache's key.

    What has no time of its own gives another number that changes with the content: a checksum, or the archive's time.
    """

    num_bytes: int
    changed: int


class Files(Protocol):
    """Regular files by name."""

    where: Path
    entries: dict[str, Entry]
    left_out: list[tuple[str, str]]
    """Links, devices, folders that are empty or may not be read: (name, reason); a folder's name ends with a slash."""
    ignored: list[str]
    """Hidden pictures and folders, and what operating systems leave behind: none of ours."""

    def open(self, name: str) -> Path | BinaryIO:
        """A path or a stream for `decode.open_safely`; `Unusable` where the bytes cannot be had."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """At most `limit` bytes from the start; `DataError` where they cannot be had."""
        ...


class FolderFiles:
    """The regular files below a folder."""

    def __init__(self, root: Path) -> None:
        self.where = root
        self.entries: dict[str, Entry] = {}
        self.left_out: list[tuple[str, str]] = []
        self.ignored: list[str] = []
        self._inside = root.resolve()
        for name, entry in self._walk(root, ""):
            self._add(name, entry)

    def _walk(self, folder: Path | str, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise UsageError(f"{printable(str(folder))} cannot be read: {error.strerror}.") from None
            self.left_out.append((prefix, "permission denied" if isinstance(error, PermissionError) else str(error)))
            return
        if not entries and prefix:
            self.left_out.append((prefix, EMPTY_FOLDER))
        for entry in entries:
            if is_ignored(entry.name):
                self.ignored.append(prefix + entry.name)
            elif entry.is_dir(follow_symlinks=False):
                yield from self._walk(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry

    def _add(self, name: str, entry: os.DirEntry[str]) -> None:
        try:
            if entry.is_symlink():
                if not Path(entry.path).resolve(strict=True).is_relative_to(self._inside):
                    raise Unusable("link that leaves the folder")
                if entry.is_dir():
                    raise Unusable("link to a folder")
            status = entry.stat()
            if not stat.S_ISREG(status.st_mode):
                raise Unusable("not a regular file")
            self.entries[name] = Entry(status.st_size, status.st_mtime_ns)
        except Unusable as error:
            self.left_out.append((name, str(error)))
        except (OSError, RuntimeError):  # a loop of links is an OSError or, before Python 3.13, a RuntimeError
            self.left_out.append((name, "link that leads nowhere" if entry.is_symlink() else "cannot be read"))

    def open(self, name: str) -> Path:
        return self.where / name

    def read(self, name: str, limit: int) -> bytes:
        try:
            with (self.where / name).open("rb") as stream:
                return stream.read(limit)
        except OSError as error:
            where = printable(str(self.where))
            raise DataError(f"{printable(name)} in {where} cannot be read: {error.strerror}.") from None


class JoinedFiles:
    """The files of several sources as one set: each name is the source's prefix, a slash, and the name in it.

    where: what the set is called in messages. parts: `Files` by prefix; no prefix holds a slash.
    """

    def __init__(self, where: Path, parts: Mapping[str, Files]) -> None:
        self.where = where
        self.parts = dict(parts)
        self.entries: dict[str, Entry] = {}
        self.left_out: list[tuple[str, str]] = []
        self.ignored: list[str] = []
        for prefix, files in self.parts.items():
            self.entries |= {f"{prefix}/{name}": entry for name, entry in files.entries.items()}
            self.left_out += [(f"{prefix}/{name}", why) for name, why in files.left_out]
            self.ignored += [f"{prefix}/{name}" for name in files.ignored]

    def open(self, name: str) -> Path | BinaryIO:
        prefix, _, rest = name.partition("/")
        return self.parts[prefix].open(rest)

    def read(self, name: str, limit: int) -> bytes:
        prefix, _, rest = name.partition("/")
        return self.parts[prefix].read(rest, limit)


def is_ignored(part: str) -> bool:
    """Whether a file or folder of this name is none of ours: hidden, or left behind by an operating system."""
    return part.startswith(".") or part in _IGNORED


def escapes(name: str) -> bool:
    """Whether a relative path leaves its root, on any system.

    >>> [escapes(name) for name in ("a/b.png", "../x", "/x", "C:\\\\x", "a/..\\\\..\\\\x")]
    [False, True, True, True, True]
    """
    return name.startswith(("/", "\\")) or bool(re.match(r"[A-Za-z]:", name)) or ".." in re.split(r"[/\\]", name)


def printable(name: str) -> str:
    """A file name that is safe on a terminal: control characters and undecodable bytes are written as escapes.

    >>> printable("a\\x1b[31m\\n.png")
    'a\\\\x1b[31m\\\\x0a.png'
    """

    if name.isascii() and name.isprintable():
        return name

    def shown(char: str) -> str:
        if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return char
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"

    return "".join(map(shown, name))


def normal(name: str) -> str:
    """A name as it is compared: composed (NFC), because some systems write one name in two forms.

    >>> normal("e\\u0301") == normal("\\u00e9")
    True
    """
    return unicodedata.normalize("NFC", name)


def stem(path: str) -> str:
    """The name of a source without its folder and without its ending.

    >>> stem("s3://bucket/flowers-000.tar.gz"), stem("photos/cats.v2/"), stem("b.parquet")
    ('flowers-000', 'cats.v2', 'b')
    """
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    ending = max((ending for ending in SUFFIXES if name.lower().endswith(ending)), key=len, default="")
    return name[: len(name) - len(ending)].lstrip(".") or "source"


def short_names(paths: Sequence[str]) -> list[str]:
    """A short name for each path, no two alike: its stem, with the folder's name before it where stems are equal.

    >>> short_names(["a/x.tar", "b/x.tar", "c.tar"]), short_names(["x.tar", "x.zip"])
    (['a-x', 'b-x', 'c'], ['x', 'x-2'])
    """
    stems = [stem(path) for path in paths]
    seen = Counter(normal(name).casefold() for name in stems)
    chosen: list[str] = []
    taken: set[str] = set()
    for path, name in zip(paths, stems, strict=True):
        parent = os.path.dirname(path.rstrip("/\\"))
        if seen[normal(name).casefold()] > 1 and parent.strip("/\\"):
            name = f"{stem(parent)}-{name}"
        unique, number = name, 1
        while normal(unique).casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(normal(unique).casefold())
        chosen.append(unique)
    return chosen


def missing(path: Path) -> str:
    """The sentence for a path that is not there, with the nearest names that are."""
    given = printable(str(path))
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), None)
    if folder is None:
        return f"{given} does not exist."
    wanted = path.parts[len(folder.parts)] if folder != Path(".") else path.parts[0]
    try:
        near = difflib.get_close_matches(wanted, os.listdir(folder), n=3, cutoff=0.5)
    except PermissionError:
        near = []
    hint = f"Did you mean {' or '.join(repr(printable(str(folder / name))) for name in near)}?" if near else ""
    return f"{given} does not exist. {hint}".rstrip()
