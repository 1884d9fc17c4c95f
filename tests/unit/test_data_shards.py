"""Shards: what is written comes back bit for bit, other programs read it, and damage is one clear sentence."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imagekiln.config import DataConfig
from imagekiln.core import Source
from imagekiln.data import decode, shard_index, shards
from imagekiln.data.shard_index import is_set, open_shards
from imagekiln.data.shards import Row, ShardSource, sources, write
from imagekiln.data.source import MemmapSource, Table, digest
from imagekiln.errors import DataError, DiskError, UsageError

CLASSES = ("cat", "dog")


def pixels(number: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, channels), dtype=np.uint8)


def rows(count: int = 10, **size: int) -> list[Row]:
    texts = (None, "a caption: 貓 😀", "")
    return [Row(pixels(n, **size), f"some/{n}.jpg", n % 3 - 1, texts[n % 3]) for n in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures in five tars."""
    write(rows(), tmp_path / "set", class_names=CLASSES, shard_bytes=4000)
    assert len(list((tmp_path / "set").glob("*.tar"))) == 5
    return tmp_path / "set"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_source_of_shards_equals_one_in_memory(tmp_path: Path, format: Any, channels: int) -> None:
    given = rows(7, height=6, width=9, channels=channels)
    images_NCHW = np.stack([row.pixels_HWC.transpose(2, 0, 1) for row in given])
    if channels == 4:  # nobody sees the colour under full transparency: `decode.fit` takes it away
        images_NCHW = np.where(images_NCHW[:, 3:] == 0, 0, images_NCHW)
    digests, labels = [digest(image) for image in images_NCHW], np.array([row.label for row in given])
    captions = [row.text for row in given]
    chosen = np.array([6, 0, 3])
    plain = MemmapSource(Table(images_NCHW, labels, CLASSES, digests, [row.file for row in given], captions), chosen)
    opened = write(given, tmp_path / "set", class_names=CLASSES, format=format, shard_bytes=2000)
    source = ShardSource(opened, chosen)
    assert isinstance(source, Source) and len(source) == 3 and source.image_shape == plain.image_shape
    for indices in ([0, 1, 2], [2, 2], [], [-1]):
        ours, theirs = source.read(indices), plain.read(indices)
        assert ours.images.dtype == torch.uint8 and torch.equal(ours.images, theirs.images)
        assert ours.labels is not None and theirs.labels is not None and torch.equal(ours.labels, theirs.labels)
    assert list(source.files) == plain.files and source.captions is not None
    assert list(source.captions) == plain.captions and source.captions[1:] == plain.captions[1:]
    assert channels == 4 or opened.digests == digests


def test_pictures_of_many_sizes_are_brought_to_one(tmp_path: Path) -> None:
    given = [Row(pixels(n, 5 + n, 12 - n, (1, 3, 4)[n % 3]), str(n)) for n in range(6)]
    opened = write(given, tmp_path / "set")
    with pytest.raises(UsageError, match=r"6 sizes.*data\.size"):
        ShardSource(opened)
    source = ShardSource(opened, size=(7, 7), channels=3, fit="pad", background="red")
    for index, row in enumerate(given):
        array = row.pixels_HWC[..., 0] if row.pixels_HWC.shape[2] == 1 else row.pixels_HWC
        expected = decode.fit(Image.fromarray(array), (7, 7), "pad", "red")
        assert (source.read([index]).images[0].numpy() == expected.transpose(2, 0, 1)).all()
    assert source.read([0]).labels is None and source.captions is None and source.num_classes == 0


