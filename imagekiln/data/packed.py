"""A packed folder: pictures of one size in one uint8 array, with everything that is known about them in text files.

`images.npy` (M, C, H, W) uint8, `metadata.jsonl` (one row a picture of the set, in order), `prepare.json` (shape,
classes, notices) and `left_out.csv` (file, reason, value). `row` in the metadata is the picture's place in the array,
which may hold more pictures than the set; without it the n-th row is the n-th picture. Where proportions are kept there
is also `buckets.npy` (M, C, 1, P) uint8, the same pictures in their own shapes (`imagekiln.data.buckets`), which rows
tell as `shape`. A folder is complete or absent.

Shapes: N pictures of the set, M of the array, C channels, H rows, W columns, P = H W.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from imagekiln import signals
from imagekiln.config import DataConfig
from imagekiln.core import UNLABELLED
from imagekiln.data.buckets import Buckets
from imagekiln.data.files import printable
from imagekiln.data.scan import Picture
from imagekiln.data.source import Dataset, Table, dataset, split
from imagekiln.errors import DataError

VERSION = 2
FILES = ("images.npy", "metadata.jsonl", "prepare.json")
BUCKETS = "buckets.npy"
_HELD_OUT = DataConfig().validation_fraction
_FORMULA = ("=", "+", "-", "@")
_GUARDED = tuple(f"'{sign}" for sign in _FORMULA)


class Wanted(Protocol):
    """What is asked of a packed folder: fields of `DataConfig`."""

    @property
    def size(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def validation_fraction(self) -> float: ...

    @property
    def buckets(self) -> bool: ...


def is_packed(path: Path) -> bool:
    """Whether a path is a packed folder."""
    return all(os.path.isfile(path / file) for file in FILES)


def open_packed(folder: Path, wanted: Wanted) -> Dataset:
    """Open a packed folder, the user's or the cache's. Raises `DataError` when it is damaged or of another shape."""
    about, rows, images_NCHW = read_packed(folder)
    channels, height, width = images_NCHW.shape[1:]
    if (wanted.size and (height, width) != (wanted.size, wanted.size)) or wanted.channels not in (0, channels):
        raise DataError(
            f"{folder} was prepared as {height}x{width} with {channels} channels; the recipe asks for "
            f"data.size={wanted.size}, data.channels={wanted.channels}. Prepare it again or leave both at 0."
        )
    table = Table(
        images_NCHW,
        np.array([int(row.get("label", UNLABELLED)) for row in rows], np.int64),
        tuple(map(str, about["class_names"])),
        [row["digest"] for row in rows],
        [row["file_name"] for row in rows],
        [row.get("text") for row in rows] if any("text" in row for row in rows) else None,
        np.array([row.get("row", index) for index, row in enumerate(rows)], np.int64),
        _buckets(folder, rows, images_NCHW.shape) if wanted.buckets else None,
    )
    notices, left_out = [str(notice) for notice in about.get("notices", [])], read_left_out(folder)
    if wanted.buckets and (kept := shapes_kept(rows)) not in notices:
        notices.append(kept)
    name = str(about.get("name", folder.name))
    if not all("split" in row for row in rows):
        return dataset(name, table, split(table.digests, wanted.validation_fraction), notices, left_out)
    held_out = about.get("settings", {}).get("validation_fraction", _HELD_OUT)
    if wanted.validation_fraction not in (held_out, _HELD_OUT):
        notices.append(
            f"The set says itself what is held out, so data.validation_fraction={wanted.validation_fraction:g} does "
            "not count."
        )
    sides = np.array([row["split"] for row in rows])
    return dataset(name, table, sides == "validation", notices, left_out, test=sides == "test")


def _buckets(folder: Path, rows: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> Buckets:
    """The pictures in their own shapes. Raises `DataError` when they were not kept, or are damaged."""
    if not os.path.isfile(folder / BUCKETS):
        raise DataError(
            f"{folder} was prepared in squares, and the recipe asks for data.buckets. Prepare it again with --buckets."
        )
    total, channels, height, width = shape
    shapes_N2 = np.ones((total, 2), np.int64)
    try:
        flat_NC1P = np.load(folder / BUCKETS, mmap_mode="r", allow_pickle=False)
        for index, row in enumerate(rows):
            shapes_N2[row.get("row", index)] = row["shape"]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"The prepared set {folder} is damaged ({error}). Prepare it again.") from None
    sound = flat_NC1P.dtype == np.uint8 and flat_NC1P.shape == (total, channels, 1, height * width)
    if not sound or shapes_N2.min() < 1 or shapes_N2.prod(1).max() > height * width:
        raise DataError(f"The prepared set {folder} does not fit together. Prepare it again.")
    return Buckets(flat_NC1P, shapes_N2)


def shapes_kept(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence about the shapes of pictures.

    >>> shapes_kept([{"shape": (64, 64)}, {"shape": (80, 48)}, {"shape": (64, 64)}])
    'Pictures keep their shapes: 64x64 (2), 80x48 (1).'
    """
    counts = Counter("x".join(map(str, row["shape"])) for row in rows).most_common()
    return f"Pictures keep their shapes: {', '.join(f'{shape} ({count:,})' for shape, count in counts)}."


