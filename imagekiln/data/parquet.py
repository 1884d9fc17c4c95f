"""Parquet files with a column of pictures, as Hugging Face keeps data sets: rows of bytes, labels and captions.

The picture column is a struct of `bytes` and `path`, or plain bytes; labels are numbers or names, and the names of
numbers come from the schema metadata `huggingface` (its `ClassLabel`). Reading needs pyarrow. Names, labels and
captions are read at once, pictures one row group at a time into a temporary file that is bounded. Memory holds a few
pages of the file, each as long as its writer made it (1,024 rows with pyarrow's settings).
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from imagekiln.data.archives import HARMLESS_BYTES, MAX_MEMBER_BYTES, MAX_RATIO, Spool, read_member
from imagekiln.data.decode import Unusable
from imagekiln.data.files import Entry, Files, JoinedFiles, escapes, is_ignored, normal, printable, short_names
from imagekiln.data.found import Found, Picture, as_label, as_text, listed
from imagekiln.data.metadata import MAX_CAPTION, cleaned, mention_cut_captions
from imagekiln.data.webdataset import splits_of
from imagekiln.errors import DataError, ImagekilnError, UsageError

_PICTURE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
_TEXT_COLUMNS = ("text", "caption", "captions", "prompt")
_KEPT_BYTES = 4 * 2**30  # on disk, of all files of a set together
_KEPT_GROUPS = 64
_BATCH = 16  # rows that are in memory at once while a row group is read


@dataclass(frozen=True)
class Columns:
    """Which columns of a parquet file say what, and the names of its classes where labels are numbers."""

    picture: str
    is_struct: bool
    has_path: bool
    label: str | None
    text: str | None
    classes: tuple[str, ...] | None


class Group(NamedTuple):
    """The pictures of a row group, or of any file of several: where each lies in the spool, or why it is not there."""

    spool: Spool
    places: list[tuple[int, int] | str]


class Shelf:
    """Row groups whose pictures lie in temporary files, ready for any order; the oldest make room for new ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, int], Group] = OrderedDict()

    def get(self, key: tuple[Path, int], read: Callable[[], Group]) -> Group:
        """The group of this key, read now if it is not here."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = read()
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and (
                len(self._kept) > _KEPT_GROUPS
                or sum(group.spool.num_bytes for group in self._kept.values()) > _KEPT_BYTES
            ):
                self._kept.popitem(last=False)
            return self._kept[key]


class ParquetFiles:
    """The pictures of one parquet file, by a name for every row: the path beside the picture, else the row's number.

    rows: the names in the order of the file. labels, texts: what is said of them, in the same order.
    """

    def __init__(self, path: Path, shelf: Shelf) -> None:
        self.where = path
        self.left_out: list[tuple[str, str]] = []
        self.ignored: list[str] = []
        self.cut: list[str] = []
        self._shown, self._shelf = printable(str(path)), shelf
        try:
            with self._opened() as file:
                self.columns = _columns(file.schema_arrow, self._shown)
                groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
                self._starts = list(itertools.accumulate((group.num_rows for group in groups), initial=0))
                self._read_rows(file)
            changed = path.stat().st_mtime_ns
        except ImagekilnError:
            raise
        except PermissionError:
            raise UsageError(f"{self._shown} cannot be read: permission denied.") from None
        except Exception as error:  # pyarrow's errors are ValueError, OSError, KeyError, NotImplementedError and more
            why = printable(str(error))[:200]
            raise DataError(f"{self._shown} is not a whole parquet file ({why}). Copy or download it again.") from None
        self.entries: dict[str, Entry] = {}
        for group, start in zip(groups, self._starts, strict=False):
            mean = self._picture_bytes(group) // max(1, group.num_rows)  # the size of one is known when it is read
            self.entries |= dict.fromkeys(self.rows[start : start + group.num_rows], Entry(mean, changed))
        self._row = {name: row for row, name in enumerate(self.rows)}

    def _opened(self) -> Any:
        return _pyarrow(self._shown).ParquetFile(self.where, pre_buffer=False, buffer_size=2**20, memory_map=False)

    def _picture_bytes(self, group: Any) -> int:
        """Size of the pictures of a row group. Raises `DataError` where it is beyond reason."""
        columns = [group.column(number) for number in range(group.num_columns)]
        columns = [c for c in columns if c.path_in_schema in (self.columns.picture, f"{self.columns.picture}.bytes")]
        total = sum(column.total_uncompressed_size for column in columns)
        packed = sum(column.total_compressed_size for column in columns)
        if total > max(HARMLESS_BYTES, MAX_RATIO * packed):
            sizes = f"{packed / 2**20:,.0f} MB to {total / 2**20:,.0f} MB"
            raise DataError(f"{self._shown} would grow from {sizes}, more than is safe to read.")
        return total

    def _read_rows(self, file: Any) -> None:
        """Names, labels and captions of all rows; the pictures stay where they are."""
        columns, self.rows = self.columns, list[str]()
        self.labels: list[str | None] = []
        self.texts: list[str | None] = []
        path = [f"{columns.picture}.path"] if columns.has_path else []
        wanted = [*path, *(name for name in (columns.label, columns.text) if name is not None)]
        if not wanted:
            self.rows = [f"{row:08d}" for row in range(self._starts[-1])]
            self.labels = self.texts = [None] * len(self.rows)
            return
        taken: set[str] = set()
        for batch in file.iter_batches(batch_size=1024, columns=wanted, use_threads=False):
            read = {name: batch.column(name).to_pylist() for name in batch.schema.names}
            for number in range(batch.num_rows):
                row = len(self.rows)
                place = f"{self._shown} row {row}"
                cell = read[columns.picture][number] if columns.has_path else None
                name = _row_name(cell.get("path") if cell else None, row, taken)
                taken.add(name)
                self.rows.append(name)
                self.labels.append(self._label(read[columns.label][number], place) if columns.label else None)
                text = as_text(read[columns.text][number], place) if columns.text else None
                self.cut += [name] * (len(text or "") > MAX_CAPTION)
                self.texts.append(cleaned(text))

    def _label(self, value: object, place: str) -> str | None:
        label, classes = as_label(value, place), self.columns.classes
        if label is None or classes is None or isinstance(value, str):
            return label
        if not 0 <= int(label) < len(classes):
            raise DataError(f"{place}: label {label} is none of the {len(classes):,} classes of the file.")
        return classes[int(label)]

    def _read_group(self, number: int) -> Group:
        column = self.columns.picture
        wanted = f"{column}.bytes" if self.columns.is_struct else column
        spool, places = Spool(), list[tuple[int, int] | str]()
        with self._opened() as file:
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=[number], columns=[wanted], use_threads=False):
                for cell in batch.column(column).to_pylist():
                    content = cell.get("bytes") if isinstance(cell, dict) else cell
                    if content is None:
                        places.append("its row holds no bytes of a picture")
                    elif len(content) > MAX_MEMBER_BYTES:
                        places.append(f"larger than {MAX_MEMBER_BYTES // 2**20} MB")
                    else:
                        places.append(spool.add([content]))
        return Group(spool, places)

    def open(self, name: str) -> BinaryIO:
        row = self._row[name]
        number = bisect.bisect_right(self._starts, row) - 1
        try:
            group = self._shelf.get((self.where, number), lambda: self._read_group(number))
            place = group.places[row - self._starts[number]]
        except ImagekilnError:
            raise
        except Exception as error:
            raise Unusable("damaged in the parquet file") from error
        if isinstance(place, str):
            raise Unusable(place)
        return io.BytesIO(group.spool.read(*place))

    def read(self, name: str, limit: int) -> bytes:
        return read_member(self, name, limit)


def find_rows(where: Path, paths: Sequence[Path]) -> Found:
    """The pictures of parquet files, in the order of their rows, so that every row group is read once.

    where: what the set is called in messages. Raises `UsageError` without pyarrow, `DataError` for files that cannot be
    read or hold no pictures.
    """
    shelf, parts = Shelf(), dict[str, Files]()
    found = Found(JoinedFiles(where, {}), [])
    cut: list[str] = []
    classes = set()
    named = dict(zip(short_names([str(path) for path in paths]), paths, strict=True))
    splits = splits_of(named)
    for short, path in named.items():
        part = ParquetFiles(path, shelf)
        parts[short] = part
        prefix, split = "" if len(paths) == 1 else f"{short}/", splits[short]
        said = zip(part.rows, part.labels, part.texts, strict=True)
        found.pictures += [Picture(prefix + name, label, text, split) for name, label, text in said]
        cut += part.cut
        classes.add(part.columns.classes)
    if not found.pictures:
        raise DataError(f"{printable(str(where))} holds no rows; expected one picture a row.")
    if len(classes - {None}) > 1 or (len(classes) > 1 and None in classes):
        found.notices.append("The parquet files do not name the same classes; equal names are taken as one class.")
    found.files = next(iter(parts.values())) if len(parts) == 1 else JoinedFiles(where, parts)
    mention_cut_captions(found, cut)
    return found


def _pyarrow(shown: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{shown} is a parquet file, and reading one needs pyarrow. Install it with "
            "pip install 'imagekiln[shards]'."
        ) from None
    return pyarrow.parquet


def _columns(schema: Any, shown: str) -> Columns:
    """Which columns hold what. Raises `DataError` where none can hold pictures."""
    import pyarrow.types as types

    features = _features(schema)
    kinds = {field.name: field.type for field in schema}
    structs = {name for name, kind in kinds.items() if types.is_struct(kind) and kind.get_field_index("bytes") >= 0}
    plain = {name for name, kind in kinds.items() if types.is_binary(kind) or types.is_large_binary(kind)}
    marked = [name for name in kinds if features.get(name, {}).get("_type") == "Image"]
    known = [*marked, *(name for name in _PICTURE_COLUMNS), *sorted(structs), *(plain if len(plain) == 1 else ())]
    picture = next((name for name in known if name in structs | plain), None)
    if picture is None:
        raise DataError(
            f"{shown} has no column of pictures. Columns found: {listed(kinds, 20)}; expected bytes in a column "
            f"such as {_PICTURE_COLUMNS[0]}."
        )

    def is_label(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_integer(kind) or is_text(kind) or types.is_floating(kind)

    def is_text(kind: Any) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    named = [name for name in kinds if features.get(name, {}).get("_type") == "ClassLabel"]
    label = next((name for name in (*_LABEL_COLUMNS, *named) if name in kinds and is_label(kinds[name])), None)
    text = next(
        (
            name
            for name in _TEXT_COLUMNS
            if name in kinds
            and is_text(kinds[name].value_type if types.is_list(kinds[name]) else kinds[name])
            and name != label
        ),
        None,
    )
    names = features.get(label or "", {}).get("names")
    classes = tuple(normal(str(name).strip()) for name in names) if isinstance(names, list) else None
    has_path = picture in structs and kinds[picture].get_field_index("path") >= 0
    return Columns(picture, picture in structs, has_path, label, text, classes)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Features by column from Hugging Face's note in the schema; none where it is missing or makes no sense."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _row_name(path: object, row: int, taken: set[str]) -> str:
    """The path of a row's picture as its name, if it is one and still free; else a name with the row's number."""
    given = PurePosixPath(path.replace("\\", "/")) if isinstance(path, str) else PurePosixPath()
    if escapes(str(given)) or any(is_ignored(part) for part in given.parts):
        given = PurePosixPath(given.name.lstrip("."))
    name = str(given) if given.parts and not escapes(str(given)) else f"{row:08d}"
    while name in taken:
        name = f"{row:08d}-{PurePosixPath(name).name}"
    return name
