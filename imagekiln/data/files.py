"""Files of a folder or a zip archive by name, safely: nothing outside is ever read, nothing special is ever opened.

Names are relative to the root, with forward slashes. A zip is read member by member and never unpacked to disk.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol

from imagekiln.data.decode import Unusable
from imagekiln.errors import DataError, ImagekilnError, UsageError

MAX_MEMBERS = 500_000
MAX_TOTAL_BYTES = 64 * 2**30
MAX_MEMBER_BYTES = 512 * 2**20
MAX_RATIO = 100  # a zip that grows more than this is a bomb, once it grows beyond _HARMLESS_BYTES
_HARMLESS_BYTES = 64 * 2**20
_IGNORED = {"__MACOSX", "Thumbs.db", "desktop.ini"}


class Entry(NamedTuple):
    """Size in bytes and time of the last change: with the name they stand for the content in the cache's key."""

    num_bytes: int
    changed: int


class Files(Protocol):
    """Regular files by name."""

    where: Path
    entries: dict[str, Entry]
    left_out: list[tuple[str, str]]
    """Links, devices and unreadable folders: (name, reason)."""

    def open(self, name: str) -> Path | BinaryIO:
        """A path or a stream for `decode.open_safely`; `Unusable` where the bytes cannot be had."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """At most `limit` bytes from the start; `DataError` where they cannot be had."""
        ...


def files_of(path: Path) -> Files:
    """What lies at a path: a folder or a zip. Raises `UsageError` when it is neither, `DataError` for a bad zip."""
    if os.path.isdir(path):
        return FolderFiles(path)
    if not os.path.exists(path):
        raise UsageError(_missing(path))
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return ZipFiles(path)
    raise UsageError(
        f"{printable(str(path))} is a file; expected a folder of pictures or a zip of one. "
        f"To use a picture, give the folder it lies in: {printable(str(path.parent))}."
    )


class FolderFiles:
    """The regular files below a folder."""

    def __init__(self, root: Path) -> None:
        self.where = root
        self.entries: dict[str, Entry] = {}
        self.left_out: list[tuple[str, str]] = []
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
        for entry in entries:
            if is_ignored(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
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
            raise DataError(f"{printable(name)} in {self.where} cannot be read: {error.strerror}.") from None


class ZipFiles:
    """The members of a zip. One folder that holds everything is taken as the root."""

    def __init__(self, path: Path) -> None:
        self.where = path
        self.entries: dict[str, Entry] = {}
        self.left_out: list[tuple[str, str]] = []
        try:
            self._zip = zipfile.ZipFile(path)
            members = [member for member in self._zip.infolist() if not member.is_dir()]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{path} is not a whole zip file ({error}). Copy or download it again.") from None
        self._check(members)
        members = [m for m in members if not any(is_ignored(part) for part in PurePosixPath(m.filename).parts)]
        tops = {m.filename.split("/", 1)[0] if "/" in m.filename else "" for m in members}
        skip = len(tops.pop()) + 1 if len(tops) == 1 and "" not in tops else 0
        self._members = {member.filename[skip:]: member for member in reversed(members)}
        for name, count in Counter(member.filename[skip:] for member in members).items():
            if count > 1:
                self.left_out.append((name, f"listed {count} times in the zip; the first one counts"))
        for name, member in sorted(self._members.items()):
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                self.left_out.append((name, "link" if kind == stat.S_IFLNK else "not a regular file"))
            elif member.file_size > MAX_MEMBER_BYTES:
                self.left_out.append((name, f"larger than {MAX_MEMBER_BYTES // 2**20} MB"))
            else:
                self.entries[name] = Entry(member.file_size, member.CRC)

    def _check(self, members: list[zipfile.ZipInfo]) -> None:
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{self.where} lists {len(members):,} files; at most {MAX_MEMBERS:,} are read from a zip.")
        for member in members:
            if escapes(member.filename):
                raise DataError(f"{self.where} holds {printable(member.filename)!r}, a path that leaves the archive.")
            if member.flag_bits & 1:
                raise DataError(f"{self.where} is encrypted. Unpack it with its password and give the folder.")
        total, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
        if total > MAX_TOTAL_BYTES or total > max(_HARMLESS_BYTES, MAX_RATIO * packed):
            sizes = f"{packed / 2**20:,.0f} MB to {total / 2**20:,.0f} MB"
            raise DataError(f"{self.where} would grow from {sizes}, more than is safe to read from a zip.")

    def open(self, name: str) -> BinaryIO:
        try:
            return io.BytesIO(self._zip.read(self._members[name]))
        except ImagekilnError:
            raise
        except Exception as error:  # zlib.error, lzma.LZMAError, BadZipFile and their kin share no ancestor
            raise Unusable("damaged in the zip") from error

    def read(self, name: str, limit: int) -> bytes:
        try:
            stream = self.open(name)
        except Unusable as error:
            raise DataError(f"{printable(name)} in {self.where} cannot be read: {error}.") from None
        return stream.read(limit)


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

    def shown(char: str) -> str:
        if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return char
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"

    return "".join(map(shown, name))


def _missing(path: Path) -> str:
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
