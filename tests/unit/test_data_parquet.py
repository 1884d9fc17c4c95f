"""Parquet files of pictures: which columns count, that memory stays small, and what is said where they do not fit."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from imagekiln.data import parquet
from imagekiln.data.decode import Unusable
from imagekiln.data.scan import Found, Picture, find
from imagekiln.errors import DataError, UsageError


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for path in (tmp_path, tmp_path / "a.parquet", tmp_path / "*.parquet"):
        with pytest.raises(UsageError, match=r"needs pyarrow\. Install it with pip install 'imagekiln\[shards\]'\.$"):
            find(path)


pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def written(path: Path, columns: dict[str, Any], features: Any = None, group: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


def pictures(count: int, paths: Sequence[str | None] | None = None) -> list[dict[str, Any]]:
    return [{"bytes": b"%d" % n, "path": paths[n] if paths else f"{n}.png"} for n in range(count)]


def content_of(found: Found, name: str) -> bytes:
    stream = found.files.open(name)
    return stream.read_bytes() if isinstance(stream, Path) else stream.read()


def test_a_file_of_hugging_face(tmp_path: Path) -> None:
    columns = {"image": pictures(25), "label": [0, 1, -1, None, 1] * 5, "text": ["a", None, "", " c ", "d"] * 5}
    found = find(written(tmp_path / "a.parquet", columns, FEATURES))
    assert found.pictures[:5] == [
        Picture("0.png", "cat", "a"),
        Picture("1.png", "dog", None),
        Picture("2.png", None, None),
        Picture("3.png", None, "c"),
        Picture("4.png", "dog", "d"),
    ]
    assert [picture.name for picture in found.pictures] == [f"{n}.png" for n in range(25)], "in the order of the rows"
    assert [content_of(found, f"{n}.png") for n in range(25)] == [b"%d" % n for n in range(25)]
    assert set(found.files.entries) == {picture.name for picture in found.pictures}
    assert found.files.read("24.png", 1) == b"2" and found.notices == []


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("img", [b"1", b"2"]),
        ("anything", [b"1", b"2"]),
        ("photo", [{"bytes": b"1"}, {"bytes": b"2"}]),
        ("photo", [{"path": None, "bytes": b"1"}, {"path": None, "bytes": b"2"}]),
    ],
)
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        ([3, -1], ["3", None]),
        ([3.0, float("nan")], ["3", None]),
        (None, [None, None]),
    ],
)
def test_columns_of_other_makes(tmp_path: Path, column: str, values: Any, labels: Any, names: list[str | None]) -> None:
    columns = {"id": [1, 2], column: values, **({"label": labels} if labels is not None else {})}
    found = find(written(tmp_path / "a.parquet", columns))
    assert [(p.name, p.label) for p in found.pictures] == list(zip(["00000000", "00000001"], names, strict=True))
    assert [content_of(found, picture.name) for picture in found.pictures] == [b"1", b"2"]


def test_labels_in_a_dictionary_large_types_and_captions_in_lists(tmp_path: Path) -> None:
    columns = {
        "image": pa.array([b"1", b"2"], pa.large_binary()),
        "label": pa.array(["x", "y"]).dictionary_encode(),
        "caption": [["first", "second"], []],
    }
    with pytest.raises(DataError, match=r"row 1: text is \[\]; expected a string"):
        find(written(tmp_path / "a.parquet", columns))
    columns["caption"] = [["first", "second"], None]
    found = find(written(tmp_path / "a.parquet", columns))
    assert [(p.label, p.text) for p in found.pictures] == [("x", "first"), ("y", None)]


def test_the_class_column_that_hugging_face_marks(tmp_path: Path) -> None:
    features = {"pic": {"_type": "Image"}, "sort": {"_type": "ClassLabel", "names": ["a", "b"]}, "mask": "odd"}
    columns = {"mask": [b"m"], "thumb": [b"t"], "sort": [1], "pic": [b"p"]}
    found = find(written(tmp_path / "a.parquet", columns, features))
    assert found.pictures == [Picture("00000000", "b", None)] and content_of(found, "00000000") == b"p"


@pytest.mark.parametrize("note", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": [1]}}', b"\xff"])
def test_a_note_in_the_schema_that_makes_no_sense_says_nothing(tmp_path: Path, note: bytes) -> None:
    table = pa.table({"image": [b"x"], "label": [7]}).replace_schema_metadata({b"huggingface": note})
    pq.write_table(table, tmp_path / "a.parquet")
    assert find(tmp_path / "a.parquet").pictures == [Picture("00000000", "7", None)]


def test_paths_that_are_no_names(tmp_path: Path) -> None:
    paths = [
        "a.png",
        "../../up.png",
        "/abs/olute.png",
        "C:\\win\\dows.png",
        "in/a.png",
        "a.png",
        None,
        "",
        ".hidden.png",
    ]
    found = find(written(tmp_path / "a.parquet", {"image": pictures(9, paths)}))
    assert [picture.name for picture in found.pictures] == [
        "a.png",
        "up.png",
        "olute.png",
        "dows.png",
        "in/a.png",
        "00000005-a.png",
        "00000006",
        "00000007",
        "hidden.png",
    ]
    assert [content_of(found, picture.name) for picture in found.pictures] == [b"%d" % n for n in range(9)]


def test_rows_without_bytes_are_unusable_one_by_one(tmp_path: Path) -> None:
    rows = [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    found = find(written(tmp_path / "a.parquet", {"image": rows}))
    assert content_of(found, "a.png") == b"x"
    for name in ("b.png", "00000002"):
        with pytest.raises(Unusable, match="its row holds no bytes of a picture"):
            found.files.open(name)


def test_a_folder_and_a_pattern_of_files_with_splits(tmp_path: Path) -> None:
    for split in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        written(tmp_path / "data" / f"{split}.parquet", {"image": pictures(2), "label": [0, 1]}, FEATURES)
    (tmp_path / "README.md").write_text("about")
    found = find(tmp_path)
    assert [(p.name, p.label, p.split) for p in found.pictures] == [
        (f"{file}/{number}.png", ("cat", "dog")[number], split)
        for file, split in [
            ("test-00000-of-00001", "test"),
            ("train-00000-of-00002", "train"),
            ("train-00001-of-00002", "train"),
        ]
        for number in range(2)
    ]
    assert content_of(found, "train-00001-of-00002/1.png") == b"1" and found.notices == []
    assert len(find(tmp_path / "data" / "train-*.parquet").pictures) == 4


def test_a_folder_names_the_split_of_files_that_do_not(tmp_path: Path) -> None:
    for file in ("train/0000", "train/0001", "test/0000"):
        written(tmp_path / "default" / f"{file}.parquet", {"image": pictures(1)})
    assert [(p.name, p.split) for p in find(tmp_path).pictures] == [
        ("test-0000/0.png", "test"),
        ("train-0000/0.png", "train"),
        ("0001/0.png", "train"),
    ]
    assert [p.split for p in find(tmp_path / "default" / "test").pictures] == [None]


def test_files_that_name_other_classes_say_so(tmp_path: Path) -> None:
    written(tmp_path / "a.parquet", {"image": [b"1"], "label": [0]}, FEATURES)
    written(tmp_path / "b.parquet", {"image": [b"1"], "label": [0]})
    found = find(tmp_path)
    assert [picture.label for picture in found.pictures] == ["cat", "0"]
    assert found.notices == ["The parquet files do not name the same classes; equal names are taken as one class."]


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"url": ["x"], "label": [0]}, None, "has no column of pictures. Columns found: url, label; expected bytes"),
        ({"image": ["not bytes"]}, None, "has no column of pictures"),
        ({"one": [b"1"], "two": [b"2"]}, None, "has no column of pictures"),
        ({"image": [b"x"], "label": [2]}, FEATURES, "row 0: label 2 is none of the 2 classes of the file"),
        ({"image": [b"x"], "label": [0.5]}, None, "row 0: label is 0.5; expected a whole number or a string"),
        ({"image": pa.array([], pa.binary())}, None, "holds no rows"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, columns: dict[str, Any], features: Any, message: str) -> None:
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        find(written(tmp_path / "a.parquet", columns, features))


def test_damage_ends_in_one_sentence(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"image": pictures(30), "label": [0] * 30}, FEATURES)
    raw = path.read_bytes()
    for damaged in (b"", b"PAR1", raw[: len(raw) // 2], raw[:-1], b"nothing of the kind" * 9):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"is not a whole parquet file \(.*\)\. Copy or download it again"):
            find(path)
    path.write_bytes(raw)
    found = find(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(Unusable, match="damaged in the parquet file"):
        found.files.open("7.png")
    with pytest.raises(DataError, match=r"7\.png in .* cannot be read: damaged in the parquet file"):
        found.files.read("7.png", 1)


def test_any_order_reads_the_right_row_with_few_groups_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_KEPT_GROUPS", 3)
    found = find(written(tmp_path / "a.parquet", {"image": pictures(200)}))
    order = [*range(200)] * 2
    random.Random(0).shuffle(order)
    assert all(content_of(found, f"{n}.png") == b"%d" % n for n in order)


def test_row_groups_are_read_when_asked_for_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = parquet.ParquetFiles._read_group
    monkeypatch.setattr(
        parquet.ParquetFiles, "_read_group", lambda self, number: read.append(number) or whole(self, number)
    )
    found = find(written(tmp_path / "a.parquet", {"image": pictures(40)}))
    assert read == []
    for picture in found.pictures:
        content_of(found, picture.name)
    assert read == [0, 1, 2, 3]


def test_memory_stays_below_the_size_of_a_row_group(tmp_path: Path) -> None:
    """32 MB of pictures in one row group, in pages of 2 MB: neither Python nor Arrow holds more than a few pages."""
    rows = [{"bytes": random.Random(n).randbytes(2**18), "path": None} for n in range(128)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": rows}), path, write_batch_size=8)
    del rows
    usual, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)
    tracemalloc.start()
    try:
        found = find(path)
        for picture in found.pictures:
            assert len(content_of(found, picture.name)) == 2**18
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert 2**18 < peak < 16 * 2**20 and 2**18 < counted.max_memory() < 16 * 2**20


def test_a_column_that_grows_beyond_reason_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "HARMLESS_BYTES", 2**10)
    path = tmp_path / "a.parquet"
    zeros = pa.table({"image": [bytes(2**20 + n) for n in range(4)]})
    pq.write_table(zeros, path, compression="gzip", use_dictionary=False)
    with pytest.raises(DataError, match="more than is safe to read"):
        find(path)
