"""`imagekiln prepare` from the command line: what it says, writes, undoes, and hands on to a training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index in range(30):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(root / f"{index:02d}.png")
        (root / f"{index:02d}.txt").write_text(f"picture {index}")
    shutil.copy(root / "03.png", root / "copy.png")
    (root / "page.jpg").write_text("<html>")
    return root


def test_a_set_is_prepared_told_edited_and_trained_on(cli, tiny, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    said = cli("prepare", photos, "--size", 8, "--out", out).ok().out
    assert "1 duplicate: left out" in said and "2 files were left out" in said and "report.html" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "copy.png" in page and "<script" not in page
    facts = cli("prepare", "--out", out, "--restore", "copy.png", "--drop", "07.png", "--json").ok().json()
    assert facts["counts"]["kept"] == 30 and ["07.png", "dropped by hand"] in facts["left_out"]
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {row["file_name"]: row for row in rows}
    assert names["copy.png"]["split"] == names["03.png"]["split"] and names["00.png"]["text"] == "picture 0"
    looser = cli("prepare", "--out", out, "--set", "clean.leave_out=[]", "--json").ok().json()
    assert looser["checks"]["duplicate"]["left_out"] == 0 and looser["counts"]["kept"] == 30
    assert "name their sources again" in cli("prepare", "--out", out, "--size", 16).err
    again = cli("prepare", photos, "--size", 8, "--out", out, "--json").ok().json()
    assert again["counts"] == facts["counts"]
    shown = cli("prepare", "--out", out, "--shards", tmp_path / "shards", "--show", tmp_path / "look").ok().out
    assert "30 pictures" in shown and (tmp_path / "look" / "batch.png").is_file()
    for data in (out, tmp_path / "shards"):
        arguments = tiny("vae", tmp_path / f"run-{data.name}", nimg=32)
        arguments[arguments.index("builtin:digits")] = str(data)
        cli(*arguments).ok()


def test_frames_a_cut_file_and_the_crop_are_asked_for(cli, photos: Path, tmp_path: Path) -> None:
    frames = [Image.open(photos / f"{index:02d}.png") for index in range(3)]
    frames[0].save(photos / "moving.png", save_all=True, append_images=frames[1:])
    frames[2].resize((90, 120)).save(photos / "cut.jpg", quality=90)
    raw = (photos / "cut.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(raw[:-2])
    plain = cli("prepare", photos, "--size", 8, "--out", tmp_path / "plain", "--json").ok().json()
    assert ["cut.jpg", "truncated"] in plain["left_out"] and plain["counts"]["files"] == 34
    options = ("--frames", "all", "--repair", "--fit", "smart", "--set", "clean.leave_out=[]")
    facts = cli("prepare", photos, "--size", 8, "--out", tmp_path / "set", *options, "--json").ok().json()
    assert facts["counts"]["files"] == 36 and facts["left_out"] == [["page.jpg", "not an image (HTML)"]]
    assert any("1 truncated JPEG file" in notice for notice in facts["notices"])
    rows = [json.loads(line) for line in (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()]
    moving = [row for row in rows if row["file_name"].startswith("moving.png#")]
    assert len(moving) == 3 and len({row["split"] for row in moving}) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere"], 2, "does not exist"),
        ([], 2, "No pictures were named"),
        (["photos", "--set", "clean.min_sid=3"], 2, "min_side"),
        (["photos", "--set", "clean.leave_out=['blury']"], 2, "clean.leave_out"),
        (["photos", "--drop", "00.png"], 2, "holds no prepared set"),
        (["photos", "--frames", "some"], 2, "frames"),
        (["photos", "--fit", "smrt"], 2, "fit"),
        (["photos", "--caption-encoding", "klingon"], 2, "klingon"),
        (["photos", "--urls", "list.txt"], 2, "list.txt"),
        (["hf:../x"], 2, "is no data set"),
        (["photos", "--propagate-labels", "0.9"], 2, "label"),
    ],
)
def test_bad_input_is_one_sentence(
    cli, photos: Path, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    ended = cli("prepare", *arguments, "--out", tmp_path / "set", "--size", 8, cwd=tmp_path)
    assert ended.code == code and sentence in ended.err and "Traceback" not in ended.err
