"""Any DATA as a ready data set: pictures are decoded once into one uint8 array, and everything unusable is listed.

A packed folder holds `images.npy` (N, C, H, W uint8), `metadata.jsonl` (one row a picture, in order), `prepare.json`
(shape, classes, notices) and `left_out.csv` (file, reason). It is valid DATA itself. Folders and zips are packed into
the cache under a key made of names, sizes, times of change and settings; a folder there is complete or absent.

Shapes: N pictures, H rows, W columns, C channels, A red, green, blue, alpha.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imagekiln.config import DataConfig
from imagekiln.core import UNLABELLED
from imagekiln.data import builtin, decode, scan
from imagekiln.data.files import printable
from imagekiln.data.source import Dataset, Table, dataset, digest, split
from imagekiln.errors import DataError, DiskError, UsageError

COMMON_SIZE = 256
"""`data.size = 0` keeps the pictures' own size when they all share it and no side is longer than this."""
CHOSEN_SIZE = 64
"""Otherwise it takes the median short side, rounded down to a multiple of 8, but no more than this."""

_VERSION = 1
_IN_MEMORY_BYTES = 2**30
_FILES = ("images.npy", "metadata.jsonl", "prepare.json")
_THREADS = max(1, min(8, os.cpu_count() or 1))
_CHUNK = 256
_FORMULA = ("=", "+", "-", "@")
_GUARDED = tuple(f"'{sign}" for sign in _FORMULA)

ProgressFn = Callable[[int, int], None]


def load(data: DataConfig, cache: Path | None = None, progress: ProgressFn | None = None) -> Dataset:
    """The data set of a recipe's `data` section.

    data.path: a folder or zip in the imagefolder convention, a packed folder, a folder with the published files of a
        known set, or `builtin:NAME`.
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
    if data.path.startswith("builtin:"):
        name = data.path.removeprefix("builtin:")
        return _published(name, builtin.load(name, cache), data)
    path = Path(os.path.expanduser(data.path))
    if all(os.path.isfile(path / file) for file in _FILES):
        return _packed(path, data)
    if (published := builtin.recognise(path)) is not None:
        return _published(published[0], builtin.read(*published), data)
    return _pictures(path, data, cache, progress)


def write_prepared(data: DataConfig, out: Path, progress: ProgressFn | None = None) -> Dataset:
    """Pack the pictures of `data` into the folder `out`, which is DATA from then on, and open it.

    Raises what `load` raises, and `UsageError` when `out` holds something already or `data` is packed already.
    """
    decode.colour(data.background)
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"{out} is not an empty folder. Give --out a new one.")
    if not data.path:
        raise UsageError("data.path is empty. Give a folder of pictures, a zip of one, or builtin:digits.")
    path = Path(os.path.expanduser(data.path))
    if all(os.path.isfile(path / file) for file in _FILES):
        raise UsageError(f"{path} is prepared already. Give it as DATA.")
    if data.path.startswith("builtin:"):
        name = data.path.removeprefix("builtin:")
        known: tuple[str, builtin.Arrays] | None = name, builtin.load(name, cache_folder())
    else:
        published = builtin.recognise(path)
        known = (published[0], builtin.read(*published)) if published else None
    found = scan.find(path) if known is None else None

    def write(folder: Path) -> None:
        if known is not None:
            _pack_published(*known, data, folder)
        elif found is not None:
            _pack(found, data, folder, progress)

    try:
        _write_aside(out, write)
    except OSError as error:
        raise DiskError(f"{out} cannot be written ({error.strerror or error}).") from None
    return _packed(out, data)


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
    _write_texts(folder, name, table.images_NCHW.shape, arrays.class_names, rows, list(arrays.notices), [])


# --- packed folders -------------------------------------------------------------------------------------------------


def _packed(folder: Path, data: DataConfig) -> Dataset:
    """Open a packed folder, the user's or the cache's. Raises `DataError` when it is damaged or of another shape."""
    try:
        about = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        images_NCHW = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        version, class_names = int(about["version"]), tuple(map(str, about["class_names"]))
        labels = np.array([int(row.get("label", UNLABELLED)) for row in rows], np.int64)
        digests, files = [str(row["digest"]) for row in rows], [str(row["file_name"]) for row in rows]
        captions = [row.get("text") for row in rows] if any("text" in row for row in rows) else None
        left_out = _read_left_out(folder)
        sound = all(len(text) == 32 and int(text, 16) >= 0 for text in digests)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise DataError(f"The prepared set {folder} is damaged ({error}). Prepare it again.") from None
    if version > _VERSION:
        raise DataError(f"{folder} was prepared by a newer version of imagekiln. Update imagekiln.")
    sound &= images_NCHW.dtype == np.uint8 and images_NCHW.ndim == 4 and images_NCHW.shape[1] in (1, 3, 4)
    sound &= len(rows) == len(images_NCHW) > 0 and labels.min() >= UNLABELLED and labels.max() < len(class_names)
    if not sound:
        raise DataError(f"The prepared set {folder} does not fit together. Prepare it again.")
    channels, height, width = images_NCHW.shape[1:]
    if (data.size and (height, width) != (data.size, data.size)) or data.channels not in (0, channels):
        raise DataError(
            f"{folder} was prepared as {height}x{width} with {channels} channels; the recipe asks for "
            f"data.size={data.size}, data.channels={data.channels}. Prepare it again or leave both at 0."
        )
    if images_NCHW.nbytes <= _IN_MEMORY_BYTES:
        images_NCHW = np.array(images_NCHW)
    table = Table(images_NCHW, labels, class_names, digests, files, captions)
    notices = [str(notice) for notice in about.get("notices", [])]
    marked = all("split" in row for row in rows)
    held_out = np.array([row.get("split") == "validation" for row in rows])
    held_out = held_out if marked else split(digests, data.validation_fraction)
    return dataset(str(about.get("name", folder.name)), table, held_out, notices, left_out)


def _read_left_out(folder: Path) -> list[tuple[str, str]]:
    path = folder / "left_out.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [(row["file"], row["reason"]) for row in csv.DictReader(stream)]
    return [(name[1:] if name.startswith(_GUARDED) else name, reason) for name, reason in rows]


# --- folders and zips of pictures -----------------------------------------------------------------------------------


@dataclass
class _Decoded:
    """What comes out of decoding, besides the pixels: the pictures that are usable, in order."""

    pictures: list[scan.Picture] = field(default_factory=list)
    num_grey: int = 0
    num_transparent: int = 0


def _pictures(path: Path, data: DataConfig, cache: Path, progress: ProgressFn | None) -> Dataset:
    found = scan.find(path)
    folder = cache / "packed" / _key(found, data)
    if folder.is_dir():
        try:
            return _packed(folder, data)
        except DataError:  # a damaged cache is not the user's business: it is made again
            shutil.rmtree(folder, ignore_errors=True)
    try:
        _write_aside(folder, lambda aside: _pack(found, data, aside, progress))
    except OSError as error:
        raise DiskError(
            f"The cache {cache} cannot be written ({error.strerror or error}). Set IMAGEKILN_CACHE to a folder with "
            "room for the pictures."
        ) from None
    return _packed(folder, data)


def _write_aside(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder that is complete or absent at any time: written beside its place, synced, renamed."""
    aside = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        write(aside)
        for file in aside.iterdir():
            _sync(file)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / _FILES[0]).is_file():  # else another process was faster, with the same pictures
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _key(found: scan.Found, data: DataConfig) -> str:
    """Changes whenever a picture, its label, its caption or a setting that matters does."""
    settings = data.model_dump(include={"size", "channels", "fit", "background"})
    hasher = hashlib.blake2b(json.dumps([_VERSION, settings]).encode(), digest_size=16)
    for picture in found.pictures:
        entry = found.files.entries[picture.name]
        hasher.update(json.dumps([*entry, picture.name, picture.label, picture.text]).encode())
    hasher.update(json.dumps([found.notices, found.left_out]).encode())
    return hasher.hexdigest()


