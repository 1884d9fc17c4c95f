"""Captions and labels that lie beside pictures: `metadata.csv`, `metadata.jsonl` and `.txt` files, in any script.

Text is UTF-8, or UTF-16 and UTF-32 that say so by their mark. Anything else stops with a preview in the encodings it
may be and is read in the one that the user names: a guess among old encodings gives plausible nonsense, not an error.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from imagekiln.data.captions import MAX_CAPTION, shorten
from imagekiln.data.files import Files, escapes, normal, printable
from imagekiln.data.found import Found, Picture, as_label, as_text, listed
from imagekiln.errors import DataError, UsageError, did_you_mean

_MAX_METADATA_BYTES = 512 * 2**20
_TABLES = ("metadata.csv", "metadata.jsonl")
_MARKS = (  # the longer marks first: the one of UTF-32 begins like the one of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_PROPOSED = ("gb18030", "big5", "shift_jis", "cp1252")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what JSON may hold and no encoder of text takes
_PREVIEW = 20  # characters
_PREVIEW_BYTES = 2**16


# --- text ------------------------------------------------------------------------------------------------------------


def known_encoding(name: str) -> str:
    """The name of an encoding of text as Python writes it. Raises `UsageError` for what is none.

    >>> known_encoding("GB18030")
    'gb18030'
    """
    try:
        found = codecs.lookup(name)
        codecs.getincrementaldecoder(found.name)
        with suppress(UnicodeDecodeError):  # one byte is no text in UTF-16
            b"a".decode(found.name)  # refuses what is a codec but none of text, such as hex
        return found.name
    except (LookupError, ValueError):
        hint = did_you_mean(name, ("utf-8", *_PROPOSED, "cp1251", "euc_kr", "euc_jp", "latin-1"))
        raise UsageError(f"--caption-encoding {printable(name)} is no encoding of text. {hint}") from None


def decoded(raw: bytes, where: str, encoding: str = "utf-8", whole: bool = True) -> str:
    """Bytes as text: UTF-8 or what their mark says, else in the given encoding.

    where: what the bytes are, for messages. whole: False where they were cut and may end inside a character.
    Raises `DataError` with previews where they are neither.
    """
    marked = next((name for mark, name in _MARKS if raw.startswith(mark)), None)
    try:
        return codecs.getincrementaldecoder(marked or "utf-8")().decode(raw, final=whole)
    except UnicodeError as error:
        byte = getattr(error, "start", 0)
    if marked not in (None, "utf-8-sig"):
        raise DataError(f"{where} begins as {marked} and is damaged at byte {byte:,}. Save it as UTF-8.")
    if encoding != "utf-8":
        try:
            return codecs.getincrementaldecoder(encoding)().decode(raw, final=whole)
        except UnicodeError as error:
            byte = getattr(error, "start", 0)
            raise DataError(f"{where} is neither UTF-8 nor {encoding} (byte {byte:,}).{_previews(raw)}") from None
    raise DataError(f"{where} is not UTF-8 (byte {byte:,}).{_previews(raw)}")


def _previews(raw: bytes) -> str:
    """How the first words beyond ASCII read in the encodings they may be, and what to do."""
    start = next((number for number, byte in enumerate(raw) if byte >= 0x80), 0)
    raw = raw[start : start + _PREVIEW_BYTES]
    shown = []
    for name in _PROPOSED:
        try:
            text = codecs.getincrementaldecoder(name)().decode(raw, final=False)
        except UnicodeError:
            continue
        shown.append((name, printable(text.split("\n", 1)[0].strip()[:_PREVIEW])))
    if not shown:
        return " Save it as UTF-8."
    read = "; ".join(f"{name} reads {text!r}" for name, text in shown)
    return (
        f" Of the other encodings, {read}. Add --caption-encoding {shown[0][0]}, if that is right, or save it as UTF-8."
    )


def cleaned(text: str | None) -> str | None:
    """A caption without NUL, halves of surrogate pairs and outer space, cut between words to `MAX_CAPTION` characters;
    None if nothing is left."""
    return shorten(_NO_TEXT.sub("", text or "").strip()) or None


def with_tags(text: str | None, tags: str | None) -> str | None:
    """A caption with its tags after it, commas between them; one that the caption or an earlier tag is goes.

    tags: with | or commas between them.

    >>> with_tags("a cat", "cat|pet|A cat|pet")
    'a cat, cat, pet'
    """
    told = {} if text is None or not text.strip() else {text.strip().casefold(): text.strip()}
    for tag in (tags or "").replace("|", ",").split(","):
        if tag.strip():
            told.setdefault(tag.strip().casefold(), tag.strip())
    return ", ".join(told.values()) or None


# --- what lies beside the pictures -----------------------------------------------------------------------------------


def describe(found: Found, encoding: str = "utf-8") -> None:
    """Give the pictures of `found` the labels and captions that lie beside them.

    A table speaks for the pictures in its folder and below; of two the inner one counts, and pictures without a row are
    left out. Where a table has no label column, labels stay; where it has no text column, captions come from `.txt`
    files of the same name. Raises `DataError` for what cannot be understood.
    """
    tables = _find_tables(found.files)
    pictures = {picture.name: picture for picture in found.pictures}
    by_normal = {normal(name): name for name in reversed(pictures) if not name.isascii()}
    rows: dict[str, Picture] = {}
    captioned: set[str] = set()
    for file in tables:
        _read_table(found, file, pictures, by_normal, rows, captioned, encoding)
    nearest = {str(PurePosixPath(file).parent): file for file in tables}
    kept = []
    for name, picture in pictures.items():
        table = next((nearest[str(up)] for up in PurePosixPath(name).parents if str(up) in nearest), None)
        if table is not None and name not in rows:
            found.left_out.append((name, f"no row in {table}"))
        else:
            kept.append(rows.get(name, picture))
    if tables and not kept:
        where = printable(str(found.files.where))
        raise DataError(
            f"No row of {printable(tables[0])} in {where} names a picture that is there; file_name is relative "
            "to the folder the metadata lies in."
        )
    found.pictures = kept
    _add_captions(found, captioned, encoding)


def _find_tables(files: Files) -> list[str]:
    """Metadata files, those in outer folders first. Raises `DataError` for two in one folder."""
    tables = [name for name in files.entries if posixpath.basename(name) in _TABLES]
    counts = Counter(str(PurePosixPath(name).parent) for name in tables)
    twice = next((folder for folder, count in counts.items() if count > 1), None)
    if twice is not None:
        where = printable(str(files.where)) + ("" if twice == "." else f", {printable(twice)}")
        raise DataError(f"{where} holds both {' and '.join(_TABLES)}. Keep one of them.")
    return sorted(tables, key=lambda name: (name.count("/"), name))


def _read_table(
    found: Found,
    file: str,
    pictures: dict[str, Picture],
    by_normal: dict[str, str],
    rows: dict[str, Picture],
    captioned: set[str],
    encoding: str,
) -> None:
    """Put the rows of one table into `rows`, and the names it has a text column for into `captioned`."""
    num_missing = num_long = num_repeated = 0
    folder, mentioned = PurePosixPath(file).parent, set()
    for place, row in _rows(found.files, file, encoding):
        name = str(folder / _file_name(row, place))
        name = name if name in pictures else by_normal.get(normal(name), name)
        if name not in pictures:
            num_missing += 1
            continue
        num_repeated += name in mentioned
        mentioned.add(name)
        picture = rows.get(name, pictures[name])
        if "label" in row:
            picture = replace(picture, label=as_label(row["label"], place))
        if any(column in row for column in ("text", "caption", "tags")):
            text = as_text(row.get("text", row.get("caption")), place)
            text = with_tags(text, as_text(row.get("tags"), place))
            num_long += len(text or "") > MAX_CAPTION
            picture = replace(picture, text=cleaned(text))
            captioned.add(name)
        rows[name] = picture
    shown = printable(file)
    if num_missing:
        found.notices.append(f"{num_missing:,} rows of {shown} name no picture that is there.")
    if num_repeated:
        found.notices.append(
            f"{num_repeated:,} rows of {shown} name a picture for the second time; the last row counts."
        )
    if num_long:
        found.notices.append(f"{num_long:,} captions were cut to {MAX_CAPTION:,} characters.")


def _file_name(row: dict[str, object], place: str) -> PurePosixPath:
    name = row.get("file_name")
    if not isinstance(name, str):
        raise DataError(f"{place}: there is no file_name. Columns found: {listed(row, 20) or 'none'}.")
    if escapes(name):
        raise DataError(f"{place}: file_name {printable(name)!r} leaves the folder.")
    return PurePosixPath(name.replace("\\", "/"))


def _rows(files: Files, file: str, encoding: str) -> Iterator[tuple[str, dict[str, object]]]:
    """(place, row) of a metadata file; the place is the file and the line, for error messages."""
    where = f"{printable(str(files.where))}, {printable(file)}"
    if files.entries[file].num_bytes > _MAX_METADATA_BYTES:
        raise DataError(f"{where} is larger than {_MAX_METADATA_BYTES // 2**20} MB.")
    text = decoded(files.read(file, _MAX_METADATA_BYTES), where, encoding)
    if file.endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{where} line {number}", json_object(line, f"{where} line {number}")
        return
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t|", key=header.count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        columns = [str(column).strip() for column in table.fieldnames or []]
        if "file_name" not in columns:
            raise DataError(f"{where} has no column file_name. Columns found: {listed(columns, 20) or 'none'}.")
        table.fieldnames = columns
        for row in table:
            if why := surplus(row, delimiter):
                raise DataError(f"{where} line {table.line_num} {why}")
            yield f"{where} line {table.line_num}", {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise DataError(f"{where} line {table.line_num} cannot be read as CSV: {printable(str(error))}.") from None


def surplus(row: Mapping[Any, Any], delimiter: str) -> str:
    """What is wrong with a row of `csv.DictReader` that has more values than there are columns; "" where nothing is.

    >>> surplus({"file_name": "a.png", "text": "a cat", None: [""]}, ",")
    ''
    """
    if not any(value.strip() for value in row.get(None) or ()):
        return ""
    return f"has more values than there are columns. Put a text that holds {delimiter!r} between double quotes."


def json_object(text: str, place: str) -> dict[str, object]:
    """The object that a JSON text is. Raises `DataError` for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{place} is not JSON.") from None
    if not isinstance(value, dict):
        raise DataError(f'{place}: expected an object such as {{"file_name": "a.png"}}.')
    return value


