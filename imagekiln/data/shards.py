"""Prepared pictures in tar files that WebDataset reads too, and a `Source` that reads them at random.

A set of shards is a folder (or an fsspec URL) with `shard-000000.tar`, `shard-000001.tar`, ... and `index.json`. A tar
holds two members a picture, `000000000.png` (or `.jpg`, `.webp`) and `000000000.json` (file_name, digest, and label,
text, split where known), as WebDataset wants it (A. Aizman, G. Maltby, T. Breuel, High Performance I/O For Large Scale
Deep Learning, arXiv:2001.01858). Equal rows make equal bytes: owners, times and order are fixed. The index says where
in which tar every member lies, so that a picture is one read of known length and nothing is ever scanned.

Pictures may have any sizes; a `ShardSource` brings them to one.

Shapes: N pictures, B of them, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from imagekiln.config import DataConfig, Fit
from imagekiln.core import UNLABELLED, Batch
from imagekiln.data import decode, pixels
from imagekiln.data.files import printable
from imagekiln.data.packed import write_aside
from imagekiln.data.shard_index import COLUMNS, INDEX, SPLITS, VERSION, Shards, open_shards
from imagekiln.data.source import Dataset, digest, split
from imagekiln.errors import DataError, DiskError, UsageError

SHARD_BYTES = 256 * 2**20
CACHE_BYTES = 256 * 2**20

_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {"compress_level": 6}),
    "jpg": ("JPEG", {"subsampling": 0}),
    "webp": ("WEBP", {"lossless": True, "exact": True, "quality": 50, "method": 2}),
}

Format = Literal["png", "jpg", "webp"]


@dataclass(frozen=True)
class Row:
    """One prepared picture to be written.

    pixels_HWC: uint8, 1, 3 or 4 channels. file: the name it had. label: a class number, `UNLABELLED` where unknown.
    digest: its content hash; "" computes `source.digest`. split: one of `SPLITS`.
    """

    pixels_HWC: np.ndarray
    file: str
    label: int = UNLABELLED
    text: str | None = None
    digest: str = ""
    split: str = ""


# --- writing --------------------------------------------------------------------------------------------------------


def write(
    rows: Iterable[Row],
    folder: Path,
    *,
    class_names: Sequence[str] = (),
    format: Format = "png",
    quality: int = 95,
    shard_bytes: int = SHARD_BYTES,
) -> Shards:
    """Write pictures into a new folder of shards, complete or absent, and open it.

    Equal rows and settings give equal bytes (with the same version of Pillow and its libraries). Memory holds a few
    pictures and the index.

    format: png and webp lose nothing; jpg (without chroma subsampling) at this `quality` does.
    shard_bytes: a tar is closed once it has grown this large.

    Raises `UsageError` when the folder is there already or a row does not fit, `DataError` when there is no row or a
    picture is too small or too narrow, `DiskError` when the folder cannot be written.

    >>> import tempfile
    >>> rows = [Row(np.full((8, 12, 3), 9, np.uint8), "a.png"), Row(np.zeros((8, 8, 3), np.uint8), "b.png")]
    >>> with tempfile.TemporaryDirectory() as place:
    ...     source = ShardSource(write(rows, Path(place) / "set"), size=(8, 8))
    ...     source.read([0]).images.shape, int(source.read([0]).images.max()), source.files[1]
    (torch.Size([1, 3, 8, 8]), 9, 'b.png')
    """
    if format not in _ENCODERS:
        raise UsageError(f"Shards in the format {format!r} are not written; expected {', '.join(_ENCODERS)}.")
    if os.path.lexists(folder):
        raise UsageError(f"{folder} is there already. Give a new folder for the shards.")
    names = tuple(class_names)
    try:
        write_aside(folder, lambda aside: _write_all(rows, aside, names, format, quality, shard_bytes))
    except OSError as error:
        raise DiskError(f"{folder} cannot be written ({error.strerror or error}).") from None
    return open_shards(folder)


def write_dataset(dataset: Dataset, folder: Path, format: Format = "png") -> Shards:
    """Write every picture of a set into a new folder of shards, its sides marked. Raises what `write` raises."""
    return write(_rows(dataset), folder, class_names=dataset.train.class_names, format=format)


def _rows(dataset: Dataset) -> Iterator[Row]:
    sides = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    if dataset.train is dataset.validation:
        sides = {"train": dataset.train, "test": dataset.test}
    for side, source in sides.items():
        if source is None:
            continue
        for index in range(len(source)):
            images_BCHW, labels_B = source.read([index])[:2]
            yield Row(
                images_BCHW[0].permute(1, 2, 0).numpy(),
                source.files[index],
                UNLABELLED if labels_B is None else int(labels_B[0]),
                (source.captions[index] or None) if source.captions is not None else None,
                split=side,
            )


def _write_all(
    rows: Iterable[Row], folder: Path, class_names: tuple[str, ...], format: Format, quality: int, shard_bytes: int
) -> None:
    number, channels, texts, writer = 0, 0, False, None
    listed: list[str] = []  # one JSON object a shard: far smaller than the numbers in it
    pool = ThreadPoolExecutor(pixels.THREADS)
    try:
        for row, encoded in pixels.in_order(pool, lambda row: _encoded(row, format, quality), rows):
            if not UNLABELLED <= row.label < len(class_names) or row.split not in SPLITS:
                words = f"label {row.label} of {len(class_names)} classes, split {row.split!r}"
                raise UsageError(f"{printable(row.file)} has {words}: such a picture cannot be written.")
            writer = writer or _Writer(folder / f"shard-{len(listed):06d}.tar")
            writer.add(f"{number:09d}", format, row, encoded)
            number, channels, texts = number + 1, max(channels, row.pixels_HWC.shape[2]), texts or bool(row.text)
            if writer.position >= shard_bytes:
                listed, writer = [*listed, writer.close()], None
        if writer is not None:
            listed, writer = [*listed, writer.close()], None
    finally:
        pool.shutdown(cancel_futures=True)
        if writer is not None:
            writer.close()
    if not number:
        raise DataError("There are no pictures to write into shards.")
    about = {"version": VERSION, "num_pictures": number, "channels": channels, "format": format, "texts": texts}
    head = json.dumps({**about, "class_names": class_names})
    with (folder / INDEX).open("w", encoding="utf-8") as stream:
        stream.write(head[:-1] + ', "shards": [\n' + ",\n".join(listed) + "\n]}\n")


def _encoded(row: Row, format: Format, quality: int) -> tuple[str, bytes]:
    """Digest and file of a picture; what could not be read back is refused."""
    shown, name = row.pixels_HWC, printable(row.file)
    if shown.dtype != np.uint8 or shown.ndim != 3 or shown.shape[2] not in (1, 3, 4):
        raise UsageError(f"{name} is {shown.dtype} {shown.shape}; expected uint8 with 1, 3 or 4 channels.")
    if format == "jpg" and shown.shape[2] == 4:
        raise UsageError(f"{name} has transparency, which JPEG cannot hold. Write png or webp shards.")
    content = row.digest or digest(shown.transpose(2, 0, 1))
    stream, (kind, options) = io.BytesIO(), _ENCODERS[format]
    if shown.shape[2] == 1:
        shown = shown[..., 0]
    Image.fromarray(np.ascontiguousarray(shown)).save(
        stream, kind, **({**options, "quality": quality} if format == "jpg" else options)
    )
    try:
        decode.probe(io.BytesIO(stream.getvalue()))
    except decode.Unusable as error:
        raise DataError(f"{name} cannot go into shards: {error}.") from None
    return content, stream.getvalue()


class _Writer:
    """One tar: members one after the other, hashed while they are written."""

    def __init__(self, path: Path) -> None:
        self.position, self._path, self._sha = 0, path, hashlib.sha256()
        self._rows: list[tuple[int, ...]] = []
        self._digests: list[str] = []
        self._stream = path.open("wb")

    def add(self, key: str, format: str, row: Row, encoded: tuple[str, bytes]) -> None:
        content, picture = encoded
        about: dict[str, Any] = {"file_name": row.file, "digest": content}
        about |= {} if row.label == UNLABELLED else {"label": row.label}
        about |= {} if not row.text else {"text": row.text}
        about |= {} if not row.split else {"split": row.split}
        text = json.dumps(about).encode()
        where = (self._member(f"{key}.{format}", picture), len(picture), self._member(f"{key}.json", text), len(text))
        self._rows.append((*where, *row.pixels_HWC.shape[:2], row.label, SPLITS.index(row.split)))
        self._digests.append(content)

    def close(self) -> str:
        """End the tar and return its part of the index."""
        if self._stream.closed:
            return ""
        with self._stream:
            self._put(bytes(2 * tarfile.BLOCKSIZE))
        part: dict[str, Any] = {"file": self._path.name, "sha256": self._sha.hexdigest(), "size": self.position}
        part |= dict(zip(COLUMNS, map(list, zip(*self._rows, strict=True)), strict=True))
        return json.dumps({**part, "digests": "".join(self._digests)}, separators=(",", ":"))

    def _member(self, name: str, content: bytes) -> int:
        """Append a file; where its content begins."""
        about = tarfile.TarInfo(name)
        about.size, about.mode = len(content), 0o644  # owner 0, time 0: what TarInfo begins with
        self._put(about.tobuf(tarfile.USTAR_FORMAT))
        start = self.position
        self._put(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        return start

    def _put(self, raw: bytes) -> None:
        self._stream.write(raw)
        self._sha.update(raw)
        self.position += len(raw)


# --- reading --------------------------------------------------------------------------------------------------------


class ShardSource:
    """Pictures of shards by index, brought to one size: the `Source` that training and validation read from.

    shards: an opened set. rows: which of its pictures, in order; None takes all.
    size: height and width; None keeps the pictures' own, which must be one. channels: 1, 3 or 4; 0 takes the set's.
    fit, background: as `decode.fit` takes them.
    cache_bytes: decoded pictures are kept until this much memory is full; what is kept stays.

    Reading is safe from several threads. Raises `UsageError` when the sizes differ and none is given.
    """

    def __init__(
        self,
        shards: Shards,
        rows: np.ndarray | None = None,
        size: tuple[int, int] | None = None,
        channels: Literal[0, 1, 3, 4] = 0,
        fit: Fit = "crop",
        background: str = "white",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.shards, self.class_names, self.num_classes = shards, shards.class_names, len(shards.class_names)
        self._rows = np.arange(len(shards)) if rows is None else np.asarray(rows, np.int64)
        self._size = size or _shared_size(shards, self._rows)
        self._channels: Any = channels or shards.channels
        self._fit, self._background = fit, background
        self.image_shape = (self._channels, *self._size)
        self.labels_N = torch.from_numpy(shards.table["label"][self._rows]) if self.class_names else None
        self._kept = _Kept(len(self._rows), self.image_shape, cache_bytes)
        self.files: Sequence[str] = _Column(shards, self._rows, "file_name")
        self.captions: Sequence[str] | None = _Column(shards, self._rows, "text") if shards.has_texts else None
        self.fingerprint = self._hash()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> Batch:
        """The pictures at these indices: images_BCHW uint8, labels_B int64 or None where nothing is labelled.

        Raises `DataError` for a picture that cannot be read.
        """
        chosen = np.arange(len(self))[np.asarray(indices, np.int64)]
        images_BCHW = np.empty((len(chosen), *self.image_shape), np.uint8)
        for place, index in enumerate(chosen.tolist()):
            if not self._kept.get(index, images_BCHW[place]):
                images_BCHW[place] = self._decoded(int(self._rows[index]))
                self._kept.put(index, images_BCHW[place])
        labels = None if self.labels_N is None else self.labels_N[torch.from_numpy(chosen)]
        return Batch(torch.from_numpy(images_BCHW), labels)

    def _decoded(self, row: int) -> np.ndarray:
        """pixels_CHW of a picture."""
        raw = self.shards.member(row)
        try:
            image = decode.open_safely(io.BytesIO(raw), short_side=max(self._size))
        except decode.Unusable as error:
            file = self.shards.files[self.shards.table["shard"][row]]
            where = f"{self.shards.storage.where}/{file}"
            raise DataError(f"Picture {row} in {where} is {error}. Copy or prepare the set again.") from None
        return decode.fit(image, self._size, self._fit, self._background, self._channels).transpose(2, 0, 1)

    def _hash(self) -> str:
        """Over the sums of the tars, which stand for pixels, labels and captions, the rows, and how they are fit."""
        how = [self.class_names, self.image_shape, self._fit, self._background, self.shards.hashes]
        hasher = hashlib.blake2b(json.dumps(how).encode(), digest_size=16)
        hasher.update(self._rows.astype("<i8").tobytes())
        return hasher.hexdigest()


class Sources(NamedTuple):
    """The sides of a set; test: pictures that neither training nor validation sees, None where none were set aside."""

    train: ShardSource
    validation: ShardSource
    test: ShardSource | None


def sources(shards: Shards, data: DataConfig) -> Sources:
    """The sides of a set: as all of its rows are marked, else training and validation by content (`source.split`).

    Where training or validation would be empty both are one and the same object, as in `source.dataset`. Raises
    `DataError` when every picture is set aside for a test.
    """
    marks, size = shards.table["split"], (data.size, data.size) if data.size else None
    if (marks > 0).all():
        held_out, test = marks == SPLITS.index("validation"), marks == SPLITS.index("test")
    else:
        held_out, test = split(shards.digests, data.validation_fraction), marks < 0

    def side(chosen: np.ndarray) -> ShardSource:
        return ShardSource(shards, np.flatnonzero(chosen), size, data.channels, data.fit, data.background)

    if test.all():
        raise DataError(f"Every picture of {shards.storage.where} is set aside for a test; none is left to train on.")
    aside = side(test) if test.any() else None
    if held_out.any() and (~held_out & ~test).any():
        return Sources(side(~held_out & ~test), side(held_out), aside)
    both = side(~test)
    return Sources(both, both, aside)


def _shared_size(shards: Shards, rows: np.ndarray) -> tuple[int, int]:
    sizes = np.unique(np.stack([shards.table["height"][rows], shards.table["width"][rows]], 1), axis=0)
    if len(sizes) != 1:
        where = printable(shards.storage.where)
        raise UsageError(f"{where} holds pictures of {len(sizes):,} sizes. Set data.size, such as data.size=64.")
    return int(sizes[0, 0]), int(sizes[0, 1])


class _Column(Sequence[str]):
    """One entry of what is known about every picture, read when it is asked for."""

    def __init__(self, shards: Shards, rows: np.ndarray, key: str) -> None:
        self._shards, self._rows, self._key = shards, rows, key

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return str(self._shards.about(int(self._rows[index])).get(self._key) or "")


class _Kept:
    """Decoded pictures in a fixed amount of memory, taken as they come: in a random order no other choice is better."""

    def __init__(self, num_pictures: int, shape: tuple[int, ...], num_bytes: int) -> None:
        room = min(num_pictures, num_bytes // int(np.prod(shape)))
        self._pixels, self._used, self._lock = np.empty((room, *shape), np.uint8), 0, threading.Lock()
        self._slots = np.full(num_pictures if room else 0, -1, np.int64)

    def get(self, index: int, out: np.ndarray) -> bool:
        """Copy a picture to `out`, and whether it was there."""
        slot = int(self._slots[index]) if len(self._slots) else -1
        if slot >= 0:
            out[:] = self._pixels[slot]
        return slot >= 0

    def put(self, index: int, pixels: np.ndarray) -> None:
        with self._lock:
            if self._used < len(self._pixels) and self._slots[index] < 0:
                self._pixels[self._used] = pixels
                self._slots[index] = self._used  # last: whoever sees the slot sees the pixels
                self._used += 1
