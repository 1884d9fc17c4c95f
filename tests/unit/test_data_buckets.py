"""Pictures in their own proportions: shapes, the order of batches, how they are kept, learned and drawn."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import folding
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import imagekiln
from imagekiln.config import DataConfig
from imagekiln.data import Loader, decode, load, prepare, to_float
from imagekiln.data.buckets import MAX_ASPECT, PARTS, BucketOrder, Buckets, flattened, nearest, shapes
from imagekiln.data.decisions import Edits, PrepareConfig
from imagekiln.engine import inputs, recipe
from imagekiln.engine.models import open_model
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.errors import DataError, RecipeError, UsageError
from imagekiln.families.fine_tune import FineTune, FineTuneConfig

TALL, SQUARE, WIDE = (24, 10), (16, 16), (12, 20)
OWN = {TALL: (24, 10), SQUARE: (16, 16), WIDE: (12, 20)}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures that have the shapes of buckets of 16 pixels already, so that nothing is resampled."""
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path / "cache"))
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    root.mkdir()
    rows = ["file_name,text"]
    for index in range(40):
        height, width = (TALL, SQUARE, WIDE, WIDE)[index % 4]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index:02d}.png")
        rows.append(f"{index:02d}.png,number {index}")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


def pixels_of(root: Path, name: str) -> torch.Tensor:
    with Image.open(root / name) as image:
        return torch.from_numpy(np.array(image.convert("RGB")).transpose(2, 0, 1).copy())


# -- shapes -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 128))
def test_shapes_are_multiples_within_the_square_s_area_and_come_in_both_directions(part: int) -> None:
    size = part * PARTS
    found = shapes(size)
    assert (size, size) in found and len(set(found)) == len(found)
    assert {(width, height) for height, width in found} == set(found)
    for height, width in found:
        assert height % part == width % part == 0 and height * width <= size * size
        assert (height + part) * width > size * size and height * (width + part) > size * size, "it could be larger"
        assert max(height, width) <= MAX_ASPECT * min(height, width)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_no_shape_is_nearer_than_the_nearest(height: int, width: int) -> None:
    known = shapes(64)
    chosen = nearest(known, height, width)
    apart = [abs(math.log(h / w * width / height)) for h, w in known]
    assert abs(math.log(chosen[0] / chosen[1] * width / height)) == pytest.approx(min(apart))


def test_pictures_of_two_shapes_are_not_read_at_once() -> None:
    rows = [np.arange(12).reshape(3, 4, 1), np.arange(10).reshape(2, 5, 1), 7 + np.arange(12).reshape(3, 4, 1)]
    flat = np.stack([flattened(one, 16).T[:, None] for one in rows])
    buckets = Buckets(flat, np.array([[3, 4], [2, 5], [3, 4]]))
    assert buckets.read(np.array([2, 0])).tolist() == [
        rows[2].transpose(2, 0, 1).tolist(),
        rows[0].transpose(2, 0, 1).tolist(),
    ]
    with pytest.raises(ValueError, match="several shapes"):
        buckets.read(np.array([0, 1]))


# -- the order --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 9))
def test_stretches_have_one_shape_and_all_pictures_are_seen_about_equally_often(
    counts: list[int], stretch: int, seed: int
) -> None:
    shapes_N2 = np.repeat([[8 + kind, 8] for kind in range(len(counts))], counts, axis=0)
    order = BucketOrder(shapes_N2, seed, stretch)
    turns = 40 * sum(counts)
    seen = order.order(0, turns * stretch)
    assert all(len({*shapes_N2[part, 0]}) == 1 for part in np.split(seen, turns))
    often = np.bincount(seen, minlength=len(shapes_N2))
    wanted = turns * stretch / len(shapes_N2)
    for kind, count in enumerate(counts):
        mine = often[shapes_N2[:, 0] == 8 + kind]
        assert mine.max() - mine.min() <= 1, "a permutation is not begun before the last one is through"
        assert abs(mine.sum() - wanted * count) <= 6 * stretch * math.log2(turns), "the rotation keeps shares"


