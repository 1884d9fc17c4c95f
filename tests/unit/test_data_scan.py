"""Folders and zips as people have them: what is found, what is left out and why, and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagekiln.data import files as files_module
from imagekiln.data.files import escapes, files_of, printable
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
    assert "folders of folders" in found.notices[0]


def test_what_operating_systems_leave_behind_is_ignored(tmp_path: Path) -> None:
    hidden = [".hidden/a.png", "__MACOSX/a.png", "Thumbs.db", "cats/._x.png", ".x.jpg"]
    found = find(lay(tmp_path, dict.fromkeys([*hidden, "cats/a.png", "dogs/b.png"], png())))
    assert names(found) == ["cats/a.png", "dogs/b.png"] and found.left_out == []


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
    found = find(lay(tmp_path, {**PICTURES, "metadata.jsonl": text}))
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
    monkeypatch.setattr(files_module, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="lists 4 files; at most 3"):
        find(zipped(tmp_path / "many.zip", dict.fromkeys("1234", b"")))


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
    with pytest.raises(files_module.Unusable, match="damaged in the zip"):
        files_of(tmp_path / "a.zip").open("a.png")
    with pytest.raises(DataError, match="damaged in the zip"):
        files_of(tmp_path / "a.zip").read("a.png", 10)
