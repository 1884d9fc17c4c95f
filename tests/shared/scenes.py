"""Pictures with the statistics of photographs, from a seed."""

from __future__ import annotations

import numpy as np
from PIL import Image


def scene(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Colour noise with the power spectrum of photographs, 1/f^2."""
    rng = np.random.default_rng(seed)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    pixels = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, height, width))) / frequency).real
    pixels = 128 + 45 * pixels / pixels.std()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))
