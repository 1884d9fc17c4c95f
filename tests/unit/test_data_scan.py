"""Folders and zips as people have them: what is found, what is left out and why, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagekiln.data import archives, scan
from imagekiln.data.archives import files_of
from imagekiln.data.files import escapes, printable
from imagekiln.data.scan import EXTENSIONS, Found, class_names, find
from imagekiln.errors import DataError, UsageError


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), value).save(stream, "PNG")
    return stream.getvalue()


def lay(root: Path, content: dict[str, bytes | str]) -> Path:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def zipped(path: Path, content: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def names(found: Found) -> list[str]:
    return [picture.name for picture in found.pictures]


def test_a_folder_that_is_not_there_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=r"does not exist\. Did you mean '.*photos'"):
        find(tmp_path / "fotos")
    with pytest.raises(UsageError, match=r"does not exist\.$"):
        find(tmp_path / "something-else-entirely" / "deep")


def test_an_empty_folder_says_where_it_looked_and_for_what(tmp_path: Path) -> None:
    lay(tmp_path, {"notes.txt": "nothing"})
    with pytest.raises(DataError, match="No pictures in ") as error:
        find(tmp_path)
    assert str(tmp_path) in str(error.value) and all(ending in str(error.value) for ending in EXTENSIONS)


def test_a_single_picture_is_not_a_set(tmp_path: Path) -> None:
    lay(tmp_path, {"a.png": png()})
    with pytest.raises(UsageError, match=re.escape(f"give the folder it lies in: {tmp_path}")):
        find(tmp_path / "a.png")


def test_endings_in_any_case_and_folders_of_folders(tmp_path: Path) -> None:
    wanted = ["a.JPG", "b.Jpeg", "c.PNG", "d/e.webp", "d/f/g.TIFF"]
    found = find(lay(tmp_path, dict.fromkeys(wanted, png())))
    assert names(found) == sorted(wanted)
    assert all(picture.label is None for picture in found.pictures)
    assert "folders of folders" in found.notices[0] and "metadata.csv" in found.notices[0]


def test_what_operating_systems_leave_behind_is_ignored(tmp_path: Path) -> None:
    hidden = [".hidden/a.png", "__MACOSX/a.png", "Thumbs.db", "cats/._x.png", ".x.jpg"]
    found = find(lay(tmp_path, dict.fromkeys([*hidden, "cats/a.png", "dogs/b.png"], png())))
    assert names(found) == ["cats/a.png", "dogs/b.png"] and found.left_out == []
    assert found.notices == ["Hidden files and folders were passed over: .hidden, .x.jpg, __MACOSX, cats/._x.png."]


def test_class_folders(tmp_path: Path) -> None:
    found = find(lay(tmp_path, dict.fromkeys(["猫/1.png", "a b/2.png", "beside.png"], png())))
    assert {picture.name: picture.label for picture in found.pictures} == {
        "猫/1.png": "猫",
        "a b/2.png": "a b",
        "beside.png": None,
    }


def test_one_folder_is_no_class(tmp_path: Path) -> None:
    found = find(lay(tmp_path, {"images/1.png": png(), "images/2.png": png()}))
    assert [picture.label for picture in found.pictures] == [None, None]


def test_strange_names_are_found_and_shown_escaped(tmp_path: Path) -> None:
    strange = ["new\nline.png", "\x1b[31mred.png", "=HYPERLINK(1).png", "$(rm -rf ~); '\".png", "训练图片.png"]
    found = find(lay(tmp_path, dict.fromkeys(strange, png())))
    assert sorted(names(found)) == sorted(strange)
    assert all(printable(name).isprintable() for name in names(found))


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(raw, "wb") as stream:
        stream.write(png())
    found = find(tmp_path)
    assert len(found.pictures) == 1
    printable(names(found)[0]).encode("utf-8")


def test_formats_that_are_not_read_are_listed_with_what_to_do(tmp_path: Path) -> None:
    found = find(lay(tmp_path, {"a.heic": b"x", "b.SVG": b"x", "c.png": png(), "d.cr2": b"x"}))
    assert dict(found.left_out) == {
        "a.heic": "HEIC is not read; convert it to JPEG or PNG",
        "b.SVG": "SVG is not read; convert it to JPEG or PNG",
        "d.cr2": "camera RAW is not read; convert it to JPEG or PNG",
    }


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {"a.png": png()})
    lay(tmp_path, {"secret.png": png()})
    (root / "same.png").symlink_to(root / "a.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "gone.png").symlink_to(root / "nothing.png")
    (root / "up.png").symlink_to(root)
    (root / "around").symlink_to(root)
    found = find(root)
    assert names(found) == ["a.png", "same.png"]
    assert dict(found.left_out) == {
        "gone.png": "link that leads nowhere",
        "loop.png": "link that leads nowhere",
        "out.png": "link that leaves the folder",
        "up.png": "link to a folder",
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_is_left_out_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(lay(tmp_path, {"a.png": png()}) / "pipe.png")
    found = find(tmp_path)
    assert names(found) == ["a.png"] and found.left_out == [("pipe.png", "not a regular file")]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_left_out(tmp_path: Path) -> None:
    lay(tmp_path, {"a.png": png(), "locked/b.png": png()})
    (tmp_path / "locked").chmod(0)
    try:
        found = find(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o755)
    assert names(found) == ["a.png"] and found.left_out == [("locked/", "permission denied")]


PICTURES = {"a.png": png(), "b.png": png()}


@pytest.mark.parametrize(
    "table",
    [
        "file_name,text,label\na.png,one,cat\nb.png,two,dog\n",
        "\ufefffile_name,text,label\r\na.png,one,cat\r\nb.png,two,dog\r\n",
        "text;label;file_name\none;cat;a.png\ntwo;dog;b.png",
        "file_name\ttext\tlabel\na.png\tone\tcat\nb.png\ttwo\tdog",
        'file_name,text,label\n"a.png","one","cat"\n\nb.png,two,dog\n',
    ],
)
def test_tables_of_any_make(tmp_path: Path, table: str) -> None:
    found = find(lay(tmp_path, {**PICTURES, "metadata.csv": table}))
    assert [(p.name, p.label, p.text) for p in found.pictures] == [("a.png", "cat", "one"), ("b.png", "dog", "two")]
    assert found.left_out == [] and found.notices == []


def test_utf16_with_its_mark_and_quoted_line_breaks(tmp_path: Path) -> None:
    table = 'file_name,text\na.png,"two\nlines"\nb.png,"<script>{{7*7}}%s"\n'
    found = find(lay(tmp_path, {**PICTURES, "metadata.csv": table.encode("utf-16")}))
    assert [picture.text for picture in found.pictures] == ["two\nlines", "<script>{{7*7}}%s"]


def test_jsonl_with_numbers_and_gaps(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "label": 7, "text": "x\u2028y\0"}, {"file_name": "b.png", "label": -1, "text": ""}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    found = find(lay(tmp_path, {**PICTURES, "metadata.jsonl": text.replace("y", "y\\ud83d")}))
    assert [(p.label, p.text) for p in found.pictures] == [("7", "x\u2028y"), (None, None)]


def test_folders_name_the_classes_where_the_table_has_none(tmp_path: Path) -> None:
    table = "file_name,text\ncat/1.png,a\ndog/1.png,b\n"
    found = find(lay(tmp_path, {"cat/1.png": png(), "dog/1.png": png(), "metadata.csv": table}))
    assert [(p.label, p.text) for p in found.pictures] == [("cat", "a"), ("dog", "b")]


def test_rows_and_pictures_that_do_not_meet(tmp_path: Path) -> None:
    found = find(lay(tmp_path, {**PICTURES, "metadata.csv": "file_name\na.png\nzzz.png\n"}))
    assert names(found) == ["a.png"]
    assert found.left_out == [("b.png", "no row in metadata.csv")]
    assert found.notices == ["1 rows of metadata.csv name no picture that is there."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "path,text\na.png,x\n", "has no column file_name. Columns found: path, text"),
        ("metadata.csv", "", "has no column file_name. Columns found: none"),
        ("metadata.csv", "file_name\n../../etc/passwd\n", r"line 2: file_name '../../etc/passwd' leaves the folder"),
        ("metadata.csv", "file_name\n/etc/passwd\n", "line 2: file_name '/etc/passwd' leaves the folder"),
        ("metadata.csv", "file_name\nC:\\x.png\n", "leaves the folder"),
        ("metadata.csv", "file_name\nno.png\n", "No row of metadata.csv"),
        (
            "metadata.csv",
            "file_name,text\na.png,a cat, on a sofa\n",
            "line 2 has more values than there are columns. Put",
        ),
        ("metadata.csv", "file_name;text;label\na.png;a;b;cat\n", "a text that holds ';' between double quotes"),
        ("metadata.csv", "file_name\n" + "x" * 200_000 + "\n", "cannot be read as CSV"),
        ("metadata.csv", "file_name,text\na.png,白色的猫\n".encode("gb18030"), "metadata.csv is not UTF-8"),
        ("metadata.jsonl", '{"file": "a.png"}', "line 1: there is no file_name. Columns found: file"),
        ("metadata.jsonl", '{"file_name": 3}', "there is no file_name"),
        ("metadata.jsonl", "[1]", "line 1: expected an object"),
        ("metadata.jsonl", "\n{", "line 2 is not JSON"),
        ("metadata.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', "text is 3; expected a string"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": [3]}', r"label is \[3\]; expected"),
        ("a.txt", "白色的猫".encode("gb18030"), "caption a.txt in .* is not UTF-8"),
    ],
)
def test_metadata_that_cannot_be_right(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find(lay(tmp_path, {**PICTURES, name: content}))


def test_two_tables_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Keep one of them"):
        find(lay(tmp_path, {**PICTURES, "metadata.csv": "file_name\n", "metadata.jsonl": ""}))


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    texts = {"a.txt": "\ufeff  a cat 🐈 \r\n", "b.txt": "\0 ", "c.txt": "猫".encode("utf-16"), "d.txt": "长" * 100_000}
    found = find(lay(tmp_path, {**dict.fromkeys(["a.png", "b.png", "c.png", "d.png", "e.png"], png()), **texts}))
    assert [picture.text for picture in found.pictures] == ["a cat 🐈", None, "猫", "长" * 10_000, None]
    assert found.notices == ["The caption d.txt was cut to 10,000 characters."]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_caption_outside_the_folder_is_never_read(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {"a.png": png()})
    lay(tmp_path, {"secret.txt": "secret"})
    (root / "a.txt").symlink_to(tmp_path / "secret.txt")
    assert find(root).pictures[0].text is None


def test_numbers_sort_as_numbers() -> None:
    assert class_names(["10", "9", "-x"]) == ("-x", "10", "9")
    assert class_names(["10", "9", "009", None]) == ("009", "9", "10")


def test_a_zip_is_read_like_the_folder_in_it(tmp_path: Path) -> None:
    table = "file_name,text\ncat/1.png,a\ndog/1.png,b\n"
    inside = {"cat/1.png": png(), "dog/1.png": png(9), "metadata.csv": table}
    for prefix in ("", "set/"):
        path = zipped(tmp_path / "set.ZIP", {prefix + name: data for name, data in inside.items()})
        found = find(path)
        assert [(p.name, p.label, p.text) for p in found.pictures] == [
            ("cat/1.png", "cat", "a"),
            ("dog/1.png", "dog", "b"),
        ]
        stream = found.files.open("dog/1.png")
        assert not isinstance(stream, Path) and stream.read() == png(9)


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "C:\\x.png", "a/../../x.png", "..\\x.png", "set/../../setx/a.png"]
)
def test_a_zip_that_reaches_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "slip.zip", {"a.png": png(), name: png()})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="a path that leaves the archive"):
        find(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_zip_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="more than is safe"):
        find(zipped(tmp_path / "bomb.zip", {"a.bmp": bytes(80 * 2**20)}))
    nested = zipped(tmp_path / "nested.zip", {f"{index}.zip": png() for index in range(3)})
    with pytest.raises(DataError, match="No pictures"):
        find(nested)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="lists 4 files; at most 3"):
        find(zipped(tmp_path / "many.zip", dict.fromkeys("1234", b"")))


def test_a_zip_of_a_million_members_is_refused_before_they_are_listed(tmp_path: Path) -> None:
    raw = zipped(tmp_path / "a.zip", {"a": b""}).read_bytes()
    start, end = raw.index(b"PK\1\2"), raw.index(b"PK\5\6")
    num, size = 10**6, 10**6 * (end - start)
    last = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, num, num, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
    crowd = raw[:start] + raw[start:end] * num + last + locator + raw[end : end + 8] + b"\xff" * 12 + b"\0\0"
    (tmp_path / "crowd.zip").write_bytes(crowd)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="lists 1,000,000 files; at most 500,000"):
            find(tmp_path / "crowd.zip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_encrypted_cut_and_false_zips(tmp_path: Path) -> None:
    raw = bytearray(zipped(tmp_path / "a.zip", {"a.png": png()}).read_bytes())
    (tmp_path / "cut.zip").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "false.zip").write_text("this is no zip")
    for name in ("cut.zip", "false.zip"):
        with pytest.raises(DataError, match="is not a whole zip file"):
            find(tmp_path / name)
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = raw.index(signature) + offset
        raw[at : at + 2] = struct.pack("<H", 1)
    (tmp_path / "locked.zip").write_bytes(raw)
    with pytest.raises(DataError, match=r"is encrypted\. Unpack it with its password"):
        find(tmp_path / "locked.zip")


def test_links_and_doubles_in_a_zip_are_left_out(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", png(2))
        archive.writestr(link, "/etc/passwd")
    found = find(tmp_path / "a.zip")
    assert names(found) == ["a.png"]
    assert dict(found.left_out) == {"link.png": "link", "a.png": "listed 2 times in the zip; the first one counts"}
    stream = found.files.open("a.png")
    assert not isinstance(stream, Path) and stream.read() == png(1)


@given(st.text(max_size=40))
@settings(deadline=None)
def test_printable_is_printable_and_keeps_plain_text(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in shown)
    assert printable(shown) == shown


@given(st.lists(st.sampled_from(["a", "..", ".", "b.png", "", "C:"]), min_size=1, max_size=5), st.sampled_from("/\\"))
@settings(deadline=None)
def test_nothing_that_does_not_escape_leaves_the_root(parts: list[str], separator: str) -> None:
    name = separator.join(parts)
    root = Path("/root")
    if not escapes(name):
        assert Path(os.path.normpath(root / name.replace("\\", "/"))).is_relative_to(root)


@given(st.binary(max_size=400))
@settings(max_examples=60, deadline=None)
def test_any_bytes_as_a_table_end_in_rows_or_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    root = tmp_path_factory.getbasetemp() / "table"
    for name in ("metadata.csv", "metadata.jsonl"):
        lay(root, {**PICTURES, name: (b"file_name,text\na.png," if name.endswith("csv") else b"") + raw})
        try:
            assert names(find(root)) in (["a.png"], ["b.png"], ["a.png", "b.png"])
        except DataError as error:
            assert str(error).isprintable()
        (root / name).unlink()


def test_a_member_damaged_in_the_zip_is_reported_by_reason(tmp_path: Path) -> None:
    raw = bytearray(zipped(tmp_path / "a.zip", {"a.png": bytes(range(256))}).read_bytes())
    raw[60] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(archives.Unusable, match="damaged in the zip"):
        files_of(tmp_path / "a.zip").open("a.png")
    with pytest.raises(DataError, match="damaged in the zip"):
        files_of(tmp_path / "a.zip").read("a.png", 10)


def test_a_zip_whose_members_overlap_is_refused(tmp_path: Path) -> None:
    """200 names for one stretch of 20 kB: the sum of what is packed hides how much the file grows."""
    words = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest()[:1] * 32 for i in range(2**15))
    with zipfile.ZipFile(tmp_path / "overlap.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("0.bmp", words)
        for number in range(1, 200):
            double = copy.copy(archive.filelist[0])
            double.filename = f"{number}.bmp"
            archive.filelist.append(double)
    listed = zipfile.ZipFile(tmp_path / "overlap.zip").infolist()
    total, packed = sum(m.file_size for m in listed), sum(m.compress_size for m in listed)
    assert packed * archives.MAX_RATIO > total > archives.HARMLESS_BYTES, "else another limit is what refuses it"
    with pytest.raises(DataError, match="more than is safe"):
        find(tmp_path / "overlap.zip")


def test_backslashes_of_old_windows_programs_are_folders(tmp_path: Path) -> None:
    found = find(zipped(tmp_path / "a.zip", {"cat\\1.png": png(), "dog\\2.png": png()}))
    assert [(p.name, p.label) for p in found.pictures] == [("cat/1.png", "cat"), ("dog/2.png", "dog")]


# --- folders that say more -------------------------------------------------------------------------------------------


def test_outer_folders_that_all_share_are_no_classes(tmp_path: Path) -> None:
    found = find(lay(tmp_path, dict.fromkeys(["set/v1/cat/1.png", "set/v1/dog/1.png"], png())))
    assert [picture.label for picture in found.pictures] == ["cat", "dog"] and found.notices == []


@pytest.mark.parametrize("outer", ["", "flowers/", "a/b/"])
def test_splits_by_folder_with_classes_below(tmp_path: Path, outer: str) -> None:
    inside = ["train/cat/1.png", "train/dog/2.png", "Test/cat/3.png", "val/dog/4.png", "train/beside.png"]
    found = find(lay(tmp_path, {outer + name: png() for name in inside}))
    assert {p.name.removeprefix(outer): (p.split, p.label) for p in found.pictures} == {
        "train/cat/1.png": ("train", "cat"),
        "train/dog/2.png": ("train", "dog"),
        "Test/cat/3.png": ("test", "cat"),
        "val/dog/4.png": ("validation", "dog"),
        "train/beside.png": ("train", None),
    }
    assert found.notices == ["The set brings its own splits, by folder: train (3), validation (1), test (1)."]


def test_splits_without_classes_and_lone_ones(tmp_path: Path) -> None:
    flat = find(lay(tmp_path / "flat", {"train/1.png": png(), "validation/1.png": png()}))
    assert [(p.split, p.label) for p in flat.pictures] == [("train", None), ("validation", None)]
    lone = find(lay(tmp_path / "lone", {"train/a/1.png": png(), "train/b/1.png": png()}))
    assert [(p.split, p.label) for p in lone.pictures] == [("train", "a"), ("train", "b")]
    archive = find(zipped(tmp_path / "lone.zip", {"train/a/1.png": png(), "train/b/1.png": png()}))
    assert archive.pictures == lone.pictures


@pytest.mark.parametrize("other", ["plane/1.png", "1.png", "training/1.png"])
def test_a_class_named_like_a_split_beside_others_is_a_class(tmp_path: Path, other: str) -> None:
    found = find(lay(tmp_path, {"train/1.png": png(), "test/2.png": png(), other: png()}))
    assert all(picture.split is None for picture in found.pictures)
    assert {picture.label for picture in found.pictures} >= {"train", "test"}


def test_tables_in_folders_speak_for_what_lies_there(tmp_path: Path) -> None:
    content = {
        "metadata.csv": "file_name,text,label\nx.png,outer,one\nin/y.png,outer,one\n",
        "in/metadata.jsonl": '{"file_name": "y.png", "text": "inner"}\n{"file_name": "deep/z.png", "text": "deep"}',
        **dict.fromkeys(["x.png", "in/y.png", "in/deep/z.png", "in/none.png"], png()),
    }
    found = find(lay(tmp_path, content))
    assert [(p.name, p.text, p.label) for p in found.pictures] == [
        ("in/deep/z.png", "deep", None),
        ("in/y.png", "inner", "one"),
        ("x.png", "outer", "one"),
    ]
    assert ("in/none.png", "no row in in/metadata.jsonl") in found.left_out


def test_tables_in_splits_leave_other_folders_alone(tmp_path: Path) -> None:
    content = {
        "train/metadata.csv": "file_name,label,text\n1.png,7,a\n",
        "test/1.txt": "beside",
        "train/1.png": png(),
        "test/1.png": png(),
    }
    found = find(lay(tmp_path, content))
    assert found.pictures == [
        scan.Picture("test/1.png", None, "beside", "test"),
        scan.Picture("train/1.png", "7", "a", "train"),
    ]
    assert found.left_out == []


def test_two_tables_in_an_inner_folder_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r", in holds both metadata\.csv and metadata\.jsonl"):
        find(lay(tmp_path, {"in/metadata.csv": "", "in/metadata.jsonl": "", **PICTURES}))


def test_a_table_of_labels_leaves_the_captions_to_text_files(tmp_path: Path) -> None:
    found = find(lay(tmp_path, {**PICTURES, "metadata.csv": "file_name,label\na.png,x\nb.png,y\n", "a.txt": "words"}))
    assert [(p.label, p.text) for p in found.pictures] == [("x", "words"), ("y", None)]


def test_a_column_named_caption_and_rows_twice(tmp_path: Path) -> None:
    table = "file_name,caption\na.png,first\nb.png,two\na.png,last\n"
    found = find(lay(tmp_path, {**PICTURES, "metadata.csv": table}))
    assert [picture.text for picture in found.pictures] == ["last", "two"]
    assert found.notices == ["1 rows of metadata.csv name a picture for the second time; the last row counts."]


def test_labels_of_tables_made_by_programs(tmp_path: Path) -> None:
    rows = '{"file_name": "a.png", "label": 3.0}\n{"file_name": "b.png", "label": NaN}'
    found = find(lay(tmp_path, {**PICTURES, "metadata.jsonl": rows}))
    assert [picture.label for picture in found.pictures] == ["3", None]
    for odd in ("true", "0.5", '{"a": 1}'):
        with pytest.raises(DataError, match="expected a whole number or a string"):
            find(lay(tmp_path, {"metadata.jsonl": f'{{"file_name": "a.png", "label": {odd}}}'}))


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    content = {"cat/1.png": png(), "dog/notes.txt": "x", "more/more.zip": b"PK", "bird/1.heic": b"x"}
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    found = find(lay(tmp_path, content))
    assert found.notices == [
        "Archives among the pictures were not opened: more/more.zip. Give them as DATA.",
        "Folders that hold no pictures: dog/, empty/inner/, more/.",
    ]
    assert found.left_out == [("bird/1.heic", "HEIC is not read; convert it to JPEG or PNG")]


def test_a_folder_of_archives_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"It holds 2 archives, which are not opened: unpack them\.$"):
        find(lay(tmp_path, {"a.zip": b"PK", "b.rar": b"Rar"}))


# --- names in two forms of Unicode -----------------------------------------------------------------------------------

NFC, NFD = "caf\u00e9", "cafe\u0301"


def holds_both_forms(folder: Path) -> bool:
    lay(folder, {f"{NFC}.png": png(1), f"{NFD}.png": png(2)})
    return len(list(folder.iterdir())) == 2


def test_names_in_both_forms_are_both_kept_and_said(tmp_path: Path) -> None:
    if not holds_both_forms(tmp_path):
        pytest.skip("this file system knows one form only")
    found = find(tmp_path)
    assert sorted(names(found)) == sorted([f"{NFC}.png", f"{NFD}.png"])
    assert len(found.notices) == 1 and found.notices[0].startswith("1 names differ from another only in how Unicode")


@pytest.mark.parametrize(("file", "row"), [(NFC, NFD), (NFD, NFC)])
def test_tables_and_captions_meet_pictures_in_either_form(tmp_path: Path, file: str, row: str) -> None:
    table = zipped(tmp_path / "a.zip", {f"{file}.png": png(), "metadata.csv": f"file_name,text\n{row}.png,hot\n"})
    beside = zipped(tmp_path / "b.zip", {f"{file}.png": png(), f"{row}.txt": "hot"})
    for path in (table, beside):
        assert [(p.name, p.text) for p in find(path).pictures] == [(f"{file}.png", "hot")]


def test_class_folders_in_both_forms_are_one_class(tmp_path: Path) -> None:
    found = find(zipped(tmp_path / "a.zip", dict.fromkeys([f"{NFC}/1.png", f"{NFD}/2.png", "tea/3.png"], png())))
    assert class_names([p.label for p in found.pictures]) == (NFC, "tea")


# --- scripts and encodings -------------------------------------------------------------------------------------------

CAT = "白色的猫坐在窗边看着外面的雨水和行人的伞"


def test_an_old_encoding_stops_with_previews_and_a_proposal(tmp_path: Path) -> None:
    lay(tmp_path, {**PICTURES, "a.txt": b"a cat: " + CAT.encode("gb18030")})
    with pytest.raises(DataError) as error:
        find(tmp_path)
    said = str(error.value)
    assert "The caption a.txt in" in said and "is not UTF-8 (byte 7)" in said
    assert f"gb18030 reads '{CAT[:20]}'" in said and "Add --caption-encoding gb18030" in said
    assert said.isprintable()


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", CAT),
        ("big5", "白色的貓坐在窗邊"),
        ("shift_jis", "窓辺の白い猫です"),
        ("cp1252", "café au lait"),
        ("GBK", CAT),
    ],
)
@pytest.mark.parametrize("file", ["a.txt", "metadata.csv", "metadata.jsonl"])
def test_a_named_encoding_is_used_where_text_is_not_utf8(tmp_path: Path, encoding: str, text: str, file: str) -> None:
    row = {"csv": f"file_name,text\na.png,{text}\n", "jsonl": f'{{"file_name": "a.png", "text": "{text}"}}'}
    lay(tmp_path, {"a.png": png(), file: row.get(file.rpartition(".")[2], text).encode(encoding)})
    with pytest.raises(DataError, match="is not UTF-8"):
        find(tmp_path)
    assert find(tmp_path, caption_encoding=encoding).pictures[0].text == text


def test_utf8_and_marks_come_before_the_named_encoding(tmp_path: Path) -> None:
    files = {"a.txt": CAT.encode(), "b.txt": CAT.encode("utf-16"), "c.txt": b"\xff\xfe\0\0" + CAT.encode("utf-32-le")}
    found = find(lay(tmp_path, {**PICTURES, "c.png": png(), **files}), caption_encoding="gb18030")
    assert [picture.text for picture in found.pictures] == [CAT, CAT, CAT]


@pytest.mark.parametrize(
    ("raw", "encoding", "message"),
    [
        (b"\xff\xfea", "utf-8", "begins as utf-16 and is damaged"),
        (b"\xef\xbb\xbf\xff", "utf-8", "is not UTF-8"),
        (b"caf\xff\xff", "gb18030", "is neither UTF-8 nor gb18030"),
        (b"caf\xff\xff\x81\x8d", "utf-8", r"is not UTF-8 \(byte 3\)\. Save it as UTF-8\."),
    ],
)
def test_text_that_is_damaged(tmp_path: Path, raw: bytes, encoding: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find(lay(tmp_path, {**PICTURES, "a.txt": raw}), caption_encoding=encoding)


@pytest.mark.parametrize("name", ["gb18031", "hex", "zlib", "", "\0", "undefined"])
def test_a_name_that_is_no_encoding_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no encoding of text") as error:
        find(tmp_path / "not-there", caption_encoding=name)
    assert name != "gb18031" or "'gb18030'" in str(error.value)


def test_long_captions_are_counted_however_they_are_long(tmp_path: Path) -> None:
    texts = {"a.txt": "x" * 10_001, "b.txt": "长" * 100_000}
    found = find(lay(tmp_path, {**PICTURES, **texts}))
    assert [len(picture.text or "") for picture in found.pictures] == [10_000, 10_000]
    assert found.notices == ["2 captions were cut to 10,000 characters."]


@pytest.mark.parametrize("text", ["🐈‍⬛🎉", "قطة بيضاء", "[bold]x[/]", "{{7*7}} %s $HOME", "<script>alert(1)</script>"])
def test_captions_are_kept_literally(tmp_path: Path, text: str) -> None:
    assert find(lay(tmp_path, {"a.png": png(), "a.txt": text})).pictures[0].text == text


CELLS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["a.png", "file_name", "label", '"', "\r"])


@given(
    rows=st.lists(st.lists(CELLS, max_size=4), max_size=5),
    separators=st.tuples(st.sampled_from(",;\t|"), st.sampled_from(["\n", "\r\n", "\r"])),
    encoding=st.sampled_from(["utf-8", "utf-16", "gb18030", "shift_jis"]),
    named=st.sampled_from(["utf-8", "gb18030", "shift_jis"]),
)
@settings(max_examples=80, deadline=None)
def test_any_text_as_a_table_ends_in_pictures_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[str]],
    separators: tuple[str, str],
    encoding: str,
    named: str,
) -> None:
    root = tmp_path_factory.getbasetemp() / "any-table"
    comma, end = separators
    text = end.join(comma.join(row) for row in [["file_name", "text", "label"], *rows])
    lay(root, {**PICTURES, "metadata.csv": text.encode(encoding, "replace")})
    try:
        assert set(names(find(root, caption_encoding=named))) <= {"a.png", "b.png"}
    except DataError as error:
        assert str(error).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a.png"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["file_name", "text"]), inner),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.sampled_from(["file_name", "text", "label", "caption", "x"]), JSON), max_size=3))
@settings(max_examples=80, deadline=None)
def test_any_json_as_rows_ends_in_pictures_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]
) -> None:
    root = tmp_path_factory.getbasetemp() / "any-json"
    lay(root, {**PICTURES, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    try:
        for picture in find(root).pictures:
            assert isinstance(picture.text, str | None) and isinstance(picture.label, str | None)
    except DataError as error:
        assert str(error).isprintable()
