"""Densities of noise levels to train on, as pure functions of uniform numbers.

A density maps a uniform number to a sigma by its quantile function, so plain random numbers and spread-out ones
(`stratified`) go through the same code. sigma is the noise-to-signal ratio of `imagekiln.diffusion.paths`.

Sources: EDM (Karras et al. 2022, table 1), Stable Diffusion 3 (Esser et al. 2024, section 3.1), Variational Diffusion
Models (Kingma et al. 2021, appendix I.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from imagekiln.diffusion.paths import TIME_SCALE, Path, exact

EDM_MEAN, EDM_STD = -0.51, 1.2
"""EDM's density for pictures in [-1, 1]: its P_mean of -1.2 plus ln 2, because its data has standard deviation 1/2."""

_MARGIN = 2.0**-24
"""Quantiles are kept this far from 0 and 1: the resolution of a float32 uniform number."""


def stratified(offset: Tensor, batch: int) -> Tensor:
    """Uniform numbers spread evenly over [0, 1): (batch,), offset's dtype.

    offset: one uniform number in [0, 1), any shape with one element. Every single number of the result is uniform, and
    together they cover the range, so that the loss of a batch varies much less than with independent numbers.

    >>> stratified(torch.tensor(0.1), 4).tolist()
    [0.10000000149011612, 0.3499999940395355, 0.6000000238418579, 0.8500000238418579]
    """
    return (offset.reshape(()) + torch.arange(batch, dtype=offset.dtype, device=offset.device) / batch) % 1


def even(like: Tensor, levels: int) -> Tensor:
    """The middles of `levels` equal parts of [0, 1], dealt in turn to pictures: (B,), on the device of `like`.

    like: any tensor whose first axis is B.

    >>> even(torch.zeros(3, 1), 2).tolist()
    [0.25, 0.75, 0.25]
    """
    return (torch.arange(len(like), device=like.device) % levels + 0.5) / levels


def log_normal(uniform_B: Tensor, mean: float = EDM_MEAN, std: float = EDM_STD) -> Tensor:
    """Log-normal noise, ln sigma ~ N(mean, std^2): sigma_B, uniform_B's dtype.

    On the RF path ln sigma = ln(t / (1 - t)), so this is also the logit-normal density of t of Stable Diffusion 3
    (there mean 0 and std 1).

    >>> log_normal(torch.tensor([0.5]), mean=0.0).tolist()
    [1.0]
    """
    normal_B = torch.special.ndtri(exact(uniform_B).clamp(_MARGIN, 1 - _MARGIN))
    return torch.exp(mean + std * normal_B).to(uniform_B)


def shifted(sigma_B: Tensor, shift: float) -> Tensor:
    """Noise levels shifted towards noise, as pictures of more pixels want it: sigma_B, its dtype.

    Stable Diffusion 3 shifts the time of a flow, t' = s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23). There
    sigma = t / (1 - t), so this is sigma' = s sigma, and defined on every path. Log-normal levels (logit-normal times)
    stay log-normal: a shift by s is ln s added to the mean of ln sigma.

    >>> shifted(torch.tensor([0.5, 1.0]), 3.0).tolist()
    [1.5, 3.0]
    """
    return shift * sigma_B


def uniform_time(uniform_B: Tensor, path: Path) -> Tensor:
    """Uniform in the path's own time: sigma_B, uniform_B's dtype.

    On RF that is t uniform in (0, 1) (Liu et al. 2023); on VP the cosine schedule (Nichol and Dhariwal 2021). The ends
    are kept 1/10000 away, where sigma is 0 or infinite.
    """
    return path.sigma(TIME_SCALE * exact(uniform_B).clamp(1e-4, 1 - 1e-4)).to(uniform_B)
