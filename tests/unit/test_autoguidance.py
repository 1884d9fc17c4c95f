"""Guidance by a weaker model: what is drawn, which models may guide, and early weights that are kept for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagekiln
from imagekiln.core import Condition, seeded_noise
from imagekiln.engine.models import guide_by, open_model
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError

EVERYWHERE = {"steps": 3, "guidance": 2.0, "guidance_low": 0.0, "guidance_high": 1e9}
SMALL = {
    "family": {"widths": [16, 32], "layers": 1, "attention": [False, False], "sample": EVERYWHERE},
    "train": {"batch": 16, "total_kimg": 0.32, "checkpoint_kimg": 0.08, "doctor": "off", "precision": "fp32"},
}


def trained(out: Path, **more: object) -> Run:
    settings = {**SMALL, "train": SMALL["train"] | more}
    return imagekiln.train("diffusion", data="builtin:digits", out=out, settings=settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("guided") / "strong", keep_kimg=[0.1], choose="last")


@pytest.fixture(scope="module")
def early(run: Run) -> Path:
    """The weights of its early moment."""
    return min((run.path / "weights").glob("[0-9]*.safetensors"))


def test_early_weights_are_kept(run: Run, early: Path) -> None:
    """The first that are saved after 0.1 kimg, the last, and nothing else."""
    kept = {int(file.stem.split("-", 1)[0]) for file in (run.path / "weights").glob("[0-9]*.safetensors")}
    first = int(early.stem.split("-", 1)[0])
    assert kept == {first, 320} and 100 <= first < 200


def test_a_model_that_guides_itself_changes_nothing(run: Run) -> None:
    model = open_model(run)
    noise, asked = seeded_noise([1, 2], model.family.noise_shape()), Condition(labels=torch.tensor([3, 5]))
    plain = model.family.sample(noise, asked, model.family.config.sample.model_copy(update={"guidance": 1.0}))
    options = model.family.config.sample.model_copy(update={"guidance": 3.0})
    assert not torch.allclose(model.family.sample(noise, asked, options), plain, atol=1e-3), "guided by no class"
    guide_by(model, run.path, options)
    assert torch.allclose(model.family.sample(noise, asked, options), plain, atol=1e-4)


def test_one_step_goes_from_the_weaker_through_the_stronger(run: Run, early: Path) -> None:
    """Weak + 2.5 (strong - weak), both told the same class."""
    model, weak = open_model(run), open_model(run)
    weak.family.load_state_dict(_tensors(early), strict=False)
    noise, asked = seeded_noise([1, 2], model.family.noise_shape()), Condition(labels=torch.tensor([3, 5]))
    step = {"sampler": "euler", "steps": 1}
    one = model.family.config.sample.model_copy(update=step | {"guidance": 1.0})
    strong_x, weak_x = (one_model.family.sample(noise, asked, one) for one_model in (model, weak))
    options = one.model_copy(update={"guidance": 2.5})
    guide_by(model, early, options)
    assert not torch.allclose(strong_x, weak_x, atol=1e-3)
    wanted = weak_x + 2.5 * (strong_x - weak_x)
    assert torch.allclose(model.family.sample(noise, asked, options), wanted, atol=1e-4)


def test_pictures_and_measurements_can_be_guided(run: Run, early: Path, tmp_path: Path) -> None:
    first = imagekiln.generate(run, 2, tmp_path / "by-class")
    second = imagekiln.generate(run, 2, tmp_path / "by-weaker", guide=early)
    assert _pixels(first.pictures[0]).tolist() != _pixels(second.pictures[0]).tolist()
    imagekiln.evaluate(run, n=20, features="randconv", metrics="frechet", guide=early)
    options = {row["metric"]: row["options"] for row in run.measurements()}
    assert options["frechet"] == {"guide": str(early)} and options["mse"] == {}, "given back is without a guide"


def test_who_may_not_guide(run: Run, tmp_path: Path) -> None:
    model, options = open_model(run), open_model(run).family.config.sample
    with pytest.raises(UsageError, match="guidance of 1 is none"):
        guide_by(model, run.path, options.model_copy(update={"guidance": 1.0}))
    vae = imagekiln.train("vae", data="builtin:digits", out=tmp_path / "vae", settings={"train": {"total_kimg": 0.1}})
    with pytest.raises(UsageError, match="of the family vae, and this one is of diffusion"):
        guide_by(model, vae.path, options)
    with pytest.raises(UsageError, match="of the family diffusion, and this one is of vae"):
        imagekiln.generate(vae, 1, tmp_path / "drawn", guide=run.path)
    generator = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    other = imagekiln.train("diffusion", data=tmp_path, out=tmp_path / "other", settings=SMALL)
    with pytest.raises(UsageError, match="other pictures, classes, captions or latents"):
        guide_by(model, other.path, options)
    with pytest.raises(UsageError, match="nowhere"):
        guide_by(model, tmp_path / "nowhere", options)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))
