"""Changes of training pictures: exact where they can be, analytic where not, functions of (seed, position) alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekiln import testing
from imagekiln.config import AUGMENT_LABELS, DataAugmentConfig, Recipe, write_toml
from imagekiln.core import Batch, Condition, Progress, seeded_noise
from imagekiln.data.augment import CHANGES, draw, labels, uniform
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.engine.augment import Augment, apply, loader
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import RecipeError, UsageError
from imagekiln.nets.unet import UNet, UNetConfig

EVERYTHING = DataAugmentConfig(p=0.5, flip="both", shift=0.125, rotate=180, scale=0.3, color=0.3, hue=60, cutout=0.4)


def changes(count: int = 1, **values: object) -> np.ndarray:
    made = np.zeros(count, CHANGES)
    for name, value in values.items():
        made[name] = value
    return made


def pictures(count: int, channels: int = 3, height: int = 9, width: int = 9) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(count)) * 2 - 1


# -- what is drawn ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(0, 10**12), st.integers(1, 20), st.integers(0, 19))
@settings(max_examples=50, deadline=None)
def test_what_is_drawn_is_a_function_of_seed_and_position(seed: int, position: int, count: int, start: int) -> None:
    whole = draw(EVERYTHING, seed, position, 20, (16, 24))
    assert (draw(EVERYTHING, seed, position + start, count, (16, 24))[: 20 - start] == whole[start:][:count]).all()


def test_numbers_are_even_independent_and_differ_by_kind_and_seed() -> None:
    count = 40_000
    columns = [uniform(seed, kind, 10**9, count) for seed in (0, 1) for kind in ("a", "b")]
    columns.append(uniform(0, "a", 10**9 + 1, count))
    for column in columns:
        assert column.min() >= 0 and column.max() < 1
        shares = np.histogram(column, 20, (0, 1))[0]
        assert (abs(shares - count / 20) < 5 * math.sqrt(count / 20)).all()
    correlations = np.corrcoef(columns) - np.eye(5)
    assert abs(correlations).max() < 5 / math.sqrt(count)


@pytest.mark.parametrize(
    ("setting", "field", "largest"),
    [
        ({"flip": "horizontal"}, "across", 1),
        ({"flip": "vertical"}, "down", 1),
        ({"flip": "both"}, "down", 1),
        ({"shift": 0.25}, "rows", 8),
        ({"shift": 0.25}, "columns", 16),
        ({"rotate": 30}, "degrees", 30),
        ({"scale": 1.0}, "octaves", 1),
        ({"color": 0.5}, "brightness", 0.5),
        ({"color": 0.5}, "contrast", math.log2(1.5)),
        ({"color": 0.5}, "saturation", math.log2(1.5)),
        ({"hue": 20}, "hue", 20),
        ({"cutout": 0.5}, "cut_height", 16),
        ({"cutout": 0.5}, "cut_width", 32),
    ],
)
def test_each_change_is_made_to_its_share_of_pictures(setting: dict, field: str, largest: float) -> None:
    p, count = 0.3, 20_000
    made = draw(DataAugmentConfig(p=p, **setting), 5, 0, count, (32, 64))[field].astype(float)
    # a shift of up to s pixels rounds to none with probability 1 / 2s
    share = p * (1 - 1 / (2 * largest)) if field in ("rows", "columns") else p
    assert abs((made != 0).sum() - count * share) < 4 * math.sqrt(count * share * (1 - share))
    assert 0.99 * largest <= abs(made).max() <= largest
    others = draw(DataAugmentConfig(p=p), 5, 0, count, (32, 64))
    assert (others == np.zeros(count, CHANGES)).all()


def test_strengths_are_even_to_both_sides() -> None:
    made = draw(DataAugmentConfig(p=1, rotate=90), 0, 0, 20_000, (8, 8))["degrees"]
    shares = np.histogram(made, 9, (-90, 90))[0]
    assert (abs(shares - 20_000 / 9) < 4.5 * math.sqrt(20_000 / 9)).all()


def test_flips_of_both_kinds_are_independent() -> None:
    made = draw(DataAugmentConfig(p=0.5, flip="both"), 0, 0, 8000, (8, 8))
    counts = np.bincount(2 * made["across"] + made["down"], minlength=4)
    assert (abs(counts - 2000) < 4 * math.sqrt(8000 * 3 / 16)).all()


# -- what is done to pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_nothing_done_is_nothing_changed(channels: int) -> None:
    images = pictures(5, channels)
    assert torch.equal(apply(images, changes(5)), images)
    augmented, told = Augment(DataAugmentConfig(p=0.0, rotate=90, color=1), 0)(images, 0)
    assert torch.equal(augmented, images) and not told.any()


@pytest.mark.parametrize("quarters", [-2, -1, 1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_quarter_turns_are_exact(quarters: int, size: int) -> None:
    images = pictures(3, 3, size, size)
    assert torch.equal(apply(images, changes(3, degrees=90 * quarters)), images.rot90(quarters, (2, 3)))


def test_half_turns_are_exact_where_quarters_do_not_fit() -> None:
    images = pictures(2, 3, 6, 10)
    assert torch.equal(apply(images, changes(2, degrees=-180)), images.rot90(2, (2, 3)))


@pytest.mark.parametrize(("across", "down", "axes"), [(1, 0, [3]), (0, 1, [2]), (1, 1, [2, 3])])
def test_mirroring_is_exact(across: int, down: int, axes: list[int]) -> None:
    images = pictures(2, 3, 6, 7)
    assert torch.equal(apply(images, changes(2, across=across, down=down)), images.flip(axes))
    square = pictures(2)
    assert torch.equal(
        apply(square, changes(2, across=across, down=down, degrees=90)), square.flip(axes).rot90(1, (2, 3))
    )


@pytest.mark.parametrize(("rows", "columns"), [(2, 0), (0, -3), (-1, 2)])
def test_shifts_are_exact_and_the_border_is_a_mirror(rows: int, columns: int) -> None:
    images = pictures(2, 4, 7, 8)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), "symmetric")
    expected = padded[:, :, 4 - rows : 11 - rows, 4 - columns : 12 - columns]
    assert np.array_equal(apply(images, changes(2, rows=rows, columns=columns)).numpy(), expected)


def scene(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A smooth picture of places, in pixels from the middle, that no turn or mirror maps to itself."""
    return torch.sin(0.21 * x + 0.5) * torch.cos(0.17 * y) * 0.6 + 0.2 * torch.sin(0.11 * (x - 2 * y))


