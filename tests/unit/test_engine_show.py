"""What is shown is what the trainer computes on, bit for bit, and beside it what the pictures were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagekiln import testing
from imagekiln.config import Recipe, write_toml
from imagekiln.core import Source
from imagekiln.data import to_uint8
from imagekiln.data.source import MemmapSource, Table
from imagekiln.engine import recipe as recipes
from imagekiln.engine import show
from imagekiln.engine.inputs import begin
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer

AUGMENT = {"p": 0.5, "flip": "vertical", "shift": 0.2, "rotate": 20, "color": 0.3, "cutout": 0.3}
SMALL = {"widths": [16], "attention": [False]}


def source(channels: int = 3, size: int = 16) -> MemmapSource:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, channels, size, size), np.uint8)
    captions = [f"picture {n} <b>" if n % 2 else None for n in range(30)]
    names = [f"{n}.png" for n in range(30)]
    table = Table(images, np.arange(30) % 3 - 1, ("猫", "dog"), [f"{n:032x}" for n in range(30)], names, captions)
    return MemmapSource(table, np.arange(3, 30))


def recipe(augment: dict[str, Any], flip: bool = False, **train: Any) -> Recipe:
    settings = {"batch": 8, "total_kimg": 0.08, "precision": "fp32", "device": "cpu", "compile": "off", "seed": 3}
    data = {"path": "builtin:digits", "augment": augment, "flip": flip}
    return recipes.resolve("diffusion", {"family": SMALL, "train": settings | train, "data": data})


def trainer(folder: Path, made: Recipe, pictures: Source) -> Trainer:
    family = recipes.build(made, pictures.image_shape, pictures.num_classes)
    return Trainer(made, family, pictures, pictures, Run.create(folder, write_toml(made), {}), Silent())


def cells(path: Path, count: int, columns: int, size: int) -> np.ndarray:
    """The pictures of a sheet: pixels are enlarged by a whole factor, and one empty pixel is between pictures."""
    sheet = np.asarray(Image.open(path))
    zoom = sheet.shape[1] // (columns * (size + 1) - 1)
    assert (sheet == sheet[::zoom, ::zoom].repeat(zoom, 0).repeat(zoom, 1)).all()
    small = sheet[::zoom, ::zoom]
    places = [((n // columns) * (size + 1), (n % columns) * (size + 1)) for n in range(count)]
    return np.stack([small[top : top + size, left : left + size] for top, left in places])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("position", [0, 40])
def test_after_is_what_the_trainer_computes_on(tmp_path: Path, position: int, accumulate: int) -> None:
    made, pictures = recipe(AUGMENT, flip=True, accumulate=accumulate), source()
    before, after = show.batches(made, pictures, position)
    real = trainer(tmp_path / "run", made, pictures)
    expected = real.loader.batch(position)
    assert torch.equal(after.images, expected.images) and torch.equal(after.augment, expected.augment)
    assert torch.equal(after.labels, expected.labels) and torch.equal(before.labels, expected.labels)
    raw = pictures.read(real.loader.order(position, 8 // accumulate).tolist())
    assert torch.equal(to_uint8(before.images), raw.images) and before.augment is None


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_files_show_both_and_say_what_was_done(tmp_path: Path, channels: int) -> None:
    made, pictures = recipe(AUGMENT, flip=True), source(channels)
    told = show.write(made, tmp_path / "new" / "show", pictures, position=16)
    folder = tmp_path / "new" / "show"
    assert sorted(path.name for path in folder.iterdir()) == ["after.png", "batch.json", "batch.png", "before.png"]
    sides = [to_uint8(batch.images).permute(0, 2, 3, 1).numpy() for batch in show.batches(made, pictures, 16)]
    before, after = (side[..., 0] if channels == 1 else side for side in sides)
    columns = told["columns"]
    assert (cells(folder / "before.png", 8, columns, 16) == before).all()
    assert (cells(folder / "after.png", 8, columns, 16) == after).all()
    pairs = cells(folder / "batch.png", 16, 2 * columns, 16)
    assert (pairs[0::2] == before).all() and (pairs[1::2] == after).all()
    assert json.loads((folder / "batch.json").read_text(encoding="utf-8")) == told
    changed = (before != after).reshape(8, -1).any(1)
    assert [bool(entry["changes"]) for entry in told["pictures"]] == changed.tolist() and 2 < changed.sum() <= 8


def test_every_picture_has_its_name_class_and_caption(tmp_path: Path) -> None:
    pictures = source()
    told = show.write(recipe({}), tmp_path, pictures)["pictures"]
    for place, entry in enumerate(told):
        number = int(entry["file"].removesuffix(".png"))
        assert entry["position"] == place and pictures.files[entry["index"]] == entry["file"]
        assert entry["changes"] == {}
        assert entry.get("class") == {0: None, 1: "猫", 2: "dog"}[number % 3]
        assert entry.get("caption") == (f"picture {number} <b>" if number % 2 else None)
    assert len({entry["file"] for entry in told}) == 8


def test_a_source_that_knows_nothing_and_a_large_batch(tmp_path: Path) -> None:
    told = show.write(recipe(AUGMENT, batch=100), tmp_path, testing.Toy(num_classes=0))
    assert len(told["pictures"]) == show.MOST_SHOWN
    assert set().union(*told["pictures"]) == {"position", "index", "changes"}


def test_the_recipe_names_its_pictures(tmp_path: Path) -> None:
    """As a user would: the pictures of the recipe, and those that `train` then takes."""
    made = recipe({"p": 1.0, "flip": "horizontal"})
    told = show.write(made, tmp_path / "show")
    from imagekiln import data

    dataset = data.load(made.data)
    torch.manual_seed(0)
    run = Run.create(tmp_path / "run", write_toml(made), {})
    real = Trainer(made, *begin(made, dataset), run, Silent())
    after = cells(tmp_path / "show" / "after.png", 8, told["columns"], 8)
    assert (after == to_uint8(real.loader.batch(0).images)[:, 0].numpy()).all()
    assert all(entry["changes"] == {"across": True} for entry in told["pictures"])
