"""Tars and WebDataset shards: what is read, what is refused, and that damage ends in one sentence."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln.data import archives, webdataset
from imagekiln.data.archives import Spool, TarFiles, ZipFiles, files_of
from imagekiln.data.decode import Unusable
from imagekiln.data.files import escapes
from imagekiln.data.scan import Found, Picture, find
from imagekiln.errors import DataError, DiskError, ImagekilnError, UsageError

Content = dict[str, bytes | str]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def tarred(content: Content, *extra: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, data in content.items():
            raw = data.encode() if isinstance(data, str) else data
            tar.addfile(member(name, len(raw)), io.BytesIO(raw))
        for info in extra:
            tar.addfile(info)
    return stream.getvalue()


def written(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def content_of(found: Found, name: str) -> bytes:
    stream = found.files.open(name)
    return stream.read_bytes() if isinstance(stream, Path) else stream.read()


def said(found: Found) -> list[tuple[str, str | None, str | None]]:
    return [(picture.name, picture.label, picture.text) for picture in found.pictures]


CLASSES: Content = {"cat/1.png": b"one" * 300, "dog/1.png": b"two", "dog/deep.txt": "x", "猫/é.png": b""}


# --- tars as folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("prefix", ["", "./", "set/", "./set/"])
def test_a_tar_is_read_like_the_folder_in_it(tmp_path: Path, ending: str, prefix: str) -> None:
    raw = tarred(
        {prefix + name: data for name, data in CLASSES.items()}, member(f"{prefix}empty", kind=tarfile.DIRTYPE)
    )
    found = find(written(tmp_path / f"set.{ending}", PACKERS[ending](raw)))
    assert said(found) == [("cat/1.png", "cat", None), ("dog/1.png", "dog", None), ("猫/é.png", "猫", None)]
    assert {name: content_of(found, name) for name in ("cat/1.png", "dog/1.png", "猫/é.png")} == {
        name: data for name, data in CLASSES.items() if name.endswith("png")
    }
    assert found.files.read("cat/1.png", 4) == b"oneo"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_a_tar_known_by_its_content(tmp_path: Path, form: int) -> None:
    long = "/".join(["长" * 60] * 4) + "/a.png"
    found = find(written(tmp_path / "no-ending", tarred({long: b"x", "b.png": b"y"}, form=form)))
    assert sorted(picture.name for picture in found.pictures) == sorted([long, "b.png"])
    assert content_of(found, long) == b"x"


def test_metadata_captions_and_splits_in_a_tar(tmp_path: Path) -> None:
    inside: Content = {
        "train/1.png": b"",
        "test/2.png": b"",
        "metadata.csv": "file_name,text\ntrain/1.png,a\ntest/2.png,b",
    }
    found = find(written(tmp_path / "set.tar.gz", gzip.compress(tarred(inside))))
    assert found.pictures == [Picture("test/2.png", None, "b", "test"), Picture("train/1.png", None, "a", "train")]


def test_many_threads_read_the_right_bytes(tmp_path: Path) -> None:
    content: Content = {f"{number}.png": bytes([number % 256]) * (number * 37 % 4000) for number in range(200)}
    for path in (
        written(tmp_path / "a.tar", tarred(content)),
        written(tmp_path / "a.tgz", gzip.compress(tarred(content))),
    ):
        found = find(path)
        with ThreadPoolExecutor(8) as pool:
            read = dict(zip(content, pool.map(lambda name: content_of(found, name), content), strict=True))  # noqa: B023
        assert read == content


def test_what_is_unpacked_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    files = TarFiles(written(tmp_path / "a.tgz", gzip.compress(tarred(CLASSES))))
    if os.name != "nt":
        assert list(spare.iterdir()) == [], "the temporary file has no name"
    del files
    assert list(spare.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DiskError, match="Set TMPDIR to a folder with room"):
        find(tmp_path / "a.tgz")
    with pytest.raises(DataError, match="No pictures"):
        find(written(tmp_path / "plain.tar", tarred({"a.txt": ""})))  # a plain tar needs no room


def test_a_changed_tar_changes_its_entries(tmp_path: Path) -> None:
    """Members may all bear the same time, so the archive's own tells whether anything is new."""
    for ending in ("tar", "tgz"):
        path = written(tmp_path / f"a.{ending}", PACKERS[ending](tarred({"a.png": b"1"})))
        before, again = files_of(path).entries, files_of(path).entries
        written(path, PACKERS[ending](tarred({"a.png": b"2"})))
        os.utime(path, ns=(1, 1))
        assert before == again != files_of(path).entries


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
        (b"Z", "not a regular file"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes, what: str) -> None:
    special = member("x/b.png", kind=kind)
    special.linkname = "/etc/passwd"
    with pytest.raises(DataError, match=rf"holds 'x/b\.png', which is {what}\. Make the tar of regular files only"):
        find(written(tmp_path / "a.tar", tarred({"a.png": b""}, special)))


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "C:\\x.png", "a/../../x.png", "..\\x.png", "set/../../setx/a.png"]
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_tar_that_reaches_outside_is_refused(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    path = written(tmp_path / "slip.tar", pack(tarred({"a.png": b"", name: b""})))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="a path that leaves the archive"):
        find(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_tar_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tarred({"a.bmp": bytes(2**20)})
    monkeypatch.setattr(archives, "HARMLESS_BYTES", 2**16)
    for ending in ("tar.gz", "tar.bz2", "tar.xz"):
        with pytest.raises(DataError, match="more than is safe to unpack"):
            find(written(tmp_path / f"bomb.{ending}", PACKERS[ending](raw)))
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 2**16)
    with pytest.raises(DataError, match="more than is safe to unpack"):
        find(tmp_path / "bomb.tar.gz")
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="holds more than 3 files"):
        find(written(tmp_path / "many.tar", tarred(dict.fromkeys("1234", b""))))
    monkeypatch.undo()
    with pytest.raises(DataError, match="It holds 2 archives, which are not opened"):
        find(written(tmp_path / "nested.tar", tarred({"a.tar": raw, "b.zip": b"PK"})))


