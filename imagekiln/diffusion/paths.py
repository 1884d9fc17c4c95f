r"""Paths from pictures to noise: variance preserving (VP) and rectified flow (RF).

One variable says how noisy a picture is on every path: sigma, the ratio of noise to signal, in [0, inf]. It is the
sigma of EDM (Karras et al. 2022) for data of unit variance. A path fixes how the noisy picture is scaled,

    z = a x + b eps,   b / a = sigma

    VP  a = 1 / sqrt(1 + sigma^2)   b = sigma / sqrt(1 + sigma^2)   v = a eps - b x   (Salimans and Ho 2022)
    RF  a = 1 - t                   b = t = sigma / (1 + sigma)     v = eps - x       (Liu et al. 2023)

and what a network may be asked for is linear in picture and noise: "x", "eps", or the path's velocity "v". The three
are exchangeable, so any network can be sampled, measured and exported as any other. Plain mean squared error on the
target is a well-defined loss for all of them; on the VP path with target v it *is* EDM's preconditioning and weighting.

Shapes: B pictures; x, eps, z have any shape that starts with B; sigma_B has one noise level a picture.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from imagekiln.errors import RecipeError, did_you_mean

Target = Literal["v", "x", "eps"]
TARGETS: tuple[Target, ...] = ("v", "x", "eps")

TIME_SCALE = 1000.0
"""The network's time input runs from 0 (clean) to this (noise), as in diffusers."""


def expand(sigma_B: Tensor, like: Tensor) -> Tensor:
    """One number a picture, shaped to multiply pictures: (B,) -> (B, 1, ..., 1)."""
    return sigma_B.reshape(-1, *[1] * (like.ndim - 1))


def exact(numbers: Tensor) -> Tensor:
    """The same numbers in float64: where they are, or on the CPU for a device without it (MPS)."""
    return (numbers.cpu() if numbers.device.type == "mps" else numbers).double()


class Path(ABC):
    """How signal fades into noise. Stateless; `path(name)` finds the two by name, `VP` and `RF`.

    Everything but `time` and `sigma` works elementwise on tensors of any dtype and is differentiable. sigma may be 0
    and, except where the text says so, infinite.
    """

    name: ClassVar[str]

    @abstractmethod
    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of z = a x + b eps, same shape as sigma."""

    @abstractmethod
    def velocity_scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) of v = p x + q eps, same shape as sigma. Both paths keep a q - b p = 1, which `to_x` relies on."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The network's time input in [0, 1000], growing with sigma."""

    @abstractmethod
    def sigma(self, time: Tensor) -> Tensor:
        """The inverse of `time`: the noise ratio at a time in [0, 1000]."""

    def diffuse(self, x: Tensor, eps: Tensor, sigma_B: Tensor) -> Tensor:
        """The noisy picture z = a x + b eps.

        >>> x, eps = torch.zeros(2, 1), torch.ones(2, 1)
        >>> RF().diffuse(x, eps, torch.tensor([0.0, 1.0])).tolist()
        [[0.0], [0.5]]
        """
        a, b = self.scales(expand(sigma_B, x))
        return a * x + b * eps

    def target(self, kind: Target, x: Tensor, eps: Tensor, sigma_B: Tensor) -> Tensor:
        """What a network of this kind should answer."""
        if kind == "x":
            return x
        if kind == "eps":
            return eps
        p, q = self.velocity_scales(expand(sigma_B, x))
        return p * x + q * eps

    def to_x(self, kind: Target, output: Tensor, z: Tensor, sigma_B: Tensor) -> Tensor:
        """The clean picture that a network's output implies. For "eps", sigma must be finite."""
        if kind == "x":
            return output
        a, b = self.scales(expand(sigma_B, z))
        if kind == "eps":
            return (z - b * output) / a
        _, q = self.velocity_scales(expand(sigma_B, z))
        return q * z - b * output

    def from_x(self, kind: Target, x: Tensor, z: Tensor, sigma_B: Tensor) -> Tensor:
        """The inverse of `to_x`: the output of a network of this kind that implies x. sigma must not be 0."""
        if kind == "x":
            return x
        a, b = self.scales(expand(sigma_B, z))
        if kind == "eps":
            return (z - a * x) / b
        _, q = self.velocity_scales(expand(sigma_B, z))
        return (q * z - x) / b

    def x_weight(self, kind: Target, sigma: Tensor) -> Tensor:
        """How much an error in x counts when a network of this kind is trained with plain mean squared error.

        |output - target|^2 = x_weight |x_predicted - x|^2: 1 for "x", 1 / sigma^2 for "eps", 1 / b^2 for "v". Dividing
        by it makes the losses of different targets comparable. sigma must not be 0.
        """
        a, b = self.scales(sigma)
        if kind == "x":
            return torch.ones_like(sigma)
        return (a / b) ** 2 if kind == "eps" else 1 / b**2


class VP(Path):
    """Variance preserving: for data of unit variance z has unit variance at every noise level."""

    name = "vp"

    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (1 + sigma**2).rsqrt(), (1 + sigma**-2).rsqrt()

    def velocity_scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.scales(sigma)
        return -b, a

    def time(self, sigma: Tensor) -> Tensor:
        """The angle of the cosine schedule, z = cos(angle) x + sin(angle) eps, over its range of pi/2."""
        return TIME_SCALE * (2 / math.pi) * torch.atan(sigma)

    def sigma(self, time: Tensor) -> Tensor:
        return torch.tan(time * (math.pi / 2 / TIME_SCALE))


class SteppedVP(VP):
    """Variance preserving, told the numbers of the steps that a pretrained network learned (Ho et al. 2020).

    betas_T: variances that step 0, 1, ... adds; sigma^2 = (1 - p) / p with p the product of all 1 - beta so far.

    >>> path = SteppedVP(torch.tensor([0.5, 0.5], dtype=torch.float64))
    >>> path.sigma_T.tolist(), path.time(torch.tensor([0.1, 1.6])).tolist()
    ([1.0, 1.7320508075688772], [0.0, 1.0])
    """

    def __init__(self, betas_T: Tensor) -> None:
        kept_T = torch.cumprod(1 - betas_T.double(), 0).clamp(min=1e-12)  # some schedules end in noise alone
        self.sigma_T = ((1 - kept_T) / kept_T).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """The step whose ln sigma is nearest: the network has only seen whole ones."""
        levels = exact(sigma).contiguous()
        edges = (self.sigma_T[:-1] * self.sigma_T[1:]).sqrt().to(levels.device)
        return torch.bucketize(levels, edges).to(sigma)

    def sigma(self, time: Tensor) -> Tensor:
        """time: in steps; a fraction is cut off."""
        step = time.long().clamp(0, len(self.sigma_T) - 1)
        return self.sigma_T.to(time)[step]


class RF(Path):
    """Rectified flow: straight lines from picture to noise, with constant velocity."""

    name = "rf"

    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / (1 + sigma), 1 / (1 + 1 / sigma)

    def velocity_scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(sigma), torch.ones_like(sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """Simply 1000 t, as diffusers' FlowMatchEulerDiscreteScheduler passes it."""
        return TIME_SCALE / (1 + 1 / sigma)

    def sigma(self, time: Tensor) -> Tensor:
        return time / (TIME_SCALE - time)


PATHS: dict[str, Path] = {"vp": VP(), "rf": RF()}


def path(name: str) -> Path:
    """The path of this name; `RecipeError` when there is none.

    >>> path("rf").name
    'rf'
    """
    if name not in PATHS:
        raise RecipeError(f"No path is called {name!r}. {did_you_mean(name, PATHS)}")
    return PATHS[name]
