"""Perceptual path length: how much pictures change along a straight path between two latents.

PPL = mean |phi(G(z_t)) - phi(G(z_{t + eps}))|^2 / eps^2,   z_t between two random latents, t uniform on [0, 1]

(Karras et al. 2019, arXiv 1812.04948, section 4.1.) Pairs below the 1st and above the 99th percentile are left out, as
in the authors' numbers. In Z the path runs over the sphere (slerp, on latents of length 1), in W straight (lerp).
Published numbers take phi from VGG16; with any other features write their name beside it.

At eps = 1e-4 two pictures differ by less than one of 256 steps, so everything between the latent and the features has
to stay floating point: rounded to uint8 the number is noise, many times too large.

Shapes: N pairs, L latent numbers, B pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from imagekiln.core import mix
from imagekiln.errors import DataError, UsageError

SPACES = ("z", "w")
PATHS = ("full", "end")
CUT = (1.0, 99.0)
EPSILON = 1e-4


class PathLength(NamedTuple):
    """value: mean over the `kept` of `n` pairs; standard_error: of that mean; lengths: of all pairs, in their order."""

    value: float
    standard_error: float
    n: int
    kept: int
    lengths: Tensor


class PathLengthSetting(NamedTuple):
    """What the number depends on: write it beside the number.

    space: "z" (slerp) or "w" (lerp). path: "full" (t uniform on [0, 1]) or "end" (t = 0). cut: percentiles outside
    which pairs are left out. seed: chooses t.
    """

    space: str = "z"
    epsilon: float = EPSILON
    path: str = "full"
    cut: tuple[float, float] = CUT
    seed: int = 0


def path_length(
    generate: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensor],
    first_NL: Tensor,
    second_NL: Tensor,
    setting: PathLengthSetting | None = None,
    batch: int = 64,
) -> PathLength:
    """The path length of a latent model between given pairs of latents.

    generate: latents_BL -> images_BCHW, floating point, nothing random inside; features: images -> features_BD.
    first_NL, second_NL: float32 or float64 (float64 where `generate` takes it: differences lose 4 digits).

    Raises UsageError for an impossible setting, DataError for latents or pictures of a wrong shape or dtype, or results
    that are not finite.

    >>> straight = PathLengthSetting(space="w")
    >>> ends = torch.zeros(8, 2, dtype=torch.float64), torch.ones(8, 2, dtype=torch.float64)
    >>> round(path_length(lambda w: w, lambda images: 3.0 * images, *ends, straight).value, 6)
    18.0
    """
    setting = setting or PathLengthSetting()
    low, high = setting.cut
    if setting.space not in SPACES or setting.path not in PATHS or setting.epsilon <= 0.0 or not 0 <= low < high <= 100:
        raise UsageError(
            f"A path length got {setting}; it needs space z or w, path full or end, epsilon > 0 and 0 <= cut <= 100 "
            "ascending."
        )
    if first_NL.shape != second_NL.shape or first_NL.ndim != 2 or not len(first_NL) or not first_NL.is_floating_point():
        raise DataError(
            f"A path length got latents {tuple(first_NL.shape)} {first_NL.dtype} and {tuple(second_NL.shape)}; it "
            "needs the same (pairs, numbers) floating point for both."
        )
    generator = torch.Generator().manual_seed(mix(setting.seed, "path length"))
    t_N = torch.rand(len(first_NL), dtype=torch.float64, generator=generator).to(first_NL)
    t_N = t_N if setting.path == "full" else torch.zeros_like(t_N)
    between = slerp if setting.space == "z" else torch.lerp
    lengths = []
    with torch.no_grad():
        for a_BL, b_BL, t_B in zip(first_NL.split(batch), second_NL.split(batch), t_N.split(batch), strict=True):
            ends = torch.cat([between(a_BL, b_BL, (t_B + step)[:, None]) for step in (0.0, setting.epsilon)])
            images = generate(ends)
            if not images.is_floating_point() or len(images) != len(ends):
                raise DataError(
                    f"A path length got {tuple(images.shape)} {images.dtype} pictures for {len(ends)} latents; it "
                    "needs one floating point picture each: rounded pixels hide small steps."
                )
            start, stop = features(images).flatten(1).cpu().double().chunk(2)
            lengths.append((start - stop).square().sum(1) / setting.epsilon**2)
    lengths_N = torch.cat(lengths)
    if not torch.isfinite(lengths_N).all():
        raise DataError(
            "A path length got NaN or infinite features; look at the pictures, the model may have diverged."
        )
    least = lengths_N.quantile(low / 100, interpolation="lower")
    most = lengths_N.quantile(high / 100, interpolation="higher")
    kept_K = lengths_N[(lengths_N >= least) & (lengths_N <= most)]
    error = float(kept_K.std(correction=0)) / len(kept_K) ** 0.5
    return PathLength(float(kept_K.mean()), error, len(lengths_N), len(kept_K), lengths_N)


def slerp(first_BL: Tensor, second_BL: Tensor, t_B1: Tensor) -> Tensor:
    """Point at t on the great circle between two latents, each brought to length 1 first (Shoemake 1985).

    >>> slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0]])).round(decimals=6).abs()
    tensor([[0., 1.]])
    """
    a_BL, b_BL = (torch.nn.functional.normalize(x_BL, dim=1) for x_BL in (first_BL, second_BL))
    cosine_B1 = (a_BL * b_BL).sum(1, keepdim=True)
    across_BL = torch.nn.functional.normalize(b_BL - cosine_B1 * a_BL, dim=1)
    angle_B1 = t_B1 * torch.acos(cosine_B1.clamp(-1.0, 1.0))
    return a_BL * angle_B1.cos() + across_BL * angle_B1.sin()
