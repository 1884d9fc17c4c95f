"""The index of a set of shards, and bytes of its tar files by place: see `imagekiln.data.shards` for the format.

Every number in the index is checked before it is believed. Bytes come from a folder or from any fsspec URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from imagekiln.core import UNLABELLED
from imagekiln.data.files import printable
from imagekiln.errors import DataError, UsageError

INDEX = "index.json"
VERSION = 1
SPLITS = ("", "train", "validation", "test")
COLUMNS = ("offset", "bytes", "about_offset", "about_bytes", "height", "width", "label", "split")

_MAX_INDEX_BYTES = 2**30
_MAX_MEMBER_BYTES = 2**29
_OPEN_FILES = 32
_PIECES = 64
_AGAIN = "Copy or prepare the set again."


class Storage(Protocol):
    """Where shards lie. Errors are OSErrors, or whatever a remote store throws."""

    where: str

    def read(self, file: str, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, fewer only at the end."""
        ...

    def size(self, file: str) -> int: ...


@dataclass(frozen=True, eq=False)
class Shards:
    """An opened set of shards: its index as arrays, one entry a picture in the order of writing.

    table: int64 arrays by name: `shard`, and `COLUMNS`. digests: bytes, 16 a picture. hashes: sha256 of every tar.
    """

    storage: Storage
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    hashes: tuple[str, ...]
    class_names: tuple[str, ...]
    channels: int
    has_texts: bool
    table: dict[str, np.ndarray]
    digest_bytes: bytes

    def __len__(self) -> int:
        return len(self.table["shard"])

    @property
    def digests(self) -> list[str]:
        """Content hashes, 32 hex digits each."""
        return [self.digest_bytes[start : start + 16].hex() for start in range(0, 16 * len(self), 16)]

    def member(self, row: int, of: Literal["", "about_"] = "") -> bytes:
        """The bytes of a picture's file, or of the JSON about it. Raises `DataError`."""
        file = self.files[self.table["shard"][row]]
        offset, count = int(self.table[f"{of}offset"][row]), int(self.table[f"{of}bytes"][row])
        raw = self._bytes(file, offset, count)
        if len(raw) != count:
            raise DataError(f"{self.storage.where}/{file} is cut at byte {offset + len(raw):,}. {_AGAIN}")
        return raw

    def about(self, row: int) -> dict[str, Any]:
        """What is known about a picture: file_name, digest, and label, text, split where given. Raises `DataError`."""
        try:
            found = json.loads(self.member(row, "about_"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            file = self.files[self.table["shard"][row]]
            raise DataError(f"{self.storage.where}/{file} is damaged: what it says about picture {row}. {_AGAIN}")
        return found

    def verify(self) -> None:
        """Read every tar and compare it with its checksum. Raises `DataError` naming the first that differs."""
        for file, size, wanted in zip(self.files, self.sizes, self.hashes, strict=True):
            sha = hashlib.sha256()
            for start in range(0, size, 2**22):
                sha.update(self._bytes(file, start, min(2**22, size - start)))
            if sha.hexdigest() != wanted or self.storage.size(file) != size:
                raise DataError(f"{self.storage.where}/{file} is damaged: its checksum differs. {_AGAIN}")

    def _bytes(self, file: str, offset: int, count: int) -> bytes:
        try:
            return self.storage.read(file, offset, count)
        except Exception as error:  # stores throw their own kinds
            raise DataError(f"{self.storage.where}/{file} cannot be read ({_why(error)}). {_AGAIN}") from None


def is_set(where: str | Path) -> bool:
    """Whether a folder holds shards of ours; a URL is taken to."""
    return "://" in str(where) or os.path.isfile(Path(where) / INDEX)


def open_shards(where: str | Path, *, piece_bytes: int = 0) -> Shards:
    """Open a set of shards by its index alone.

    where: a folder, or any URL that fsspec knows (`s3://bucket/set`, `memory://set`), read by ranges.
    piece_bytes: behind a URL, read pieces of this size and keep the last few (64): for an order by blocks. 0 reads
        exactly what is asked for.

    Raises `UsageError` where nothing lies or fsspec is missing, `DataError` for a damaged index or a missing shard.
    """
    storage = _storage(str(where), piece_bytes)
    try:
        size = storage.size(INDEX)
        raw = storage.read(INDEX, 0, size) if size <= _MAX_INDEX_BYTES else b""
    except FileNotFoundError:
        raise UsageError(f"{printable(storage.where)} holds no {INDEX}; expected a folder of shards.") from None
    except Exception as error:  # stores throw their own kinds
        raise DataError(f"{printable(storage.where)}/{INDEX} cannot be read ({_why(error)}).") from None
    try:
        shards = _parsed(storage, json.loads(raw))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(f"{storage.where}/{INDEX} is damaged ({_why(error)}). {_AGAIN}") from None
    for file, expected in zip(shards.files, shards.sizes, strict=True):
        if isinstance(storage, _Folder):  # behind a URL a missing tar is noticed when it is read
            try:
                found = storage.size(file)
            except OSError as error:
                raise DataError(f"{storage.where}/{file} cannot be read ({_why(error)}). {_AGAIN}") from None
            if found != expected:
                raise DataError(f"{storage.where}/{file} has {found:,} bytes instead of {expected:,}. {_AGAIN}")
    return shards


def _parsed(storage: Storage, index: dict[str, Any]) -> Shards:
    """The index as arrays, every number checked. Raises ValueError, KeyError or TypeError for anything odd."""
    if int(index["version"]) > VERSION:
        raise DataError(f"{storage.where} was written by a newer version of imagekiln. Update imagekiln.")
    files: list[str] = []
    sizes: list[int] = []
    hashes: list[str] = []
    digests: list[bytes] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("shard", *COLUMNS)}
    for number, part in enumerate(index["shards"]):
        file, size, sha = str(part["file"]), int(part["size"]), str(part["sha256"])
        count = len(part["label"])
        found = {name: np.array(part[name], np.int64).reshape(count) for name in COLUMNS}
        for begin, length in ((found["offset"], found["bytes"]), (found["about_offset"], found["about_bytes"])):
            inside = (begin >= 0) & (length > 0) & (length <= _MAX_MEMBER_BYTES) & (begin <= size - length)
            _require(bool(inside.all()), f"{file} has members outside of it")
        _require(file == f"shard-{number:06d}.tar" and bool(re.fullmatch("[0-9a-f]{64}", sha)), "a shard's name or sum")
        raw = bytes.fromhex(part["digests"])
        _require(count > 0 and len(raw) == 16 * count, f"{file} has {len(raw) // 16} digests for {count} pictures")
        for name, values in {"shard": np.full(count, number), **found}.items():
            columns[name].append(values)
        files.append(file)
        sizes.append(size)
        hashes.append(sha)
        digests.append(raw)
    _require(bool(files), "no shards")
    table = {name: np.concatenate(values) for name, values in columns.items()}
    class_names, channels = tuple(map(str, index["class_names"])), int(index["channels"])
    _require(len(table["shard"]) == int(index["num_pictures"]) and channels in (1, 3, 4), "its counts differ")
    labels, splits = table["label"], table["split"]
    _require(int(labels.min()) >= UNLABELLED and int(labels.max()) < len(class_names), "a label without a class")
    _require(int(splits.min()) >= 0 and int(splits.max()) < len(SPLITS), "an unknown split")
    _require(int(min(table["height"].min(), table["width"].min())) > 0, "an empty picture")
    known = tuple(files), tuple(sizes), tuple(hashes), class_names
    return Shards(storage, *known, channels, bool(index["texts"]), table, b"".join(digests))


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise ValueError(what)


def _why(error: Exception) -> str:
    return printable(str(getattr(error, "strerror", None) or error or type(error).__name__))[:200]


# --- storage --------------------------------------------------------------------------------------------------------


def _storage(where: str, piece_bytes: int) -> Storage:
    if "://" not in where:
        return _Folder(where)
    try:
        import fsspec  # the extra `shards`
    except ImportError as error:
        raise UsageError(f"{where} needs the package fsspec ({error}): pip install 'imagekiln[shards]'.") from None
    try:
        system, root = fsspec.core.url_to_fs(where)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{printable(where)} cannot be opened: {error}.") from None
    return _Remote(where.rstrip("/"), system, root, piece_bytes)


class _Folder:
    """Files of a folder, a few of them kept open."""

    def __init__(self, where: str) -> None:
        self.where, self._lock = where.rstrip("/") or "/", threading.Lock()
        self._open: OrderedDict[str, _File] = OrderedDict()

    def read(self, file: str, offset: int, count: int) -> bytes:
        with self._lock:
            if file not in self._open:
                self._open[file] = _File(Path(self.where) / file)
            self._open.move_to_end(file)
            chosen = self._open[file]
            while len(self._open) > _OPEN_FILES:  # another thread may be reading it: it closes with its last user
                self._open.popitem(last=False)
        return chosen.read(offset, count)

    def size(self, file: str) -> int:
        return (Path(self.where) / file).stat().st_size


class _File:
    """A file that several threads read at once, and that closes when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self._stream: BinaryIO | None = None
        self._stream, self._lock = path.open("rb", buffering=0), threading.Lock()

    def read(self, offset: int, count: int) -> bytes:
        if self._stream is None:
            return b""
        if hasattr(os, "pread"):
            return os.pread(self._stream.fileno(), count, offset)
        with self._lock:
            self._stream.seek(offset)
            return self._stream.read(count)

    def __del__(self) -> None:
        if self._stream is not None:
            self._stream.close()


class _Remote:
    """Ranges of files behind an fsspec URL; with `piece_bytes` in whole pieces, of which the last few are kept."""

    def __init__(self, where: str, system: Any, root: str, piece_bytes: int) -> None:
        self.where, self._system, self._root, self._piece_bytes = where, system, root.rstrip("/"), piece_bytes
        self._pieces: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: str, offset: int, count: int) -> bytes:
        step = self._piece_bytes
        if not step or not count:
            return self._range(file, offset, offset + count)
        first = offset // step
        raw = b"".join(self._piece(file, number) for number in range(first, (offset + count - 1) // step + 1))
        return raw[offset - first * step :][:count]

    def size(self, file: str) -> int:
        return int(self._system.size(f"{self._root}/{file}"))

    def _piece(self, file: str, number: int) -> bytes:
        with self._lock:
            if (file, number) in self._pieces:
                self._pieces.move_to_end((file, number))
                return self._pieces[file, number]
        raw = self._range(file, number * self._piece_bytes, (number + 1) * self._piece_bytes)
        with self._lock:
            self._pieces[file, number] = raw
            while len(self._pieces) > _PIECES:
                self._pieces.popitem(last=False)
        return raw

    def _range(self, file: str, start: int, end: int) -> bytes:
        return bytes(self._system.cat_file(f"{self._root}/{file}", start=start, end=end)) if end > start else b""
