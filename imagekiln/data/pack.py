"""Any DATA as a ready data set: pictures are decoded once into one uint8 array, and everything unusable is listed.

Folders and archives are packed (see `imagekiln.data.packed`) into the cache under a key made of names, sizes, times of
change and settings. Nothing is cleaned here beyond what cannot be decoded; that is `imagekiln.data.prepared`.

Shapes: N pictures, H rows, W columns, C channels, A red, green, blue, alpha.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from imagekiln.config import DataConfig
from imagekiln.data import buckets, builtin, decode, packed, pixels, scan, shard_index, shards, webdataset
from imagekiln.data.files import TAR_SUFFIXES, printable, stem
from imagekiln.data.found import drop_lone_train_split
from imagekiln.data.pixels import ProgressFn
from imagekiln.data.source import NOTHING_HELD_OUT, Dataset, Table, dataset, digest, split
from imagekiln.errors import DataError, DiskError, UsageError


def load(data: DataConfig, cache: Path | None = None, progress: ProgressFn | None = None) -> Dataset:
    """The data set of a recipe's `data` section.

    data.path: what `scan.find` takes, a packed folder, a folder or address of our own shards, a folder with the
        published files of a known set, or `builtin:NAME`.
    cache: where packed pictures are kept; None takes `cache_folder()`.
    progress: called as progress(done, total) while pictures are decoded.

    Raises `UsageError` for a path that is not there, `DataError` when nothing in it can be used, `DiskError` when the
    cache cannot be written.

    >>> load(DataConfig(path="builtin:digits")).train.image_shape
    (1, 8, 8)
    """
    decode.colour(data.background)
    cache = cache if cache is not None else cache_folder()
    if not data.path:
        raise UsageError("data.path is empty. Give a folder of pictures, a zip of one, or builtin:digits.")
    path = Path(os.path.expanduser(data.path))
    if packed.is_packed(path):
        return packed.open_packed(path, data)
    if shard_index.is_set(path) or (webdataset.is_address(data.path) and not data.path.endswith(TAR_SUFFIXES)):
        _require_squares(data, data.path)
        return _sharded(data)
    if (known := published(data.path, cache)) is not None:
        _require_squares(data, data.path)
        return _published(*known, data)
    return _pictures(path, data, cache, progress)


def _require_squares(data: DataConfig, name: str) -> None:
    """Raises `UsageError` where proportions are to be kept of pictures that are all of one shape."""
    if data.buckets:
        raise UsageError(
            f"buckets: proportions are to be kept, and the pictures of {name} are all of one shape. Leave it out, or "
            "name a folder of pictures."
        )


def published(source: str, cache: Path | None = None) -> tuple[str, builtin.Arrays] | None:
    """Name and content of a published set: `builtin:NAME`, or a folder with its files; None for anything else."""
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        return name, builtin.load(name, cache if cache is not None else cache_folder())
    found = builtin.recognise(Path(os.path.expanduser(source)))
    return (found[0], builtin.read(*found)) if found else None


def write_published(name: str, arrays: builtin.Arrays, data: DataConfig, out: Path) -> Dataset:
    """Pack a published set into the folder `out`, which is DATA from then on, and open it.

    Raises `UsageError` when `out` holds something already or `data.buckets` is set, `DiskError` when it cannot be
    written.
    """
    _require_squares(data, name)
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"{out} is not an empty folder. Give --out a new one.")
    try:
        packed.write_aside(out, lambda folder: _pack_published(name, arrays, data, folder))
    except OSError as error:
        raise DiskError(f"{out} cannot be written ({error.strerror or error}).") from None
    return packed.open_packed(out, data)


def cache_folder() -> Path:
    """`$IMAGEKILN_CACHE`, else the platform's place for caches."""
    if given := os.environ.get("IMAGEKILN_CACHE"):
        return Path(given)
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and the user is not in the password file
        return Path(tempfile.gettempdir()) / "imagekiln"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "imagekiln"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "imagekiln"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "imagekiln"


# --- published sets -------------------------------------------------------------------------------------------------


def _published(name: str, arrays: builtin.Arrays, data: DataConfig) -> Dataset:
    table = _table(arrays, data)
    held_out = _test_split(arrays)
    return dataset(
        name,
        table,
        split(table.digests, data.validation_fraction) if held_out is None else held_out,
        list(arrays.notices),
        [],
    )


def _table(arrays: builtin.Arrays, data: DataConfig) -> Table:
    images_NHWC = builtin.brought_to(arrays.images_NHWC, data.size, data.channels)
    images_NCHW = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
    files = [f"{index:06d}" for index in range(len(images_NCHW))]
    return Table(images_NCHW, arrays.labels, arrays.class_names, [digest(image) for image in images_NCHW], files)


def _test_split(arrays: builtin.Arrays) -> np.ndarray | None:
    """Which pictures are the published test split; None where there is none."""
    total = len(arrays.labels)
    return np.arange(total) >= total - arrays.num_validation if arrays.num_validation else None


