"""Drawing with a denoiser: the settings that all families of diffusion share, and what is done with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagekiln.config import Section
from imagekiln.diffusion import guidance, samplers
from imagekiln.diffusion.paths import Path

NO_LIMIT = 1e9
"""Stands for infinity, which JSON cannot write."""

SPACINGS: dict[str, Callable[[int], Tensor]] = {"edm": samplers.sigmas, "even": samplers.even_sigmas}
"""Grids of noise levels, from the same highest one."""


class Drawing(Section):
    """How pictures are drawn."""

    sampler: Literal["dpmpp_2m", "heun", "euler", "ddim"] = "dpmpp_2m"
    steps: int = Field(18, ge=1, le=1000)
    spacing: Literal["edm", "even"] = Field(
        "edm", description="of noise levels: closer where there is little noise, or even in the time of a flow"
    )
    guidance: float = Field(1.0, ge=0, le=20, description="1 = none; larger follows what is asked for more closely")
    guidance_low: float = Field(0.0, ge=0, description="guide only where the noise level is above this")
    guidance_high: float = Field(NO_LIMIT, gt=0, description="and not above this")

    strength: float = Field(1.0, gt=0, le=1, description="share of the steps taken from a given picture (--start)")

    def cost(self, guided: bool) -> float:
        """Of a picture, in pictures trained on (`Family.drawing_cost`). guided: there is something to guide by."""
        calls = self.steps * (2 if self.sampler == "heun" else 1)
        return calls * (2 if guided and self.guidance != 1 else 1) / 3


def draw(
    noise: Tensor,
    path: Path,
    settings: Drawing,
    denoise: samplers.Denoiser,
    weaker: samplers.Denoiser | None = None,
    rescale: float = 0.0,
    grid: Tensor | None = None,
    start: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Pictures of noise, of its shape. weaker: what guidance turns away from; None = nothing to guide by.

    rescale: see `guidance.rescaled`. grid: noise levels that are stepped through; None = those of `settings.spacing`.
    start, keep: of `core.Condition`; with a start only the last `strength` of the steps are taken, from there.

    >>> from imagekiln.diffusion.paths import RF
    >>> draw(torch.randn(2, 3), RF(), Drawing(steps=4), lambda z, sigma_B: torch.ones_like(z))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    denoise = guided_by(settings, denoise, weaker, rescale)
    levels = SPACINGS[settings.spacing](settings.steps) if grid is None else grid
    if start is not None:
        levels = levels[settings.steps - max(1, round(settings.strength * settings.steps)) :]
        noise = noise + start / float(levels[0])  # b (eps + x / sigma) = a x + b eps
        denoise = denoise if keep is None else keeping(denoise, start, keep)
    return samplers.sampler(settings.sampler)(denoise, noise, levels, path)


def guided_by(
    settings: Drawing, denoise: samplers.Denoiser, weaker: samplers.Denoiser | None, rescale: float = 0.0
) -> samplers.Denoiser:
    """A denoiser with the guidance of these settings; as it is where there is nothing to guide by."""
    if weaker is None:
        return denoise
    interval = (settings.guidance_low, settings.guidance_high if settings.guidance_high < NO_LIMIT else math.inf)
    return guidance.guide(denoise, weaker, settings.guidance, interval, rescale)


def keeping(denoise: samplers.Denoiser, start: Tensor, keep: Tensor) -> samplers.Denoiser:
    """A denoiser that expects the picture itself where it is kept (keep = 1)."""

    def answer(z: Tensor, sigma_B: Tensor) -> Tensor:
        return torch.lerp(denoise(z, sigma_B), start, keep.expand_as(start))

    return answer
