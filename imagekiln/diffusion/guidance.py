"""Guidance: pushing what a model draws away from what a weaker model would draw.

Classifier-free guidance (Ho and Salimans 2022) takes the model without its condition as the weaker one; autoguidance
(Karras et al. 2024) a smaller or younger model. Both extrapolate predictions of x, which is the same as extrapolating
v, eps or the score. Guiding only at middle noise levels (Kynkaanniemi et al. 2024) is better and cheaper.

Shapes: z, x (B, ...); sigma_B one noise level a picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagekiln.diffusion.paths import expand
from imagekiln.diffusion.samplers import Denoiser


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Extrapolate: unconditional + scale (conditional - unconditional). 1 = no guidance, 0 = the unconditional model.

    >>> guided(torch.tensor([1.0]), torch.tensor([0.5]), 3.0).tolist()
    [2.0]
    """
    return unconditional + scale * (conditional - unconditional)


def guide(
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: float,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Denoiser:
    """A denoiser guided where sigma_lo < sigma <= sigma_hi, and conditional elsewhere.

    The unconditional model is not evaluated where its answer would not count: outside the interval and at scale 1.
    """
    if scale == 1:
        return conditional
    low, high = interval

    def denoise(z: Tensor, sigma_B: Tensor) -> Tensor:
        if interval == (0.0, math.inf):
            return guided(conditional(z, sigma_B), unconditional(z, sigma_B), scale)
        inside_B = (low < sigma_B) & (sigma_B <= high)
        x = conditional(z, sigma_B)
        if not inside_B.any():
            return x
        scale_B = torch.where(inside_B, scale, 1.0).to(x.dtype)
        return guided(x, unconditional(z, sigma_B), expand(scale_B, x))

    return denoise