@pytest.mark.parametrize(
    ("degrees", "octaves", "rows", "columns"),
    [
        (30, 0, 0, 0),
        (44.9, 0, 0, 0),
        (45.1, 0, 0, 0),
        (-120, 0, 0, 0),
        (0, 0.4, 0, 0),
        (0, -0.3, 0, 0),
        (25, 0.3, 3, -2),
    ],
)
def test_turns_and_scales_are_those_of_geometry(degrees: float, octaves: float, rows: int, columns: int) -> None:
    """A picture of a function is turned by asking the function at the place where each pixel came from."""
    place = torch.arange(64.0) - 31.5
    y, x = torch.meshgrid(place, place, indexing="ij")
    made = changes(degrees=degrees, octaves=octaves, rows=rows, columns=columns)
    found = apply(scene(y, x)[None, None], made)[0, 0]
    # rows point down, so a turn against the clock takes (x, y) to (x cos + y sin, y cos - x sin)
    angle, zoom = math.radians(degrees), 2.0**octaves
    right, below = (x - columns) / zoom, (y - rows) / zoom
    from_x = right * math.cos(angle) - below * math.sin(angle)
    from_y = below * math.cos(angle) + right * math.sin(angle)
    inside = (from_x.abs() < 25) & (from_y.abs() < 25)
    assert inside.sum() > 1500
    assert (found - scene(from_y, from_x)).abs()[inside].max() < 0.01


