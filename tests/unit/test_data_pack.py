"""From any DATA to a data set: what is left out, chosen, split, cached and told."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import imagekiln
from imagekiln.config import DataConfig
from imagekiln.data import Dataset, cache_folder, load, open_own, published, write_published, write_shards
from imagekiln.data.source import digest, split
from imagekiln.errors import DataError, DiskError, UsageError


def picture(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    channels = len(mode)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values)


def lay(root: Path, count: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(index, size, mode).save(root / f"{index:03d}.png")
    return root


def loaded(path: Path, cache: Path, **settings: object) -> Dataset:
    return load(DataConfig(path=str(path), **settings), cache)


def pixels(data: Dataset) -> dict[str, np.ndarray]:
    """Pictures of both sides by file name."""
    sides = (data.train,) if data.train is data.validation else (data.train, data.validation)
    return {
        name: image
        for side in sides
        for name, image in zip(side.files, side.read(range(len(side))).images.numpy(), strict=True)
    }


def test_pictures_arrive_unchanged_at_their_own_size(tmp_path: Path) -> None:
    data = loaded(lay(tmp_path / "set", 10, (24, 16)), tmp_path / "cache", validation_fraction=0.3)
    assert data.train.image_shape == (3, 16, 24) and data.notices == [] and data.left_out == []
    for index in range(10):
        expected = np.asarray(picture(index, (24, 16))).transpose(2, 0, 1)
        assert (pixels(data)[f"{index:03d}.png"] == expected).all()


def test_bad_pictures_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", 6)
    whole = (root / "000.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "page.jpg").write_text("<!doctype html><p>404")
    (root / "=HYPERLINK(1).png").write_bytes(b"\0\1\2")
    (root / "\x1b[31m\n.png").write_bytes(b"")
    Image.new("L", (1, 1)).save(root / "speck.png")
    data = loaded(root, tmp_path / "cache")
    reasons = {
        "cut.png": "truncated",
        "empty.jpg": "empty file",
        "page.jpg": "not an image (HTML)",
        "=HYPERLINK(1).png": "not an image",
        "\\x1b[31m\\x0a.png": "empty file",
        "speck.png": "1x1 is below the smallest size (4x4)",
    }
    assert dict(data.left_out) == reasons and len(pixels(data)) == 6
    assert data.summary().endswith("6 files were left out.")
    (table,) = (tmp_path / "cache").rglob("left_out.csv")
    raw = table.read_text(encoding="utf-8")
    assert "\x1b" not in raw and len(raw.splitlines()) == 7
    cells = [cell for row in csv.reader(io.StringIO(raw)) for cell in row]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_when_nothing_can_be_used_the_reasons_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"None of the 3 pictures in .* can be used: 2 empty file, 1 HEIC is not read"):
        loaded(tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_usage_errors(tmp_path: Path) -> None:
    for path in ("", str(tmp_path / "missing"), "builtin:nothing", "x" * 5000, "a\0b"):
        with pytest.raises(UsageError):
            load(DataConfig(path=path), tmp_path / "cache")
    with pytest.raises(UsageError, match="is no colour"):
        loaded(lay(tmp_path / "set", 1), tmp_path / "cache", background="blurple")


def test_the_size_is_chosen_when_pictures_differ(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", 4, (50, 46))
    picture(9, (90, 45)).save(root / "wide.png")
    data = loaded(root, tmp_path / "cache")
    assert data.train.image_shape == (3, 40, 40)
    assert data.notices[0] == "The pictures are brought to 40x40 pixels; set data.size for another size."
    assert loaded(root, tmp_path / "cache", size=24).train.image_shape == (3, 24, 24)
    large = loaded(lay(tmp_path / "large", 2, (300, 290)), tmp_path / "cache")
    assert large.train.image_shape == (3, 64, 64)


def test_turned_photographs_share_their_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (32, 16)).save(tmp_path / "a.jpg")
    picture(1, (16, 32)).save(tmp_path / "b.jpg", exif=exif)
    assert loaded(tmp_path, tmp_path / "cache").train.image_shape == (3, 16, 32)


def test_channels_are_chosen_by_looking(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    grey = lay(tmp_path / "grey", 3, mode="L")
    picture(7, mode="L").convert("RGB").save(grey / "three-equal-channels.png")
    assert loaded(grey, cache).train.image_shape[0] == 1
    assert (pixels(loaded(grey, cache))["001.png"][0] == np.asarray(picture(1, mode="L"))).all()
    picture(8).save(grey / "colour.png")
    mixed = loaded(grey, cache)
    assert mixed.train.image_shape[0] == 3 and mixed.notices == ["4 of 5 pictures are grey among coloured ones."]
    clear = lay(tmp_path / "clear", 3, mode="RGBA")
    flat = loaded(clear, cache)
    assert flat.train.image_shape[0] == 3 and "3 of 3 pictures have transparent parts" in flat.notices[0]
    kept = loaded(clear, cache, channels=4)
    assert kept.train.image_shape[0] == 4 and kept.notices == [
        "No pictures are held out: validation uses the training pictures."
    ] * (kept.train is kept.validation)
    assert loaded(clear, cache, channels=1).train.image_shape[0] == 1


def test_padding_and_background(tmp_path: Path) -> None:
    Image.new("RGB", (32, 16), "blue").save(tmp_path / "a.png")
    data = loaded(tmp_path, tmp_path / "cache", size=16, fit="pad", background="#ff0000")
    assert pixels(data)["a.png"][:, [0, 8], 8].T.tolist() == [[255, 0, 0], [0, 0, 255]]


def test_labels_captions_and_unlabelled_pictures(tmp_path: Path) -> None:
    for index, name in enumerate(["b/1", "a/1", "a/2", "beside"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(index).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    data = loaded(tmp_path, tmp_path / "cache", validation_fraction=0)
    assert data.train.class_names == ("a", "b") and data.train.num_classes == 2
    labels = data.train.read(range(4)).labels
    assert labels is not None
    assert dict(zip(data.train.files, labels.tolist(), strict=True)) == {
        "a/1.png": 0,
        "a/2.png": 0,
        "b/1.png": 1,
        "beside.png": -1,
    }
    assert data.train.captions == ["picture a/1", "picture a/2", "picture b/1", "picture beside"]


def test_a_class_without_usable_pictures_is_dropped_and_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        lay(tmp_path / "set" / name, 2)
    for file in (tmp_path / "set" / "b").iterdir():
        file.write_bytes(b"")
    data = loaded(tmp_path / "set", tmp_path / "cache")
    assert data.train.class_names == ("a", "c") and "No usable pictures are left of: b." in data.notices


def test_one_picture_trains_on_itself(tmp_path: Path) -> None:
    data = loaded(lay(tmp_path / "set", 1), tmp_path / "cache")
    assert data.train is data.validation and len(data.train) == 1
    assert data.notices == ["No pictures are held out: validation uses the training pictures."]


def test_exact_duplicates_never_lie_on_both_sides(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", 30)
    for index in range(30):
        picture(index).save(root / f"copy-{index:03d}.bmp")
    data = loaded(root, tmp_path / "cache", validation_fraction=0.3)
    sides = [
        {image.tobytes() for image in side.read(range(len(side))).images.numpy()}
        for side in (data.train, data.validation)
    ]
    assert not sides[0] & sides[1] and sides[0] and sides[1]
    assert len(data.train) + len(data.validation) == 60 and len(sides[0] | sides[1]) == 30


def test_a_picture_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", 40)
    before = set(loaded(root, tmp_path / "cache", validation_fraction=0.25).validation.files)
    after = set(loaded(lay(root, 60), tmp_path / "cache", validation_fraction=0.25).validation.files)
    assert before and before == {name for name in after if name < "040"}


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=2, max_size=30), st.floats(0, 1))
@settings(deadline=None)
def test_split_properties(raw: list[bytes], fraction: float) -> None:
    digests = [item.hex() for item in raw]
    held_out = split(digests, fraction)
    assert not {d for d, out in zip(digests, held_out, strict=True) if out} & {
        d for d, out in zip(digests, held_out, strict=True) if not out
    }
    if len(set(digests)) > 1 and fraction > 0:
        assert held_out.any() and not held_out.all()


def test_digests_know_the_shape() -> None:
    flat = np.zeros((1, 2, 8), np.uint8)
    assert digest(flat) != digest(flat.reshape(1, 4, 4)) and digest(flat) == digest(flat.copy())


def test_pictures_are_decoded_once_and_again_when_they_change(tmp_path: Path) -> None:
    root, cache = lay(tmp_path / "set", 5), tmp_path / "cache"
    seen: list[tuple[int, int]] = []

    def fingerprint() -> str:
        seen.clear()
        return load(DataConfig(path=str(root)), cache, lambda done, total: seen.append((done, total))).fingerprint

    first = fingerprint()
    assert seen == [(done, 5) for done in range(1, 6)]
    assert fingerprint() == first and seen == []
    picture(99).save(root / "000.png")
    assert fingerprint() != first and seen


def test_the_fingerprint_sees_pixels_labels_and_captions_only(tmp_path: Path) -> None:
    first = loaded(lay(tmp_path / "one", 5), tmp_path / "cache").fingerprint
    assert loaded(lay(tmp_path / "two", 5), tmp_path / "other").fingerprint == first
    (tmp_path / "two" / "000.txt").write_text("a caption")
    assert loaded(tmp_path / "two", tmp_path / "cache").fingerprint != first


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    root, cache = lay(tmp_path / "set", 5), tmp_path / "cache"
    first = loaded(root, cache).fingerprint
    for name in ("images.npy", "metadata.jsonl", "prepare.json"):
        (file,) = cache.rglob(name)
        file.write_bytes(file.read_bytes()[:20])
        assert loaded(root, cache).fingerprint == first


def test_a_stopped_packing_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(DataConfig(path=str(lay(tmp_path / "set", 50))), tmp_path / "cache", stop)
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["packed"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DiskError, match="Set IMAGEKILN_CACHE"):
        loaded(lay(tmp_path / "set", 2), tmp_path / "cache")


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("IMAGEKILN_CACHE")
    assert cache_folder().name == "imagekiln"


def test_a_packed_folder_is_data_itself_and_holds_no_secrets(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x010F] = "SECRET CAMERA"
    for index in range(6):
        picture(index).save(root / f"{index}.jpg", exif=exif)
    first = loaded(root, tmp_path / "cache")
    (packed,) = (tmp_path / "cache" / "packed").iterdir()
    assert sorted(file.name for file in packed.iterdir()) == [
        "images.npy",
        "left_out.csv",
        "metadata.jsonl",
        "prepare.json",
    ]
    content = b"".join(file.read_bytes() for file in packed.iterdir())
    assert b"SECRET" not in content and os.fsencode(tmp_path) not in content
    assert loaded(packed, tmp_path / "unused").fingerprint == first.fingerprint
    with pytest.raises(DataError, match=r"was prepared as 16x16 with 3 channels; the recipe asks for data\.size=8"):
        loaded(packed, tmp_path / "unused", size=8)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("prepare.json", "{}", "is damaged"),
        ("prepare.json", "[]", "is damaged"),
        ("prepare.json", '{"version": 99, "class_names": []}', "by a newer version"),
        ("metadata.jsonl", "", "does not fit together"),
        ("metadata.jsonl", '{"file_name": "a", "digest": "xyz"}', "is damaged|does not fit together"),
        ("metadata.jsonl", '{"file_name": "a", "digest": "' + "0" * 32 + '", "label": 7}', "does not fit together"),
        ("images.npy", "", "is damaged"),
        ("left_out.csv", "a\nb", "is damaged"),
    ],
)
def test_damaged_packed_folders_are_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    loaded(lay(tmp_path / "set", 1), tmp_path / "cache")
    (packed,) = (tmp_path / "cache" / "packed").iterdir()
    (packed / file).write_text(content)
    with pytest.raises(DataError, match=message):
        loaded(packed, tmp_path / "unused")


def test_a_pickle_in_images_npy_is_never_loaded(tmp_path: Path) -> None:
    loaded(lay(tmp_path / "set", 1), tmp_path / "cache")
    (packed,) = (tmp_path / "cache" / "packed").iterdir()
    np.save(packed / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is damaged"):
        loaded(packed, tmp_path / "unused")


def test_a_zip_gives_what_its_folder_gives(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", 8)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(root.iterdir()):
            archive.write(file, f"set/{file.name}")
    before = sorted(tmp_path.iterdir())
    assert loaded(tmp_path / "set.zip", tmp_path / "cache").fingerprint == loaded(root, tmp_path / "cache").fingerprint
    assert sorted({*tmp_path.iterdir()} - {tmp_path / "cache"}) == before


def test_a_summary_says_it_in_one_line(tmp_path: Path) -> None:
    data = load(DataConfig(path="builtin:digits"), tmp_path)
    sides = f"{len(data.train):,} to train on, {len(data.validation):,} held out."
    assert data.summary() == f"1,797 pictures, 8x8 grey, 10 classes: {sides}"
    assert json.dumps(data.left_out) == "[]"


def test_a_published_set_is_packed_into_a_folder(tmp_path: Path) -> None:
    data = DataConfig(path="builtin:digits", size=24)
    known = published(data.path)
    assert known is not None
    written = write_published(*known, data, tmp_path / "out")
    again = loaded(tmp_path / "out", tmp_path / "unused")
    assert written.fingerprint == again.fingerprint == load(data, tmp_path / "cache").fingerprint
    with pytest.raises(UsageError, match="is not an empty folder"):
        write_published(*known, data, tmp_path / "out")
    assert published(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"drop": ["000001"], "restore": ["000002"], "propagate": 0.9}, "restore, drop, propagate. Leave them out"),
        ({"assignments": ["clean.min_side=32"]}, "does not take clean. Leave it out"),
        ({"test_fraction": 0.1, "frames": "all"}, "frames, test_fraction. Leave them"),
    ],
)
def test_what_a_published_set_does_not_take_is_refused(tmp_path: Path, asked: dict, named: str) -> None:
    with pytest.raises(UsageError, match=f"builtin:digits is a published set, which is packed as it is.*{named}"):
        imagekiln.prepare("builtin:digits", tmp_path / "set", **asked)
    assert not (tmp_path / "set").exists()


def test_a_published_test_split_survives_preparing(tmp_path: Path) -> None:
    for split_name, count in (("train", 6), ("t10k", 3)):
        for kind, values in (
            ("images-idx3", np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)),
            ("labels-idx1", np.arange(count, dtype=np.uint8)),
        ):
            head = np.array([0x800 + values.ndim, *values.shape], ">u4").tobytes()
            (tmp_path / f"{split_name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    known = published(str(tmp_path))
    assert known is not None
    written = write_published(*known, DataConfig(), tmp_path / "out")
    assert (len(written.train), len(written.validation)) == (6, 3)
    assert written.fingerprint == loaded(tmp_path, tmp_path / "unused").fingerprint


def test_a_split_of_the_set_itself_is_kept(tmp_path: Path) -> None:
    for side, count in (("train", 5), ("test", 3)):
        for label in "ab":
            folder = tmp_path / "set" / side / label
            folder.mkdir(parents=True)
            for index in range(count):
                picture(hash((side == "test", label == "a", index)) % 1000).save(folder / f"{side}{index}.png")
    dataset = loaded(tmp_path / "set", tmp_path / "cache")
    assert (len(dataset.train), len(dataset.validation), dataset.test) == (10, 6, None)
    assert all("test" in file for file in dataset.validation.files) and dataset.train.class_names == ("a", "b")


def test_a_set_that_names_training_alone_has_held_out_pictures_all_the_same(tmp_path: Path) -> None:
    plain = loaded(lay(tmp_path / "plain", 20), tmp_path / "cache")
    dataset = loaded(lay(tmp_path / "set" / "train", 20).parent, tmp_path / "cache")
    assert len(dataset.validation) == len(plain.validation) > 0 and dataset.validation is not dataset.train
    assert dataset.fingerprint == plain.fingerprint and len(dataset.notices) == 2


def test_shards_are_data(tmp_path: Path) -> None:
    dataset = loaded(lay(tmp_path / "set", 12), tmp_path / "cache")
    write_shards(dataset, tmp_path / "shards")
    again = loaded(tmp_path / "shards", tmp_path / "cache")
    assert (len(again.train), len(again.validation)) == (len(dataset.train), len(dataset.validation))
    assert again.train.read([0]).images.equal(dataset.train.read([0]).images)
    assert list(again.train.files) == list(dataset.train.files)


def test_own_pictures_are_opened_or_named(tmp_path: Path) -> None:
    lay(tmp_path, 1)
    assert open_own(tmp_path / "000.png").size == (16, 16)
    with pytest.raises(DataError, match=r"gone\.png cannot be read: no such file"):
        open_own(tmp_path / "gone.png")