@given(st.integers(0, 500), st.integers(1, 60))
def test_the_order_is_a_function_of_the_position_alone(position: int, count: int) -> None:
    shapes_N2 = np.array([[8, 8]] * 7 + [[4, 16]] * 3)
    whole = BucketOrder(shapes_N2, 3, 4).order(0, 600)
    asked = BucketOrder(shapes_N2, 3, 4)
    assert asked.order(position, count).tolist() == whole[position : position + count].tolist()
    assert asked.order(0, 600).tolist() == whole.tolist()
    assert BucketOrder(shapes_N2, 4, 4).order(0, 600).tolist() != whole.tolist()


# -- how they are kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["folder", "prepared"])
def test_pictures_keep_their_pixels_and_squares_stay_as_they_were(photos: Path, tmp_path: Path, how: str) -> None:
    path = photos
    if how == "prepared":
        path = tmp_path / "set"
        prepare([str(photos)], path, PrepareConfig(size=16, buckets=True))
    data = DataConfig(path=str(path), size=16, buckets=True)
    found, squares = load(data), load(data.model_copy(update={"buckets": False}))
    assert found.notices[-1] == "Pictures keep their shapes: 12x20 (20), 24x10 (10), 16x16 (10)."
    assert found.fingerprint != squares.fingerprint
    shaped = found.train.shaped()
    for index, name in enumerate(shaped.files):
        own = pixels_of(photos, Path(name).name)
        assert shaped.shapes_N2[index].tolist() == list(own.shape[1:])
        assert torch.equal(shaped.read([index]).images[0], own)
    everything = range(len(found.train))
    assert found.train.read(everything).images.shape[1:] == (3, 16, 16)
    assert torch.equal(found.train.read(everything).images, squares.train.read(everything).images)


def test_a_set_with_shapes_grows_and_changes_like_any_other(photos: Path, tmp_path: Path) -> None:
    config, out = PrepareConfig(size=16, buckets=True), tmp_path / "set"
    late = [photos / "00.png", photos / "39.png"]
    kept = [file.read_bytes() for file in late]
    for file in late:
        file.unlink()
    prepare([str(photos)], out, config)
    for file, content in zip(late, kept, strict=True):
        file.write_bytes(content)
    prepare([str(photos)], out, config)
    prepare([str(photos)], tmp_path / "anew", config)
    assert np.array_equal(np.load(out / "buckets.npy"), np.load(tmp_path / "anew" / "buckets.npy"))
    prepare([], out, config, edits=Edits(drop=("03.png",)))
    data = DataConfig(path=str(out), buckets=True)
    shaped = load(data).train.shaped()
    assert "03.png" not in shaped.files
    assert all(
        torch.equal(shaped.read([at]).images[0], pixels_of(photos, name)) for at, name in enumerate(shaped.files)
    )


def test_photographs_are_cut_to_the_nearest_shape(tmp_path: Path) -> None:
    root, ramp = tmp_path / "ramps", np.linspace(0, 255, 300).astype(np.uint8)
    root.mkdir()
    for turn in range(4):
        picture = Image.fromarray(np.repeat(np.repeat(ramp[None], 200, 0)[..., None], 3, 2))
        picture.rotate(90 * turn, expand=True).save(root / f"{turn}.png")
    prepare([str(root)], tmp_path / "set", PrepareConfig(size=64, channels=3, buckets=True, clean={"leave_out": []}))
    data = load(DataConfig(path=str(tmp_path / "set"), buckets=True, validation_fraction=0))
    shaped = data.train.shaped()
    for index, name in enumerate(shaped.files):
        shape = (48, 80) if int(Path(name).stem) % 2 == 0 else (80, 48)
        opened = decode.open_safely(root / name)
        assert nearest(shapes(64), opened.height, opened.width) == shape
        found = shaped.read([index]).images[0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, decode.fit(opened, shape, "crop"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda out: (out / "buckets.npy").unlink(), "Prepare it again with --buckets"),
        (lambda out: np.save(out / "buckets.npy", np.zeros((1, 3, 1, 256), np.uint8)), "does not fit together"),
        (lambda out: (out / "buckets.npy").write_bytes(b"no array"), "is damaged"),
        (lambda out: _without_shapes(out / "metadata.jsonl"), "is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_named(photos: Path, tmp_path: Path, damage: Any, sentence: str) -> None:
    out = tmp_path / "set"
    prepare([str(photos)], out, PrepareConfig(size=16, buckets=True))
    damage(out)
    with pytest.raises(DataError, match=sentence):
        load(DataConfig(path=str(out), buckets=True))
    assert len(load(DataConfig(path=str(out))).train), "squares need none of it"


def _without_shapes(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "shape"}) + "\n" for row in rows))


