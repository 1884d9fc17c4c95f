"""What one look at every file told: the table that the checks of `imagekiln.data.checks` read and never change.

Every file is decoded once. What is needed later is measured on the way and kept here, one entry a file; pixels at the
size of the set go to disk beside it. A survey is saved with the prepared set, so that a second look only opens files
that are new or have changed (`Entry`: size and time).

Shapes: N files, T = `THUMB` rows and columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from imagekiln.data.files import Entry
from imagekiln.errors import DataError

THUMB = 32
"""Side of the small RGB copy of a whole picture (not cropped, aspect not kept) that duplicates are verified on."""

MEASURES = np.dtype(
    [
        ("height", np.int32),  # of the upright picture, in pixels of the file
        ("width", np.int32),
        ("brightness", np.float32),  # mean luma, 0..1
        ("contrast", np.float32),  # standard deviation of luma, 0..1
        ("entropy", np.float32),  # of the luma histogram, bits, 0..8
        ("sharpness", np.float32),  # see `measures`
        ("hash", np.uint64),  # perceptual hash of the whole picture
        ("mirrored", np.uint64),  # of the picture mirrored left to right
    ]
)
"""What is measured of one picture; zeros where the file cannot be used."""


@lru_cache(maxsize=1024)
def _notes(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(words)


def _word(value: str | None) -> str | None:
    """Labels, reasons and sides are a few, each in thousands of rows: equal ones are kept once."""
    return None if value is None else sys.intern(value)


_COLUMNS: Mapping[str, Callable[[Any], Any]] = {
    "file_name": str,
    "entry": lambda pair: Entry(*pair),
    "label": _word,
    "text": lambda text: text,
    "split": _word,
    "reason": _word,
    "digest": str,
    "notes": lambda words: _notes(tuple(words)),
    "place": int,
}
"""How every field of a row is read back."""


@dataclass
class Survey:
    """One entry a file in every field, in the order of the names.

    labels and texts: None where nobody gave one. reasons: why a file cannot be used, "" where it can.
    digests: content hash of the pixels at the set's size, "" where there are none. measured: (N,) of `MEASURES`.
    thumbs: (N, T, T, 3) uint8, in memory or mapped from disk. notes: per file, what was noticed while reading: those
    of `decode.Opened`, and "alpha" (some pixels are not opaque) and "grey" (all are). entries: what each file was
    like when it was read. places: int64, where its pixels lie in the set's array; -1 where there are none.
    splits: the side a source says a picture belongs on, "" where it says nothing.
    """

    names: list[str]
    labels: list[str | None]
    texts: list[str | None]
    reasons: list[str]
    digests: list[str]
    measured: np.ndarray
    thumbs: np.ndarray
    notes: list[frozenset[str]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    splits: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def usable(self) -> np.ndarray:
        """Indices of the files that can be used: int64."""
        return np.flatnonzero([not reason for reason in self.reasons])

    def save(self, folder: Path) -> None:
        """Write `files.jsonl` and `measured.npy` into a folder that holds `thumbs.npy` already."""
        np.save(folder / "measured.npy", self.measured, allow_pickle=False)
        with (folder / "files.jsonl").open("w", encoding="utf-8") as stream:
            for index, name in enumerate(self.names):
                row = {
                    "file_name": name,
                    "entry": self.entries[index],
                    "label": self.labels[index],
                    "text": self.texts[index],
                    "split": self.splits[index],
                    "reason": self.reasons[index],
                    "digest": self.digests[index],
                    "notes": sorted(self.notes[index]),
                    "place": int(self.places[index]),
                }
                stream.write(json.dumps(row) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Survey:
        """What `save` wrote, thumbs mapped from disk. Raises `DataError` when it is damaged."""
        try:
            columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
            with (folder / "files.jsonl").open(encoding="utf-8", newline="\n") as stream:
                for row in map(json.loads, stream):  # 100,000 rows at once would take more memory than the columns
                    for name, column in columns.items():
                        column.append(_COLUMNS[name](row[name]))
            measured = np.load(folder / "measured.npy", allow_pickle=False)
            thumbs = np.load(folder / "thumbs.npy", mmap_mode="r", allow_pickle=False)
            survey = cls(
                names=columns["file_name"],
                labels=columns["label"],
                texts=columns["text"],
                reasons=columns["reason"],
                digests=columns["digest"],
                measured=measured,
                thumbs=thumbs,
                notes=columns["notes"],
                entries=columns["entry"],
                places=np.array(columns["place"], np.int64),
                splits=columns["split"],
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(f"The survey {folder} is damaged ({error}). Prepare the set again.") from None
        if not len(survey) == len(measured) == len(thumbs) or measured.dtype != MEASURES:
            raise DataError(f"The survey {folder} does not fit together. Prepare the set again.")
        return survey
