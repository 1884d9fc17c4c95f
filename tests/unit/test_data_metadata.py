"""Tags beside captions in `metadata.csv`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from imagekiln.config import DataConfig
from imagekiln.data import load


@pytest.mark.parametrize(
    ("header", "rows", "captions"),
    [
        ("file_name,text,tags", ["0.png,a cat,pet|Animal|a cat", "1.png,a dog,"], ["a cat, pet, Animal", "a dog"]),
        ("file_name,tags", ['0.png,"cat, pet"', "1.png,|  | "], ["cat, pet", ""]),
        ("file_name,text", ['0.png,"a cat, asleep"', "1.png,a dog,,"], ["a cat, asleep", "a dog"]),
        ("file_name,caption,tags", ["0.png,一只猫,猫|动物", "1.png,,x"], ["一只猫, 猫, 动物", "x"]),
    ],
)
def test_tags_follow_the_caption(
    header: str, rows: list[str], captions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    root.mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8), (200 * index, 0, 0)).save(root / f"{index}.png")
    (root / "metadata.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    dataset = load(DataConfig(path=str(root), validation_fraction=0))
    assert list(dataset.train.captions or []) == captions
