r"""Samplers: from noise to pictures along the probability-flow ODE, as pure functions of one signature.

    sampler(denoise, noise, sigmas, path) -> x

In EDM's variable y = z / a = x + sigma eps the ODE of every path is dy / d sigma = (y - D(y)) / sigma, where D is the
denoiser (Karras et al. 2022, equation 1). If D were constant over a step, the step would be exact:

    y' = (sigma' / sigma) y + (1 - sigma' / sigma) D   <=>   z' = (b' / b) z + a' (1 - sigma' / sigma) D

The samplers differ only in the D they put there. The right-hand form is finite at sigma = inf too, so a rectified flow
can start from pure noise at t = 1, like diffusers' FlowMatchEulerDiscreteScheduler, with which `euler` then agrees.

Shapes: noise and z (B, ...), sigma_B one noise level a picture. `sigmas` is a falling grid of steps + 1 noise levels
(CPU, float64) that may begin with inf; the result is z at its last level, which is the picture where that is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.diffusion.paths import Path
from imagekiln.errors import UsageError, did_you_mean

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""denoise(z, sigma_B) -> the clean picture expected behind z, guidance included."""

Sampler = Callable[[Denoiser, Tensor, Tensor, Path], Tensor]


class _Level(NamedTuple):
    """A noise level and the path's scales there, as Python floats: no step waits for the device."""

    sigma: float
    a: float
    b: float

    def of(self, z: Tensor) -> Tensor:
        """sigma_B for the denoiser."""
        return z.new_full((len(z),), self.sigma)


def _steps(sigmas: Tensor, path: Path) -> Iterator[tuple[_Level, _Level]]:
    grid = sigmas.double().cpu()
    a, b = path.scales(grid)
    return pairwise(_Level(*row) for row in torch.stack([grid, a, b], dim=1).tolist())


def _start(noise: Tensor, sigmas: Tensor, path: Path) -> Tensor:
    return noise * path.scales(sigmas[:1].double().cpu())[1].item()


def _advance(z: Tensor, x: Tensor, now: _Level, after: _Level) -> Tensor:
    """The exact step for a denoiser that answers x all the way."""
    return (after.b / now.b) * z + after.a * (1 - after.sigma / now.sigma) * x


def euler(denoise: Denoiser, noise: Tensor, sigmas: Tensor, path: Path) -> Tensor:
    """Euler's method, first order, one evaluation a step. DDIM with eta = 0 (Song et al. 2021) is the same formula."""
    z = _start(noise, sigmas, path)
    for now, after in _steps(sigmas, path):
        z = _advance(z, denoise(z, now.of(z)), now, after)
    return z


def heun(denoise: Denoiser, noise: Tensor, sigmas: Tensor, path: Path) -> Tensor:
    """Heun's method in sigma, second order, two evaluations a step (Karras et al. 2022, algorithm 1, no churn).

    The mean of the two slopes equals one exact step with D + (sigma / 2 sigma') (D' - D) for the denoiser.
    """
    z = _start(noise, sigmas, path)
    for now, after in _steps(sigmas, path):
        x = denoise(z, now.of(z))
        z_euler = _advance(z, x, now, after)
        if after.sigma > 0 and math.isfinite(now.sigma):
            x = x + now.sigma / (2 * after.sigma) * (denoise(z_euler, after.of(z)) - x)
            z_euler = _advance(z, x, now, after)
        z = z_euler
    return z


def dpmpp_2m(denoise: Denoiser, noise: Tensor, sigmas: Tensor, path: Path) -> Tensor:
    """DPM-Solver++(2M), second order, one evaluation a step (Lu et al. 2022, algorithm 2).

    The denoiser is extrapolated from the step before to the middle of this one, linearly in -ln sigma. The first step
    and the one to sigma = 0 are first order.
    """
    z = _start(noise, sigmas, path)
    x_before, width_before = None, 0.0
    for now, after in _steps(sigmas, path):
        x = denoise(z, now.of(z))
        width = math.log(now.sigma / after.sigma) if after.sigma > 0 else math.inf
        middle = x
        if x_before is not None and math.isfinite(width) and math.isfinite(width_before):
            middle = x + width / (2 * width_before) * (x - x_before)
        z = _advance(z, middle, now, after)
        x_before, width_before = x, width
    return z


SAMPLERS: dict[str, Sampler] = {"euler": euler, "ddim": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def sampler(name: str) -> Sampler:
    """The sampler of this name; `UsageError` when there is none.

    >>> sampler("heun").__name__
    'heun'
    """
    if name not in SAMPLERS:
        raise UsageError(f"No sampler is called {name!r}. {did_you_mean(name, SAMPLERS)}")
    return SAMPLERS[name]


def sigmas(steps: int, sigma_min: float = 0.004, sigma_max: float = 160.0, rho: float = 7.0) -> Tensor:
    """The grid of EDM (Karras et al. 2022, equation 5): (steps + 1,) float64, from sigma_max to sigma_min, then 0.

    rho: how much finer the steps are at low noise; infinity spaces them evenly in log-SNR. The default range is EDM's
    0.002 to 80 measured in standard deviations of the data. Raises `UsageError`.

    >>> [round(sigma, 3) for sigma in sigmas(3, 0.01, 10.0, rho=math.inf).tolist()]
    [10.0, 0.316, 0.01, 0.0]
    """
    _check_steps(steps)
    if not 0 < sigma_min < sigma_max < math.inf or not rho > 0:
        raise UsageError(
            f"A noise grid needs 0 < sigma_min < sigma_max and rho > 0; got {sigma_min}, {sigma_max} and {rho}."
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if math.isinf(rho):
        grid = sigma_max * (sigma_min / sigma_max) ** ramp
    else:
        high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        grid = (high + ramp * (low - high)) ** rho
    return torch.cat([grid, grid.new_zeros(1)])


def flow_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler: (steps + 1,) float64, falling from infinity to 0.

    t falls from 1 to 1/1000 in equal steps, then to 0; sigma = t / (1 - t). Shifting time towards noise (Esser et al.
    2024, equation 23) multiplies every sigma by `shift`. Like diffusers, the smallest t is shifted twice. Raises
    `UsageError`.

    >>> flow_sigmas(2, shift=3.0).tolist()[0]
    inf
    """
    _check_steps(steps)
    if not 0 < shift < math.inf:
        raise UsageError(f"The shift of a noise grid must be positive; got {shift}.")
    smallest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    t = torch.linspace(1, smallest, steps, dtype=torch.float64)
    return torch.cat([shift * t / (1 - t), t.new_zeros(1)])


def even_sigmas(steps: int, sigma_max: float = 160.0) -> Tensor:
    """A grid even in the time of a rectified flow: (steps + 1,) float64, falling from sigma_max to 0.

    t = sigma / (1 + sigma) falls in equal steps. Euler's steps on it are straight lines of equal length in the time in
    which a flow is straightest (Liu et al. 2022, arXiv:2209.03003), which suits few steps. Raises `UsageError`.

    >>> [round(sigma, 3) for sigma in even_sigmas(4).tolist()]
    [160.0, 2.927, 0.988, 0.331, 0.0]
    """
    _check_steps(steps)
    if not 0 < sigma_max < math.inf:
        raise UsageError(f"The highest noise level of a grid must be positive; got {sigma_max}.")
    t = torch.linspace(sigma_max / (1 + sigma_max), 0, steps + 1, dtype=torch.float64)
    return t / (1 - t)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise UsageError(f"Sampling takes at least 1 step; got {steps}.")
