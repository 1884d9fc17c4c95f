"""The published sets: their files are recognised, read, checked, and asked for by name when they are missing."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagekiln.data import builtin
from imagekiln.data.decode import fit
from imagekiln.errors import DataError, UsageError

RNG = np.random.default_rng(0)


def idx(values: np.ndarray) -> bytes:
    head = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
    return gzip.compress(head + values.tobytes())


def lay_idx(folder: Path, counts: tuple[int, int] = (12, 4)) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    laid = {}
    for split, count in zip(("train", "t10k"), counts, strict=True):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        laid[split] = images
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count, dtype=np.uint8) % 4))
    return laid


def cifar_files() -> tuple[dict[str, bytes], np.ndarray]:
    images = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    records = np.concatenate(
        [np.arange(12, dtype=np.uint8)[:, None] % 10, images.transpose(0, 3, 1, 2).reshape(12, -1)], 1
    )
    names = [*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"]
    return {name: records[2 * index : 2 * index + 2].tobytes() for index, name in enumerate(names)}, images


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_digits_are_the_scikit_learn_digits(tmp_path: Path) -> None:
    digits = builtin.load("digits", tmp_path)
    assert digits.images_NHWC.shape == (1797, 8, 8, 1) and digits.images_NHWC.dtype == np.uint8
    assert (digits.images_NHWC.min(), digits.images_NHWC.max()) == (0, 255)
    assert len(np.unique(digits.images_NHWC)) == 17
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.num_validation == 0 and not list(tmp_path.iterdir())


def test_an_unknown_set_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"builtin:digit: there is no such set\. Did you mean 'digits'\?"):
        builtin.load("digit", tmp_path)
    with pytest.raises(UsageError, match="Known: cifar10, digits, fashion-mnist"):
        builtin.load("../../etc", tmp_path)


def test_idx_files_are_recognised_and_read(tmp_path: Path) -> None:
    laid = lay_idx(tmp_path / "fashion")
    for where in (tmp_path, tmp_path / "fashion"):
        assert builtin.recognise(where) == ("fashion-mnist", tmp_path / "fashion")
    arrays = builtin.read("fashion-mnist", tmp_path / "fashion")
    assert (arrays.images_NHWC[:12, ..., 0] == laid["train"]).all()
    assert (arrays.images_NHWC[12:, ..., 0] == laid["t10k"]).all()
    assert arrays.num_validation == 4 and arrays.labels.tolist() == [0, 1, 2, 3] * 4
    assert arrays.class_names == ("0", "1", "2", "3")  # the same file names, but not the published pictures
    assert "not the published Fashion-MNIST" in arrays.notices[0]


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    lay_idx(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2], "damaged or cut"),
        (b"<html>moved</html>", "damaged or cut"),
        (gzip.compress(b"\0\0\x08\x01" + bytes(20)), "not an idx file of 3 dimensions"),
        (idx(np.zeros((3, 28, 28), np.uint8)), "differ in length"),
    ]:
        images.write_bytes(content)
        with pytest.raises(DataError, match=message):
            builtin.read("fashion-mnist", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"needs t10k-labels-idx1-ubyte\.gz in .*http"):
        builtin.read("fashion-mnist", tmp_path)


def test_cifar_is_read_from_files_and_from_the_archive(tmp_path: Path) -> None:
    files, images = cifar_files()
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    archive = tarball(tmp_path / "cifar-10-binary.tar.gz", files)
    assert builtin.recognise(folder) == ("cifar10", folder)
    assert builtin.recognise(archive) == ("cifar10", archive)
    for where in (folder, archive):
        arrays = builtin.read("cifar10", where)
        assert (arrays.images_NHWC == images).all() and arrays.num_validation == 2
        assert arrays.labels.tolist() == [*range(10), 0, 1] and arrays.class_names[3] == "cat"


def test_damaged_cifar_files_are_named(tmp_path: Path) -> None:
    files, _ = cifar_files()
    archive = tarball(tmp_path / "cifar-10-binary.tar.gz", {**files, "test_batch.bin": b"x" * 100})
    with pytest.raises(DataError, match=r"test_batch\.bin is cut"):
        builtin.read("cifar10", archive)
    tarball(archive, {**files, "test_batch.bin": b"\x0b" + bytes(3072)})
    with pytest.raises(DataError, match="label 11 found"):
        builtin.read("cifar10", archive)
    files.pop("data_batch_3.bin")
    with pytest.raises(DataError, match=r"lacks data_batch_3\.bin"):
        builtin.read("cifar10", tarball(archive, files))
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(DataError, match="damaged or cut"):
        builtin.read("cifar10", archive)


def test_an_archive_with_a_link_in_it_is_not_followed(tmp_path: Path) -> None:
    files, _ = cifar_files()
    link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(link)
        for name in list(files)[:5]:
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))
    with pytest.raises(DataError, match=r"lacks test_batch\.bin"):
        builtin.read("cifar10", path)


def test_nothing_is_recognised_where_nothing_is(tmp_path: Path) -> None:
    assert builtin.recognise(tmp_path) is None
    assert builtin.recognise(tmp_path / "missing") is None


class Silent(http.server.SimpleHTTPRequestHandler):
    """A server that keeps its log to itself."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A publisher on this machine: (its folder, its address)."""
    folder = tmp_path / "publisher"
    folder.mkdir()
    with http.server.HTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def test_a_download_is_checked_and_kept(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = server
    (folder / "set.bin").write_bytes(b"pictures")
    published = builtin.Published("Set", url, {"set.bin": "sha256:" + hashlib.sha256(b"pictures").hexdigest()})
    builtin.download(published, tmp_path / "cache")
    assert (tmp_path / "cache" / "set.bin").read_bytes() == b"pictures"
    builtin.download(replace(published, url="http://127.0.0.1:1/"), tmp_path / "cache")  # it is there: nobody is asked


def test_a_download_of_something_else_is_thrown_away(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = server
    (folder / "set.bin").write_bytes(b"a login page")
    published = builtin.Published("Set", url, {"set.bin": "md5:" + hashlib.md5(b"pictures").hexdigest()})
    with pytest.raises(DataError, match="checksum differs"):
        builtin.download(published, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("missing", ["no server", "no file"])
def test_a_download_that_fails_says_what_to_put_where(server: tuple[Path, str], tmp_path: Path, missing: str) -> None:
    url = "http://127.0.0.1:1/" if missing == "no server" else server[1]
    cache = tmp_path / "cache"
    with pytest.raises(DataError) as error:
        builtin.download(replace(builtin.CIFAR10, url=url), cache)
    for part in ("CIFAR-10 could not be downloaded", f"{url}cifar-10-binary.tar.gz", f"put it into {cache}", "as DATA"):
        assert part in str(error.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [5, 8, 16])
def test_resizing_all_at_once_equals_one_by_one(channels: int, size: int) -> None:
    images = RNG.integers(0, 256, (7, 8, 8, channels), dtype=np.uint8)
    at_once = builtin.brought_to(images, size, 0)
    rows = [Image.fromarray(image.squeeze(-1) if channels == 1 else image) for image in images]
    assert (at_once == np.stack([fit(row, (size, size), channels=channels) for row in rows])).all()


def test_channels_of_published_sets() -> None:
    grey = RNG.integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    assert (builtin.brought_to(grey, 0, 3) == grey).all()
    rgba = builtin.brought_to(grey, 0, 4)
    assert rgba.shape == (2, 8, 8, 4) and (rgba[..., 3] == 255).all()
    assert builtin.brought_to(np.full((1, 8, 8, 3), (255, 0, 0), np.uint8), 0, 1).max() == 76