def test_what_cannot_be_read_in_a_sound_tar_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 2**20)
    content: Content = {"a.png": b"first", "big.png": bytes(2**20 + 1), ".hidden/x.png": b"", "._a.png": b""}
    again = written(tmp_path / "a.tar", tarred(content))
    with tarfile.open(again, "a") as tar:
        tar.addfile(member("a.png", 4), io.BytesIO(b"last"))
    found = find(again)
    assert said(found) == [("a.png", None, None)] and content_of(found, "a.png") == b"last"
    assert dict(found.left_out) == {
        "a.png": "listed 2 times in the tar; the last one counts",
        "big.png": "larger than 1 MB",
    }
    assert found.notices == ["Hidden files and folders were passed over: .hidden, ._a.png."]


def test_a_sparse_member_is_left_out(tmp_path: Path) -> None:
    """A header of 512 bytes that claims a gigabyte of holes."""
    info = member("a.png", kind=tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (2**30, 0)
    header[483:495] = b"%011o\0" % 2**30
    found = find(written(tmp_path / "a.tar", signed(header) + tarred({"b.png": b""})))
    assert said(found) == [("b.png", None, None)] and found.left_out == [("a.png", "sparse file")]


@pytest.mark.parametrize("name", ["a.rar", "b.7z", "c.tar.zst"])
def test_archives_of_other_kinds_say_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"is an archive of a kind that is not read\. Unpack it"):
        find(written(tmp_path / name, b"whatever"))


# --- damage ----------------------------------------------------------------------------------------------------------


