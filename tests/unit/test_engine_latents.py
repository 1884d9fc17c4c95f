"""Walks close and pass through the pictures they are made of; mixed styles are what they are said to be."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from imagekiln.config import FamilyConfig
from imagekiln.core import Family, Loss, Phase, seeded_noise
from imagekiln.data import to_uint8
from imagekiln.engine import latents, pictures, recipe, registry
from imagekiln.engine.generate import asked_for, draw, options_for
from imagekiln.engine.latents import StyleSpace, mixed, require_styles, require_walk, slerp, walk
from imagekiln.engine.models import Model
from imagekiln.engine.sheets import Sheets
from imagekiln.errors import UsageError

SHAPE = (3, 8, 8)
STYLED = [name for name in registry.names() if issubclass(registry.load(name), StyleSpace)]


def build(name: str, num_classes: int = 3, **settings) -> Family:
    torch.manual_seed(0)
    given = {"family": {**registry.load(name).check_settings, **settings}}
    family = recipe.build(recipe.resolve(name, given), SHAPE, num_classes).eval().requires_grad_(False)
    for key, parameter in family.named_parameters():
        if key.endswith("noise_strength"):
            parameter.fill_(0.3)  # 0 at first, which would hide whose noise it is
    return family


class _Config(FamilyConfig):
    name: str = "tests"


class Bare(Family):
    """Its pictures are its noise, so that frames are known."""

    Config = _Config
    phases = (Phase("none", trains=("net",)),)
    averaged = ("net",)

    def __init__(self, config, image_shape, num_classes):
        super().__init__(config, image_shape, num_classes)
        self.net = torch.nn.Linear(1, 1)

    def loss(self, phase, batch, progress):
        return Loss(self.net(batch.images.mean().view(1, 1)).square().mean())

    def sample(self, noise, condition, options=None):
        return (noise / 4).clamp(-1, 1)

    def noise_shape(self):
        return self.image_shape


# -- spherical interpolation ------------------------------------------------------------------------------------------


def test_slerp_ends_where_it_should_to_the_bit():
    a, b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).mul(7)
    assert torch.equal(slerp(a, b, torch.zeros(3)), a) and torch.equal(slerp(a, b, torch.ones(3)), b)


def test_slerp_of_a_right_angle_is_sine_and_cosine():
    a, b = torch.eye(6, dtype=torch.float64)[:2, None]
    for share in (0.1, 0.5, 0.8):
        expected = math.cos(share * math.pi / 2) * a + math.sin(share * math.pi / 2) * b
        torch.testing.assert_close(slerp(a, b, torch.tensor([share])), expected, atol=1e-7, rtol=0)


def test_slerp_goes_evenly_along_one_great_circle_with_lengths_between_those_of_the_ends():
    a, b = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shares = torch.linspace(0, 1, 11)
    path = slerp(a.expand(11, -1), b.expand(11, -1), shares)
    lengths = path.norm(dim=1)
    torch.testing.assert_close(lengths, torch.lerp(a.norm(), b.norm(), shares.double()), rtol=1e-6, atol=0)
    units = path / lengths[:, None]
    angles = (units[1:] * units[:-1]).sum(1).acos()
    torch.testing.assert_close(angles, angles.mean().expand(10), rtol=1e-5, atol=0)
    assert torch.linalg.matrix_rank(path, tol=1e-9) == 2


def test_slerp_keeps_the_law_of_the_length_where_a_straight_line_does_not():
    a, b = torch.randn(2, 4000, 64, generator=torch.Generator().manual_seed(3))
    middle = slerp(a, b, torch.full((4000,), 0.5))
    assert middle.square().mean().item() == pytest.approx(1.0, abs=0.02)
    assert middle.mean().abs() < 0.01 and ((a + b) / 2).square().mean() < 0.52


@pytest.mark.parametrize("factor", [1.0, -1.0, 2.5])
def test_slerp_is_finite_where_directions_are_equal_or_opposite_or_there_is_but_one_number(factor: float):
    a = torch.tensor([[3.0, -4.0], [1.0, 2.0]])
    for first in (a, a[:, :1]):
        middle = slerp(first, factor * first, torch.full((2,), 0.5))
        torch.testing.assert_close(middle, (1 + factor) / 2 * first)
    assert torch.equal(slerp(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0.3])), torch.zeros(1, 3))


# -- walks ------------------------------------------------------------------------------------------------------------


def test_a_walk_is_closed_and_its_frames_are_the_interpolated_noise():
    family, seeds, frames = Bare(_Config(), SHAPE, 0), [5, 6, 7], 4
    keys = draw(family, seeds, [-1] * 3)
    found = walk(family, keys, seeds, [-1] * 3, frames, batch=5)
    assert found.dtype == torch.uint8 and found.shape == (12, *SHAPE)
    noise = seeded_noise(seeds, SHAPE)
    for index in range(12):
        leg, step = divmod(index, frames)
        between = slerp(noise[leg, None], noise[(leg + 1) % 3, None], torch.tensor([step / frames]))
        assert torch.equal(found[index], to_uint8(family.sample(between, None))[0]), index
    assert torch.equal(found[::frames], keys)


@pytest.mark.parametrize("name", [name for name in registry.names() if registry.load(name).draws])
def test_every_family_walks_through_its_own_pictures(name: str):
    family, seeds = build(name), [1, 2]
    options = getattr(family.config, "sample", None)
    if hasattr(options, "steps"):
        options = options_for(family, {"steps": 2})
    keys = draw(family, seeds, [1, 1], options)
    found = walk(family, keys, seeds, [1, 1], 3, options)
    assert torch.equal(found[::3], keys) and found.shape[0] == 6
    assert not torch.equal(found[1], found[0]) or not torch.equal(found[2], found[0])
    # there and back is the same way
    assert (found[[1, 2]].int() - found[[5, 4]].int()).abs().max() <= 1


@pytest.mark.parametrize("name", STYLED)
def test_a_walk_through_styles_is_straight_in_styles_and_passes_between_classes(name: str):
    family, seeds, labels = build(name), [1, 2], [0, 2]
    require_walk(family, 4, labels)
    keys = draw(family, seeds, labels)
    found = walk(family, keys, seeds, labels, 4)
    noise = seeded_noise(seeds, family.noise_shape())
    styles = family.styles(noise, asked_for(family, labels))
    quarter = family.from_styles(
        (0.75 * styles[0] + 0.25 * styles[1])[None], slerp(noise[:1], noise[1:], torch.tensor([0.25]))
    )
    assert (found[1].int() - to_uint8(quarter)[0].int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_animation_opens_with_all_frames_and_equals_the_strip(channels: int):
    family = Bare(_Config(), (channels, 8, 6), 0)
    keys = draw(family, [1, 2, 3], [-1] * 3)
    frames = walk(family, keys, [1, 2, 3], [-1] * 3, 5)
    zoom = pictures.frame_zoom(frames)
    strip = np.asarray(pictures.grid(frames, len(frames), zoom))
    with Image.open(io.BytesIO(pictures.animation(frames, fps=25))) as film:
        assert film.n_frames == 15 and film.info["loop"] == 0
        for index in range(15):
            film.seek(index)
            left = index * (6 + 1) * zoom
            assert film.info["duration"] == 40
            assert np.array_equal(np.asarray(film), strip[:, left : left + 6 * zoom]), index
    assert strip.shape[:2] == (8 * zoom, (15 * 7 - 1) * zoom)


def test_walks_that_make_no_sense_are_refused():
    family = build("dcgan")
    for frames, labels, words in (
        (1, [0, 0], "2 or more frames"),
        (-3, [0, 0], "2 or more frames"),
        (5, [0], "at least 2 pictures"),
        (500, [0] * 10, "5000 frames"),
        (5, [0, 1], "--label"),
    ):
        with pytest.raises(UsageError, match=words):
            require_walk(family, frames, labels)
    require_walk(family, 5, [1, 1])
    require_walk(build("dcgan", num_classes=0), 5, [0, 0])


# -- styles -----------------------------------------------------------------------------------------------------------


def test_there_are_families_with_styles():
    assert len(STYLED) >= 2


@pytest.mark.parametrize("name", STYLED)
@pytest.mark.parametrize("truncation", [1.0, 0.4])
def test_a_picture_is_what_its_styles_draw(name: str, truncation: float):
    family, seeds, labels = build(name), [3, 4], [0, -1]
    family.generator.mean_style.normal_(generator=torch.Generator().manual_seed(1))
    options = options_for(family, {"truncation": truncation})
    noise, condition = seeded_noise(seeds, family.noise_shape()), asked_for(family, labels)
    styles = family.styles(noise, condition, options)
    assert styles.ndim == 3 and styles.shape[0] == 2 and styles.shape[1] >= 2
    drawn = family.sample(noise, condition, options)
    assert torch.equal(family.from_styles(styles, noise).clamp(-1, 1), drawn)
    free = family.styles(noise, condition, options_for(family, {"truncation": 1.0}))
    mean = family.generator.mean_style
    torch.testing.assert_close(styles - mean, truncation * (free - mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STYLED)
def test_mixing_a_picture_with_itself_gives_the_picture(name: str):
    family, seeds, labels = build(name), [8, 9, 8, 9], [0, 1, 0, 1]
    drawn = draw(family, seeds, labels)
    places = family.styles(*_inputs(family, seeds, labels)).shape[1]
    for crossover in range(1, places):
        cells = mixed(family, seeds, labels, 2, crossover)
        assert cells.shape == (2, 2, *SHAPE)
        for index in range(2):
            assert (cells[index, index].int() - drawn[index].int()).abs().max() <= 1
    assert not torch.equal(cells[0, 1], cells[0, 0]) and not torch.equal(cells[0, 1], cells[1, 0])


@pytest.mark.parametrize("name", STYLED)
def test_mixed_pictures_have_coarse_styles_and_noise_of_rows_and_fine_styles_of_columns(name: str):
    family, seeds, labels = build(name), [1, 2, 3, 4, 5], [0, 1, 2, 0, 1]
    cells = mixed(family, seeds, labels, 2, 1, batch=4)
    assert cells.shape == (2, 3, *SHAPE)
    noise, condition = _inputs(family, seeds, labels)
    styles = family.styles(noise, condition)
    for row in range(2):
        for column in range(3):
            both = torch.cat([styles[row, :1], styles[2 + column, 1:]])[None]
            expected = to_uint8(family.from_styles(both, noise[row, None]))[0]
            assert (cells[row, column].int() - expected.int()).abs().max() <= 1


def _inputs(family: Family, seeds: list[int], labels: list[int]):
    return seeded_noise(seeds, family.noise_shape()), asked_for(family, labels)


def test_tables_that_make_no_sense_are_refused():
    family = build(STYLED[0])
    assert require_styles(family, 2, 3, None) == 2 and require_styles(family, 2, 3, 3) == 3
    for crossover in (0, 4, -1):
        with pytest.raises(UsageError, match="expected 1 to 3"):
            require_styles(family, 2, 3, crossover)
    with pytest.raises(UsageError, match="at most 4096"):
        require_styles(family, 100, 100, None)
    with pytest.raises(UsageError, match="has no styles"):
        mixed(build("dcgan"), [1, 2], [0, 0], 1, 1)
    assert latents.MAX_CELLS == 4096


# -- sheets -----------------------------------------------------------------------------------------------------------


def _model(num_classes: int) -> Model:
    family = Bare(_Config(), SHAPE, num_classes)
    return Model(family, None, tuple(f"kind {i}" for i in range(num_classes)), None, torch.device("cpu"))


def test_what_does_not_go_together_is_refused():
    for sheets, num_classes, words in (
        (Sheets(grid="rows"), 2, "--grid rows: expected plain or class"),
        (Sheets(grid="class"), 0, "does not draw by labels"),
        (Sheets(fps=0), 0, "--fps 0"),
        (Sheets(fps=1e6), 0, "--fps"),
        (Sheets(crossover=2), 0, "--mix, too"),
        (Sheets(mix=1), 0, "no styles"),
    ):
        with pytest.raises(UsageError, match=words):
            sheets.require(_model(num_classes), [0] * 4)
    with pytest.raises(UsageError, match="--mix -1"):
        Sheets(mix=-1)


def test_rows_of_classes_hold_each_picture_once_in_its_row():
    shades = torch.tensor([10, 20, 30, 40, 50], dtype=torch.uint8)
    sheet = pictures.class_rows(shades.view(5, 1, 1, 1).expand(-1, 1, 16, 16), [2, 0, 2, 2, 0], ["ä", "unused", "犬"])
    pixels = np.asarray(sheet)
    zoom, (rows, columns) = 8, (2, 3)
    assert pixels.shape[0] == (rows * 17 - 1) * zoom
    margin = pixels.shape[1] - (columns * 17 - 1) * zoom
    assert margin > 8 and pixels[:, :margin].min() < 128, "names are written"
    centres = pixels[8 * zoom :: 17 * zoom, margin + 8 * zoom :: 17 * zoom]
    assert centres.tolist() == [[20, 50, 255], [10, 30, 40]]


@pytest.mark.parametrize(("name", "letters"), [("café", "cafe"), ("“ä”", "“a”"), ("犬", "0"), ("ж", "0"), ("ß", "0")])
def test_names_are_written_in_letters_that_the_font_has(name: str, letters: str):
    image = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    assert pictures.class_rows(image, [0], [name]).tobytes() == pictures.class_rows(image, [0], [letters]).tobytes()


def test_rows_of_prompts_stand_beside_their_pictures_and_long_ones_end():
    shades = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).view(4, 1, 1, 1).expand(-1, 1, 16, 16)
    pixels = np.asarray(pictures.prompt_rows(shades, ["a red shoe on a white table, " * 99, "犬\n"]))
    zoom = 8
    assert pixels.shape[0] == (2 * 17 - 1) * zoom
    margin = pixels.shape[1] - (2 * 17 - 1) * zoom
    assert 100 < margin < 400
    centres = pixels[8 * zoom :: 17 * zoom, margin + 8 * zoom :: 17 * zoom]
    assert centres.tolist() == [[10, 20], [30, 40]]
    lines = np.flatnonzero(pixels[: 16 * zoom, :margin].min(1) < 128)
    assert 16 * zoom * 0.7 < lines.max() - lines.min() and lines.min() > 0, "as many lines as there is room for"
    assert pixels[17 * zoom :, :margin].min() < 128, "a number where there are no letters"


def test_walks_of_frames_that_are_equal_still_open():
    frames = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    with Image.open(io.BytesIO(pictures.animation(frames, fps=10))) as film:
        assert film.size == (64, 64) and np.asarray(film).max() == 0