def _pack(found: scan.Found, data: DataConfig, folder: Path, progress: ProgressFn | None) -> None:
    """Decode every picture of `found` and write the files of a packed folder."""
    notices, left_out = list(found.notices), list(found.left_out)
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")  # what Pillow mutters about odd metadata is no concern of the user
        shape = (data.size, data.size) if data.size else _chosen_shape(found, pool, notices)
        decoded = _decode_all(found, data, shape, pool, folder / "pixels.raw", left_out, progress)
    num_pictures = len(decoded.pictures)
    if not num_pictures:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(why for _, why in left_out).most_common(3))
        raise DataError(f"None of the {len(left_out):,} pictures in {found.files.where} can be used: {reasons}.")
    channels = data.channels or _chosen_channels(decoded, notices)
    _write_images(folder, decoded, shape, channels, data)
    _write_rows(found, folder, decoded, notices, left_out)


def _decode_all(
    found: scan.Found,
    data: DataConfig,
    shape: tuple[int, int],
    pool: ThreadPoolExecutor,
    target: Path,
    left_out: list[tuple[str, str]],
    progress: ProgressFn | None,
) -> _Decoded:
    """Write the pixels of all usable pictures as RGBA, one after the other, and say which these are."""
    decoded = _Decoded()

    def decode_one(picture: scan.Picture) -> np.ndarray | str:
        try:
            image = decode.open_safely(found.files.open(picture.name), short_side=max(shape))
            return decode.fit(image, shape, data.fit, data.background, channels=4)
        except decode.Unusable as error:
            return str(error)

    with target.open("wb") as stream:
        for done, (picture, result) in enumerate(_in_order(pool, decode_one, found.pictures), 1):
            if isinstance(result, str):
                left_out.append((picture.name, result))
            else:
                decoded.pictures.append(picture)
                opaque = bool((result[..., 3] == 255).all())
                decoded.num_transparent += not opaque
                decoded.num_grey += bool((result[..., :1] == result[..., 1:3]).all())
                stream.write(result.tobytes())
            if progress is not None:
                progress(done, len(found.pictures))
    return decoded