def signed(header: bytearray) -> bytes:
    """A header with the right checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    raw = tarred({"a.png": bytes(700), "b.png": b"x"})
    end = len(raw.rstrip(b"\0")) // 512 * 512 + 512
    for size in [*range(0, end, 256), end, end + 100]:
        with pytest.raises(DataError, match=r"is not a whole tar file \(.+\)\. Copy or download it again"):
            find(written(tmp_path / "cut.tar", raw[:size]))
    assert len(find(written(tmp_path / "cut.tar", raw[: end + 512])).pictures) == 2


@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_compressed_tar_cut_or_damaged_is_refused(tmp_path: Path, ending: str) -> None:
    raw = PACKERS[ending](tarred({"a.png": os.urandom(5000)}))
    half = len(raw) // 2
    for damaged in (raw[:half], raw[:-3], raw[:half] + bytes([raw[half] ^ 0xFF]) + raw[half + 1 :]):
        with pytest.raises(DataError, match="is not a whole tar file"):
            find(written(tmp_path / f"a.{ending}", damaged))


def test_a_header_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    raw = bytearray(tarred({"a.png": b"x", "b.png": b"y"}, form=tarfile.USTAR_FORMAT))
    raw[1024] ^= 1  # the name of b.png
    with pytest.raises(DataError, match=r"damaged at byte 1,024"):
        find(written(tmp_path / "a.tar", bytes(raw)))
    with pytest.raises(DataError, match="goes on after its end mark"):
        find(written(tmp_path / "two.tar", tarred({"a.png": b""}) + tarred({"b.png": b""})))
    with pytest.raises(DataError, match="is not a whole tar file"):
        find(written(tmp_path / "false.tar", b"this is no tar" * 100))


def test_headers_that_lie_about_sizes_end(tmp_path: Path) -> None:
    """Sizes below zero send older Pythons in circles (CVE-2025-8194), and digits keep them busy (CVE-2024-6232)."""
    first = tarred({"a.png": b"x"}, form=tarfile.USTAR_FORMAT)[:1024]
    below = bytearray(first[:512])
    below[124:136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
    circles = first + signed(below) + bytes(1024)
    pax = bytearray(member("x", 2**16, tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT))
    digits = signed(pax) + b"1" * 2**16 + first + bytes(1024)
    huge = bytearray(member("x", 2**33 - 1, tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT))
    long_negative = bytearray(member("x", 0, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.USTAR_FORMAT))
    long_negative[124:136] = below[124:136]
    chain = member("x", 0, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.USTAR_FORMAT) * 3000
    for raw in (circles, digits, signed(huge) + first, signed(long_negative) + first + bytes(1024), chain):
        with pytest.raises(DataError, match="is not a whole tar file"):
            find(written(tmp_path / "a.tar", raw))


def test_a_tar_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", tarred({"a.png": b"x" * 600, "b.png": b"y" * 600}))
    found = find(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert content_of(found, "a.png") == b"x" * 600
    with pytest.raises(Unusable, match="cut off in the tar"):
        found.files.open("b.png")
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png in .*a\.tar cannot be read: the tar cannot be read any more"):
        found.files.read("a.png", 3)


SOUND = tarred({"train/a.png": b"x" * 600, "train/b.png": b"y", "长" * 50 + ".txt": "z"}) + bytes(512)


@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_mutated_tar_is_listed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], packed: bool
) -> None:
    raw = bytearray(gzip.compress(SOUND, mtime=0) if packed else SOUND)
    for place, value in changes:
        raw[place % len(raw)] = value
    path = written(tmp_path_factory.getbasetemp() / "mutated.tar", bytes(raw))
    try:
        files = files_of(path)
        assert not any(escapes(name) for name in files.entries)
        assert all(isinstance(files.read(name, 10), bytes) for name in files.entries)
    except ImagekilnError as error:
        assert str(error).isprintable()


NAMES = st.lists(
    st.sampled_from(["a", "b.png", "..", ".", "", "C:", ".x", "\\", "é", "\x1b[1m"]), min_size=1, max_size=4
)


@given(st.lists(st.tuples(NAMES, st.sampled_from("/\\")), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_names_in_archives_stay_inside_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[list[str], str]]
) -> None:
    root = tmp_path_factory.getbasetemp()
    content: Content = {separator.join(name): b"data" for name, separator in parts}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name or "x"), data)
    for kind, path in (
        (TarFiles, written(root / "names.tar", tarred(content))),
        (ZipFiles, written(root / "names.zip", stream.getvalue())),
    ):
        try:
            files = kind(path)
        except DataError as error:
            assert str(error).isprintable()
            continue
        for name in files.entries:
            assert not escapes(name) and Path(os.path.normpath(Path("/root") / name)).is_relative_to("/root")
            assert files.read(name, 10) == b"data"


# --- shards ----------------------------------------------------------------------------------------------------------


def shard(first: int, count: int = 2, **more: str) -> bytes:
    content: Content = {}
    for number in range(first, first + count):
        content |= {f"{number:04d}.jpg": b"%d" % number, f"{number:04d}.cls": str(number % 2)}
        content |= {f"{number:04d}.txt": f"picture {number}"}
    return tarred(content | {name.replace("_", "."): text for name, text in more.items()})


def test_one_shard(tmp_path: Path) -> None:
    found = find(written(tmp_path / "set.tar", shard(0, 3)))
    assert said(found) == [
        ("0000.jpg", "0", "picture 0"),
        ("0001.jpg", "1", "picture 1"),
        ("0002.jpg", "0", "picture 2"),
    ]
    assert content_of(found, "0002.jpg") == b"2"


@pytest.mark.parametrize("list_of_names", ["classes.txt", "classnames.txt"])
def test_a_list_of_names_names_the_numbers(tmp_path: Path, list_of_names: str) -> None:
    inside = {list_of_names.replace(".", "_"): "cat\r\n two words \n"}
    found = find(written(tmp_path / "set.tar", shard(0, 2, **inside)))
    assert [picture.label for picture in found.pictures] == ["cat", "two words"]
    with pytest.raises(DataError, match=r"0001\.jpg has the label 1, but .* names 1 classes, numbered from 0"):
        find(written(tmp_path / "set.tar", shard(0, 2, **{list_of_names.replace(".", "_"): "cat\n"})))


def test_json_beside_pictures(tmp_path: Path) -> None:
    rows: dict[str, dict[str, object]] = {
        "a": {"label": 3, "text": "x"},
        "b": {"label": "cat", "caption": "y", "url": "z"},
        "c": {"label": -1, "text": None},
    }
    content: Content = {f"{key}.png": b"" for key in rows} | {
        f"{key}.json": json.dumps(row) for key, row in rows.items()
    }
    assert said(find(written(tmp_path / "set.tar", tarred(content)))) == [
        ("a.png", "3", "x"),
        ("b.png", "cat", "y"),
        ("c.png", None, None),
    ]
    for broken, message in (
        ("[1]", "expected an object"),
        ("{", "is not JSON"),
        ('{"label": [1]}', "expected a whole"),
    ):
        with pytest.raises(DataError, match=rf"b\.json in .*{message}"):
            find(written(tmp_path / "set.tar", tarred(content | {"b.json": broken})))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(3):
        raw = shard(0 if number < 2 else 7)
        written(tmp_path / "sets" / f"s-{number:03d}.tar", gzip.compress(raw) if number == 1 else raw)
    return tmp_path / "sets"


@pytest.mark.parametrize("pattern", ["s-{000..002}.tar", "s-*.tar", "s-00[0-2].tar", "s-00{0,1,2}.tar", ""])
def test_several_shards(shards: Path, pattern: str) -> None:
    """Keys repeat from shard to shard, and a compressed one lies among plain ones."""
    (shards / "README.md").write_text("not a shard")
    found = find(shards / pattern if pattern else shards)
    assert said(found) == [
        (f"s-{number:03d}/{key:04d}.jpg", str(key % 2), f"picture {key}")
        for number, key in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 7), (2, 8)]
    ]
    assert [content_of(found, picture.name) for picture in found.pictures] == [b"0", b"1", b"0", b"1", b"7", b"8"]
    assert found.notices == [] and found.left_out == []


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s-{000..004}.tar", r"2 of 5 shards of .* are missing: .*s-003\.tar, .*s-004\.tar\."),
        ("t-*.tar", "stands for no file that is there"),
        ("t-{0..3}.tar", "stands for no file that is there"),
        ("s-{0..999999999}.tar", "stands for more than 100,000 shards"),
        ("{1..999}{1..999}.tar", "stands for more than 100,000 shards"),
        ("*.jpg", r"stands for .*x\.jpg, which is no tar; .* give the folder they lie in"),
        ("s-000.tar/{1,2}", "stands for no file that is there"),
    ],
)
def test_patterns_that_stand_for_nothing_usable(shards: Path, pattern: str, message: str) -> None:
    (shards / "x.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        find(shards / pattern)


def test_a_name_with_signs_of_a_pattern_is_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "my [best] {1,2} *pictures*; $HOME"
    written(folder / "a.png", b"")
    assert said(find(folder)) == [("a.png", None, None)]


def test_samples_that_are_not_plain(tmp_path: Path) -> None:
    content: Content = {
        "two.jpg": b"1",
        "two.png": b"2",
        "two.seg.png": b"3",
        "two.cls": "1",
        "one.input.png": b"4",
        "one.cls": "0",
        "bare.cls": "1",
        "bare.txt": "x",
        "README.md": "y",
        "cls.JPG": b"5",
        "cls.cls": "cat\n",
    }
    found = find(written(tmp_path / "set.tar", tarred(content)))
    assert said(found) == [("cls.JPG", "cat", None), ("one.input.png", "0", None), ("two.jpg", "1", None)]
    assert found.left_out == [
        ("two.png", "its sample holds several pictures; two.jpg counts"),
        ("two.seg.png", "its sample holds several pictures; two.jpg counts"),
    ]
    assert found.notices == ["1 samples hold no picture."]


def test_folders_name_classes_where_samples_do_not(tmp_path: Path) -> None:
    content: Content = {f"{folder}/{folder}.{end}": "{}" for folder in ("cat", "dog") for end in ("png", "json")}
    written(tmp_path / "0.tar", tarred(content))
    written(tmp_path / "1.tar", tarred(content))
    assert [picture.label for picture in find(tmp_path / "0.tar").pictures] == ["cat", "dog"]
    assert [picture.label for picture in find(tmp_path).pictures] == ["cat", "dog"] * 2


def test_splits_in_the_names_of_shards(tmp_path: Path) -> None:
    written(tmp_path / "set-train-000.tar", shard(0))
    written(tmp_path / "set-val-000.tar", shard(0))
    assert [picture.split for picture in find(tmp_path).pictures] == ["train"] * 2 + ["validation"] * 2
    for place, name in enumerate(["train/0.tar", "train/1.tar", "test/0.tar"]):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path / "in" / name, shard(place, 1))
    assert {p.name: p.split for p in find(tmp_path / "in").pictures} == {
        "train-0/0000.jpg": "train",
        "1/0001.jpg": "train",
        "test-0/0002.jpg": "test",
    }


def test_shards_that_do_not_agree_or_hold_nothing(tmp_path: Path) -> None:
    written(tmp_path / "a.tar", shard(0, 2, classes_txt="x\ny"))
    written(tmp_path / "b.tar", shard(0, 2, classes_txt="y\nx"))
    with pytest.raises(DataError, match=r"lists of classes differ: a/classes\.txt, b/classes\.txt"):
        find(tmp_path)
    written(tmp_path / "empty" / "a.tar", tarred({"a.cls": "1"}))
    with pytest.raises(DataError, match="No pictures in"):
        find(tmp_path / "empty")
    with pytest.raises(DataError, match=r"a\.tar is not a whole tar file"):
        find(written(tmp_path / "cut" / "a.tar", shard(0)[:1000]).parent)


def test_captions_of_shards_in_other_encodings(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", tarred({"1.png": b"", "1.cls": "0", "1.txt": "白猫".encode("gb18030")}))
    with pytest.raises(DataError, match=r"The caption 1\.txt in .* gb18030 reads '白猫'"):
        find(path)
    assert said(find(path, caption_encoding="gb18030")) == [("1.png", "0", "白猫")]


def test_addresses_need_fsspec_and_paths_do_not(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert len(find(shards / "s-{000..002}.tar").pictures) == 6
    for address in ("s3://bucket/a-{0..1}.tar", "http://127.0.0.1:9/a.tar", Path("s3://bucket/a.tar")):
        with pytest.raises(UsageError, match=r"needs fsspec\. Install it with pip install 'imagekiln\[shards\]'"):
            find(address)


def test_shards_behind_addresses(shards: Path) -> None:
    pytest.importorskip("fsspec")
    addresses = [
        f"file://{shards.as_posix()}/s-{{000..001}}.tar",
        Path(f"file://{shards.as_posix()}/s-{{000..001}}.tar"),
    ]
    for address in addresses:
        found = find(address)
        assert said(found) == said(find(shards / "s-{000..001}.tar"))
        assert [content_of(found, picture.name) for picture in found.pictures] == [b"0", b"1", b"0", b"1"]
        assert found.files.entries == find(address).files.entries
    with pytest.raises(UsageError, match=r"s-009\.tar cannot be read .* Check the address and the rights to it"):
        find(f"file://{shards.as_posix()}/s-009.tar")
    with pytest.raises(UsageError, match=r"cannot be read .* Check the address"):
        find("nosuchscheme://x/a.tar")


def test_keys_end_at_the_first_dot() -> None:
    assert webdataset.key_of("a.b/c.d.png") == ("a.b/c", "d.png")


def test_a_spool_gives_back_what_it_took() -> None:
    spool = Spool()
    places = [spool.add([b"ab", b"", b"c" * number]) for number in range(5)]
    assert [spool.read(*place) for place in places] == [b"ab" + b"c" * number for number in range(5)]
    assert spool.num_bytes == sum(size for _, size in places)
