"""Several sources as one set: names, classes, what is refused, and that one source alone is left as it is."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from imagekiln.data.collect import collect
from imagekiln.data.found import Found
from imagekiln.data.scan import find
from imagekiln.errors import DataError, UsageError


def lay(root: Path, content: dict[str, str]) -> Path:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(data, encoding="utf-8")
    return root


def zipped(path: Path, content: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, content: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data.encode()))
    return path


def content_of(found: Found, name: str) -> bytes:
    stream = found.files.open(name)
    return stream.read_bytes() if isinstance(stream, Path) else stream.read()


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        lay(
            tmp_path / "photos",
            {"cat/1.png": "p1", "dog/2.png": "p2", "dog/2.txt": "a dog", "x.heic": "", ".h.png": ""},
        ),
        zipped(tmp_path / "drawn.zip", {"cat/1.png": "d1", "bird/1.png": "d2", "none/x.txt": ""}),
        tarred(
            tmp_path / "shard-000.tar", {"1.png": "s1", "1.cls": "cat", "1.txt": "tiny", "2.png": "s2", "2.cls": "7"}
        ),
    ]


def test_one_source_is_what_find_says(three: list[Path]) -> None:
    for source in three:
        alone, found = collect([source]), find(source)
        assert (alone.pictures, alone.left_out, alone.notices) == (found.pictures, found.left_out, found.notices)
        assert collect([str(source)]).pictures == found.pictures


def test_several_sources_of_different_kinds(three: list[Path]) -> None:
    steps: list[tuple[int, int]] = []
    found = collect(three, progress=lambda done, total: steps.append((done, total)))
    assert [(p.name, p.label, p.text) for p in found.pictures] == [
        ("photos/cat/1.png", "cat", None),
        ("photos/dog/2.png", "dog", "a dog"),
        ("drawn/bird/1.png", "bird", None),
        ("drawn/cat/1.png", "cat", None),
        ("shard-000/1.png", "cat", "tiny"),
        ("shard-000/2.png", "7", None),
    ]
    assert [content_of(found, picture.name) for picture in found.pictures] == [b"p1", b"p2", b"d2", b"d1", b"s1", b"s2"]
    assert all(picture.name in found.files.entries for picture in found.pictures)
    assert found.files.read("photos/dog/2.txt", 3) == b"a d"
    assert found.left_out == [("photos/x.heic", "HEIC is not read; convert it to JPEG or PNG")]
    assert found.notices == [
        "photos: Hidden files and folders were passed over: .h.png.",
        "drawn: Folders that hold no pictures: none/.",
    ]
    assert found.files.where.name == "photos+drawn+shard-000" and steps == [(1, 3), (2, 3), (3, 3)]


def test_entries_stay_the_same_for_what_does_not_change(three: list[Path]) -> None:
    before = collect(three)
    lay(three[0], {"cat/new.png": "n"})
    after = collect(three)
    assert {name: after.files.entries[name] for name in before.files.entries} == before.files.entries
    assert set(after.files.entries) - set(before.files.entries) == {"photos/cat/new.png"}


def test_sources_with_the_same_name_are_told_apart(tmp_path: Path) -> None:
    sources = [lay(tmp_path / name, {"a.png": name}) for name in ("one/set", "two/set", "three/Set")]
    sources.append(zipped(tmp_path / "two" / "set.zip", {"a.png": "zip"}))
    found = collect(sources)
    assert [picture.name for picture in found.pictures] == [
        "one-set/a.png",
        "two-set/a.png",
        "three-Set/a.png",
        "two-set-2/a.png",
    ]
    assert content_of(found, "two-set-2/a.png") == b"zip"


def test_splits_of_a_source_stay(tmp_path: Path) -> None:
    marked = lay(tmp_path / "marked", {"train/1.png": "", "test/1.png": ""})
    found = collect([marked, lay(tmp_path / "plain", {"a.png": ""})])
    assert {picture.name: picture.split for picture in found.pictures} == {
        "marked/train/1.png": "train",
        "marked/test/1.png": "test",
        "plain/a.png": None,
    }


def test_training_as_the_only_split_is_none(tmp_path: Path) -> None:
    marked = lay(tmp_path / "marked", {"train/a/1.png": "", "train/b/2.png": ""})
    test = lay(tmp_path / "test", {"test/a/1.png": "", "train/a/2.png": ""})
    for sources in ([marked], [marked, lay(tmp_path / "plain", {"a/3.png": "", "b/4.png": ""})]):
        found = collect(sources)
        assert {picture.split for picture in found.pictures} == {None}
        assert found.pictures[0].label == "a" and "content decides what is held out" in found.notices[-1]
    assert {picture.split for picture in collect([marked, test]).pictures} == {"train", "test"}


@pytest.mark.parametrize(
    ("first", "second", "notice"),
    [
        ({"0/a.png": "", "1/a.png": ""}, {"0/a.png": "", "5/a.png": ""}, "a, b number their classes; an equal number"),
        (
            {"0/a.png": "", "1/a.png": ""},
            {"x/a.png": "", "y/a.png": ""},
            "a numbers its classes and other sources name",
        ),
        ({"x/a.png": "", "y/a.png": ""}, {"a.png": ""}, "The pictures of b have no labels; those of the other"),
    ],
)
def test_classes_that_may_not_fit_together_are_said(
    tmp_path: Path, first: dict[str, str], second: dict[str, str], notice: str
) -> None:
    found = collect([lay(tmp_path / "a", first), lay(tmp_path / "b", second)])
    assert len(found.notices) == 1 and notice in found.notices[0]


def test_the_same_source_twice_is_refused(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for other in (three[0], f"{three[0]}/", "photos", "./photos/../photos", tmp_path / "photos" / "." / ""):
        with pytest.raises(UsageError, match="is given twice"):
            collect([three[0], three[1], other])
    if os.name != "nt":
        (tmp_path / "link").symlink_to(three[0])
        with pytest.raises(UsageError, match=r"link is given twice; .*photos is the same\. Give it once"):
            collect([three[0], tmp_path / "link"])
    with pytest.raises(UsageError, match="is given twice"):
        collect([three[2], tmp_path / "shard-{000..000}.tar"])
    with pytest.raises(UsageError, match="is given twice"):
        collect(["s3://a/b.tar", Path("s3://a/b.tar")])


def test_a_source_inside_another_is_refused(three: list[Path]) -> None:
    with pytest.raises(UsageError, match=r"cat lies in .*photos, so its pictures would be there twice"):
        collect([three[0] / "cat", three[0]])
    inner = zipped(three[0] / "more.zip", {"z.png": "z"})
    assert "more/z.png" in collect([three[0], inner]).files.entries, "an archive among pictures is not opened by itself"


def test_one_bad_source_stops_with_its_name(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"photoz does not exist\. Did you mean"):
        collect([three[0], tmp_path / "photoz"])
    with pytest.raises(DataError, match=r"No pictures in .*hollow"):
        collect([three[0], lay(tmp_path / "hollow", {"a.txt": ""})])
    with pytest.raises(UsageError, match="No source is given"):
        collect([])
    with pytest.raises(UsageError, match="--caption-encoding gb is no encoding of text"):
        collect(three, caption_encoding="gb")


def test_a_named_encoding_reaches_every_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lay(tmp_path / name, {"1.png": ""})
        (tmp_path / name / "1.txt").write_bytes("白貓".encode("big5"))
    found = collect([tmp_path / "a", tmp_path / "b"], caption_encoding="big5")
    assert [picture.text for picture in found.pictures] == ["白貓", "白貓"]
