"""Every frame of a file as a picture of its own: content, names, sides, limits, damage."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagekiln.data import Edits, PrepareConfig, frames, pixels, prepare
from imagekiln.data.decode import Unusable, fit, num_frames, open_frames
from imagekiln.errors import UsageError

LOSSLESS = {"GIF": {"duration": 40}, "PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}


def drawn(count: int, seed: int = 0, side: int = 24) -> list[Image.Image]:
    """Pictures of few colours, each unlike the others, so that a palette holds them."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (count, 12, 3), dtype=np.uint8)
    cells = rng.integers(0, 12, (count, 6, 6))
    each = (colours[n][cells[n]].repeat(side // 6, 0).repeat(side // 6, 1) for n in range(count))
    return [Image.fromarray(array) for array in each]


def animation(images: list[Image.Image], format: str) -> bytes:
    stream = io.BytesIO()
    images[0].save(stream, format, save_all=True, append_images=images[1:], **LOSSLESS[format])
    return stream.getvalue()


def left_out(folder: Path) -> dict[str, str]:
    with (folder / "left_out.csv").open(encoding="utf-8", newline="") as stream:
        return {row["file"]: row["reason"] for row in csv.DictReader(stream)}


ALL = PrepareConfig.model_validate({"size": 12, "frames": "all", "clean": {"leave_out": []}})


@pytest.mark.parametrize("format", list(LOSSLESS))
def test_every_frame_is_read_as_it_was_drawn(format: str) -> None:
    images = drawn(5)
    raw = animation(images, format)
    assert [num_frames(io.BytesIO(raw), most) for most in (3, 5, 9)] == [3, 5, 5]
    found = open_frames(io.BytesIO(raw))
    for image in images:
        assert (np.asarray(next(found).convert("RGB")) == np.asarray(image)).all()
    with pytest.raises(Unusable):
        next(found)


def test_a_still_picture_has_one_frame_and_so_has_what_cannot_be_read() -> None:
    for format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        stream = io.BytesIO()
        drawn(1)[0].save(stream, format)
        assert num_frames(stream, 9) == 1
    assert [num_frames(io.BytesIO(raw), 9) for raw in (b"", b"GIF89a", b"<html>")] == [1, 1, 1]


def test_ten_thousand_frames_are_counted_no_further_than_asked() -> None:
    raw = animation(drawn(2, side=6), "GIF")
    second = raw.rindex(b"\x21\xf9")  # the control block of the second frame
    bomb = raw[:-1] + raw[second:-1] * 10_000 + b"\x3b"
    assert num_frames(io.BytesIO(bomb), 1001) == 1001 and num_frames(io.BytesIO(bomb), 10**6) == 10_002


@pytest.mark.parametrize("format", list(LOSSLESS))
def test_frames_become_pictures_with_the_label_and_caption_of_their_file(format: str, tmp_path: Path) -> None:
    root, images = tmp_path / "photos", drawn(4)
    root.mkdir()
    (root / "moving.gif").write_bytes(animation(images, format))
    (root / "moving.txt").write_text("it moves")
    drawn(1, seed=9)[0].save(root / "still.png")
    (root / "metadata.csv").write_text("file_name,label\nmoving.gif,cat\nstill.png,dog\n")
    prepared = prepare([str(root)], tmp_path / "set", ALL)
    rows = {row["file_name"]: row for row in prepared.rows}
    assert sorted(rows) == [*(f"moving.gif#{n:04d}" for n in range(4)), "still.png"]
    for number, image in enumerate(images):
        row = rows[f"moving.gif#{number:04d}"]
        assert row["label"] == 0 and row["text"] == "it moves"
        assert (prepared.images_NCHW[row["row"]].transpose(1, 2, 0) == fit(image, (12, 12))).all()
    assert any("4 pictures in all" in notice for notice in prepared.about["notices"])


def test_unasked_only_the_first_frame_is_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.gif").write_bytes(animation(drawn(3, seed=ord(name)), "GIF"))
    prepared = prepare([str(tmp_path / "photos")], tmp_path / "set", ALL.model_copy(update={"frames": "first"}))
    assert [row["file_name"] for row in prepared.rows] == ["a.gif", "b.gif"]
    assert all("frames" in notes for notes in prepared.survey.notes)
    with pytest.raises(UsageError, match="To change frames, the pictures are needed"):
        prepare([], tmp_path / "set", ALL)
    assert len(prepare([str(tmp_path / "photos")], tmp_path / "set", ALL).rows) == 6


def test_a_file_never_has_frames_on_two_sides(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(20):
        (tmp_path / "photos" / f"{number}.gif").write_bytes(animation(drawn(3, seed=number), "GIF"))
    config = ALL.model_copy(update={"validation_fraction": 0.3, "test_fraction": 0.2})
    prepared = prepare([str(tmp_path / "photos")], tmp_path / "set", config)
    sides: dict[str, set[str]] = {}
    for row in prepared.rows:
        sides.setdefault(row["file_name"].partition("#")[0], set()).add(row["split"])
    assert len(sides) == 20 and all(len(side) == 1 for side in sides.values())
    assert set.union(*sides.values()) == {"train", "validation", "test"}


def test_what_is_beyond_the_limits_is_cut_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.gif").write_bytes(animation(drawn(6), "GIF"))
    (tmp_path / "photos" / "b.gif").write_bytes(animation(drawn(3, seed=1), "GIF"))
    monkeypatch.setattr(frames, "MOST_FRAMES", 4)
    prepared = prepare([str(tmp_path / "photos")], tmp_path / "set", ALL)
    assert len(prepared.rows) == 7
    assert "Only the first 4 frames are read of a.gif." in prepared.about["notices"]
    monkeypatch.setattr(frames, "MOST_PIXELS", 2 * 24 * 24)
    prepared = prepare([str(tmp_path / "photos")], tmp_path / "other", ALL)
    assert [row["file_name"] for row in prepared.rows] == [f"{name}.gif#{n:04d}" for name in "ab" for n in range(2)]
    assert left_out(tmp_path / "other")["b.gif#0002"] == "its file has more pixels than are read of one"


def test_of_a_cut_file_the_whole_frames_are_used(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    raw = animation(drawn(5), "GIF")
    third = [at for at in range(len(raw) - 1) if raw[at : at + 2] == b"\x21\xf9"][2]
    (tmp_path / "photos" / "a.gif").write_bytes(raw[: third + 80])
    prepared = prepare([str(tmp_path / "photos")], tmp_path / "set", ALL)
    assert [row["file_name"] for row in prepared.rows] == ["a.gif#0000", "a.gif#0001"]
    assert left_out(tmp_path / "set") == {"a.gif#0002": "truncated"}


def test_archives_edits_and_second_runs_know_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.gif", animation(drawn(3), "GIF"))
        archive.writestr("b.png", animation(drawn(2, seed=1), "PNG"))
    sources, out = [str(tmp_path / "set.zip")], tmp_path / "out"
    prepare(sources, out, ALL)
    seen: list[str] = []
    see = pixels.see

    def watched(found, picture, *args, **settings):  # type: ignore[no-untyped-def]
        seen.append(picture.name)
        return see(found, picture, *args, **settings)

    monkeypatch.setattr(pixels, "see", watched)
    edited = prepare(sources, out, ALL, edits=Edits(drop=("a.gif#0001",)))
    names = [row["file_name"] for row in edited.rows]
    assert names == ["a.gif#0000", "a.gif#0002", "b.png#0000", "b.png#0001"] and not seen
    assert edited.rows[0]["split"] == edited.rows[1]["split"]


def test_neighbours_join_all_frames_of_a_file() -> None:
    names = ["x/a.gif#0000", "x/a.gif#0001", "y/a.gif#0000", "a#b.gif", "x/a.gif#10000", "y/a.gif#0001"]
    assert list(frames.neighbours(names)) == [(0, 1), (1, 4), (2, 5)]
