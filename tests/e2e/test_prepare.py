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


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere"], 2, "does not exist"),
        ([], 2, "No pictures were named"),
        (["photos", "--set", "clean.min_sid=3"], 2, "min_side"),
        (["photos", "--set", "clean.leave_out=['blury']"], 2, "clean.leave_out"),
        (["photos", "--drop", "00.png"], 2, "holds no prepared set"),
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
