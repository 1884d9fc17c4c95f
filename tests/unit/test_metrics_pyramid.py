"""Patches on a Laplacian pyramid: exact reconstruction, independent filters, blur and noise by level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from imagekiln.core import mix
from imagekiln.errors import DataError
from imagekiln.metrics.pyramid import _filtered, _levels, laplacian, pyramid_distance
from imagekiln.metrics.sliced import unit_directions


def textures(n, side=64, seed=0, channels=3):
    """Noise at every scale, so that every level has something to lose."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(n, channels, side, side)
    for step in (1, 2, 4, 8):
        coarse = torch.randn(n, channels, side // step, side // step, generator=generator)
        total += functional.interpolate(coarse, scale_factor=step, mode="nearest")
    return total


def small(a, b, **settings):
    return pyramid_distance(a, b, **{"patches": 32, "directions": 64, **settings})


def test_levels_and_filters_agree_with_scipy():
    pictures = textures(2, 64)
    levels = laplacian(pictures)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    picture = pictures[0, 1].numpy().astype(np.float64)
    blurred = ndimage.convolve(picture, kernel, mode="mirror")
    assert np.allclose(_filtered(pictures)[0, 1], blurred, atol=1e-5)
    spread = np.zeros_like(picture)
    spread[::2, ::2] = blurred[::2, ::2]
    assert np.allclose(levels[0][0, 1], picture - ndimage.convolve(spread, 4 * kernel, mode="mirror"), atol=1e-5)


def test_a_constant_has_nothing_but_its_last_level():
    *fine, last = laplacian(torch.full((1, 1, 64, 64), 0.7))
    assert all(float(level.abs().max()) < 1e-5 for level in fine) and float((last - 0.7).abs().max()) < 1e-5


def test_equal_sets_score_zero_and_fresh_ones_little():
    pictures = textures(24)
    assert small(pictures, pictures).mean == 0.0
    fresh, blank = small(pictures, textures(24, seed=1)), small(pictures, torch.full((24, 3, 64, 64), 0.3))
    assert 0.0 < fresh.mean < 0.5 * blank.mean
    assert blank.levels[64] == pytest.approx(1000 * (2 / torch.pi) ** 0.5, rel=0.2)  # E|x| of patches against zeros


def test_blur_changes_the_finest_level_most():
    pictures = textures(24)
    found = small(functional.avg_pool2d(pictures, 3, 1, 1), pictures).levels
    assert found[64] > 1.5 * found[32] > 1.5 * found[16] / 1.5 and max(found, key=found.get) == 64


def test_scale_and_offset_of_pictures_drop_out():
    a, b = textures(12), textures(12, seed=1)
    assert small(a * 127.5 + 127.5, b * 127.5 + 127.5).levels == pytest.approx(small(a, b).levels, rel=1e-3)


def test_patches_are_pieces_of_the_picture_and_normalised_by_channel():
    pictures = textures(3, 16) * torch.tensor([1.0, 5.0, 0.2]).reshape(3, 1, 1) + 2.0
    ((side, patches),) = list(_levels(pictures, 40, seed=0))
    assert side == 16 and patches.shape == (120, 3 * 49)
    by_channel = patches.reshape(120, 3, 49)
    assert torch.allclose(by_channel.mean((0, 2)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(by_channel.std((0, 2), correction=0), torch.ones(3), atol=1e-5)
    every = functional.unfold(pictures[:1], 7)[0].T.reshape(-1, 3, 49)
    first = by_channel[0]
    fits = [np.corrcoef(first[0], candidate[0])[0, 1] for candidate in every]
    assert max(fits) > 0.9999


def test_direct_recomputation_of_one_level():
    """Sorted absolute differences, over the directions, from the patches."""

    a, b = textures(4, 16), textures(4, 16, seed=1)
    (_, left), (_, right) = next(_levels(a, 8, 0)), next(_levels(b, 8, 0))
    directions = unit_directions(16, 147, mix(0, "pyramid directions", 0)).double().numpy()
    projected = [np.sort(directions @ side.double().numpy().T, axis=1) for side in (left, right)]
    want = 1000 * np.abs(projected[0] - projected[1]).mean()
    assert pyramid_distance(a, b, patches=8, directions=16).levels == {16: pytest.approx(want, rel=1e-4)}


def test_odd_and_small_sides_have_one_level():
    assert list(small(textures(2, 40), textures(2, 40)).levels) == [40, 20]
    assert list(pyramid_distance(torch.rand(2, 1, 9, 28), torch.rand(2, 1, 9, 28), 4, 4).levels) == [28]


def test_refusals():
    pictures = textures(2, 16)
    with pytest.raises(DataError, match="the same"):
        small(pictures, pictures[:1])
    with pytest.raises(DataError, match="at least 7"):
        small(pictures[..., :6], pictures[..., :6])
    with pytest.raises(DataError, match="NaN"):
        small(pictures, pictures * float("nan"))
