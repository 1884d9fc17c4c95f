"""Zip and tar archives as `Files`: read member by member, never unpacked, refused where they are not safe.

A zip and a plain tar are read where they lie. A compressed tar, or one behind a URL, can only be read from front to
back, so it is written once to a temporary file without a name, which is bounded and gone when the program ends; the
folder for it is Python's (`TMPDIR`). Refused are paths that leave the archive, links and devices in a tar, encrypted
zips, archives that grow beyond reason, and archives that were cut or damaged. Archives inside archives stay closed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from imagekiln.data.decode import Unusable
from imagekiln.data.files import (
    SPLITS,
    TAR_SUFFIXES,
    Entry,
    Files,
    FolderFiles,
    escapes,
    is_ignored,
    missing,
    printable,
)
from imagekiln.errors import DataError, DiskError, ImagekilnError, UsageError

MAX_MEMBERS = 500_000
MAX_TOTAL_BYTES = 64 * 2**30
MAX_MEMBER_BYTES = 512 * 2**20
MAX_RATIO = 100  # an archive that grows more than this is a bomb, once it grows beyond HARMLESS_BYTES
HARMLESS_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 2**20
_BLOCK = tarfile.BLOCKSIZE
_UNPACKERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_UNCLEAN = re.compile(r"(?:^|/)\.?(?:/|$)")  # an empty part of a path, or one that is a dot
_CLOSED = (".rar", ".7z", ".tar.zst", ".tzst", ".tar.lz", ".tar.z", ".iso", ".cbz", ".cbr")


def files_of(path: Path) -> Files:
    """What lies at a path: a folder, a zip or a tar.

    Raises `UsageError` when it is none of them, `DataError` for an archive that cannot be read safely.
    """
    if os.path.isdir(path):
        return FolderFiles(path)
    if not os.path.exists(path):
        raise UsageError(missing(path))
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return ZipFiles(path)
    if is_tar(path):
        return TarFiles(path)
    given = printable(str(path))
    if path.name.lower().endswith(_CLOSED):
        raise UsageError(f"{given} is an archive of a kind that is not read. Unpack it and give the folder.")
    raise UsageError(
        f"{given} is a file; expected a folder of pictures, or a zip, tar or parquet file of them. "
        f"To use a picture, give the folder it lies in: {printable(str(path.parent))}."
    )


def is_tar(path: Path) -> bool:
    """Whether a file is a tar, by its ending or by the mark in its first header."""
    if path.name.lower().endswith(TAR_SUFFIXES):
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(_BLOCK)[257:262] == b"ustar"
    except OSError:
        return False


class Spool:
    """A temporary file without a name that holds what cannot be read out of order where it lies.

    It is gone with the object. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._lock = threading.RLock()  # unpacking may read from the spool it writes to
        with self._room():
            self._file = tempfile.TemporaryFile(prefix="imagekiln-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def add(self, content: Iterable[bytes]) -> tuple[int, int]:
        """Append all of it; (offset, size). Raises `DiskError` where there is no room."""
        with self._lock:
            start = self.num_bytes
            for data in content:
                with self._room():
                    self._file.seek(self.num_bytes)
                    self._file.write(data)
                self.num_bytes += len(data)
            with self._room():
                self._file.flush()
            return start, self.num_bytes - start

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(
                f"The temporary folder {tempfile.gettempdir()} cannot be written ({error.strerror or error}). "
                "Set TMPDIR to a folder with room for what has to be unpacked."
            ) from None


class ZipFiles:
    """The members of a zip. One folder that holds everything is taken as the root."""

    def __init__(self, path: Path) -> None:
        self.where = path
        self.entries: dict[str, Entry] = {}
        self.left_out: list[tuple[str, str]] = []
        try:
            self._refuse_crowd(_num_listed(path))
            self._zip = zipfile.ZipFile(path)
            members = [member for member in self._zip.infolist() if not member.is_dir()]
        except PermissionError:
            raise UsageError(f"{printable(str(path))} cannot be read: permission denied.") from None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            why = printable(str(error))
            raise DataError(
                f"{printable(str(path))} is not a whole zip file ({why}). Copy or download it again."
            ) from None
        self._check(members)
        cleaned = [_cleaned(member.filename.replace("\\", "/")) for member in members]  # as old Windows programs wrote
        names, self.ignored = rooted(cleaned)
        self._members = {names[n]: m for n, m in zip(reversed(cleaned), reversed(members), strict=True) if n in names}
        for name, count in Counter(cleaned).items():
            if count > 1 and name in names:
                self.left_out.append((names[name], f"listed {count} times in the zip; the first one counts"))
        for name, member in sorted(self._members.items()):
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                self.left_out.append((name, "link" if kind == stat.S_IFLNK else "not a regular file"))
            elif member.file_size > MAX_MEMBER_BYTES:
                self.left_out.append((name, f"larger than {MAX_MEMBER_BYTES // 2**20} MB"))
            else:
                self.entries[name] = Entry(member.file_size, member.CRC)

    def _refuse_crowd(self, count: int) -> None:
        if count > MAX_MEMBERS:
            where = printable(str(self.where))
            raise DataError(f"{where} lists {count:,} files; at most {MAX_MEMBERS:,} are read from a zip.")

    def _check(self, members: list[zipfile.ZipInfo]) -> None:
        self._refuse_crowd(len(members))
        where = printable(str(self.where))
        for member in members:
            _refuse_escape(member.filename, where)
            if member.flag_bits & 1:
                raise DataError(f"{where} is encrypted. Unpack it with its password and give the folder.")
        total = sum(member.file_size for member in members)
        packed = min(sum(member.compress_size for member in members), self.where.stat().st_size)  # members may overlap
        if total > MAX_TOTAL_BYTES or total > max(HARMLESS_BYTES, MAX_RATIO * packed):
            sizes = f"{packed / 2**20:,.0f} MB to {total / 2**20:,.0f} MB"
            raise DataError(f"{where} would grow from {sizes}, more than is safe to read from a zip.")

    def open(self, name: str) -> BinaryIO:
        try:
            return io.BytesIO(self._zip.read(self._members[name]))
        except ImagekilnError:
            raise
        except Exception as error:  # zlib.error, lzma.LZMAError, BadZipFile and their kin share no ancestor
            raise Unusable("damaged in the zip") from error

    def read(self, name: str, limit: int) -> bytes:
        return read_member(self, name, limit)


class _Member(NamedTuple):
    """Where the bytes of a tar's member lie, counted from the start of the tar."""

    offset: int
    size: int


class TarFiles:
    """The members of a tar, plain or compressed with gzip, bzip2 or xz. One folder that holds everything is the root.

    path: what it is called in messages, and where it lies when there is no `stream`.
    spool: takes what has to be written aside; several archives may share one. None makes one when it is needed.
    stream: the bytes of an archive that is no local file, read once from front to back.
    """

    def __init__(self, path: Path, spool: Spool | None = None, stream: BinaryIO | None = None) -> None:
        self.where = path
        self.entries: dict[str, Entry] = {}
        self.left_out: list[tuple[str, str]] = []
        self._shown = printable(str(path))
        self._spool: Spool | None = None  # None: the plain tar lies at the path
        self._start = 0
        try:
            self._make_readable(spool, stream)
            with self._whole() as whole:
                members = list(self._members(whole))
        except ImagekilnError:
            raise
        except PermissionError:
            raise UsageError(f"{self._shown} cannot be read: permission denied.") from None
        except Exception as error:  # tarfile.TarError, zlib.error, LZMAError, EOFError, ValueError share no ancestor
            why = printable(str(error)) or type(error).__name__
            raise DataError(f"{self._shown} is not a whole tar file ({why}). Copy or download it again.") from None
        self._keep(members)

    def _make_readable(self, spool: Spool | None, stream: BinaryIO | None) -> None:
        """Bring the tar to where any stretch of it can be read."""
        if stream is None:
            status = os.stat(self.where)
            self._size, self._changed = status.st_size, status.st_mtime_ns
        else:
            self._write_aside(stream, MAX_TOTAL_BYTES, spool := spool or Spool())
        head = self._bytes(0, 6)
        unpack = next((unpack for magic, unpack in _UNPACKERS.items() if head.startswith(magic)), None)
        if unpack is not None:
            limit = min(MAX_TOTAL_BYTES, max(HARMLESS_BYTES, MAX_RATIO * self._size))
            with self._whole() as whole, unpack(whole) as unpacked:
                self._write_aside(unpacked, limit, spool or Spool())

    def _write_aside(self, stream: BinaryIO, limit: int, spool: Spool) -> None:
        checksum = total = 0

        def content() -> Iterator[bytes]:
            nonlocal checksum, total
            while data := stream.read(2**20):
                checksum, total = zlib.crc32(data, checksum), total + len(data)
                if total > limit:
                    raise DataError(
                        f"{self._shown} would grow beyond {limit / 2**20:,.0f} MB, more than is safe to unpack. "
                        "Unpack it yourself and give the folder."
                    )
                yield data

        self._start, self._size = spool.add(content())
        self._spool, self._changed = spool, checksum

    @contextmanager
    def _whole(self) -> Iterator[BinaryIO]:
        """The archive from its start to its end."""
        if self._spool is None:
            with self.where.open("rb") as stream:
                yield stream
        else:
            yield io.BufferedReader(_Stretch(self._spool, self._start, self._size))

    def _bytes(self, offset: int, size: int) -> bytes:
        """A stretch of the archive; shorter where the archive is."""
        size = max(0, min(size, self._size - offset))
        if self._spool is not None:
            return self._spool.read(self._start + offset, size)
        with self.where.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def _members(self, whole: BinaryIO) -> Iterator[tuple[str, _Member | str]]:
        """(name, where it lies or why it cannot be read) of every file, after a look at the whole chain of headers."""
        before = number = 0
        with tarfile.open(
            fileobj=_Headers(whole),  # type: ignore[call-overload]
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it would remember every member otherwise
                number += 1
                if number > MAX_MEMBERS:
                    raise DataError(f"{self._shown} holds more than {MAX_MEMBERS:,} files; a tar may not hold more.")
                if tar.offset <= before or member.size < 0:
                    raise tarfile.ReadError("a header points backwards")
                before = tar.offset
                _refuse_escape(member.name, self._shown)
                if member.isreg():
                    yield _cleaned(member.name), self._place(member)
                elif not member.isdir():
                    raise DataError(
                        f"{self._shown} holds {printable(member.name)!r}, which is {_kind(member)}. "
                        "Make the tar of regular files only (tar --dereference --hard-dereference)."
                    )
            self._check_end(whole, tar.offset)

    def _place(self, member: tarfile.TarInfo) -> _Member | str:
        if member.issparse():
            return "sparse file"
        if member.size > MAX_MEMBER_BYTES:
            return f"larger than {MAX_MEMBER_BYTES // 2**20} MB"
        return _Member(member.offset_data, member.size)

    def _check_end(self, whole: BinaryIO, offset: int) -> None:
        """Python's reader stops without a word at a damaged header; only blocks of zeros are the end of a whole tar."""
        whole.seek(offset)
        rest = whole.read(2**20)
        if len(rest) < _BLOCK:
            raise tarfile.ReadError("it ends without its end mark, so a part is missing")
        if any(rest[:_BLOCK]):
            raise tarfile.ReadError(f"damaged at byte {offset:,}")
        if any(rest):
            raise tarfile.ReadError("it goes on after its end mark, as if several were put together")

    def _keep(self, members: list[tuple[str, _Member | str]]) -> None:
        names, self.ignored = rooted([name for name, _ in members])
        for name, count in Counter(name for name, _ in members).items():
            if count > 1 and name in names:
                self.left_out.append((names[name], f"listed {count} times in the tar; the last one counts"))
        places = {names[name]: place for name, place in members if name in names}
        self._places = {name: place for name, place in places.items() if isinstance(place, _Member)}
        self.left_out += [(name, place) for name, place in sorted(places.items()) if isinstance(place, str)]
        self.entries = {name: Entry(place.size, self._changed) for name, place in sorted(self._places.items())}

    def open(self, name: str) -> BinaryIO:
        offset, size = self._places[name]
        try:
            content = self._bytes(offset, size)
        except OSError as error:
            raise Unusable("the tar cannot be read any more") from error
        if len(content) < size:
            raise Unusable("cut off in the tar")
        return io.BytesIO(content)

    def read(self, name: str, limit: int) -> bytes:
        return read_member(self, name, limit)


class _Stretch(io.RawIOBase):
    """A part of a spool as a file."""

    def __init__(self, spool: Spool, start: int, size: int) -> None:
        self._spool, self._start, self._size, self._at = spool, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._spool.read(self._start + self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Headers:
    """What `tarfile` may read while it lists: headers, in sane amounts.

    A header may ask for any number of bytes, below zero too, and long runs of digits in it take Python's older readers
    quadratic time (CVE-2024-6232).
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header of absurd size")
        data = self._stream.read(size)
        if size > _BLOCK and re.search(rb"[0-9]{1000}", data):
            raise tarfile.ReadError("a header of nothing but digits")
        return data


def rooted(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Names in an archive as names below its root, and what is ignored. One folder that holds everything is the root.

    A lone folder that is named like a split stays, so that the split is known.

    >>> rooted(["set/a.png", "set/b/c.png", "__MACOSX/x.png"])
    ({'set/a.png': 'a.png', 'set/b/c.png': 'b/c.png'}, ['__MACOSX'])
    """
    kept: list[str] = []
    ignored: dict[str, None] = {}
    for name in names:
        parts = name.split("/")
        hidden = next((number for number, part in enumerate(parts, 1) if is_ignored(part)), 0)
        if hidden:
            ignored["/".join(parts[:hidden])] = None
        else:
            kept.append(name)
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in kept}
    lone = tops.pop() if len(tops) == 1 else ""
    skip = len(lone) + 1 if lone and lone.lower() not in SPLITS else 0
    if any(escapes(name[skip:]) for name in kept):  # such as a/C:
        skip = 0
    return {name: name[skip:] for name in kept}, list(ignored)


def _cleaned(name: str) -> str:
    return str(PurePosixPath(name)) if _UNCLEAN.search(name) else name


def _refuse_escape(name: str, where: str) -> None:
    plain = _cleaned(name.replace("\\", "/"))
    if any(escapes(form) for form in {name, _cleaned(name), plain}):
        raise DataError(f"{where} holds {printable(name)!r}, a path that leaves the archive.")


def _num_listed(path: Path) -> int:
    """How many members a zip says it has, in its last record: a million would be a gigabyte once they are listed."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 2**16 - 200))
        tail = stream.read()
    last = tail.rfind(b"PK\5\6")
    count = int.from_bytes(tail[last + 10 : last + 12], "little") if last >= 0 else 0
    large = tail.rfind(b"PK\6\6")  # the record of zips with more than 65,535 members
    return int.from_bytes(tail[large + 32 : large + 40], "little") if count == 0xFFFF and large >= 0 else count


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link"
    return "a device" if member.isdev() else "not a regular file"


def read_member(files: Files, name: str, limit: int) -> bytes:
    """At most `limit` bytes of a member that `open` gives as a stream. Raises `DataError`."""
    try:
        stream = files.open(name)
    except Unusable as error:
        where = printable(str(files.where))
        raise DataError(f"{printable(name)} in {where} cannot be read: {error}.") from None
    return b"" if isinstance(stream, Path) else stream.read(limit)
