"""Published picture sets: scikit-learn's digits, Fashion-MNIST and CIFAR-10, read from their publishers' own files.

The digits ship with scikit-learn. The others are read from a folder the user names, else from the cache, else they are
downloaded from their publisher and checked. Their published test split is the validation split.

Sources: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (8x8, as in scikit-learn);
H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, arXiv:1708.07747; A. Krizhevsky, Learning Multiple Layers of Features
from Tiny Images, 2009.

Shapes: N pictures, H rows, W columns, C channels.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from imagekiln.data.decode import flatten
from imagekiln.errors import DataError, DiskError, UsageError, did_you_mean

NAMES = ("digits", "fashion-mnist", "cifar10")
_TIMEOUT_SEC = 30
_STACK = 1000
_MAX_DOWNLOAD_BYTES = 256 * 2**20
_MAX_IDX_BYTES = 2**30


@dataclass(frozen=True)
class Arrays:
    """A whole set in memory.

    images_NHWC: uint8. labels: int64, one a picture.
    num_validation: how many pictures at the end are the published test split; 0 where there is none.
    """

    images_NHWC: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    num_validation: int = 0
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """Files of a publisher: where they are, and what each must hash to."""

    title: str
    url: str
    files: dict[str, str]
    """File name -> `algorithm:hexdigest`."""


_IMAGES, _LABELS = "{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz"
FASHION_MNIST = Published(
    "Fashion-MNIST",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        _IMAGES.format("train"): "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        _LABELS.format("train"): "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        _IMAGES.format("t10k"): "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        _LABELS.format("t10k"): "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
)
_TARBALL = "cifar-10-binary.tar.gz"
CIFAR10 = Published("CIFAR-10", "https://www.cs.toronto.edu/~kriz/", {_TARBALL: "md5:c32a1d4ab5d03f1284b67883e8d87530"})
_CIFAR_FILES = (*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin")
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load(name: str, cache: Path) -> Arrays:
    """A set by name: `digits`, `fashion-mnist` or `cifar10`.

    Raises `UsageError` for another name, `DataError` when the files are neither in the cache nor to be had.

    >>> digits = load("digits", Path("unused"))
    >>> digits.images_NHWC.shape, int(digits.images_NHWC.max()), digits.class_names[:2]
    ((1797, 8, 8, 1), 255, ('0', '1'))
    """
    if name == "digits":
        return _digits()
    if name not in NAMES:
        raise UsageError(f"builtin:{name}: there is no such set. {did_you_mean(name, NAMES)}")
    folder = cache / name
    found = recognise(folder)
    if name == "fashion-mnist" or found is None:
        download(FASHION_MNIST if name == "fashion-mnist" else CIFAR10, folder)
    return read(name, found[1] if found else folder)


def recognise(path: Path) -> tuple[str, Path] | None:
    """(name, folder or tar file) when a path holds published files, itself or one level below; else None."""
    if os.path.isfile(path):
        return ("cifar10", path) if path.name == _TARBALL else None
    try:
        below = sorted(Path(entry.path) for entry in os.scandir(path) if entry.is_dir())
    except (OSError, ValueError):
        return None
    for folder in (path, *below):
        if os.path.isfile(folder / _IMAGES.format("train")):
            return "fashion-mnist", folder
        if os.path.isfile(folder / _CIFAR_FILES[0]) or (folder == path and os.path.isfile(folder / _TARBALL)):
            return "cifar10", folder
    return None


def read(name: str, folder: Path) -> Arrays:
    """A set from its published files. Raises `DataError` naming the file that is missing or damaged."""
    return _fashion_mnist(folder) if name == "fashion-mnist" else _cifar10(folder)


def download(published: Published, folder: Path) -> None:
    """Fetch the files of a set that are not there yet: checked, written aside, renamed.

    Raises `DataError` that says which file to put where by hand.
    """
    for file, digest in published.files.items():
        target = folder / file
        if target.is_file():
            continue
        aside = folder / f".{file}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"The cache {folder} cannot be made ({error.strerror}). Set IMAGEKILN_CACHE.") from None
        try:
            with urllib.request.urlopen(published.url + file, timeout=_TIMEOUT_SEC) as answer:
                found = _store(answer, aside, digest.partition(":")[0])
            if found != digest:
                raise OSError("what came is not the published file: its checksum differs")
            os.replace(aside, target)
        except (OSError, ValueError) as error:  # URLError, timeouts and HTTP errors are all OSErrors
            reason = getattr(error, "reason", None) or error
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is also the answer, and holds the connection
            raise DataError(
                f"{published.title} could not be downloaded ({reason}). Get {published.url}{file} by other means and "
                f"put it into {folder}, or give the folder that holds it as DATA."
            ) from None
        finally:
            aside.unlink(missing_ok=True)


def _store(answer: IO[bytes], aside: Path, algorithm: str) -> str:
    """Write what comes, up to a limit, and return its hash as `algorithm:hexdigest`."""
    digest, left = hashlib.new(algorithm, usedforsecurity=False), _MAX_DOWNLOAD_BYTES
    with aside.open("wb") as out:
        while left and (block := answer.read(min(left, 2**20))):
            digest.update(block)
            out.write(block)
            left -= len(block)
        out.flush()
        os.fsync(out.fileno())
    return f"{algorithm}:{digest.hexdigest()}"


def brought_to(images_NHWC: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Square pictures at another size and number of channels; 0 leaves as is. All at once, because there are 70,000.

    Each pass is one Pillow call (Lanczos, antialiased) on all rows of many pictures stacked: the rows of a picture are
    resized, then, turned on its side, its columns. The result equals resizing one by one.
    """
    count, side, _, found = images_NHWC.shape
    if size and size != side:
        mode = {1: "L", 3: "RGB"}[found]
        out = np.empty((count, size, size, found), np.uint8)
        for start in range(0, count, _STACK):
            turned = images_NHWC[start : start + _STACK]
            for rows in (side, size):
                stack = Image.frombytes(mode, (side, len(turned) * rows), np.ascontiguousarray(turned).tobytes())
                resized = np.asarray(stack.resize((size, stack.height), Image.Resampling.LANCZOS))
                turned = resized.reshape(-1, rows, size, found).transpose(0, 2, 1, 3)
            out[start : start + _STACK] = turned
        images_NHWC = out
    if channels in (0, found):
        return images_NHWC
    opaque = np.full((*images_NHWC.shape[:3], 1), 255, np.uint8)
    rgb = np.broadcast_to(images_NHWC, (*images_NHWC.shape[:3], 3))
    return flatten(np.concatenate([rgb, opaque], axis=-1), channels, (0, 0, 0))


