r"""What denoisers are taught: pictures under noise, and how much an error counts at each level of it.

With min-SNR weights (Hang et al. 2023, arXiv:2303.09556) an error in the picture x counts min(SNR, m), where the
signal-to-noise ratio SNR is 1 / sigma^2. For the squared error of a network of another target that is the weight

    eps      min(SNR, m) / SNR
    v (VP)   min(SNR, m) / (SNR + 1)
    v (RF)   min((1 - t)^2, m t^2)

Offset noise eps + o c, with one more normal number c a channel, has the variance o^2 + 1 / (H W) in a channel's mean,
so that brightness is learned too, which plain noise hardly touches. The other remedy, a last level of noise alone (Lin
et al. 2023, arXiv:2305.08891), needs no setting here: noise levels have no upper end, and on both paths drawing begins
at sigma = 160, an SNR of 4e-5 where the steps of Stable Diffusion 1 end at 5e-3.

Shapes: B pictures; x, eps, z (B, C, ...); sigma_B one noise level a picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import Section
from imagekiln.diffusion.paths import Path, Target, expand


class Noise(Section):
    """The noise of training; a student hears of the shift alone, since its teacher shows it what to draw."""

    shift: float = Field(1.0, gt=0, le=100, description="noise levels are multiplied by this; above 1 noisier (SD3: 3)")
    offset: float = Field(0.0, ge=0, le=1, description="how far whole channels of the noise are shifted")
    min_snr: float = Field(
        0.0,
        ge=0,
        description="most that an error in the picture counts, in 1 / sigma^2; 0 = no such weights (paper: 5)",
    )


def noise(like: Tensor, offset: float = 0.0) -> Tensor:
    """Normal noise of this shape, the channels of each picture shifted by `offset` normal numbers: (B, C, ...).

    From torch's global generator; without an offset that draws nothing more.

    >>> noise(torch.zeros(2, 3, 4, 4), offset=0.1).shape
    torch.Size([2, 3, 4, 4])
    """
    eps = torch.randn_like(like)
    if not offset:
        return eps
    return eps + offset * torch.randn(*like.shape[:2], *[1] * (like.ndim - 2), dtype=like.dtype, device=like.device)


def min_snr(path: Path, target: Target, sigma: Tensor, most: float) -> Tensor:
    """Weights of the squared error of a network with this target, of the shape of sigma, which must not be 0.

    >>> from imagekiln.diffusion.paths import VP
    >>> min_snr(VP(), "x", torch.tensor([0.1, 2.0]), most=5.0).tolist()
    [5.0, 0.25]
    """
    return (sigma**-2).clamp(max=most) / path.x_weight(target, sigma)


def error(
    path: Path,
    target: Target,
    x: Tensor,
    sigma_B: Tensor,
    answer: Callable[[Tensor], Tensor],
    offset: float = 0.0,
    most: float = 0.0,
) -> Tensor:
    """Squared error of what a network answers to x with this much noise, of the shape of x.

    answer: the network's output for a noisy picture z. offset: of `noise`. most: of `min_snr`; 0 = all errors alike.
    """
    eps = noise(x, offset)
    output = answer(path.diffuse(x, eps, sigma_B))
    squared = (output.float() - path.target(target, x, eps, sigma_B)).square()
    return squared * expand(min_snr(path, target, sigma_B, most), squared) if most else squared
