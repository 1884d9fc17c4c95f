"""Power spectra: white noise, waves, planted checkerboards, blur, streaming."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from imagekiln.errors import DataError
from imagekiln.metrics.spectrum import Spectrum, compare_spectra


def noise(n, height=32, width=32, seed=0, channels=3):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


def board(height=32, width=32):
    return 1.0 - 2.0 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (9, 17)])
def test_white_noise_is_flat_and_has_its_variance(height, width):
    radial = Spectrum().update(0.5 * noise(800, height, width)).radial
    assert float(radial[1:].min()) > 0.25 * 0.9 and float(radial[1:].max()) < 0.25 * 1.1


def test_power_agrees_with_a_sum_over_pixels():
    pictures = noise(2, 8, 10, channels=1).double()
    window = [0.5 - 0.5 * math.cos(2 * math.pi * (i + 1) / 9) for i in range(8)]
    across = [0.5 - 0.5 * math.cos(2 * math.pi * (i + 1) / 11) for i in range(10)]
    weight = sum((a * b) ** 2 for a in window for b in across)
    want = 0.0
    for picture in pictures[:, 0]:
        mean = float(picture.mean())
        total = sum(
            window[y] * across[x] * (float(picture[y, x]) - mean) * complex(math.cos(angle), math.sin(angle))
            for y in range(8)
            for x in range(10)
            for angle in [-2 * math.pi * (3 * y / 8 + 2 * x / 10)]
        )
        want += abs(total) ** 2 / weight / 2
    spectrum = Spectrum().update(pictures)
    assert float(spectrum.power[3, 2]) == pytest.approx(want, rel=1e-5)
    assert float(spectrum.frequency[3, 2]) == pytest.approx(math.hypot(3 / 8, 2 / 10))


def test_a_wave_stands_in_its_ring():
    wave = torch.cos(2 * math.pi * 8 / 32 * torch.arange(32.0)).expand(1, 1, 32, 32)
    radial = Spectrum().update(wave).radial
    assert int(radial.argmax()) + 1 == 8 and float(radial[6:9].sum()) > 0.99 * float(radial.sum())


@pytest.mark.parametrize(
    "pattern", [board(), board()[:1].expand(32, 32), board()[:, :1].expand(32, 32)], ids=["both", "columns", "rows"]
)
def test_planted_checkerboard_is_seen_at_nyquist(pattern):
    smooth = functional.avg_pool2d(noise(100), 3, 1, 1)
    reference = Spectrum().update(functional.avg_pool2d(noise(100, seed=1), 3, 1, 1))
    clean = compare_spectra(Spectrum().update(smooth), reference)
    planted = compare_spectra(Spectrum().update(smooth + 0.1 * pattern), reference)
    assert 0.7 < clean.nyquist < 1.4 and planted.nyquist > 3.0
    assert planted.distance_db > 3 * clean.distance_db
    assert (
        planted.bands["low"] == pytest.approx(clean.bands["low"], rel=0.02)
        and planted.bands["high"] > 1.3 * clean.bands["high"]
    )
    assert Spectrum().update(pattern.expand(1, 1, 32, 32)).nyquist_share > 0.999


def test_share_of_white_noise_is_the_share_of_the_points():
    """3 x 3 bins around each of the three points."""
    assert Spectrum().update(noise(400)).nyquist_share == pytest.approx(27 / 32**2, rel=0.1)


def test_blur_loses_the_high_band_and_contrast_loses_all_alike():
    pictures = noise(60)
    sharp = Spectrum().update(pictures)
    blurred = compare_spectra(Spectrum().update(functional.avg_pool2d(pictures, 3, 1, 1)), sharp)
    assert blurred.bands["high"] < blurred.bands["middle"] < blurred.bands["low"] < 1.0
    fainter = compare_spectra(Spectrum().update(0.1 * pictures + 0.7), sharp)
    assert fainter.distance_db == pytest.approx(20.0, abs=1e-3) and fainter.nyquist == pytest.approx(1.0, abs=1e-3)
    assert compare_spectra(sharp, sharp) == (0.0, {"low": 1.0, "middle": 1.0, "high": 1.0}, 1.0)


def test_streaming_and_order_do_not_show():
    pictures = noise(50)
    streamed = Spectrum()
    for part in torch.arange(50).flip(0).split(7):
        streamed.update(pictures[part])
    assert torch.allclose(streamed.power, Spectrum().update(pictures).power, rtol=1e-6)
    assert streamed.n == 50


def test_blank_pictures_are_finite():
    blank = Spectrum().update(torch.full((3, 1, 16, 16), 0.2))
    found = compare_spectra(blank, Spectrum().update(noise(3, 16, 16, channels=1)))
    assert math.isfinite(found.distance_db) and found.distance_db > 60.0


def test_refusals():
    with pytest.raises(DataError, match="no pictures yet"):
        _ = Spectrum().power
    with pytest.raises(DataError, match="at least 8"):
        Spectrum().update(noise(2, 7, 8))
    with pytest.raises(DataError, match="one size"):
        Spectrum().update(noise(2)).update(noise(2, 16, 32))
    with pytest.raises(DataError, match="NaN"):
        Spectrum().update(noise(2) * math.nan)
    with pytest.raises(DataError, match="compare one size"):
        compare_spectra(Spectrum().update(noise(2)), Spectrum().update(noise(2, 16, 16)))