def _digits() -> Arrays:
    from sklearn.datasets import load_digits  # imported late: scikit-learn takes a second to load

    found = load_digits()
    images_NHW = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return Arrays(images_NHW[..., None], found.target.astype(np.int64), tuple("0123456789"))


def _fashion_mnist(folder: Path) -> Arrays:
    """Four idx files. Other sets in the same files, such as MNIST, are read too; only their classes are numbers."""
    raw = {file: _bytes(folder / file, FASHION_MNIST) for file in FASHION_MNIST.files}
    genuine = all("sha256:" + hashlib.sha256(raw[file]).hexdigest() == sha for file, sha in FASHION_MNIST.files.items())
    images, labels = [], []
    for split in ("train", "t10k"):
        image_file, label_file = _IMAGES.format(split), _LABELS.format(split)
        images.append(_idx(raw[image_file], folder / image_file, 3))
        labels.append(_idx(raw[label_file], folder / label_file, 1))
        if len(images[-1]) != len(labels[-1]):
            raise DataError(f"{folder}: {image_file} and {label_file} differ in length.")
    all_labels = np.concatenate(labels).astype(np.int64)
    names = _FASHION_CLASSES if genuine else tuple(str(index) for index in range(int(all_labels.max()) + 1))
    notice = f"The files in {folder.name} are not the published Fashion-MNIST, so its classes are numbers."
    notices = () if genuine else (notice,)
    return Arrays(np.concatenate(images)[..., None], all_labels, names, len(images[1]), notices)


def _idx(packed: bytes, path: Path, dimensions: int) -> np.ndarray:
    """One idx file: 0, 0, 8 (uint8), number of dimensions, their sizes as big-endian uint32, the values."""
    try:
        raw = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(_MAX_IDX_BYTES)
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", raw)
    except (OSError, EOFError, zlib.error, struct.error):
        raise DataError(f"{path} is damaged or cut. Get it again from {FASHION_MNIST.url}.") from None
    values = raw[4 + 4 * dimensions :]
    if magic != 0x800 + dimensions or math.prod(shape) != len(values) or not values:
        raise DataError(f"{path} is not an idx file of {dimensions} dimensions.")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _cifar10(folder: Path) -> Arrays:
    """The binary version: records of one label byte and 3,072 pixel bytes, red, green, blue planes."""
    if folder.is_dir() and (folder / _CIFAR_FILES[0]).is_file():
        raw = {file: _bytes(folder / file, CIFAR10) for file in _CIFAR_FILES}
    else:
        raw = _cifar_members(folder if folder.is_file() else folder / _TARBALL)
    for file, content in raw.items():
        if not content or len(content) % _CIFAR_RECORD:
            raise DataError(f"{folder}: {file} is cut; expected records of {_CIFAR_RECORD} bytes.")
    records = np.concatenate([np.frombuffer(raw[file], np.uint8) for file in _CIFAR_FILES]).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(_CIFAR_CLASSES):
        raise DataError(f"{folder}: label {labels.max()} found; CIFAR-10 has labels 0 to 9.")
    images_NHWC = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Arrays(images_NHWC, labels, _CIFAR_CLASSES, len(raw["test_batch.bin"]) // _CIFAR_RECORD)


def _cifar_members(tarball: Path) -> dict[str, bytes]:
    """The six files inside the published archive, read in place: nothing is unpacked to disk."""
    raw: dict[str, bytes] = {}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in _CIFAR_FILES and member.isreg() and member.size <= 10_000 * _CIFAR_RECORD:
                    stream = archive.extractfile(member)
                    raw[name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{tarball} is damaged or cut ({error}). Get it again from {CIFAR10.url}{_TARBALL}.") from None
    _require(_CIFAR_FILES, raw, tarball)
    return raw


def _require(wanted: Iterable[str], found: Iterable[str], where: Path) -> None:
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}.")


def _bytes(path: Path, published: Published) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{published.title} needs {path.name} in {path.parent}, which cannot be read ({error.strerror}). "
            f"Get it from {published.url}."
        ) from None