def test_jpeg_is_near_and_says_the_digest_it_was_given(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    opened = write([Row(smooth, "a", digest="ab" * 16)], tmp_path / "set", format="jpg")
    read = ShardSource(opened).read([0]).images[0].permute(1, 2, 0).numpy()
    assert np.abs(read.astype(int) - smooth).mean() < 2 and opened.digests == ["ab" * 16]


def test_what_is_kept_is_what_is_read(folder: Path) -> None:
    """Reading twice, with room for all, for some and for none: the same pictures."""
    opened, order = open_shards(folder), [3, 9, 3, 0, 9, 1, 2, 3]
    whole = ShardSource(opened)
    first, again = whole.read(order).images, whole.read(order).images
    assert torch.equal(first, again)
    for room in (0, 2 * 8 * 8 * 3):
        source = ShardSource(opened, cache_bytes=room)
        assert all(torch.equal(source.read(order).images, first) for _ in range(2))
        assert source._kept._pixels.nbytes <= room


def test_the_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    opened = open_shards(folder)
    same = open_shards(shutil.copytree(folder, tmp_path / "moved"))
    changed = [*rows()[:-1], Row(pixels(99), "some/9.jpg", -1)]
    other = write(changed, tmp_path / "other", class_names=CLASSES, shard_bytes=4000)
    assert ShardSource(opened).fingerprint == ShardSource(same).fingerprint
    different = [
        ShardSource(opened),
        ShardSource(opened, np.arange(10)[::-1]),
        ShardSource(opened, np.arange(9)),
        ShardSource(opened, size=(4, 4)),
        ShardSource(opened, fit="pad"),
        ShardSource(other),
    ]
    assert len({source.fingerprint for source in different}) == len(different)


def test_the_sides_are_the_marked_ones_or_by_content(tmp_path: Path) -> None:
    marks = ["train", "validation", "test", "train", "validation"]
    marked = write([Row(pixels(n), str(n), split=mark) for n, mark in enumerate(marks)], tmp_path / "marked")
    train, validation, test = sources(marked, DataConfig())
    assert test is not None
    assert [list(side.files) for side in (train, validation, test)] == [["0", "3"], ["1", "4"], ["2"]]
    plain = write([Row(pixels(n), str(n)) for n in range(40)], tmp_path / "plain")
    train, validation, test = sources(plain, DataConfig(validation_fraction=0.3))
    expected = [str(n) for n, text in enumerate(plain.digests) if int(text[:13], 16) / 16**13 < 0.3]
    assert list(validation.files) == expected and len(train) == 40 - len(expected) and test is None
    train, validation, _ = sources(plain, DataConfig(validation_fraction=0.0, size=4))
    assert train is validation and train.image_shape == (3, 4, 4)
    lost = write([Row(pixels(0), "0", split="test")], tmp_path / "lost")
    with pytest.raises(DataError, match="set aside for a test"):
        sources(lost, DataConfig())


# --- what is written ------------------------------------------------------------------------------------------------


def test_equal_rows_make_equal_bytes(folder: Path, tmp_path: Path) -> None:
    write(iter(rows()), tmp_path / "again", class_names=CLASSES, shard_bytes=4000)
    assert content(folder) == content(tmp_path / "again")


def test_the_tars_are_plain_and_the_index_is_true(folder: Path) -> None:
    opened, number = open_shards(folder), 0
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as archive:
            members = archive.getmembers()
            assert {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode, m.type) for m in members} == {
                (0, 0, "", "", 0, 0o644, tarfile.REGTYPE)
            }
            for picture, about in zip(members[::2], members[1::2], strict=True):
                assert (picture.name, about.name) == (f"{number:09d}.png", f"{number:09d}.json")
                assert picture.offset_data == opened.table["offset"][number]
                assert about.offset_data == opened.table["about_offset"][number]
                stream = archive.extractfile(picture)
                assert stream is not None and stream.read() == opened.member(number)
                number += 1
    assert number == len(opened) == 10
    given = rows()[1]
    assert opened.about(1) == {
        "file_name": given.file,
        "digest": digest(given.pixels_HWC.transpose(2, 0, 1)),
        "label": 0,
        "text": given.text,
    }


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_library_webdataset_reads_them(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(file) for file in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()  # it leaves its files open, and is not to blame the test that comes next
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(10)]
    for row, sample in zip(rows(), samples, strict=True):
        assert (np.asarray(Image.open(io.BytesIO(sample["png"]))) == row.pixels_HWC).all()
        assert json.loads(sample["json"])["file_name"] == row.file


