"""The noise of training: its levels, its channels, and what errors weigh, against the formulas of the papers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagekiln
from imagekiln.core import Batch, HeldOut, Progress
from imagekiln.diffusion import noising, paths
from imagekiln.diffusion.densities import log_normal, shifted
from imagekiln.engine.models import open_model
from imagekiln.families.stable_diffusion import StableDiffusion, StableDiffusionConfig

SMALL = {"depth": 1, "text": {"width": 32, "layers": 2, "context": 8, "vocabulary": 520}, "sample": {"steps": 2}}
ALL_ON = {"shift": 3.0, "offset": 0.1, "min_snr": 5.0}


def levels(count: int = 50) -> torch.Tensor:
    """From nearly clean to nearly noise: sigma_B float64."""
    return torch.logspace(-2, 2, count, dtype=torch.float64)


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_shift_is_that_of_stable_diffusion_3(shift: float):
    t = paths.path("rf").time(levels()) / 1000
    moved = paths.path("rf").time(shifted(levels(), shift)) / 1000
    assert torch.allclose(moved, shift * t / (1 + (shift - 1) * t), rtol=1e-12)


def test_a_shift_of_log_normal_levels_is_a_mean():
    uniform = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    assert torch.allclose(shifted(log_normal(uniform, 0.2, 0.8), 3.0), log_normal(uniform, 0.2 + np.log(3), 0.8))


def test_weights_are_those_of_the_paper():
    """Hang et al. 2023, section 3.4, and for a flow what follows from an error of x by hand."""
    sigma, snr = levels(), levels() ** -2
    fewest = torch.minimum(snr, torch.tensor(5.0))
    t = sigma / (1 + sigma)
    expected = {
        ("vp", "x"): fewest,
        ("vp", "eps"): fewest / snr,
        ("vp", "v"): fewest / (snr + 1),
        ("rf", "x"): fewest,
        ("rf", "eps"): fewest / snr,
        ("rf", "v"): torch.minimum((1 - t) ** 2, 5 * t**2),
    }
    for (path, target), weights in expected.items():
        found = noising.min_snr(paths.path(path), target, sigma, 5.0)
        assert torch.allclose(found, weights, rtol=1e-10), (path, target)


@pytest.mark.parametrize("kind", paths.TARGETS)
@pytest.mark.parametrize("name", ["vp", "rf"])
def test_an_error_in_the_picture_counts_alike_whatever_is_asked_for(name: str, kind: paths.Target):
    """A network that means x + d instead of x: min(SNR, 5) d^2, and x_weight d^2 without such weights."""
    path, sigma = paths.path(name), torch.logspace(-1, 1, 20, dtype=torch.float64)
    x = torch.randn(20, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def answer(z: torch.Tensor) -> torch.Tensor:
        return path.from_x(kind, x + 0.5, z, sigma)

    for most, weights in ((5.0, (sigma**-2).clamp(max=5)), (0.0, path.x_weight(kind, sigma))):
        found = noising.error(path, kind, x, sigma, answer, offset=0.3, most=most)
        assert torch.allclose(found, paths.expand(weights, found).expand_as(found) * 0.25, rtol=1e-4)


def test_an_offset_shifts_whole_channels_by_as_much_as_it_says():
    like = torch.zeros(4000, 2, 3, 3, dtype=torch.float64)
    torch.manual_seed(0)
    plain = noising.noise(like)
    torch.manual_seed(0)
    moved = noising.noise(like, 0.4)
    apart = moved - plain
    assert torch.allclose(apart, apart[..., :1, :1].expand_as(apart), atol=1e-12)
    means = moved.mean((2, 3))
    assert float(means.var()) == pytest.approx(0.4**2 + 1 / 9, rel=0.05)
    assert abs(float((means[:, 0] * means[:, 1]).mean())) < 0.02  # channels for themselves


def test_without_an_offset_nothing_more_is_drawn():
    like, drawn = torch.zeros(2, 3, 4, 4), []
    for made in (torch.randn_like, noising.noise):
        torch.manual_seed(0)
        drawn.append((made(like), torch.rand(1)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


# -- the family -------------------------------------------------------------------------------------------------------


def family(**noise: float) -> StableDiffusion:
    torch.manual_seed(0)
    return StableDiffusion(StableDiffusionConfig(**SMALL, noise=noise), (3, 8, 8), 0)


def held_out(model: StableDiffusion) -> HeldOut:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    return model.eval().held_out(Batch(images, text=model.read(["a cup"] * 8)), Progress(0, 1))["denoise"]


def test_every_setting_reaches_the_loss():
    pytest.importorskip("diffusers")
    plain, noisier = held_out(family()), held_out(family(shift=3.0))
    assert torch.allclose(noisier.levels, 3 * plain.levels)
    weighted = held_out(family(min_snr=5.0))
    t = plain.levels / (1 + plain.levels)
    assert torch.allclose(weighted.values, plain.values * torch.minimum((1 - t) ** 2, 5 * t**2), rtol=1e-4)
    assert not torch.allclose(held_out(family(offset=0.5)).values, plain.values, rtol=1e-3)


def test_a_run_with_all_of_them_continues_exactly(tmp_path: Path):
    pytest.importorskip("diffusers")
    photos, rng, rows = tmp_path / "photos", np.random.default_rng(0), ["file_name,text"]
    photos.mkdir()
    for index in range(10):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(photos / f"{index}.png")
        rows.append(f"{index}.png,picture {index}")
    (photos / "metadata.csv").write_text("\n".join(rows) + "\n")
    train = {"batch": 4, "doctor": "off", "precision": "fp32", "schedule": "constant", "warmup_fraction": 0.0}

    def trained(name: str, kimg: float, noise: dict[str, float]) -> dict[str, torch.Tensor]:
        wanted = {"family": SMALL | {"noise": noise}, "data": {"size": 16}, "train": train | {"total_kimg": kimg}}
        run = imagekiln.train("stable_diffusion", data=photos, out=tmp_path / name, settings=wanted)
        return open_model(run).family.state_dict()

    whole = trained("whole", 0.032, ALL_ON)
    trained("parts", 0.016, ALL_ON)
    parts, plain = trained("parts", 0.032, ALL_ON), trained("plain", 0.032, {})
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)