def _pack_published(name: str, arrays: builtin.Arrays, data: DataConfig, folder: Path) -> None:
    """Write a published set as the files of a packed folder, its test split marked."""
    table, held_out = _table(arrays, data), _test_split(arrays)
    np.save(folder / "images.npy", table.images_NCHW, allow_pickle=False)
    rows: list[dict[str, Any]] = []
    for index, (file, content) in enumerate(zip(table.files, table.digests, strict=True)):
        row: dict[str, Any] = {"file_name": file, "digest": content, "label": int(table.labels[index])}
        rows.append(row if held_out is None else {**row, "split": "validation" if held_out[index] else "train"})
    about = about_of(name, table.images_NCHW.shape, arrays.class_names, arrays.notices)
    packed.write_texts(folder, about, rows, [])


# --- folders and zips of pictures -----------------------------------------------------------------------------------


def _pictures(path: Path, data: DataConfig, cache: Path, progress: ProgressFn | None) -> Dataset:
    pixels.require_size(data)
    found = scan.find(path)
    drop_lone_train_split(found)
    folder = cache / "packed" / _key(found, data)
    if folder.is_dir():
        try:
            return packed.open_packed(folder, data)
        except DataError:  # a damaged cache is not the user's business: it is made again
            shutil.rmtree(folder, ignore_errors=True)
    try:
        packed.write_aside(folder, lambda aside: _pack(found, data, aside, progress))
    except OSError as error:
        raise DiskError(
            f"The cache {cache} cannot be written ({error.strerror or error}). Set IMAGEKILN_CACHE to a folder with "
            "room for the pictures."
        ) from None
    return packed.open_packed(folder, data)


def _sharded(data: DataConfig) -> Dataset:
    """A set of shards, which is read where it lies."""
    opened = shard_index.open_shards(os.path.expanduser(data.path))
    train, validation, test = shards.sources(opened, data)
    notices = [NOTHING_HELD_OUT] if train is validation else []
    return Dataset(stem(Path(data.path.rstrip("/")).name), train, validation, notices, [], test)


def _key(found: scan.Found, data: DataConfig) -> str:
    """Changes whenever a picture, its label, its caption or a setting that matters does."""
    settings = data.model_dump(
        include={"size", "channels", "fit", "background", *(["buckets"] if data.buckets else [])}
    )
    hasher = hashlib.blake2b(json.dumps([packed.VERSION, settings]).encode(), digest_size=16)
    for picture in found.pictures:
        entry = found.files.entries[picture.name]
        hasher.update(json.dumps([*entry, picture.name, picture.label, picture.text, picture.split]).encode())
    hasher.update(json.dumps([found.notices, found.left_out]).encode())
    return hasher.hexdigest()


def _pack(found: scan.Found, data: DataConfig, folder: Path, progress: ProgressFn | None) -> None:
    """Decode every picture of `found` and write the files of a packed folder."""
    notices, left_out = list(found.notices), list(found.left_out)
    pictures: list[scan.Picture] = []
    notes: list[frozenset[str]] = []
    shapes: list[buckets.Shape | None] = []
    with warnings.catch_warnings(), pixels.workers() as pool, pixels.Raw(folder, data) as raw:
        warnings.simplefilter("ignore")  # what Pillow mutters about odd metadata is no concern of the user
        shape = (data.size, data.size) if data.size else pixels.chosen_shape(found, pool, notices)
        see = partial(pixels.see, found, shape=shape, shaping=data, measure=False)
        for done, (picture, seen) in enumerate(pixels.in_order(pool, see, found.pictures), 1):
            if isinstance(seen, str):
                left_out.append((picture.name, seen))
            else:
                raw.add(seen)
                pictures.append(picture)
                notes.append(seen.notes)
                shapes.append(seen.shape)
            if progress is not None:
                progress(done, len(found.pictures))
    if not pictures:
        raise pixels.none_usable(found.files.where, [why for _, why in left_out])
    channels = data.channels or pixels.chosen_channels(notes, notices)
    for name, its in pixels.kept((len(pictures), channels, *shape), data).items():
        pixels.write_images(folder / f"{name}.raw", folder / f"{name}.npy", its, data.background)
    names = scan.class_names([picture.label for picture in pictures])
    lost = set(scan.class_names([picture.label for picture in found.pictures])) - set(names)
    if lost:
        notices.append(f"No usable pictures are left of: {', '.join(printable(name) for name in sorted(lost))}.")
    images_NCHW = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    rows = [packed.row_of(picture, digest(image), names) for picture, image in zip(pictures, images_NCHW, strict=True)]
    for row, own in zip(rows, shapes, strict=True):
        row |= {} if own is None else {"shape": own}
    if any(picture.split for picture in pictures):
        held_out = "validation" if any(picture.split == "validation" for picture in pictures) else "test"
        for row, picture in zip(rows, pictures, strict=True):  # like a published set, whose test split is held out
            row["split"] = "validation" if picture.split == held_out else picture.split or "train"
    about = about_of(name_of(found.files.where), images_NCHW.shape, names, notices)
    packed.write_texts(folder, about, rows, left_out)


def name_of(path: Path) -> str:
    """What a set made of the files at a path is called."""
    return stem(path.resolve().name)


def about_of(name: str, shape: tuple[int, ...], class_names: Sequence[str], notices: Sequence[str]) -> dict[str, Any]:
    """What `prepare.json` says of every packed folder."""
    return {
        "name": name,
        "num_pictures": shape[0],
        "image_shape": shape[1:],
        "class_names": class_names,
        "notices": notices,
    }