def _in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: list[Any]) -> Iterator[tuple[Any, Any]]:
    """(item, result) in order, with only a few results waiting at any time; leaving early cancels the rest."""
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 4 * _THREADS:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _chosen_shape(found: scan.Found, pool: ThreadPoolExecutor, notices: list[str]) -> tuple[int, int]:
    """Height and width for `data.size = 0`: see `COMMON_SIZE` and `CHOSEN_SIZE`."""

    def probe(picture: scan.Picture) -> tuple[int, int] | None:
        try:
            return decode.probe(found.files.open(picture.name))
        except decode.Unusable:
            return None

    shapes: list[tuple[int, int]] = [shape for _, shape in _in_order(pool, probe, found.pictures) if shape is not None]
    if len(set(shapes)) == 1 and max(shapes[0]) <= COMMON_SIZE:
        return shapes[0]
    side = int(statistics.median(min(shape) for shape in shapes)) if shapes else CHOSEN_SIZE
    side = max(8, min(CHOSEN_SIZE, side // 8 * 8))
    if shapes:
        notices.append(f"The pictures are brought to {side}x{side} pixels; set data.size for another size.")
    return side, side


def _chosen_channels(decoded: _Decoded, notices: list[str]) -> int:
    """1 where every picture is grey, else 3. Transparency is kept only when the recipe asks for 4 channels."""
    total = len(decoded.pictures)
    if decoded.num_transparent > total / 20:
        notices.append(
            f"{decoded.num_transparent:,} of {total:,} pictures have transparent parts, which were laid on "
            "data.background; data.channels=4 keeps them."
        )
    if decoded.num_grey == total and not decoded.num_transparent:
        return 1
    if decoded.num_grey and decoded.num_grey < total:
        notices.append(f"{decoded.num_grey:,} of {total:,} pictures are grey among coloured ones.")
    return 3


def _write_images(folder: Path, decoded: _Decoded, shape: tuple[int, int], channels: int, data: DataConfig) -> None:
    """Turn the RGBA pixels into `images.npy` with the wanted channels."""
    total, raw = len(decoded.pictures), folder / "pixels.raw"
    rgba = np.memmap(raw, np.uint8, "r", shape=(total, *shape, 4))
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (total, channels, *shape))
    background = decode.colour(data.background)
    for start in range(0, total, _CHUNK):
        pixels_NHWC = decode.flatten(rgba[start : start + _CHUNK], channels, background)
        images[start : start + _CHUNK] = pixels_NHWC.transpose(0, 3, 1, 2)
    images.flush()
    del rgba, images
    raw.unlink()


def _write_rows(
    found: scan.Found, folder: Path, decoded: _Decoded, notices: list[str], left_out: list[tuple[str, str]]
) -> None:
    names = scan.class_names([picture.label for picture in decoded.pictures])
    lost = set(scan.class_names([picture.label for picture in found.pictures])) - set(names)
    if lost:
        notices.append(f"No usable pictures are left of: {', '.join(printable(name) for name in sorted(lost))}.")
    number = {name: index for index, name in enumerate(names)}
    images_NCHW = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    rows = []
    for picture, image in zip(decoded.pictures, images_NCHW, strict=True):
        row: dict[str, Any] = {"file_name": picture.name, "digest": digest(image)}
        if picture.label is not None:
            row["label"] = number[picture.label]
        if picture.text is not None:
            row["text"] = picture.text
        rows.append(row)
    name = found.files.where.resolve().name.removesuffix(".zip")
    _write_texts(folder, name, images_NCHW.shape, names, rows, notices, left_out)


def _write_texts(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    class_names: tuple[str, ...],
    rows: list[dict[str, Any]],
    notices: list[str],
    left_out: list[tuple[str, str]],
) -> None:
    """Everything of a packed folder but its pixels."""
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    about = {
        "version": _VERSION,
        "name": name,
        "num_pictures": shape[0],
        "image_shape": shape[1:],
        "class_names": class_names,
        "notices": notices,
    }
    (folder / "prepare.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    with (folder / "left_out.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("file", "reason"))
        table.writerows((_cell(printable(name)), reason) for name, reason in sorted(left_out))


def _cell(text: str) -> str:
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
