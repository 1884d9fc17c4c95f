"""Projection finds what a model can draw, says where it cannot, and stays among what is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from imagekiln.config import FamilyConfig
from imagekiln.core import UNLABELLED, Family, Loss, Phase, seeded_noise
from imagekiln.data import to_float, to_uint8
from imagekiln.engine import project, recipe, registry
from imagekiln.engine.generate import draw
from imagekiln.engine.models import Model
from imagekiln.engine.project import (
    LARGEST_DB,
    Distance,
    Encodes,
    Latent,
    longest,
    psnr_db,
    random_features,
    read_picture,
    require_searchable,
    search,
)
from imagekiln.errors import DataError, UsageError

SHAPE = (3, 8, 8)
NOTHING = lambda images: []  # noqa: E731  no features


def build(name: str, num_classes: int = 3, **settings) -> Family:
    torch.manual_seed(0)
    given = {"family": {**registry.load(name).check_settings, **settings}}
    return recipe.build(recipe.resolve(name, given), SHAPE, num_classes).eval().requires_grad_(False)


class _Config(FamilyConfig):
    name: str = "tests"


class Linear(Family):
    """Pictures are a linear map of four numbers, so the nearest one is known."""

    Config = _Config
    phases = (Phase("none", trains=("net",)),)
    averaged = ("net",)
    scale = 0.1

    def __init__(self, config, image_shape, num_classes):
        super().__init__(config, image_shape, num_classes)
        self.net = torch.nn.Linear(4, math.prod(image_shape), bias=False)
        with torch.no_grad():
            self.net.weight.normal_(std=self.scale, generator=torch.Generator().manual_seed(0))

    def loss(self, phase, batch, progress):
        return Loss(self.net(batch.images.new_ones(1, 4)).square().mean())

    def sample(self, noise, condition, options=None):
        return self.net(noise).view(-1, *self.image_shape)

    def noise_shape(self):
        return (4,)


def linear() -> Linear:
    return Linear(_Config(), SHAPE, 0).eval().requires_grad_(False)


def test_the_nearest_picture_of_a_linear_family_is_that_of_least_squares():
    family = linear()
    target = to_uint8(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).mul(0.15))
    weight, goal = family.net.weight.double(), to_float(target).double().flatten()
    solution = torch.linalg.lstsq(weight, goal[:, None]).solution[:, 0]
    assert solution.norm() < longest(4), "else the bound has a say"
    best = psnr_db(to_uint8((weight @ solution).view(SHAPE)), target)
    found = search(family, target, [UNLABELLED], lambda images: [], steps=150, restarts=2)
    # four sizes of the pixels have a least-squares solution of their own, near this one
    assert best - 0.3 < found.psnr_db <= best + 1e-6
    assert found.psnr_db > found.drawn_psnr_db


def test_a_picture_of_the_family_is_found_and_noise_is_not():
    family = linear()
    own = draw(family, [77], [UNLABELLED])[0]
    found = search(family, own, [UNLABELLED], random_features(SHAPE), steps=150, restarts=2)
    assert found.found and found.psnr_db > 45 > found.mean_psnr_db
    torch.testing.assert_close(found.latent.noise, seeded_noise([77], (4,)), atol=0.05, rtol=0)
    noise = torch.randint(0, 256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    lost = search(family, noise, [UNLABELLED], random_features(SHAPE), steps=50, restarts=2)
    assert not lost.found and lost.psnr_db < lost.mean_psnr_db + 2


@pytest.mark.parametrize("name", ["dcgan", "stylegan1", "stylegan2", "vae"])
def test_a_drawn_picture_is_recovered_far_better_than_by_the_mean_picture(name: str):
    family = build(name)
    picture = draw(family, [123], [1])[0]
    found = search(family, picture, [0, 1, 2], random_features(SHAPE), steps=60, restarts=2)
    assert found.psnr_db > found.mean_psnr_db + 4 and found.psnr_db > found.drawn_psnr_db
    assert torch.equal(found.image, to_uint8(project._picture(family, found.latent))[0])


def test_noise_is_no_longer_than_that_of_drawn_pictures_and_styles_no_farther_from_their_mean():
    bright = torch.full(SHAPE, 255, dtype=torch.uint8)  # asks for more than there is
    found = search(linear(), bright, [UNLABELLED], NOTHING, steps=80, restarts=1)
    assert found.latent.noise.norm() <= longest(4) + 1e-4
    family = build("stylegan2")
    found = search(family, bright, [0], NOTHING, steps=80, restarts=1)
    noise = project._starts(family, to_float(bright)[None], [0], project.NUM_DRAWN, 0)
    from_mean = noise.styles - noise.styles.mean(0)
    assert (found.latent.styles - noise.styles.mean(0)).norm(dim=2).max() <= from_mean.norm(dim=2).max() + 1e-4


class Shaded(Linear):
    """Class 0 is dark and class 1 is bright."""

    def sample(self, noise, condition, options=None):
        return super().sample(noise, condition) * 0.5 + (condition.labels.float() - 0.5)[:, None, None, None]


def test_the_label_that_fits_is_chosen_unless_one_is_asked_for():
    family = Shaded(_Config(), SHAPE, 2).eval().requires_grad_(False)
    for label in range(2):
        picture = draw(family, [5], [label])[0]
        assert search(family, picture, [0, 1], NOTHING, steps=20, restarts=1).latent.labels == [label]
        wrong = search(family, picture, [1 - label], NOTHING, steps=20, restarts=1)
        assert wrong.latent.labels == [1 - label] and wrong.psnr_db < 15


def test_pictures_outside_the_range_are_seen_as_they_are_written_and_can_come_back():
    x = torch.tensor([-3.0, 0.5, 2.0], requires_grad=True)
    seen = project._seen(x)
    assert seen.tolist() == [-1.0, 0.5, 1.0]
    assert torch.autograd.grad((seen * torch.tensor([1.0, 2.0, 3.0])).sum(), x)[0].tolist() == [1.0, 2.0, 3.0]


def test_an_encoder_gives_starts_beside_the_drawn_ones():
    family = build("vae")
    assert isinstance(family, Encodes) and not isinstance(build("dcgan"), Encodes)
    picture = to_float(draw(family, [5], [1]))
    starts = project._starts(family, picture, [0, 1, 2], 6, seed=0)
    assert starts.noise.shape == (9, *family.noise_shape()) and starts.labels == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    told, _ = family.encoder(picture, torch.tensor([1]))
    torch.testing.assert_close(starts.noise[7], told[0])
    torch.testing.assert_close(family.reconstruct(picture), family.decoder(family.encoder(picture, None)[0], None))


def test_the_search_is_repeatable_and_its_starts_do_not_know_of_each_other():
    family = linear()
    own = draw(family, [7], [UNLABELLED])[0]
    first, second = (search(family, own, [UNLABELLED], NOTHING, steps=20, restarts=2) for _ in range(2))
    assert torch.equal(first.latent.noise, second.latent.noise)
    starts = Latent(seeded_noise([1, 2, 3], (4,)), [UNLABELLED] * 3)
    distance = Distance(to_float(own)[None], torch.zeros(1, *SHAPE), NOTHING)
    (together, _), (alone, _) = (
        project._descend(family, starts, chosen, distance, 10, None) for chosen in ([0, 1, 2], [1])
    )
    torch.testing.assert_close(together.noise[1], alone.noise[0])


def test_the_distance_is_that_of_the_formula():
    goal, mean, x = torch.randn(3, 1, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def part(image):
        return ((image - goal) ** 2).mean() + (image.mean() - goal.mean()) ** 2

    def doubled(images):
        return [2 * images.flatten(1)]

    def feature(image):
        return (2 * (image - goal)).square().mean()

    expected = part(x) / part(mean) + feature(x) / feature(mean)
    torch.testing.assert_close(Distance(goal, mean, doubled)(x), expected.view(1))
    torch.testing.assert_close(Distance(goal, mean, NOTHING)(mean), torch.ones(1, dtype=torch.float64))
    assert Distance(goal, goal, doubled)(goal).item() == 0.0


def test_features_of_random_convolutions_have_finite_derivatives_also_on_flat_pictures():
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    maps = random_features((3, 16, 16))(flat)
    assert len(maps) == 4 and sum((found - 1).square().mean() for found in maps).isfinite()
    (slope,) = torch.autograd.grad(sum((found - 1).square().mean() for found in maps), flat)
    assert slope.isfinite().all() and slope.any()
    assert random_features((3, 4, 4))(flat) == []


def test_decibels():
    black, grey = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 51, dtype=torch.uint8)
    assert psnr_db(black, grey) == pytest.approx(20 * math.log10(5)) and psnr_db(grey, grey) == LARGEST_DB


@pytest.mark.parametrize("name", registry.names())
def test_what_cannot_be_searched_is_refused_in_one_sentence(name: str):
    family = build(name)
    searchable = name not in ("classifier", "diffusion", "fine_tune", "stable_diffusion", "vqvae")
    if searchable:
        require_searchable(family)
    else:
        with pytest.raises(UsageError, match=r"nothing to search|cannot be searched"):
            require_searchable(family)


def test_pictures_from_outside_come_at_the_models_size(tmp_path):
    model = Model(linear(), recipe.resolve("vae"), (), tmp_path, torch.device("cpu"))
    Image.new("RGBA", (40, 20), (255, 0, 0, 255)).save(tmp_path / "red.png")
    assert read_picture(tmp_path / "red.png", model).shape == SHAPE
    assert read_picture(tmp_path / "red.png", model)[:, 4, 4].tolist() == [255, 0, 0]
    (tmp_path / "text.png").write_text("hello")
    for name, why in (("text.png", "cannot be used"), ("missing.png", "does not exist"), (".", "cannot be used")):
        with pytest.raises(DataError, match=why):
            read_picture(tmp_path / name, model)
    with pytest.raises(UsageError, match="this model draws"):
        search(linear(), torch.zeros(3, 4, 4, dtype=torch.uint8), [UNLABELLED], NOTHING)
