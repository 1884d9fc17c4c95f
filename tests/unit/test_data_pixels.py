"""The array of a set: what was kept as RGBA, with the channels the set needs, whatever the number of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imagekiln.data import decode, pixels


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_array_is_the_flattened_pixels(
    channels: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "_CHUNK_BYTES", 2 * 3 * 5 * 4)
    rgba = np.random.default_rng(0).integers(0, 256, (count, 3, 5, 4), dtype=np.uint8)
    raw, target = tmp_path / "pixels.raw", tmp_path / "images.npy"
    raw.write_bytes(rgba.tobytes())
    pixels.write_images(raw, target, (count, channels, 3, 5), "red")
    for images in (np.load(target), np.load(target, mmap_mode="r") if count else np.load(target)):
        assert images.dtype == np.uint8 and images.shape == (count, channels, 3, 5)
        expected = decode.flatten(rgba, channels, (255, 0, 0)).transpose(0, 3, 1, 2)  # type: ignore[arg-type]
        assert (images == expected).all()
    assert not raw.exists()