def test_an_octave_is_twice_as_large() -> None:
    image = torch.full((1, 1, 32, 32), -1.0)
    image[..., 12:20, 12:20] = 1
    found = apply(image, changes(octaves=1.0))
    assert found[..., 9:23, 9:23].min() > 0 and abs(int((found > 0).sum()) - 256) <= 8


def pixel(*values: float, channels: int = 3) -> torch.Tensor:
    return torch.tensor(values).view(1, channels, 1, 1).expand(1, channels, 4, 4)


@pytest.mark.parametrize(
    ("values", "change", "expected"),
    [
        ((0.2, 0.0, -0.4), {"brightness": 0.3}, (0.5, 0.3, -0.1)),
        ((0.2, 0.0, -0.4), {"contrast": 1.0}, (0.4, 0.0, -0.8)),
        ((0.4, 0.1, -0.2), {"saturation": 1.0}, (0.7, 0.1, -0.5)),
        ((0.4, 0.1, -0.2), {"saturation": -1.0}, (0.25, 0.1, -0.05)),
        ((0.5, 0.0, -0.2), {"hue": 120.0}, (-0.2, 0.5, 0.0)),
        ((0.5, 0.0, -0.2), {"hue": -120.0}, (0.0, -0.2, 0.5)),
        ((0.9, 0.9, -0.9), {"brightness": 0.5}, (1.0, 1.0, -0.4)),  # what is too bright is white
        ((0.3, 0.3, 0.3), {"hue": 77.0, "saturation": 2.0}, (0.3, 0.3, 0.3)),
    ],
)
def test_colors_have_known_values(values: tuple, change: dict, expected: tuple) -> None:
    assert torch.allclose(apply(pixel(*values), changes(**change)), pixel(*expected), atol=1e-6)


def test_grey_pictures_have_brightness_and_contrast_and_alpha_stays() -> None:
    grey = apply(pixel(0.2, channels=1), changes(hue=90, saturation=3, brightness=0.1, contrast=1))
    assert torch.allclose(grey, pixel(0.6, channels=1), atol=1e-6)
    images = pictures(3, 4)
    colored = apply(images, changes(3, brightness=0.4, hue=50, cut_height=3, cut_width=5, cut_row=4, cut_column=4))
    assert torch.equal(colored[:, 3], images[:, 3]) and (colored[:, :3] != images[:, :3]).any()


def test_what_is_cut_out_is_grey() -> None:
    images = pictures(2, 3, 8, 8)
    found = apply(images, changes(2, cut_height=2, cut_width=4, cut_row=[3, 0], cut_column=[4, 7]))
    expected = images.clone()
    expected[0, :, 2:4, 2:6] = 0
    expected[1, :, 0:1, 5:8] = 0
    assert torch.equal(found, expected)


def test_only_chosen_pictures_change_and_none_leaves_the_range() -> None:
    images = pictures(64, 3, 16, 16)
    before = images.clone()
    made = draw(EVERYTHING.model_copy(update={"p": 0.1, "color": 1.0}), 1, 0, 64, (16, 16))
    found = apply(images, made)
    touched = torch.from_numpy(np.array([any(row) for row in made.tolist()]))
    assert 10 < touched.sum() < 54
    assert torch.equal(found[~touched], images[~touched]) and torch.equal(images, before)
    assert ((found != images).flatten(1).any(1) == touched).all()
    assert found.min() >= -1 and found.max() <= 1 and torch.isfinite(found).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 14)])
def test_a_picture_comes_out_the_same_in_every_batch(height: int, width: int) -> None:
    images, augment = pictures(24, 3, height, width), Augment(EVERYTHING, 3)
    whole, told = augment(images, 100)
    for size in (1, 5, 12):
        parts = [augment(part, 100 + size * number) for number, part in enumerate(images.split(size))]
        assert torch.equal(torch.cat([part for part, _ in parts]), whole)
        assert torch.equal(torch.cat([part for _, part in parts]), told)


# -- what is told -----------------------------------------------------------------------------------------------------


