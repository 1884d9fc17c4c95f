"""A prepared set: one look, decisions that can be taken back, and a second run that only opens what is new."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagekiln import signals
from imagekiln.config import DataConfig
from imagekiln.data import PROPOSALS, Edits, PrepareConfig, is_prepared, load, open_prepared, pixels, prepare
from imagekiln.errors import DataError, DiskError, Interrupted, UsageError


def scene(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth picture with some detail, unlike every other seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-20, 21, (size[1], size[0], 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty pictures in two classes, one exact copy, one blank, one that is cut, one text file named as a picture."""
    root = tmp_path / "photos"
    for index in range(20):
        folder = root / ("cat" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        scene(index).save(folder / f"{index:02d}.png")
    shutil.copy(root / "cat" / "01.png", root / "cat" / "copy.png")
    Image.new("RGB", (48, 40), "grey").save(root / "dog" / "blank.png")
    raw = (root / "dog" / "00.png").read_bytes()
    (root / "dog" / "cut.png").write_bytes(raw[: len(raw) // 2])
    (root / "dog" / "text.jpg").write_text("hello")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def left_out(folder: Path) -> dict[str, str]:
    with (folder / "left_out.csv").open(encoding="utf-8", newline="") as stream:
        return {row["file"]: row["reason"] for row in csv.DictReader(stream)}


CONFIG = PrepareConfig(size=16)


def test_a_set_is_cleaned_split_and_opened_as_data(photos: Path, tmp_path: Path) -> None:
    before = contents(photos)
    prepared = prepare([str(photos)], tmp_path / "set", CONFIG)
    assert contents(photos) == before
    assert prepared.about["counts"] | {"train": 0, "validation": 0} == {
        "files": 24,
        "usable": 22,
        "kept": 20,
        "left_out": 4,
        "train": 0,
        "validation": 0,
        "test": 0,
    }
    reasons = left_out(tmp_path / "set")
    assert set(reasons) == {"cat/copy.png", "dog/blank.png", "dog/cut.png", "dog/text.jpg"}
    assert "01.png" in reasons["cat/copy.png"] and reasons["dog/text.jpg"] == "not an image (text)"
    dataset = load(DataConfig(path=str(tmp_path / "set")))
    assert len(dataset.train) + len(dataset.validation) == 20 and dataset.train.class_names == ("cat", "dog")
    # Every row's pixels are those of its file: places in the array are not mixed up.
    for source in (dataset.train, dataset.validation):
        for index, file in enumerate(source.files):
            plain = load(DataConfig(path=str(photos), size=16), tmp_path / "cache")
            both = {
                name: side.read([n]).images
                for side in (plain.train, plain.validation)
                for n, name in enumerate(side.files)
            }
            assert source.read([index]).images.equal(both[file])


def test_the_second_run_opens_only_what_is_new(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    see = pixels.see

    def watched(found, picture, *args, **settings):  # type: ignore[no-untyped-def]
        seen.append(picture.name)
        return see(found, picture, *args, **settings)

    monkeypatch.setattr(pixels, "see", watched)
    first = prepare([str(photos)], tmp_path / "set", CONFIG)
    assert len(seen) == 24
    seen.clear()
    before = contents(tmp_path / "set")
    prepare([str(photos)], tmp_path / "set", CONFIG)
    assert not seen and contents(tmp_path / "set") == before
    scene(100).save(photos / "cat" / "new.png")
    scene(101).save(photos / "dog" / "00.png")
    (photos / "cat" / "03.png").unlink()
    second = prepare([str(photos)], tmp_path / "set", CONFIG)
    assert sorted(seen) == ["cat/new.png", "dog/00.png"]
    fresh = prepare([str(photos)], tmp_path / "other", CONFIG)
    rows = {row["file_name"]: row["digest"] for row in fresh.rows}
    assert {row["file_name"]: row["digest"] for row in second.rows} == rows
    for row in second.rows:
        other = next(one for one in fresh.rows if one["file_name"] == row["file_name"])
        assert (second.images_NCHW[row["row"]] == fresh.images_NCHW[other["row"]]).all()
    assert (second.survey.measured == fresh.survey.measured).all() and len(first.rows) == len(second.rows)
    seen.clear()
    prepare([str(photos)], tmp_path / "set", PrepareConfig(size=24))
    assert len(seen) == 24


def test_a_picture_keeps_its_side_when_others_come(photos: Path, tmp_path: Path) -> None:
    config = PrepareConfig(size=16, validation_fraction=0.3, test_fraction=0.2)
    before = {row["file_name"]: row["split"] for row in prepare([str(photos)], tmp_path / "set", config).rows}
    for index in range(200, 240):
        scene(index).save(photos / "cat" / f"{index}.png")
    after = {row["file_name"]: row["split"] for row in prepare([str(photos)], tmp_path / "set", config).rows}
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 40
    assert set(after.values()) == {"train", "validation", "test"}
    assert load(DataConfig(path=str(tmp_path / "set"))).test is not None


def test_other_fractions_choose_sides_anew_and_say_so(photos: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "set", CONFIG.model_copy(update={"validation_fraction": 0.5, "test_fraction": 0.2})
    sides = {row["file_name"]: row["split"] for row in prepare([str(photos)], tmp_path / "new", wanted).rows}
    prepare([str(photos)], out, CONFIG)
    for sources in ([], [str(photos)]):
        changed = prepare(sources, out, wanted)
        assert {row["file_name"]: row["split"] for row in changed.rows} == sides
        assert "sides were chosen anew" in changed.about["notices"][-1]
        prepare(sources, out, CONFIG)
    edited = prepare([], out, CONFIG, edits=Edits(drop=("dog/00.png",)))
    assert not any("anew" in notice for notice in edited.about["notices"])


@pytest.mark.parametrize(("asked", "said"), [(0.1, False), (0.3, False), (0.2, True), (0, True)])
def test_a_fraction_that_a_prepared_set_does_not_follow_is_told(
    photos: Path, tmp_path: Path, asked: float, said: bool
) -> None:
    prepare([str(photos)], tmp_path / "set", CONFIG.model_copy(update={"validation_fraction": 0.3}))
    dataset = load(DataConfig(path=str(tmp_path / "set"), validation_fraction=asked))
    notice = f"The set says itself what is held out, so data.validation_fraction={asked:g} does not count."
    assert (notice in dataset.notices) == said


def test_decisions_are_taken_back_without_the_pictures(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    first = prepare([str(photos)], out, CONFIG)
    shutil.rmtree(photos)
    edited = prepare([], out, CONFIG, edits=Edits(restore=("dog/blank.png",), drop=("cat/05.png",)))
    names = {row["file_name"] for row in edited.rows}
    assert "dog/blank.png" in names and "cat/05.png" not in names
    assert left_out(out)["cat/05.png"] == "dropped by hand" and "dog/blank.png" not in left_out(out)
    again = prepare([], out, CONFIG, edits=Edits(restore=("cat/05.png",), drop=("dog/blank.png",)))
    assert {row["file_name"] for row in again.rows} == {row["file_name"] for row in first.rows}
    with pytest.raises(UsageError, match=r"no file 'cat/5\.png'. Did you mean"):
        prepare([], out, CONFIG, edits=Edits(drop=("cat/5.png",)))
    assert is_prepared(out)


def test_an_edited_file_may_go_and_come_back(photos: Path, tmp_path: Path) -> None:
    out, away = tmp_path / "set", tmp_path / "05.png"
    prepare([str(photos)], out, CONFIG)
    prepare([], out, CONFIG, edits=Edits(drop=("cat/05.png",)))
    shutil.move(photos / "cat" / "05.png", away)
    assert "cat/05.png" not in left_out(prepare([str(photos)], out, CONFIG).folder)
    shutil.move(away, photos / "cat" / "05.png")
    assert left_out(prepare([str(photos)], out, CONFIG).folder)["cat/05.png"] == "dropped by hand"


def test_settings_change_without_the_pictures_unless_they_are_needed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    prepare([str(photos)], out, CONFIG)
    shutil.rmtree(photos)
    lenient = PrepareConfig.model_validate({"size": 16, "clean": {"leave_out": ["duplicate"]}})
    assert {row["file_name"] for row in prepare([], out, lenient).rows} >= {"dog/blank.png"}
    with pytest.raises(UsageError, match="To change size, the pictures are needed"):
        prepare([], out, PrepareConfig(size=24))


def test_a_set_made_before_a_setting_existed_is_as_it_was(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    prepare([str(photos)], out, CONFIG)
    about = json.loads((out / "prepare.json").read_text())
    assert about["settings"].pop("frames") == "first" and about["settings"].pop("repair") is False
    (out / "prepare.json").write_text(json.dumps(about))
    before = contents(out)
    monkeypatch.setattr(pixels, "see", None)  # nothing is looked at
    prepare([str(photos)], out, CONFIG)
    prepare([], out, CONFIG)
    assert contents(out) == before


def test_a_label_that_is_given_is_worth_more_than_a_proposed_one(photos: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "set", photos / "metadata.csv"
    table.write_text("file_name,label\ncat/01.png,cat\ndog/00.png,dog\ncat/03.png,\n")
    prepare([str(photos)], out, CONFIG)
    prepare([], out, CONFIG, edits=Edits(labels={"cat/03.png": "dog"}))
    table.write_text("file_name,label\ncat/01.png,cat\ndog/00.png,dog\ncat/03.png,cat\n")
    rows = {row["file_name"]: row for row in prepare([str(photos)], out, CONFIG).rows}
    assert rows["cat/03.png"]["label"] == 0 and "label_from" not in rows["cat/03.png"]


def test_accepted_labels_are_marked(photos: Path, tmp_path: Path) -> None:
    (photos / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"cat/{i:02d}.png,cat\n" for i in (1, 3, 5)) + "dog/00.png,dog\ncat/07.png,\n"
    )
    out = tmp_path / "set"
    prepare([str(photos)], out, CONFIG)
    rows = prepare([], out, CONFIG, edits=Edits(labels={"cat/07.png": "cat"})).rows
    proposed = [row for row in rows if row.get("label_from") == "proposed"]
    assert [row["file_name"] for row in proposed] == ["cat/07.png"] and proposed[0]["label"] == 0
    with (photos / "metadata.csv").open("a") as table:
        table.write("dog/02.png,\n")
    config = CONFIG.model_copy(update={"clean": CONFIG.clean.model_copy(update={"leave_out": ("missing_label",)})})
    left = {row["file_name"] for row in prepare([str(photos)], out, config).rows}
    assert "cat/07.png" in left and "dog/02.png" not in left, "an accepted label is a label"


def test_the_table_of_proposals_outlives_a_change(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    prepare([str(photos)], out, CONFIG)
    (out / PROPOSALS).write_text("file,name\n")
    prepare([], out, CONFIG, edits=Edits(drop=("dog/00.png",)))
    scene(77).save(photos / "dog" / "77.png")
    prepare([str(photos)], out, CONFIG)
    assert (out / PROPOSALS).read_text() == "file,name\n"


def test_a_signal_while_a_set_is_replaced_waits_until_one_stands(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    prepare([str(photos)], out, CONFIG)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self == out:
            os.kill(os.getpid(), signal.SIGINT)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with signals.handled(), pytest.raises(Interrupted):
        prepare([], out, CONFIG, edits=Edits(drop=("dog/00.png",)))
    assert "dog/00.png" not in [row["file_name"] for row in open_prepared(out).rows]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_captions_are_made_from_labels_where_there_are_none(photos: Path, tmp_path: Path) -> None:
    (photos / "dog" / "00.txt").write_text("my own {label}")
    config = PrepareConfig(size=16, caption_templates=("a {label}", "one {label}, 100%"))
    texts = {row["file_name"]: row["text"] for row in prepare([str(photos)], tmp_path / "set", config).rows}
    assert texts.pop("dog/00.png") == "my own {label}"
    assert set(texts.values()) == {"a cat", "a dog", "one cat, 100%", "one dog, 100%"}


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
def test_a_template_for_a_name_that_is_not_utf8(photos: Path, tmp_path: Path) -> None:
    scene(30).save(photos / "cat" / os.fsdecode(b"caf\xe9.png"))
    config = PrepareConfig(size=16, caption_templates=("a {label}",))
    texts = {row["file_name"]: row["text"] for row in prepare([str(photos)], tmp_path / "set", config).rows}
    assert texts["cat/caf\udce9.png"] == "a cat"


def test_grey_sets_become_coloured_when_colour_comes(tmp_path: Path) -> None:
    root = tmp_path / "grey"
    root.mkdir()
    for index in range(6):
        scene(index).convert("L").save(root / f"{index}.png")
    assert prepare([str(root)], tmp_path / "set", CONFIG).images_NCHW.shape == (6, 1, 16, 16)
    scene(7).save(root / "7.png")
    assert prepare([str(root)], tmp_path / "set", CONFIG).images_NCHW.shape == (7, 3, 16, 16)


def test_what_is_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(UsageError, match="holds no prepared set"):
        prepare([str(photos)], out, CONFIG, edits=Edits(drop=("a.png",)))
    with pytest.raises(UsageError, match="No pictures were named"):
        prepare([], out, CONFIG)
    prepare([str(photos)], out, CONFIG)
    other = tmp_path / "other"
    other.mkdir()
    scene(1).save(other / "a.png")
    with pytest.raises(UsageError, match="holds a set prepared from"):
        prepare([str(other)], out, CONFIG)
    with pytest.raises(UsageError, match="not a prepared set"):
        prepare([str(photos)], other, CONFIG)
    with pytest.raises(DataError, match="Every picture would be left out"):
        prepare([str(photos)], tmp_path / "x", PrepareConfig.model_validate({"size": 16, "clean": {"min_side": 4000}}))
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        prepare([str(photos)], tmp_path / "file" / "set", CONFIG)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_damaged_surveys_are_named(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    prepare([str(photos)], out, CONFIG)
    for file, content in (("survey/files.jsonl", "{}\n"), ("survey/measured.npy", "x"), ("findings.jsonl", "{")):
        keep = (out / file).read_bytes()
        (out / file).write_text(content)
        with pytest.raises(DataError, match="is damaged"):
            open_prepared(out)
        (out / file).write_bytes(keep)
    about = json.loads((out / "prepare.json").read_text())
    assert about["version"] == 2 and about["settings"]["size"] == 16
