"""Smart crop: which window has most edges, against loops; and that everything that fits pictures cuts the same one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagekiln.config import DataConfig
from imagekiln.data import PrepareConfig, load, prepare
from imagekiln.data.decode import fit, open_safely
from imagekiln.data.shards import Row, ShardSource, write
from imagekiln.data.window import SHORT_SIDE, best_shift


def subject(width: int, height: int, left: int, top: int, side: int = 40, seed: int = 0) -> Image.Image:
    """Noise of `side` pixels on a soft slope."""
    slope = np.add.outer(np.linspace(90, 110, height), np.linspace(0, 20, width))
    pixels = np.repeat(slope[..., None], 3, 2)
    noise = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    coarse = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    pixels[top : top + side, left : left + side] = np.asarray(coarse)
    return Image.fromarray(pixels.astype(np.uint8))


def whole(image: Image.Image) -> tuple[float, float, float, float]:
    return (0.0, 0.0, float(image.width), float(image.height))


@pytest.mark.parametrize(("left", "expected"), [(0, -1), (150, 1)])
def test_the_subject_is_kept(left: int, expected: int) -> None:
    image = subject(200, 50, left + 5, 5)
    shift = best_shift(image, whole(image), (50, 50))
    assert shift * expected > 0.7
    kept = np.asarray(fit(image, (50, 50), "smart")).astype(float)
    found = np.abs(np.diff(kept, axis=1)).sum() / np.abs(np.diff(np.asarray(image).astype(float), axis=1)).sum()
    assert found > 0.9
    middle = np.abs(np.diff(fit(image, (50, 50), "crop").astype(float), axis=1)).sum()
    assert middle < 0.2 * np.abs(np.diff(kept, axis=1)).sum()


def test_the_score_is_that_of_loops() -> None:
    rng = np.random.default_rng(3)
    luma = (rng.random((SHORT_SIDE, 100)) * np.linspace(30, 200, 100) ** 0.5 * 10).astype(np.uint8)
    luma[:, 60:75] = rng.integers(0, 256, (SHORT_SIDE, 15))
    edges = [0.0] * 100
    for row in range(SHORT_SIDE):
        for column in range(100):
            if row + 1 < SHORT_SIDE:
                edges[column] += abs(int(luma[row + 1, column]) - int(luma[row, column]))
            if column + 1 < 100:
                step = abs(int(luma[row, column + 1]) - int(luma[row, column]))
                edges[column] += step / 2
                edges[column + 1] += step / 2
    scores = {}
    for start in range(100 - SHORT_SIDE + 1):  # whole places; the function also tries those between them
        x = 2 * start / (100 - SHORT_SIDE) - 1
        scores[x] = sum(edges[start : start + SHORT_SIDE]) / sum(edges) - x * x / 8
    found = best_shift(Image.fromarray(luma), (0, 0, 100, SHORT_SIDE), (SHORT_SIDE, SHORT_SIDE))
    best = max(scores, key=lambda x: scores[x])
    assert 0.05 < best < 1 and abs(found - best) <= 1 / (100 - SHORT_SIDE) + 1e-9


def test_a_mirrored_picture_is_cut_in_the_mirror_and_a_turned_one_turned() -> None:
    image = subject(150, 60, 90, 10)
    kept = fit(image, (32, 32), "smart").astype(int)
    mirrored = fit(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (32, 32), "smart").astype(int)
    turned = fit(image.transpose(Image.Transpose.TRANSPOSE), (32, 32), "smart").astype(int)
    assert np.abs(mirrored[:, ::-1] - kept).max() <= 2 and np.abs(turned.transpose(1, 0, 2) - kept).max() <= 2
    assert np.abs(kept - fit(image, (32, 32), "crop")).max() > 50


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_what_has_no_better_part_is_cut_to_its_middle(mode: str) -> None:
    for image in (Image.new("RGB", (90, 40), (9, 99, 199)), subject(64, 64, 0, 0)):
        smart, crop = (fit(image.convert(mode), (16, 16), how, channels=4) for how in ("smart", "crop"))
        assert (smart == crop).all()
    board = Image.fromarray((np.indices((40, 90)).sum(0) % 2 * 255).astype(np.uint8)).convert(mode)
    assert abs(best_shift(board, whole(board), (40, 40))) < 0.15


def test_alpha_alone_is_a_subject_and_hidden_color_is_none() -> None:
    pixels = np.zeros((40, 120, 4), np.uint8)
    pixels[:, :40, :3] = np.random.default_rng(0).integers(0, 256, (40, 40, 3))  # under full transparency
    pixels[10:30, 90:110, 3] = 255
    image = Image.fromarray(pixels)
    assert best_shift(image, whole(image), (40, 40)) > 0.5
    assert fit(image, (40, 40), "smart", channels=4)[..., 3].sum() == pixels[..., 3].sum()


def test_a_reduced_jpeg_is_cut_like_the_whole_one() -> None:
    photo = subject(1203, 515, 700, 60, side=400)
    stream = io.BytesIO()
    photo.save(stream, "JPEG", quality=95)
    raw = stream.getvalue()
    reduced, full = (open_safely(io.BytesIO(raw), short_side=side) for side in (32, 0))
    assert reduced.width < full.width / 3
    small, large = (fit(image, (32, 32), "smart").astype(float) for image in (reduced, full))
    assert 10 * np.log10(255**2 / np.square(small - large).mean()) > 30  # decibels
    assert np.square(large - fit(full, (32, 32), "crop")).mean() > 10 * np.square(small - large).mean()


def test_prepared_loaded_and_sharded_pictures_are_the_same(tmp_path: Path) -> None:
    root, names = tmp_path / "photos", [f"{n}.png" for n in range(6)]
    root.mkdir()
    images = [subject(96, 48, (n % 3) * 28, 4, seed=n) for n in range(6)]
    for name, image in zip(names, images, strict=True):
        image.save(root / name)
    expected = {name: fit(image, (24, 24), "smart") for name, image in zip(names, images, strict=True)}
    prepare([str(root)], tmp_path / "set", PrepareConfig(size=24, fit="smart"))
    rows = [Row(np.asarray(image), name) for name, image in zip(names, images, strict=True)]
    sharded = ShardSource(write(rows, tmp_path / "shards"), size=(24, 24), fit="smart")
    sources = [sharded]
    for data in (DataConfig(path=str(tmp_path / "set")), DataConfig(path=str(root), size=24, fit="smart")):
        dataset = load(data, tmp_path / "cache")
        sources += [dataset.train, dataset.validation]
    seen = [file for source in sources for file in source.files]
    assert sorted(seen) == sorted(names * 3)
    for source in sources:
        for index, file in enumerate(source.files):
            assert (source.read([index]).images[0].permute(1, 2, 0).numpy() == expected[file]).all()
