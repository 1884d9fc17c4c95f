"""What one look at every file told: the table that the checks of `imagekiln.data.checks` read and never change.

Every file is decoded once. What is needed later is measured on the way and kept here, one entry a file; pixels at the
size of the set go to disk beside it. A survey is saved with the prepared set, so that a second look only opens files
that are new or have changed (`Entry`: size and time).

Shapes: N files, T = `THUMB` rows and columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

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
            lines = (folder / "files.jsonl").read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
            measured = np.load(folder / "measured.npy", allow_pickle=False)
            thumbs = np.load(folder / "thumbs.npy", mmap_mode="r", allow_pickle=False)
            survey = cls(
                names=[row["file_name"] for row in rows],
                labels=[row["label"] for row in rows],
                texts=[row["text"] for row in rows],
                reasons=[row["reason"] for row in rows],
                digests=[row["digest"] for row in rows],
                measured=measured,
                thumbs=thumbs,
                notes=[frozenset(row["notes"]) for row in rows],
                entries=[Entry(*row["entry"]) for row in rows],
                places=np.array([row["place"] for row in rows], np.int64),
                splits=[row["split"] for row in rows],
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(f"The survey {folder} is damaged ({error}). Prepare the set again.") from None
        if not len(rows) == len(measured) == len(thumbs) or measured.dtype != MEASURES:
            raise DataError(f"The survey {folder} does not fit together. Prepare the set again.")
        return survey