def read_about(folder: Path) -> dict[str, Any]:
    """`prepare.json` alone, which is small however many pictures there are. Raises `DataError` when it is damaged."""
    try:
        about: dict[str, Any] = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"The prepared set {folder} is damaged ({error}). Prepare it again.") from None
    return about


def read_packed(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], np.ndarray]:
    """(prepare.json, rows of metadata.jsonl, images_NCHW mapped from disk). Raises `DataError` when it is damaged."""
    try:
        about = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))
        rows = _rows(folder / "metadata.jsonl")
        images_NCHW = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        version, num_classes = int(about["version"]), len(tuple(map(str, about["class_names"])))
        labels = [int(row.get("label", UNLABELLED)) for row in rows]
        places = [int(row.get("row", index)) for index, row in enumerate(rows)]
        sound = all(len(str(row["digest"])) == 32 and int(str(row["digest"]), 16) >= 0 for row in rows)
        sound &= all(isinstance(row["file_name"], str) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise DataError(f"The prepared set {folder} is damaged ({error}). Prepare it again.") from None
    if version > VERSION:
        raise DataError(f"{folder} was prepared by a newer version of imagekiln. Update imagekiln.")
    sound &= images_NCHW.dtype == np.uint8 and images_NCHW.ndim == 4 and images_NCHW.shape[1] in (1, 3, 4)
    sound &= bool(rows) and min(labels) >= UNLABELLED and max(labels) < num_classes
    sound &= len(set(places)) == len(rows) > 0 and min(places) >= 0 and max(places) < len(images_NCHW)
    sound &= len(rows) == len(images_NCHW) or "row" in (*rows, {})[0]
    if not sound:
        raise DataError(f"The prepared set {folder} does not fit together. Prepare it again.")
    return about, rows, images_NCHW


def _rows(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; keys are kept once, or those of 100,000 rows would take more memory than all values."""
    with path.open(encoding="utf-8", newline="\n") as stream:
        found = (json.loads(line) for line in stream if line.strip())
        return [{sys.intern(key): value for key, value in row.items()} for row in found]


def read_left_out(folder: Path) -> list[tuple[str, str]]:
    """(file, reason) of everything that is not in the set."""
    path = folder / "left_out.csv"
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [(row["file"], row["reason"]) for row in csv.DictReader(stream)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DataError(f"The prepared set {folder} is damaged (left_out.csv: {error}). Prepare it again.") from None
    return [(name[1:] if name.startswith(_GUARDED) else name, reason) for name, reason in rows]


def row_of(picture: Picture, content: str, class_names: Sequence[str]) -> dict[str, Any]:
    """A picture's line in `metadata.jsonl`."""
    row: dict[str, Any] = {"file_name": picture.name, "digest": content}
    if picture.label is not None:
        row["label"] = class_names.index(picture.label)
    if picture.text is not None:
        row["text"] = picture.text
    return row


def write_texts(
    folder: Path, about: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], left_out: Sequence[tuple[str, ...]]
) -> None:
    """Everything of a packed folder but its pixels; left_out: (file, reason) or (file, reason, measured value)."""
    write_rows(folder / "metadata.jsonl", rows)
    text = json.dumps({"version": VERSION, **about}, indent=1)
    (folder / "prepare.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "left_out.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("file", "reason", "value"))
        table.writerows((cell(printable(name)), *rest, *[""] * (2 - len(rest))) for name, *rest in sorted(left_out))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def write_aside(folder: Path, write: Callable[[Path], None], replace: bool = False) -> None:
    """Fill a folder that is complete or absent at any time: written beside its place, synced, renamed.

    replace: put it in the place of the folder that is there, which is removed when the new one stands.
    """
    aside, old = (folder.parent / f".{folder.name}.{os.getpid()}{end}" for end in ("", ".old"))
    try:
        aside.mkdir(parents=True, exist_ok=True)
        write(aside)
        for file in aside.rglob("*"):
            _sync(file)
        with signals.deferred():  # between the two renames there is no folder of that name
            _put_in_place(aside, folder, old if replace else None)
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)
    signals.raise_if_pending()


def _put_in_place(aside: Path, folder: Path, old: Path | None) -> None:
    """Rename a finished folder; old: where the one that is there goes."""
    if old:
        folder.rename(old)
    try:
        aside.rename(folder)
    except OSError:
        if old:
            old.rename(folder)
            raise
        if not (folder / FILES[0]).is_file():  # else another process was faster, with the same pictures
            raise


def cell(text: str) -> str:
    """A CSV cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _sync(path: Path) -> None:
    """Make sure a file or a folder's list of names is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