def caption(files: Files, name: str, encoding: str = "utf-8") -> tuple[str | None, bool]:
    """The text of a `.txt` file, and whether it was cut to `MAX_CAPTION` characters."""
    raw = files.read(name, 4 * MAX_CAPTION + 4)
    whole = files.entries[name].num_bytes <= len(raw)
    where = f"The caption {printable(name)} in {printable(str(files.where))}"
    text = decoded(raw, where, encoding, whole)
    return cleaned(text), not whole or len(text) > MAX_CAPTION


def mention_cut_captions(found: Found, names: Sequence[str]) -> None:
    """Say which captions were too long."""
    if names:
        which = f"The caption {printable(names[0])} was" if len(names) == 1 else f"{len(names):,} captions were"
        found.notices.append(f"{which} cut to {MAX_CAPTION:,} characters.")


def _add_captions(found: Found, captioned: set[str], encoding: str) -> None:
    """Captions from the `.txt` files of the same names, for the pictures that no table speaks of."""
    texts = {normal(name): name for name in found.files.entries if name.endswith(".txt")}
    cut: list[str] = []
    pictures = []
    for picture in found.pictures:
        exact = posixpath.splitext(picture.name)[0] + ".txt"
        file = exact if exact in found.files.entries else texts.get(normal(exact))
        if file is not None and picture.name not in captioned:
            text, was_cut = caption(found.files, file, encoding)
            cut += [file] * was_cut
            picture = replace(picture, text=text)
        pictures.append(picture)
    found.pictures = pictures
    mention_cut_captions(found, cut)
