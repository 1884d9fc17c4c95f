"""Drawing from a given picture: how much of it is left, what a mask keeps, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagekiln
from imagekiln.diffusion.drawing import Drawing, draw
from imagekiln.diffusion.paths import RF, VP
from imagekiln.diffusion.samplers import even_sigmas, sigmas
from imagekiln.engine.run import Run
from imagekiln.errors import DataError, UsageError

TINY = {"widths": [32], "attention": [False], "sample": {"steps": 4}}


def towards(goal: torch.Tensor, spread: float, path):
    """The perfect denoiser of normal data with this mean and standard deviation."""

    def denoise(z, sigma_B):
        a, _ = path.scales(sigma_B[:, None])
        y, noise = z / a, sigma_B[:, None] ** 2
        return (spread**2 * y + noise * goal) / (spread**2 + noise)

    return denoise


@pytest.mark.parametrize(("spacing", "grid"), [("edm", sigmas(5)), ("even", even_sigmas(5))])
def test_levels_are_spaced_as_asked(spacing, grid) -> None:
    seen: list[float] = []

    def denoise(z, sigma_B):
        seen.append(float(sigma_B[0]))
        return torch.zeros_like(z)

    draw(torch.randn(2, 3), RF(), Drawing(steps=5, spacing=spacing), denoise)
    assert seen == pytest.approx(grid[:-1].tolist())


@pytest.mark.parametrize("path", [VP(), RF()])
def test_strength_says_how_much_of_a_picture_is_left(path) -> None:
    torch.manual_seed(0)
    noise, start = torch.randn(64, 8), torch.full((64, 8), 5.0)
    denoise = towards(torch.zeros(8), 1.0, path)
    distances = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        drawn = draw(noise, path, Drawing(steps=20, strength=strength), denoise, start=start)
        distances.append(float((drawn - start).abs().mean()))
    assert distances == sorted(distances) and distances[0] < 1 < 4 < distances[-1]
    plain = draw(noise, path, Drawing(steps=20), denoise)
    whole = draw(noise, path, Drawing(steps=20), denoise, start=start)
    assert torch.allclose(plain, whole, atol=0.1), "at strength 1 next to nothing of the picture is left"


def test_the_first_step_begins_with_the_noisy_picture() -> None:
    path, seen = VP(), []

    def denoise(z, sigma_B):
        seen.append((z, sigma_B))
        return torch.zeros_like(z)

    noise, start = torch.randn(2, 3), torch.randn(2, 3)
    draw(noise, path, Drawing(steps=10, strength=0.5), denoise, start=start)
    z, sigma_B = seen[0]
    assert len(seen) == 5 and torch.allclose(z, path.diffuse(start, noise, sigma_B), atol=1e-5)


def test_what_is_kept_comes_out_as_it_went_in() -> None:
    path, keep = RF(), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    noise, start = torch.randn(2, 4), torch.randn(2, 4)
    drawn = draw(noise, path, Drawing(steps=6), towards(torch.full((4,), 9.0), 0.1, path), start=start, keep=keep)
    assert torch.allclose(drawn[:, :2], start[:, :2], atol=1e-6)
    assert float((drawn[:, 2:] - 9).abs().max()) < 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A diffusion run and one that draws from noise alone."""
    root, train = tmp_path_factory.mktemp("runs"), {"total_kimg": 0.016, "batch": 8, "doctor": "off"}
    made = {}
    for name, family in (("diffusion", TINY), ("vanilla_gan", {})):
        settings = {"family": family, "train": train}
        made[name] = imagekiln.train(name, data="builtin:digits", out=root / name, settings=settings)
    return made


def picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_a_mask_keeps_pixels_exactly(runs: dict[str, Run], tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (8, 8))
    start = picture(tmp_path / "start.png", rows)
    mask = picture(tmp_path / "mask.png", np.repeat([[0] * 4 + [255] * 4], 8, 0))
    drawn = imagekiln.generate(runs["diffusion"], n=2, out=tmp_path / "out", start=start, mask=mask, strength=0.9)
    first, second = (np.asarray(Image.open(path)) for path in drawn.pictures)
    assert np.array_equal(first[:, :4], rows[:, :4]) and np.array_equal(second[:, :4], rows[:, :4])
    assert not np.array_equal(first[:, 4:], rows[:, 4:]) and not np.array_equal(first, second)
    single = imagekiln.generate(
        runs["diffusion"], n=2, out=tmp_path / "one", start=start, mask=mask, strength=0.9, batch=1
    )
    assert [a.read_bytes() for a in single.pictures] == [b.read_bytes() for b in drawn.pictures]


def test_what_cannot_begin_with_a_picture_says_so(runs: dict[str, Run], tmp_path: Path) -> None:
    start = picture(tmp_path / "start.png", np.zeros((8, 8)))
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="draws from noise alone"):
        imagekiln.generate(runs["vanilla_gan"], n=1, out=out, start=start)
    with pytest.raises(UsageError, match="--start"):
        imagekiln.generate(runs["diffusion"], n=1, out=out, mask=start)
    with pytest.raises(UsageError, match="--start"):
        imagekiln.generate(runs["diffusion"], n=1, out=out, strength=0.5)
    with pytest.raises(UsageError, match="strength"):
        imagekiln.generate(runs["diffusion"], n=1, out=out, start=start, strength=0.0)
    with pytest.raises(UsageError, match="--interpolate"):
        imagekiln.generate(runs["diffusion"], n=2, out=out, start=start, interpolate=3)
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        imagekiln.generate(runs["diffusion"], n=1, out=out, start=tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png cannot be used"):
        imagekiln.generate(runs["diffusion"], n=1, out=out, start=tmp_path / "text.png")
