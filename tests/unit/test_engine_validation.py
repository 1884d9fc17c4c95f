"""Looking at a model during training: errors of means, levels, cost, the choice of moment and average."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imagekiln.config import FamilyConfig, Recipe
from imagekiln.core import Batch, Condition, Family, HeldOut, Loss, Phase, Progress, mix
from imagekiln.engine import validation
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.engine.validation import Validation
from imagekiln.errors import UsageError

SHAPE = (1, 8, 8)


class Shades:
    """Pictures of one random shade each."""

    image_shape, num_classes, class_names, fingerprint = SHAPE, 0, (), "shades"

    def __init__(self, n: int = 300) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (n, *SHAPE), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices) -> Batch:
        return Batch(self.images[list(indices)])


class Painter(Family):
    """Draws its noise through one number a pixel."""

    Config = FamilyConfig
    optimizers = {"net": {"name": "sgd", "lr": 0.1}}
    phases = (Phase("fit", trains=("net",)),)
    averaged = ("net",)

    def __init__(self, config, image_shape, num_classes) -> None:
        super().__init__(config, image_shape, num_classes)
        self.net = nn.ParameterDict({"gain": nn.Parameter(torch.ones(image_shape))})

    def loss(self, phase: str, batch: Batch, progress: Progress) -> Loss:
        return Loss((batch.images - self.net["gain"] * torch.randn_like(batch.images)).square().mean())

    def held_out(self, batch: Batch, progress: Progress) -> dict[str, HeldOut]:
        pixel_B = batch.images[:, 0, 0, 0]
        levels_B = torch.arange(len(pixel_B)) % 4 / 4.0
        return {"shade": HeldOut(pixel_B + 10 * levels_B, levels_B), "plain": HeldOut(pixel_B)}

    def sample(self, noise: Tensor, condition: Condition, options=None) -> Tensor:
        return (noise * self.net["gain"]).clamp(-1, 1)

    def noise_shape(self) -> tuple[int, ...]:
        return self.image_shape


def looked_at(source: Shades) -> Validation:
    return Validation(source, 0, torch.device("cpu"), torch.enable_grad)


def test_errors_are_those_of_a_stratified_sample() -> None:
    source = Shades(256)
    family = Painter(FamilyConfig(name="painter"), SHAPE, 0)
    found = looked_at(source).losses(family, Progress(0, 1))
    pixels = source.images[:, 0, 0, 0].double() / 127.5 - 1
    level = torch.arange(256) % 4
    assert found["plain"].mean == pytest.approx(float(pixels.mean()), abs=1e-6)
    assert found["plain"].error == pytest.approx(float(pixels.std()) / 16, rel=1e-6)
    own = [pixels[level == part] for part in range(4)]
    for part, name in enumerate(("0", "0.25", "0.5", "0.75")):
        assert found[f"shade@{name}"].mean == pytest.approx(float(own[part].mean()) + 2.5 * part, abs=1e-5)
    assert found["shade"].mean == pytest.approx(float(pixels.mean()) + 3.75, abs=1e-5)
    expected = math.sqrt(sum(float(part.var()) / 64 for part in own)) / 4
    assert found["shade"].error == pytest.approx(expected, rel=1e-5)
    assert found["shade"].error < float((pixels + 2.5 * level).std()) / 16 / 3  # what mixing the levels would give


def test_a_family_without_values_a_picture_has_the_mean_of_its_loss() -> None:
    family = Painter(FamilyConfig(name="painter"), SHAPE, 0)
    source = Shades(128)
    plain = {name: Family.held_out(family, Batch(torch.zeros(64, *SHAPE)), Progress(0, 1)) for name in ("a",)}["a"]
    assert list(plain) == ["fit"] and plain["fit"].values.ndim == 0 and plain["fit"].levels is None
    family.held_out = lambda batch, progress: Family.held_out(family, batch, progress)  # type: ignore[method-assign]
    found = looked_at(source).losses(family, Progress(0, 1))
    losses = []
    for start in (0, 64):
        torch.manual_seed(mix(0, "validation", start))
        images = source.images[start : start + 64].float() / 127.5 - 1
        losses.append(float(family.loss("fit", Batch(images), Progress(0, 1)).total.detach()))
    assert found["fit"].mean == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_quality_sees_a_collapsed_painter() -> None:
    look, family = looked_at(Shades()), Painter(FamilyConfig(name="painter"), SHAPE, 0)
    healthy = look.quality(family, 200)
    family.net["gain"].data.zero_()
    collapsed = look.quality(family, 200)
    assert collapsed["kernel"] > 5 * abs(healthy["kernel"]) and collapsed["coverage"] < 0.1 < healthy["coverage"]
    assert look.quality(family, 200) == collapsed
    assert look.quality(family, 0) == {}
    family.draws = False  # type: ignore[misc]
    assert look.quality(family, 200) == {}


@pytest.mark.parametrize("cost", [0.01, 1 / 3, 8.0, 100.0])
@pytest.mark.parametrize("total_nimg", [100, 10_000, 180_000, 10_000_000])
def test_drawing_never_costs_more_than_its_share(total_nimg: int, cost: float) -> None:
    count, every = validation.affordable(total_nimg, cost)
    assert count == 0 or validation.FEWEST_DRAWN <= count <= validation.MOST_DRAWN
    assert count * cost * validation.VALIDATIONS / every <= validation.SHARE * total_nimg * (1 + 1e-9)


def made(folder: Path, **settings) -> Trainer:
    train = {
        "batch": 16,
        "total_kimg": 20,
        "precision": "fp32",
        "device": "cpu",
        "averages": [{"kind": "exponential", "halflife_kimg": 1000}, {"kind": "exponential", "halflife_kimg": 0.01}],
        **settings,
    }
    recipe = Recipe.model_validate(
        {"family": {"name": "painter"}, "optim": {"net": {"name": "sgd", "lr": 0.1}}, "train": train}
    )
    run = Run.create(folder / "run", "", {"average": "exponential-1000"})
    family = Painter(recipe.family, SHAPE, 0)
    return Trainer(recipe, family, Shades(), Shades(), run, Silent())


def test_the_last_moment_is_drawn_with_where_that_is_wanted(tmp_path: Path) -> None:
    trainer = made(tmp_path, choose="last")
    trainer.step()
    trainer._validate(200)
    best, loss = trainer.state.best_nimg, trainer.state.best_loss
    trainer.step()
    for average in trainer.averages.values():
        for tensor in average.state_dict().values():
            tensor.zero_()
    trainer._validate(200)
    assert best < trainer.state.best_nimg == trainer.state.nimg, "the last moment"
    assert trainer.state.best_loss == loss and trainer.state.stale_validations == 1, "it is known to be worse"
    assert trainer.run.weights().name.startswith(f"{trainer.state.nimg:09d}-")


@pytest.mark.parametrize("monitor", [None, "net"])
def test_of_moments_that_cover_as_much_the_latest_is_kept(
    monitor: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coverage is too coarse to rank good moments, and training mostly helps; a loss ranks them."""
    monkeypatch.setattr(Painter, "monitor", monitor)
    trainer = made(tmp_path)
    average, kept = next(iter(trainer.averages)), []
    for missed in (0.5, 0.10, 0.13, 0.16, 0.12, 0.9):  # 0.16 is near 0.13, and too far from the best
        trainer.step()
        trainer._keep_best({average: missed})
        kept.append(trainer.state.best_nimg // trainer.images_per_step)
    assert kept == ([1, 2, 3, 3, 5, 5] if monitor is None else [1, 2, 2, 2, 2, 2])
    assert trainer.state.best_loss == 0.10 and trainer.state.stale_validations == 4


def test_coverages_are_told_apart_by_two_standard_errors(tmp_path: Path) -> None:
    """Of 300 pictures: that of the difference of two shares near 0.8 is 0.033, near 0.02 it is 0.011."""
    validation = made(tmp_path).validation
    assert len(validation.source) == 300
    assert validation.as_much(0.74, 0.8) and not validation.as_much(0.73, 0.8)
    assert validation.as_much(0.03, 0.04) and not validation.as_much(0.0, 0.04), "a collapse of a poor model"
    assert validation.as_much(1.0, 1.0) and validation.as_much(0.9, 0.8) and not validation.as_much(0.98, 1.0)


def test_without_a_loss_that_ranks_the_pictures_choose_moment_and_average(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    trainer.step()
    for tensor in trainer.averages["exponential-0.01"].state_dict().values():
        tensor.zero_()  # one shade for every noise: a collapse
    trainer._validate(200)
    first = trainer.state.best_nimg
    assert first == trainer.state.nimg and trainer.state.best_average == "exponential-1000"
    row = trainer.run.stats()[-1]
    assert row["quality/kernel"] < row["quality/kernel[exponential-0.01]"]
    assert row["quality/coverage"] > row["quality/coverage[exponential-0.01]"]
    trainer.step()
    for average in trainer.averages.values():
        for tensor in average.state_dict().values():
            tensor.zero_()
    trainer._validate(200)
    assert trainer.state.best_nimg == first and trainer.state.stale_validations == 1
    chosen = trainer.run.weights()
    assert chosen.name == f"{first:09d}-exponential-1000.safetensors"
    with pytest.raises(UsageError, match="no average"):
        trainer.run.weights(average="power-0.100")