def test_labels_are_zero_exactly_where_nothing_is_done() -> None:
    made = draw(EVERYTHING.model_copy(update={"p": 0.1}), 0, 0, 3000, (32, 32))
    told = labels(made, (32, 32))
    assert told.shape == (3000, len(AUGMENT_LABELS)) and told.dtype == torch.float32
    done = torch.from_numpy(np.array([any(row) for row in made.tolist()]))
    assert torch.equal(told.any(1), done) and told.abs().max() <= 3
    assert told.any(0).all(), "every column says something"


def test_different_changes_are_told_differently() -> None:
    made = draw(EVERYTHING.model_copy(update={"p": 1.0}), 0, 0, 500, (32, 32))
    assert len(labels(made, (32, 32)).unique(dim=0)) == 500
    one = labels(changes(across=True, degrees=-90, rows=4), (32, 32))[0]
    expected = {"across": 1.0, "turn_cos": -1.0, "turn_sin": -1.0, "shift_down": 1.0}
    found = {name: float(value) for name, value in zip(AUGMENT_LABELS, one, strict=True) if value}
    assert found == pytest.approx(expected)


# -- in a run ---------------------------------------------------------------------------------------------------------

SMALL = {"widths": [16, 16], "attention": [False, True]}
TRAIN = {
    "batch": 8,
    "total_kimg": 0.08,
    "precision": "fp32",
    "device": "cpu",
    "compile": "off",
    "checkpoint_kimg": 0.04,
}
CHANGED = EVERYTHING.model_dump()


def recipe(condition: bool, augment: dict | None = None, **train: object) -> Recipe:
    family = {**SMALL, "augment_condition": condition}
    data = {"augment": CHANGED if augment is None else augment}
    return recipes.resolve("diffusion", {"family": family, "train": TRAIN | train, "data": data})


def trainer(folder: Path, made: Recipe) -> Trainer:
    torch.manual_seed(0)
    family = recipes.build(made, testing.SHAPE, testing.CLASSES)
    run = Run(folder) if folder.exists() else Run.create(folder, write_toml(made), {})
    return Trainer(made, family, testing.Toy(), testing.Toy(), run, Silent())


def test_without_settings_the_loader_is_the_plain_one() -> None:
    plain = Recipe.model_validate({"family": {"name": "x"}}).data
    assert not plain.augment.changes and loader(plain, testing.Toy(), 0, 8, "cpu").augment is None
    assert loader(plain, testing.Toy(), 0, 8, "cpu").batch(0).augment is None
    assert not DataAugmentConfig(p=0, rotate=10).changes and DataAugmentConfig(hue=1).changes


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    made = recipe(condition=True)
    straight, stopped = (trainer(tmp_path / name, made) for name in ("straight", "resumed"))
    for _ in range(6):
        straight.step()
    for _ in range(3):
        stopped.step()
    stopped.save()
    resumed = trainer(tmp_path / "resumed", made)
    assert resumed.restore()
    for _ in range(3):
        resumed.step()
    ours, theirs = resumed.family.state_dict(), straight.family.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "unet.augment_embedding.weight" in ours


def test_a_split_batch_learns_from_the_same_pictures(tmp_path: Path) -> None:
    whole, split = (trainer(tmp_path / str(parts), recipe(True, accumulate=parts)) for parts in (1, 4))
    batches = [split.loader.batch(16 + 2 * part) for part in range(4)]
    assert torch.equal(torch.cat([batch.images for batch in batches]), whole.loader.batch(16).images)
    told = [batch.augment for batch in batches if batch.augment is not None]
    assert torch.equal(torch.cat(told), whole.loader.batch(16).augment)


# -- the conditional form ---------------------------------------------------------------------------------------------


def test_families_that_cannot_be_told_refuse() -> None:
    takers = []
    for name in registry.names():
        try:
            recipes.resolve(name, assignments=["family.augment_condition=true"])
            takers.append(name)
        except RecipeError as error:
            assert "family.augment_condition: no such setting" in str(error)
    assert takers == ["diffusion", "stable_diffusion"]


