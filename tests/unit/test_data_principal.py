"""Principal components: against a full SVD in float64, on exact low-rank sets, and through a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagekiln.data import builtin, principal
from imagekiln.errors import DataError


def digits() -> np.ndarray:
    return builtin.load("digits", Path("unused")).images_NHWC.transpose(0, 3, 1, 2)


def by_svd(images_NCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean_D, components, variances) from numpy's SVD in float64."""
    flat_ND = images_NCHW.reshape(len(images_NCHW), -1) / 127.5 - 1
    mean_D = flat_ND.mean(0)
    _, singular, rows = np.linalg.svd(flat_ND - mean_D, full_matrices=False)
    return mean_D, rows, singular**2 / (len(flat_ND) - 1)


def textures(n: int, side: int, seed: int = 0) -> np.ndarray:
    """Pictures whose spectrum falls like that of photos: noise divided by its frequency."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) + 1 / side
    noise = np.random.default_rng(seed).standard_normal((n, 3, side, side))
    smooth = np.fft.ifft2(np.fft.fft2(noise) / frequency).real
    return (128 + 40 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "images_NCHW", [digits()[:500], textures(300, 16), textures(25, 24)], ids=["digits", "n", "few"]
)
def test_it_agrees_with_a_full_svd(images_NCHW):
    mean_D, rows, variances = by_svd(images_NCHW)
    found = principal.fit(images_NCHW, num_components=12)
    assert np.allclose(found.mean_D, mean_D, atol=1e-5)
    assert np.allclose(found.variance_K, variances[:12], rtol=2e-3)
    assert found.total == pytest.approx(variances.sum(), rel=1e-5)
    assert np.allclose(found.components_KD @ found.components_KD.T, np.eye(12), atol=1e-4)
    # Variances near each other may share their directions, so subspaces are compared where there is a gap.
    gap = int(np.argmax(variances[:11] / variances[1:12])) + 1
    overlap = np.linalg.svd(found.components_KD[:gap] @ rows[:gap].T)[1]
    assert overlap.min() > 0.999


def test_batches_and_rows_change_nothing(monkeypatch):
    images = digits()
    rows = np.arange(0, 1700, 3)
    whole = principal.fit(images[rows], num_components=8)
    monkeypatch.setattr(principal, "BATCH_VALUES", 64 * 37)
    part = principal.fit(images, rows, num_components=8)
    assert np.allclose(whole.variance_K, part.variance_K, rtol=1e-4)
    assert np.allclose(whole.transform(images, rows), part.transform(images[rows]), atol=1e-2)


def test_a_set_of_three_directions_needs_three_components():
    generator = np.random.default_rng(1)
    patterns = np.linalg.qr(generator.standard_normal((192, 3)))[0].T
    flat = 128 + generator.standard_normal((400, 3)) * (150, 90, 50) @ patterns
    images = flat.clip(0, 255).round().astype(np.uint8).reshape(400, 3, 8, 8)
    found = principal.fit(images, num_components=6)
    assert found.needed(0.99) == 3 and found.needed(1.0) is None
    back = found.inverse(found.transform(images))
    assert np.abs(back - (images / 127.5 - 1)).max() < 0.02  # rounding to 8 bits is what is left
    assert np.allclose(found.transform(images).var(0, ddof=1), found.variance_K, rtol=1e-3)


def test_all_components_give_pictures_back():
    images = digits()[:200]
    found = principal.fit(images, num_components=64)
    assert np.abs(found.inverse(found.transform(images)) - (images / 127.5 - 1)).max() < 1e-4
    assert found.explained.sum() == pytest.approx(1, abs=1e-5)


def test_a_large_set_is_sampled(monkeypatch):
    monkeypatch.setattr(principal, "MOST_VALUES", 64 * 600)
    images = digits()
    found = principal.fit(images, num_components=5)
    exact = by_svd(images)[2][:5]
    assert found.num_pictures == 600
    assert np.allclose(found.variance_K, exact, rtol=0.25)


def test_equal_pictures_vary_in_nothing():
    found = principal.fit(np.full((5, 1, 4, 4), 7, np.uint8))
    assert found.total == 0 and not found.explained.any() and np.isfinite(found.components_KD).all()


def test_one_picture_is_refused():
    with pytest.raises(DataError, match="at least two pictures; there are 1"):
        principal.fit(digits()[:1])


def test_statistics_of_the_channels_are_those_of_float64():
    images = textures(40, 9)
    mean, spread = principal.channel_statistics(images, range(5, 40))
    values = images[5:] / 127.5 - 1
    assert np.allclose(mean, values.mean((0, 2, 3)), atol=1e-12)
    assert np.allclose(spread, values.std((0, 2, 3)), atol=1e-12)
    with pytest.raises(DataError, match="at least one"):
        principal.channel_statistics(images, [])


def test_a_file_gives_back_what_was_saved(tmp_path):
    found = principal.fit(digits()[:100], num_components=4)
    found.save(tmp_path / "basis.safetensors")
    again = principal.load(tmp_path / "basis.safetensors")
    assert again.image_shape == (1, 8, 8) and again.num_pictures == 100 and again.total == found.total
    assert np.array_equal(again.components_KD, found.components_KD) and np.array_equal(again.mean_D, found.mean_D)
    assert np.array_equal(again.variance_K, found.variance_K)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("not it")
    save_file({"mean": np.zeros(3, np.float32)}, tmp_path / "weights")
    for name in ("text", "weights", "missing"):
        with pytest.raises(DataError, match="holds no principal components"):
            principal.load(tmp_path / name)