def test_shapes_need_a_size_and_pictures_that_have_some(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 8"):
        load(DataConfig(path=str(photos), size=20, buckets=True))
    with pytest.raises(UsageError, match="size is 0"):
        prepare([str(photos)], tmp_path / "set", PrepareConfig(buckets=True))
    with pytest.raises(UsageError, match="all of one shape"):
        load(DataConfig(path="builtin:digits", size=16, buckets=True))
    with pytest.raises(UsageError, match="digits are all of one shape"):
        imagekiln.prepare("builtin:digits", tmp_path / "digits", size=16, buckets=True)


# -- how they are learned ---------------------------------------------------------------------------------------------


def made(photos: Path, name: str = "diffusion", **sections: Any) -> recipe.Recipe:
    data = {"path": str(photos), "size": 16, "buckets": True} | sections.pop("data", {})
    train = {"total_kimg": 0.064, "batch": 8, "doctor": "off", "precision": "fp32"}
    tiny = {"widths": [8, 16], "attention": [False, True]} if name == "diffusion" else {}
    return recipe.resolve(name, {"train": train, "data": data, "family": tiny} | sections)


def trainer(wanted: recipe.Recipe, folder: Path) -> Trainer:
    family, train, held_out = inputs.begin(wanted, load(wanted.data))
    run = Run(folder)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    return Trainer(wanted, family, train, held_out, run, Silent())


def test_a_run_in_shapes_resumes_bit_for_bit_and_in_parts(photos: Path, tmp_path: Path) -> None:
    wanted = made(photos, data={"flip": True})
    whole, first = (trainer(wanted, tmp_path / name) for name in ("whole", "halves"))
    seen = Counter[tuple[int, int]]()
    batch = whole.loader.batch

    def noted(position: int) -> Any:
        got = batch(position)
        seen[got.images.shape[2], got.images.shape[3]] += 1
        return got

    whole.loader.batch = noted
    for _ in range(8):
        whole.step()
    assert set(seen) == set(OWN.values()) and sum(seen.values()) == 8
    for _ in range(3):
        first.step()
    first.save()
    second = trainer(wanted, tmp_path / "halves")
    assert second.restore() and second.state.nimg == 24
    for _ in range(5):
        second.step()
    ends = (one.family.state_dict() for one in (whole, second))
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))
    parts = made(photos, train={**wanted.train.model_dump(), "accumulate": 2})
    half = trainer(parts, tmp_path / "parts").loader
    plain = trainer(made(photos), tmp_path / "plain").loader
    assert [*half.order(8, 4), *half.order(12, 4)] == plain.order(8, 8).tolist()
    assert torch.equal(torch.cat([half.batch(8).images, half.batch(12).images]), plain.batch(8).images)