def net(num_augment: int, num_classes: int | None = 4) -> UNet:
    torch.manual_seed(1)
    made = UNet(
        UNetConfig(
            sample_size=8,
            block_out_channels=(16, 16),
            layers_per_block=1,
            attention=(False, True),
            attention_head_dim=8,
            norm_num_groups=4,
            num_class_embeds=num_classes,
            num_augment=num_augment,
        )
    )
    for parameter in made.parameters():  # the net starts with zeros, which would hide everything
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


INPUTS = torch.linspace(-1, 1, 3 * 3 * 64).view(3, 3, 8, 8), torch.tensor([0.0, 500.0, 900.0]), torch.tensor([0, 1, 3])


@torch.no_grad()
def test_zeros_add_exactly_nothing_and_others_something() -> None:
    told = net(15)
    plain = told(*INPUTS)
    assert torch.equal(told(*INPUTS, torch.zeros(3, 15)), plain)
    one = torch.zeros(3, 15)
    one[1, 4] = 1
    changed = (told(*INPUTS, one) != plain).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


def test_a_net_that_is_not_told_is_what_it_was() -> None:
    assert "augment_embedding.weight" not in net(0).state_dict()
    assert net(0).diffusers_state_dict().keys() == net(0).state_dict().keys()
    with pytest.raises(UsageError, match="num_augment = 0, but 15"):
        net(0)(*INPUTS, torch.zeros(3, 15))


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [None, 4])
def test_the_exported_net_computes_what_drawing_computes(num_classes: int | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    told = net(15, num_classes)
    config = {key: value for key, value in told.diffusers_config().items() if not key.startswith("_")}
    theirs = diffusers.UNet2DModel(**config).eval()
    theirs.load_state_dict(told.diffusers_state_dict(), strict=True)
    images, times, classes = INPUTS
    classes = classes if num_classes else None
    difference = told(images, times, classes) - theirs(images, times, class_labels=classes).sample
    assert difference.abs().max() < 1e-4


def test_only_the_loss_hears_what_was_done() -> None:
    made = recipe(condition=True)
    torch.manual_seed(0)
    family = recipes.build(made, testing.SHAPE, testing.CLASSES)
    torch.nn.init.normal_(family.unet.conv_out.weight)
    for block in [*family.unet.down_blocks, *family.unet.up_blocks]:
        for residual in block.resnets:
            torch.nn.init.normal_(residual.conv2.weight, std=0.1)
    images, told = pictures(6, *testing.SHAPE), torch.ones(6, 15)

    def loss(augment: torch.Tensor | None) -> torch.Tensor:
        torch.manual_seed(7)
        return family.loss("denoise", Batch(images, None, None, augment), Progress(0, 1)).total

    assert torch.equal(loss(None), loss(torch.zeros(6, 15))) and not torch.equal(loss(None), loss(told))
    family.zero_grad()
    loss(told).backward()
    hearing = family.unet.augment_embedding.weight.grad
    assert hearing is not None and hearing.abs().max() > 0
    torch.nn.init.constant_(family.unet.augment_embedding.weight, math.nan)  # would spoil all that uses it
    family.eval()
    noise, condition = seeded_noise([0, 1], testing.SHAPE), Condition(torch.tensor([0, -1]))
    assert torch.isfinite(family.sample(noise, condition)).all()
    assert torch.isfinite(family.reconstruct(images)).all()
    held_out = family.held_out(Batch(images, None, None, None), Progress(0, 1))
    assert torch.isfinite(held_out["denoise"].values).all()


def test_a_told_family_without_changes_learns_as_one_that_is_not_told(tmp_path: Path) -> None:
    """The map has weights of its own and starts elsewhere, so weights are carried over before the steps."""
    told, plain = (trainer(tmp_path / str(condition), recipe(condition, {})) for condition in (True, False))
    told.family.load_state_dict(plain.family.state_dict(), strict=False)
    for one in (told, plain):
        for _ in range(3):
            one.step()
    ours, theirs = told.family.state_dict(), plain.family.state_dict()
    assert ours.keys() - theirs.keys() == {"unet.augment_embedding.weight"}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
