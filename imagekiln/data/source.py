"""Pictures in one uint8 array, read by index: the `Source` behind every data set.

Shapes: N pictures, B of them, C channels, H rows, W columns.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from imagekiln.core import Batch, Source
from imagekiln.data.buckets import Buckets

NOTHING_HELD_OUT = "No pictures are held out: validation uses the training pictures."

_IN_MEMORY_BYTES = 2**30
_COLOURS = {1: "grey", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Table:
    """Everything known about a set's pictures, one entry a picture in every field but `images_NCHW`.

    images_NCHW: uint8, mapped from disk or in memory. labels: int64, `UNLABELLED` (-1) where unknown; without
    class names nothing is labelled. digests: see `digest`. captions: None where the set has none. places: int64, where
    each picture lies in `images_NCHW`; None where that has the pictures of the set and no others, in order. buckets:
    the same pictures in their own shapes, at the same places, where these are wanted.
    """

    images_NCHW: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    digests: Sequence[str]
    files: Sequence[str]
    captions: Sequence[str | None] | None = None
    places: np.ndarray | None = None
    buckets: Buckets | None = None

    @cached_property
    def pixels_NCHW(self) -> np.ndarray:
        """What pictures are read from: in memory from the first reading on, where they fit there."""
        mapped = isinstance(self.images_NCHW, np.memmap)
        fits = self.images_NCHW.nbytes <= _IN_MEMORY_BYTES
        return np.array(self.images_NCHW) if mapped and fits else self.images_NCHW


class MemmapSource:
    """Some rows of a table of pictures, in order: the `Source` that training and validation read from.

    shapes_N2: height and width of each picture where pictures are read in their own shapes (`shaped`), of which a batch
    has to have one; None where all are of `image_shape`.
    """

    shapes_N2: np.ndarray | None = None
    _buckets: Buckets | None = None

    def __init__(self, table: Table, rows: np.ndarray) -> None:
        _, channels, height, width = table.images_NCHW.shape
        self.image_shape = (channels, height, width)
        self.class_names = table.class_names
        self.num_classes = len(table.class_names)
        self.files: Sequence[str] = [table.files[row] for row in rows]
        told = table.captions
        self.captions: Sequence[str] | None = [told[row] or "" for row in rows] if told is not None else None
        self._table, self._places = table, rows if table.places is None else table.places[rows]
        self.labels_N = torch.from_numpy(table.labels[rows]) if table.class_names else None
        self.fingerprint = _fingerprint(table, rows)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, indices: Sequence[int]) -> Batch:
        """The pictures at these indices: images_BCHW uint8, labels_B int64 or None where nothing is labelled."""
        chosen = np.asarray(indices, np.int64)
        places = self._places[chosen]
        images_BCHW = self._table.pixels_NCHW[places] if self._buckets is None else self._buckets.read(places)
        return Batch(
            torch.from_numpy(images_BCHW), None if self.labels_N is None else self.labels_N[torch.from_numpy(chosen)]
        )

    def shaped(self) -> MemmapSource:
        """The same pictures in their own shapes; as they are where these were not kept."""
        if (buckets := self._table.buckets) is None:
            return self
        shaped = copy.copy(self)
        shaped._buckets, shaped.shapes_N2 = buckets, buckets.shapes_N2[self._places]
        shaped.fingerprint = hashlib.blake2b(f"shaped:{self.fingerprint}".encode(), digest_size=16).hexdigest()
        return shaped


class Pictures(Source, Protocol):
    """A `Source` that knows its files, captions and labels, one a picture, without reading pixels.

    captions: None where the set has none. labels_N: int64, `UNLABELLED` (-1) where unknown; None without classes.
    """

    files: Sequence[str]
    captions: Sequence[str] | None
    labels_N: torch.Tensor | None


@dataclass(frozen=True)
class Dataset:
    """A set of pictures, ready to train on.

    notices: what was decided on the user's behalf, in plain sentences.
    left_out: (file, reason) of everything that could not be used; the names are safe to print.
    test: pictures that neither training nor validation sees; None where none were set aside.
    """

    name: str
    train: Pictures
    validation: Pictures
    notices: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    test: Pictures | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of pixels, labels and order of both sides."""
        both = self.train.fingerprint + self.validation.fingerprint
        return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()

    def summary(self) -> str:
        """One line for a person.

        For example: `1,797 pictures, 8x8 grey, 10 classes: 1,617 to train on, 180 held out.`
        """
        channels, height, width = self.train.image_shape
        shared = self.train is self.validation
        tested = len(self.test) if self.test is not None else 0
        total = len(self.train) + (0 if shared else len(self.validation)) + tested
        parts = [f"{total:,} pictures", f"{height}x{width} {_COLOURS[channels]}"]
        parts += [f"{self.train.num_classes} classes"] if self.train.num_classes else []
        parts += ["captions"] if self.train.captions is not None else []
        held = f"{'none' if shared else f'{len(self.validation):,}'} held out"
        held += f", {tested:,} set aside for a test" if tested else ""
        line = f"{', '.join(parts)}: {len(self.train):,} to train on, {held}."
        return f"{line} {len(self.left_out):,} files were left out." if self.left_out else line


def _fingerprint(table: Table, rows: np.ndarray) -> str:
    """Hash over pixels (by their digests), labels, captions and order."""
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update("\x1f".join(table.class_names).encode("utf-8", "surrogatepass"))
    for row in rows:
        caption = (table.captions[row] or "") if table.captions is not None else ""
        line = f"{table.digests[row]}:{table.labels[row]}:{caption}\0"
        if table.buckets is not None:
            place = row if table.places is None else table.places[row]
            line += "x".join(map(str, table.buckets.shapes_N2[place].tolist()))
        hasher.update(line.encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def digest(pixels: np.ndarray) -> str:
    """Content hash of one picture's pixels, shape included: 32 hex digits."""
    head = "x".join(map(str, pixels.shape)).encode()
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16, key=head).hexdigest()


def split(digests: Sequence[str], fraction: float) -> np.ndarray:
    """Which pictures are held out: bool, one for each digest, a function of the content alone.

    Equal pictures fall on one side, and a picture never changes sides when others come or go; unless a side would be
    empty: then the one distinct picture that is nearest to the border changes sides.

    >>> split(["00" * 16, "ff" * 16, "00" * 16], 0.5).tolist()
    [True, False, True]
    """
    place = np.array([int(text[:13], 16) for text in digests], np.float64) / 16**13
    held_out = place < fraction
    if fraction > 0 and len(set(digests)) > 1:
        if not held_out.any():
            held_out = place == place.min()
        elif held_out.all():
            held_out = place < place.max()
    return held_out


def dataset(
    name: str,
    table: Table,
    held_out: np.ndarray,
    notices: list[str],
    left_out: list[tuple[str, str]],
    test: np.ndarray | None = None,
) -> Dataset:
    """Two sources over one table, or three with the rows of `test`.

    An empty side of training and validation borrows the other one's pictures, and a notice says so.
    """
    test = np.zeros_like(held_out) if test is None else test
    train_rows, validation_rows, test_rows = map(np.flatnonzero, (~held_out & ~test, held_out & ~test, test))
    aside = MemmapSource(table, test_rows) if len(test_rows) else None
    if len(validation_rows) and len(train_rows):
        train, validation = MemmapSource(table, train_rows), MemmapSource(table, validation_rows)
        return Dataset(name, train, validation, notices, left_out, aside)
    both = MemmapSource(table, np.flatnonzero(~test))
    notices = [*notices, NOTHING_HELD_OUT]
    return Dataset(name, both, both, notices, left_out, aside)
