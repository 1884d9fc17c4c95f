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


def rescaled(guided_B: Tensor, conditional_B: Tensor, share: float) -> Tensor:
    """Take back the contrast that guidance adds: a share of the way to the conditional prediction's own spread.

    Lin et al. 2024 (arXiv:2305.08891), equations 15 and 16, on predictions of x; the spread is a picture's standard
    deviation. 0 = as it is.

    >>> rescaled(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 2.0]]), 1.0).tolist()
    [[0.0, 2.0]]
    """
    if share == 0:
        return guided_B
    axes = tuple(range(1, guided_B.ndim))
    factor = conditional_B.std(axes, keepdim=True) / guided_B.std(axes, keepdim=True).clamp(min=1e-6)
    return guided_B * (share * factor + 1 - share)


def guide(
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: float,
    interval: tuple[float, float] = (0.0, math.inf),
    rescale: float = 0.0,
) -> Denoiser:
    """A denoiser guided where sigma_lo < sigma <= sigma_hi, and conditional elsewhere.

    The unconditional model is not evaluated where its answer would not count: outside the interval and at scale 1.
    rescale: see `rescaled`.
    """
    if scale == 1:
        return conditional
    low, high = interval

    def denoise(z: Tensor, sigma_B: Tensor) -> Tensor:
        if interval == (0.0, math.inf):
            x = conditional(z, sigma_B)
            return rescaled(guided(x, unconditional(z, sigma_B), scale), x, rescale)
        inside_B = (low < sigma_B) & (sigma_B <= high)
        x = conditional(z, sigma_B)
        if not inside_B.any():
            return x
        scale_B = torch.where(inside_B, scale, 1.0).to(x.dtype)
        return rescaled(guided(x, unconditional(z, sigma_B), expand(scale_B, x)), x, rescale)

    return denoise
