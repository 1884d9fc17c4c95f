"""Finds the pictures of a folder or zip in the Hugging Face "imagefolder" convention, with labels and captions.

Labels come from the `label` column of `metadata.csv` or `metadata.jsonl`, else from one level of class folders.
Captions come from its `text` column, else from a `.txt` file of the same name. Nothing is decoded here.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from imagekiln.data.files import Files, escapes, files_of, printable
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
}
MAX_CAPTION = 10_000  # characters
_MAX_METADATA_BYTES = 512 * 2**20
_METADATA = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Picture:
    """A file that claims to be a picture. `label` and `text` are None where nobody gave them."""

    name: str
    label: str | None = None
    text: str | None = None


@dataclass
class Found:
    """What a folder or zip holds."""

    files: Files
    pictures: list[Picture]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def find(path: Path) -> Found:
    """The pictures at a path, sorted by name.

    Raises `UsageError` when the path is not a folder or zip, `DataError` when it holds no pictures, when its metadata
    cannot be understood, or when a caption is not UTF-8.
    """
    files = files_of(path)
    found = Found(files, [])
    names = []
    for name in sorted(files.entries):
        extension = PurePosixPath(name).suffix.lower()
        if extension in EXTENSIONS:
            names.append(name)
        elif extension in FOREIGN:
            found.left_out.append((name, f"{FOREIGN[extension]} is not read; convert it to JPEG or PNG"))
    known = (*EXTENSIONS, *FOREIGN)
    found.left_out += [
        (name, why) for name, why in files.left_out if name.endswith("/") or name.lower().endswith(known)
    ]
    if not names and not found.left_out:
        looked = f"{printable(str(path))} and everything below it"
        raise DataError(f"No pictures in {looked}. Expected files ending in {', '.join(EXTENSIONS)}.")
    labels = _folder_labels(names, found.notices)
    found.pictures = [Picture(name, labels.get(name)) for name in names]
    metadata = [name for name in _METADATA if name in files.entries]
    if len(metadata) > 1:
        raise DataError(f"{path} holds both {' and '.join(metadata)}. Keep one of them.")
    if metadata:
        _apply_metadata(found, metadata[0])
    else:
        found.pictures = [Picture(p.name, p.label, _caption(found, p.name)) for p in found.pictures]
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


def _folder_labels(names: list[str], notices: list[str]) -> dict[str, str]:
    """Class by name: one level of at least two class folders; pictures beside those folders stay unlabelled."""
    parts = {name: PurePosixPath(name).parts for name in names}
    folders = {split[0] for split in parts.values() if len(split) > 1}
    if any(len(split) > 2 for split in parts.values()):
        notices.append("Pictures lie in folders of folders, so folder names were not taken as classes.")
        return {}
    if len(folders) < 2:
        return {}
    return {name: split[0] for name, split in parts.items() if len(split) == 2}


def _apply_metadata(found: Found, file: str) -> None:
    """Give the pictures their rows; pictures without a row are left out, rows without a picture are counted."""
    folders = {picture.name: picture.label for picture in found.pictures}
    rows: dict[str, Picture] = {}
    long_captions = missing = 0
    has_labels = False
    for place, row in _rows(found.files, file):
        name = _file_name(row, place)
        if name not in folders:
            missing += 1
            continue
        text, label = row.get("text"), row.get("label")
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: text is {text!r}; expected a string.")
        if label is not None and not isinstance(label, str | int):
            raise DataError(f"{place}: label is {label!r}; expected a whole number or a string.")
        has_labels |= "label" in row
        long_captions += len(text or "") > MAX_CAPTION
        label = str(label).strip() if label is not None else ""
        rows[name] = Picture(name, None if label in ("", "-1") else label, _cleaned(text))
    if not has_labels:
        rows = {name: Picture(name, folders[name], row.text) for name, row in rows.items()}
    if missing:
        found.notices.append(f"{missing:,} rows of {file} name no picture that is there.")
    if long_captions:
        found.notices.append(f"{long_captions:,} captions were cut to {MAX_CAPTION:,} characters.")
    found.left_out += [(name, f"no row in {file}") for name in folders if name not in rows]
    found.pictures = [rows[name] for name in sorted(rows)]
    if not rows:
        raise DataError(
            f"No row of {file} in {found.files.where} names a picture that is there; file_name is relative "
            "to the folder the metadata lies in."
        )


def _file_name(row: dict[str, object], place: str) -> str:
    name = row.get("file_name")
    if not isinstance(name, str):
        raise DataError(f"{place}: there is no file_name. Columns found: {_listed(row)}.")
    if escapes(name):
        raise DataError(f"{place}: file_name {printable(name)!r} leaves the folder.")
    return str(PurePosixPath(name.replace("\\", "/")))


def _rows(files: Files, file: str) -> Iterator[tuple[str, dict[str, object]]]:
    """(place, row) of a metadata file; the place is the file and the line, for error messages."""
    where = f"{printable(str(files.where))}, {file}"
    if files.entries[file].num_bytes > _MAX_METADATA_BYTES:
        raise DataError(f"{where} is larger than {_MAX_METADATA_BYTES // 2**20} MB.")
    text = _decoded(files.read(file, _MAX_METADATA_BYTES), where)
    if file.endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{where} line {number} is not JSON.") from None
            if not isinstance(row, dict):
                raise DataError(f'{where} line {number}: expected an object such as {{"file_name": "a.png"}}.')
            yield f"{where} line {number}", row
        return
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t|", key=header.count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    columns = [str(column).strip() for column in table.fieldnames or []]
    if "file_name" not in columns:
        raise DataError(f"{where} has no column file_name. Columns found: {_listed(columns)}.")
    table.fieldnames = columns
    try:
        for row in table:
            yield f"{where} line {table.line_num}", {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise DataError(f"{where} line {table.line_num} cannot be read as CSV: {error}.") from None


def _listed(columns: Sequence[str] | dict[str, object]) -> str:
    return ", ".join(printable(column) for column in columns) or "none"


def _caption(found: Found, picture: str) -> str | None:
    """The text of the `.txt` file of the same name, if there is one."""
    name = str(PurePosixPath(picture).with_suffix(".txt"))
    if name not in found.files.entries:
        return None
    raw = found.files.read(name, 4 * MAX_CAPTION + 4)
    if found.files.entries[name].num_bytes > len(raw):
        found.notices.append(f"The caption {printable(name)} was cut to {MAX_CAPTION:,} characters.")
    whole = found.files.entries[name].num_bytes <= len(raw)
    return _cleaned(_decoded(raw, f"The caption {printable(name)} in {printable(str(found.files.where))}", whole))


def _decoded(raw: bytes, where: str, whole: bool = True) -> str:
    """Bytes as text: UTF-8, or UTF-16 that says so. Other encodings are never guessed, because guesses look right."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return codecs.getincrementaldecoder(encoding)().decode(raw, final=whole)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None


def _cleaned(text: str | None) -> str | None:
    """A caption without NUL and outer space, cut to length; None when nothing is left."""
    return (text or "").replace("\0", "").strip()[:MAX_CAPTION] or None