def test_latents_keep_shapes_and_are_scaled_over_what_is_there(photos: Path, tmp_path: Path) -> None:
    small = {"train": {"total_kimg": 0.008, "batch": 8, "doctor": "off"}, "data": {"size": 16}}
    coder = imagekiln.train(folding.__file__, data=photos, out=tmp_path / "coder", settings=small).path
    wanted = made(photos, data={"codec": str(coder), "flip": True})
    dataset = load(wanted.data)
    family, train, _ = inputs.begin(wanted, dataset)
    pictures = dataset.train.shaped()
    count = len(pictures)
    assert len(train) == 2 * count and train.image_shape == (12, 8, 8) == family.image_shape
    numbers = []
    for index in range(2 * count):
        own = to_float(pictures.read([index % count]).images)
        own = own.flip(-1) if index >= count else own
        latents = train.read([index]).images
        assert latents.shape[2:] == (own.shape[2] // 2, own.shape[3] // 2)
        assert torch.allclose(family.codec.decode(latents), own, atol=2e-3)
        numbers.append(latents.flatten())
    assert abs(float(torch.cat(numbers).mean())) < 1e-3
    assert float(torch.cat(numbers).std()) == pytest.approx(1, abs=1e-3)
    loader = Loader(train, 0, 8)
    assert {tuple(loader.batch(8 * turn).images.shape[2:]) for turn in range(12)} == {(12, 5), (8, 8), (6, 10)}


def test_latents_in_shapes_and_of_squares_are_not_taken_for_each_other(photos: Path, tmp_path: Path) -> None:
    """With nothing held out both sides have the same pictures, in shapes to learn from and in squares to judge by."""
    small = {"train": {"total_kimg": 0.008, "batch": 8, "doctor": "off"}, "data": {"size": 16}}
    coder = imagekiln.train(folding.__file__, data=photos, out=tmp_path / "coder", settings=small).path
    wanted = made(photos, data={"codec": str(coder), "validation_fraction": 0})
    dataset = load(wanted.data)
    assert dataset.train is dataset.validation and dataset.train.shaped().fingerprint != dataset.train.fingerprint
    _, train, held_out = inputs.begin(wanted, dataset)
    everything = range(len(held_out))
    assert held_out.read(everything).images.shape == (len(train), 12, 8, 8)
    assert {tuple(train.read([index]).images.shape[2:]) for index in everything} == {(12, 5), (8, 8), (6, 10)}


def test_a_model_of_latents_draws_other_shapes(photos: Path, tmp_path: Path) -> None:
    small = {"train": {"total_kimg": 0.016, "batch": 8, "doctor": "off"}, "data": {"size": 16}}
    coder = imagekiln.train(folding.__file__, data=photos, out=tmp_path / "coder", settings=small).path
    data = {"size": 16, "buckets": True, "codec": str(coder)}
    settings = small | {"data": data, "family": {"widths": [8, 16], "attention": [False, True]}}
    run = imagekiln.train("diffusion", data=photos, out=tmp_path / "run", settings=settings)
    wide = imagekiln.generate(run.path, 2, tmp_path / "wide", shape="12x20", steps=2)
    assert [pixels_of(tmp_path, str(file)).shape for file in wide.pictures] == [(3, 12, 20)] * 2
    with pytest.raises(UsageError, match="stand for 2x2 pixels"):
        imagekiln.generate(run.path, 1, tmp_path / "odd", shape="13x20")


def test_families_of_one_shape_say_so(photos: Path) -> None:
    wanted = made(photos, "dcgan")
    with pytest.raises(RecipeError, match="this dcgan model cannot learn them"):
        inputs.begin(wanted, load(wanted.data))
    for family in ({"denoiser": "unet", "widths": [32]}, {"depth": 1}):
        wanted = made(photos, "stable_diffusion", family=family)
        assert inputs.begin(wanted, load(wanted.data)).family.fits(24, 10)


@pytest.mark.parametrize("text", [{"width": 32, "layers": 2, "context": 8, "vocabulary": 520}, {"base": "random:clip"}])
def test_a_transformer_learns_and_draws_shapes_and_resumes_bit_for_bit(
    text: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    wanted = made(photos, "stable_diffusion", family={"depth": 1, "text": text, "sample": {"steps": 2}})
    whole, first = (trainer(wanted, tmp_path / name) for name in ("whole", "halves"))
    shapes = {tuple(whole.loader.batch(8 * turn).images.shape[2:]) for turn in range(8)}
    assert shapes == {TALL, SQUARE, WIDE}
    for _ in range(8):
        whole.step()
    for _ in range(4):
        first.step()
    first.time_event("checkpoint")
    second = trainer(wanted, tmp_path / "halves")
    assert second.restore()
    for _ in range(4):
        second.step()
    after, again = whole.family.state_dict(), second.family.state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_a_transformer_draws_the_shapes_that_it_has_places_for(photos: Path, tmp_path: Path) -> None:
    text = {"width": 32, "layers": 2, "context": 8, "vocabulary": 520}
    settings = {"family": {"depth": 1, "text": text}, "data": {"size": 16, "buckets": True}}
    settings["train"] = {"total_kimg": 0.016, "batch": 8, "doctor": "off"}
    run = imagekiln.train("stable_diffusion", data=photos, out=tmp_path / "run", settings=settings)
    tall = imagekiln.generate(run.path, 1, tmp_path / "tall", shape="24x10", steps=2)
    assert pixels_of(tmp_path, str(tall.pictures[0])).shape == (3, *TALL)
    for shape in ("40x16", "16x9"):
        with pytest.raises(UsageError, match="model of 16x16 pixels cannot draw that"):
            imagekiln.generate(run.path, 1, tmp_path / "none", shape=shape)


def test_a_pretrained_model_is_told_the_size_of_every_picture() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    settings = {"base": "random:sdxl", "rank": 2, "alpha": 2.0}
    model = FineTune(FineTuneConfig(**settings), (4, 8, 8), 0)
    told = []

    def note(net: Any, given: Any, named: dict[str, Any]) -> None:
        told.append(named["added_cond_kwargs"]["time_ids"][0].tolist())

    model.base.networks()["denoiser"].register_forward_pre_hook(note, with_kwargs=True)
    for shape in ((8, 8), (6, 10)):
        model._error(torch.zeros(1, 4, *shape), torch.ones(1), model.read(["a cup"]))
    assert told == [[8, 8, 0, 0, 8, 8], [6, 10, 0, 0, 6, 10]]
    assert model.fits(6, 10)
    prior = FineTune(FineTuneConfig(**settings, prior={"prompt": "a cup", "pictures": 1}), (4, 8, 8), 0)
    assert prior.fits(8, 8) and not prior.fits(6, 10)
    flow = FineTune(FineTuneConfig(**{**settings, "base": "random:sd3"}), (16, 8, 8), 0)
    table = flow.base.networks()["denoiser"].config
    most = table.patch_size * table.pos_embed_max_size
    assert flow.fits(most, 2) and not flow.fits(most + 2, 2) and not flow.fits(7, 8)


# -- how they are drawn -----------------------------------------------------------------------------------------------


def test_pictures_are_drawn_in_the_shape_that_is_asked_for(photos: Path, tmp_path: Path) -> None:
    wanted = {"family": {"widths": [8, 16], "attention": [False, True]}, "data": {"size": 16, "buckets": True}}
    wanted["train"] = {"total_kimg": 0.064, "batch": 8, "doctor": "off"}
    run = imagekiln.train("diffusion", data=photos, out=tmp_path / "run", settings=wanted)
    options = {"steps": 2, "seed": 1}
    tall = imagekiln.generate(run.path, 2, tmp_path / "tall", shape="24x10", **options)
    assert [pixels_of(tmp_path, str(file)).shape for file in tall.pictures] == [(3, 24, 10)] * 2
    own = imagekiln.generate(run.path, 2, tmp_path / "own", **options)
    asked = imagekiln.generate(run.path, 2, tmp_path / "asked", shape="16x16", **options)
    assert [file.read_bytes() for file in own.pictures] == [file.read_bytes() for file in asked.pictures]
    for shape in ("24", "0x10", "24x10x3", "tall"):
        with pytest.raises(UsageError, match="such as 96x64"):
            imagekiln.generate(run.path, 1, tmp_path / "none", shape=shape)
    assert open_model(Run.open(run.path)).family.picture_shape == (3, 16, 16)


def test_a_model_of_one_shape_draws_no_other(photos: Path, tmp_path: Path) -> None:
    settings = {"train": {"total_kimg": 0.016, "batch": 8, "doctor": "off"}, "data": {"size": 16}}
    run = imagekiln.train("vanilla_gan", data=photos, out=tmp_path / "run", settings=settings)
    with pytest.raises(UsageError, match="model of 16x16 pixels cannot draw that"):
        imagekiln.generate(run.path, 1, tmp_path / "none", shape="24x10")
    assert len(imagekiln.generate(run.path, 1, tmp_path / "one", shape="16x16").pictures) == 1