def test_a_set_is_complete_or_absent(tmp_path: Path) -> None:
    def broken() -> Iterator[Row]:
        yield from rows(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(broken(), tmp_path / "set", class_names=CLASSES, shard_bytes=2000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "options", "error", "words"),
    [
        (Row(pixels(0, 3, 3), "tiny.png"), {}, DataError, "tiny.png.*3x3 is below"),
        (Row(pixels(0, 4, 90), "bar.png"), {}, DataError, "narrower than 1:20"),
        (Row(pixels(0).astype(np.float32), "f"), {}, UsageError, "expected uint8"),
        (Row(pixels(0, channels=2), "f"), {}, UsageError, "1, 3 or 4 channels"),
        (Row(pixels(0, channels=4), "f"), {"format": "jpg"}, UsageError, "transparency"),
        (Row(pixels(0), "f", label=2), {}, UsageError, "label 2 of 2 classes"),
        (Row(pixels(0), "f", split="tests"), {}, UsageError, "split 'tests'"),
        (Row(pixels(0), "f"), {"format": "gif"}, UsageError, "png, jpg, webp"),
        (None, {}, DataError, "no pictures"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, row: Row | None, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        write([row] if row else [], tmp_path / "set", class_names=CLASSES, **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_overwritten(folder: Path) -> None:
    before = content(folder)
    with pytest.raises(UsageError, match="is there already"):
        write(rows(), folder, class_names=CLASSES)
    assert content(folder) == before
    with pytest.raises(DiskError, match="cannot be written"):
        write(rows(), folder / "index.json" / "set", class_names=CLASSES)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_missing_or_cut_shard_is_named(folder: Path) -> None:
    shard = folder / "shard-000003.tar"
    whole = shard.read_bytes()
    opened = open_shards(folder)
    shard.write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"shard-000003.tar has 700 bytes instead of"):
        open_shards(folder)
    with pytest.raises(DataError, match=r"shard-000003.tar is cut at byte 700"):
        ShardSource(opened).read(range(10))
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000003.tar cannot be read \(No such file"):
        open_shards(folder)
    with pytest.raises(DataError, match=r"shard-000003.tar cannot be read"):
        ShardSource(open_shards(f"file://{folder}")).read(range(10))


def test_a_damaged_picture_is_named_and_the_others_are_read(folder: Path) -> None:
    opened = open_shards(folder)
    opened.verify()
    shard, place = folder / "shard-000001.tar", int(opened.table["offset"][2]) + 60
    raw = bytearray(shard.read_bytes())
    raw[place] ^= 0x55
    shard.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"Picture 2 in .*shard-000001.tar is damaged"):
        ShardSource(opened).read([1, 2])
    assert len(ShardSource(opened).read([0, 1, 3, 4]).images) == 4
    with pytest.raises(DataError, match=r"shard-000001.tar is damaged: its checksum differs"):
        opened.verify()


def test_verify_sees_what_no_decoder_sees(folder: Path) -> None:
    opened = open_shards(folder)
    shard = folder / "shard-000004.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(b"some/9.jpg", b"some/8.jpg"))
    assert ShardSource(opened).files[9] == "some/8.jpg"
    with pytest.raises(DataError, match="checksum"):
        opened.verify()
    shard.write_bytes(raw + b"more")
    with pytest.raises(DataError, match="checksum"):
        opened.verify()


def test_a_place_without_a_set_is_a_usage_error(tmp_path: Path, folder: Path) -> None:
    for where in (tmp_path, tmp_path / "nowhere", "memory://nowhere"):
        with pytest.raises(UsageError, match=r"holds no index\.json"):
            open_shards(where)
    with pytest.raises(UsageError, match="cannot be opened"):
        open_shards("nosuchstore://set")
    assert is_set(folder) and not is_set(tmp_path)


def test_a_newer_index_asks_for_an_update(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(DataError, match="newer version"):
        open_shards(folder)


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(below, (*at, key))


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({})
)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_wrong_index_is_a_data_error(folder: Path, data: st.DataObject) -> None:
    """One value anywhere in the index replaced by another: refused in one sentence, or read without harm."""
    raw = (folder / "index.json").read_bytes()
    index = json.loads(raw)
    at = data.draw(st.sampled_from(list(paths_of(index))[1:]))
    changed = copy.deepcopy(index)
    holder = changed
    for key in at[:-1]:
        holder = holder[key]
    holder[at[-1]] = data.draw(ODD)
    try:
        (folder / "index.json").write_text(json.dumps(changed))
        opened = open_shards(folder)
        ShardSource(opened, size=(8, 8)).read(range(len(opened)))
    except DataError as error:
        assert "\n" not in str(error)
    finally:
        (folder / "index.json").write_bytes(raw)


@given(st.binary(max_size=60), st.integers(0, 1500))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_damaged_index_is_a_data_error(folder: Path, noise: bytes, place: int) -> None:
    raw = (folder / "index.json").read_bytes()
    (folder / "index.json").write_bytes(raw[:place] + noise)
    try:
        with pytest.raises(DataError):
            open_shards(folder)
    finally:
        (folder / "index.json").write_bytes(raw)


# --- where they lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [0, 700, 10**6])
def test_any_store_gives_the_same_pictures(folder: Path, piece_bytes: int) -> None:
    fsspec = pytest.importorskip("fsspec")
    expected = ShardSource(open_shards(folder))
    memory = fsspec.filesystem("memory")
    memory.rm("/shards-test", recursive=True) if memory.exists("/shards-test") else None
    for name, raw in content(folder).items():
        memory.pipe_file(f"/shards-test/{name}", raw)
    for where in (f"file://{folder}", "memory://shards-test", "memory://shards-test/"):
        opened = open_shards(where, piece_bytes=piece_bytes)
        opened.verify()
        source = ShardSource(opened)
        assert torch.equal(source.read(range(10)).images, expected.read(range(10)).images)
        assert source.fingerprint == expected.fingerprint and list(source.files) == list(expected.files)
    memory.rm("/shards-test", recursive=True)


def test_fsspec_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(UsageError, match=r"imagekiln\[shards\]"):
        open_shards(f"file://{folder}")


def test_few_files_are_open_and_none_is_left_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files in /proc")
    monkeypatch.setattr(shard_index, "_OPEN_FILES", 2)

    def open_tars() -> int:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).endswith(".tar") for link in links if os.path.lexists(link))

    source = ShardSource(open_shards(folder), cache_bytes=0)
    for index in [0, 9, 5, 3, 7, 1]:
        source.read([index])
        assert open_tars() <= 2
    del source
    assert open_tars() == 0


def test_defaults_are_bounded() -> None:
    assert shards.CACHE_BYTES <= 2**28 and shards.SHARD_BYTES <= 2**30
