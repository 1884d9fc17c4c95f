"""Power spectra of pictures: blur, missing grain and checkerboards as powers by spatial frequency.

power(f) = mean over pictures and channels of |FFT(w (x - mean x))(f)|^2 / sum w^2

with w a Hann window, since pictures do not end as they begin and the jump would cover the high frequencies. White noise
of variance v has power v everywhere. Averaged over rings of equal distance from frequency 0, in decibel, this is the
usual radial spectrum (Durall et al. 2020, arXiv 2003.01826). Up-sampling without a filter leaves peaks at the Nyquist
frequency: strides of 2 at half a cycle a pixel in either direction.

Shapes: B pictures, C channels, H rows, W columns, F rings.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.errors import DataError

SMALLEST_SIDE = 8
NYQUIST = 0.5
BANDS = {"low": (0.0, 0.125), "middle": (0.125, 0.25), "high": (0.25, 1.0)}
"""Cycles a pixel; "high" reaches into the corners, at 0.71."""

LEAST = 1e-12
"""Power added before a logarithm: -120 dB against pictures of variance 1."""


class SpectrumComparison(NamedTuple):
    """distance_db: root mean square over rings of the difference in dB. bands: power generated / reference by band.

    nyquist: share of the power at the Nyquist frequencies, generated / reference; well above 1 is a checkerboard.
    """

    distance_db: float
    bands: dict[str, float]
    nyquist: float


class Spectrum:
    """Mean power spectrum of any number of pictures of one size, gathered batch by batch.

    >>> noise = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> bool((Spectrum().update(noise).radial - 1.0).abs().max() < 0.2)
    True
    """

    def __init__(self) -> None:
        self.n = 0
        self._sum_HW = torch.zeros(0, 0)

    def update(self, images_BCHW: Tensor) -> Spectrum:
        """Add pictures, any float dtype, in [-1, 1]; returns itself.

        Raises DataError for another shape than before, sides under 8 pixels, NaN or infinity.
        """
        shape = tuple(images_BCHW.shape)
        if len(shape) != 4 or not shape[0] or min(shape[2:]) < SMALLEST_SIDE:
            raise DataError(
                f"A spectrum got pictures of shape {shape}; it needs (pictures, channels, height, width) with sides "
                f"of at least {SMALLEST_SIDE} pixels."
            )
        if self.n and shape[2:] != tuple(self._sum_HW.shape):
            raise DataError(
                f"A spectrum of {tuple(self._sum_HW.shape)} pixels got pictures of {shape[2:]}; it needs one size: "
                "resize the pictures first."
            )
        images = images_BCHW.detach().cpu().float()
        if not torch.isfinite(images).all():
            raise DataError("A spectrum got NaN or infinite pixels; look at the pictures, the model may have diverged.")
        window_HW = _window(shape[2])[:, None] * _window(shape[3])
        centred = (images - images.mean((2, 3), keepdim=True)) * window_HW
        power_HW = torch.fft.fft2(centred).abs().square_().mean(1).sum(0, dtype=torch.float64)
        self._sum_HW = (self._sum_HW if self.n else 0.0) + power_HW / window_HW.double().square().sum()
        self.n += shape[0]
        return self

    @property
    def power(self) -> Tensor:
        """power_HW float64, frequencies in the order of `torch.fft.fftfreq`. Raises DataError without pictures."""
        if not self.n:
            raise DataError("A spectrum has no pictures yet; call update(images) first.")
        return self._sum_HW / self.n

    @property
    def frequency(self) -> Tensor:
        """frequency_HW float64: distance from 0 in cycles a pixel."""
        rows_H, columns_W = (torch.fft.fftfreq(side, dtype=torch.float64) for side in self.power.shape)
        return (rows_H[:, None].square() + columns_W.square()).sqrt()

    @property
    def radial(self) -> Tensor:
        """radial_F float64: mean power of each ring; ring f is f / min(H, W) cycles a pixel, from 1 (0 is left out)."""
        ring_HW = (self.frequency * min(self.power.shape)).round().long().flatten()
        return (ring_HW.bincount(self.power.flatten()) / ring_HW.bincount())[1:]

    @property
    def decibel(self) -> Tensor:
        """radial_F in decibel."""
        return 10.0 * (self.radial + LEAST).log10()

    @property
    def nyquist_share(self) -> float:
        """Share of the power within one step of the three Nyquist points (0, 1/2), (1/2, 0), (1/2, 1/2)."""
        power_HW = self.power
        near_H, near_W = (_step_from(side, NYQUIST) <= 1.0 for side in power_HW.shape)
        zero_H, zero_W = (_step_from(side, 0.0) <= 1.0 for side in power_HW.shape)
        points_HW = near_H[:, None] & near_W | near_H[:, None] & zero_W | zero_H[:, None] & near_W
        return float(power_HW[points_HW].sum() / power_HW.sum().clamp(min=LEAST))

    def band(self, low: float, high: float) -> float:
        """Power of the frequencies with low <= f < high, in cycles a pixel; 0 itself is left out."""
        frequency_HW = self.frequency
        inside_HW = (frequency_HW >= low) & (frequency_HW < high) & (frequency_HW > 0.0)
        return float(self.power[inside_HW].sum())


def compare_spectra(generated: Spectrum, reference: Spectrum) -> SpectrumComparison:
    """What the generated pictures have too much or too little of. Raises DataError for different sizes.

    >>> noise = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> found = compare_spectra(Spectrum().update(2 * noise), Spectrum().update(noise))
    >>> {name: round(ratio, 6) for name, ratio in found.bands.items()}
    {'low': 4.0, 'middle': 4.0, 'high': 4.0}
    """
    if generated.power.shape != reference.power.shape:
        raise DataError(
            f"The generated pictures have {tuple(generated.power.shape)} pixels and the reference "
            f"{tuple(reference.power.shape)}; spectra compare one size: resize first."
        )
    gap_F = generated.decibel - reference.decibel
    return SpectrumComparison(
        distance_db=math.sqrt(float(gap_F.square().mean())),
        bands={
            name: (generated.band(*edges) + LEAST) / (reference.band(*edges) + LEAST) for name, edges in BANDS.items()
        },
        nyquist=(generated.nyquist_share + LEAST) / (reference.nyquist_share + LEAST),
    )


def _window(side: int) -> Tensor:
    return torch.hann_window(side + 2, periodic=False)[1:-1]  # without the two zeros at the ends


def _step_from(side: int, frequency: float) -> Tensor:
    """How many steps of 1 / side each frequency of the transform lies from +- the one given."""
    return (torch.fft.fftfreq(side, dtype=torch.float64).abs() - frequency).abs() * side
