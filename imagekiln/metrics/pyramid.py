"""Sliced Wasserstein distance of picture patches on a Laplacian pyramid: textures compared scale by scale.

Every level of the pyramid holds what one scale adds. From each picture and level 128 patches of 7 x 7 pixels are taken,
each channel of a set's patches is brought to mean 0 and standard deviation 1, and with 4 x 128 random unit directions u

SWD = 1000  mean over u  mean |sorted(u.a) - sorted(u.b)|       (Karras et al. 2018, arXiv 1710.10196, section 5)

a level, down to 16 pixels, and their mean. No network, no weights; blind to how patches are put together. The published
numbers use 8,192 or 16,384 pictures a side. Here picture i of both sets gives the patches of the same places, so a set
compared with itself scores exactly 0.

Shapes: N pictures, C channels, H rows, W columns, M patches, F numbers of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from imagekiln.core import mix
from imagekiln.errors import DataError
from imagekiln.metrics.sliced import ascending, unit_directions

PATCH = 7
PATCHES = 128
DIRECTIONS = 4 * 128
SMALLEST_SIDE = 16
SCALE = 1000.0
BLOCK_PICTURES = 256
BLOCK_ELEMENTS = 16 * 2**20
ROUNDING = 1e-6
BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)


class PyramidDistance(NamedTuple):
    """levels: distance by the level's longer side in pixels, finest first; mean over the levels."""

    levels: dict[int, float]
    mean: float


def pyramid_distance(
    first_NCHW: Tensor, second_NCHW: Tensor, patches: int = PATCHES, directions: int = DIRECTIONS, seed: int = 0
) -> PyramidDistance:
    """The distance between two equally many pictures of one size, float32, any range (it drops out).

    Levels halve the sides while both stay even and at least 16. seed: chooses patches and directions.

    Raises DataError for shapes that differ, sides under 7 pixels, NaN or infinity.

    >>> pictures = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> pyramid_distance(pictures, pictures, patches=8, directions=4)
    PyramidDistance(levels={32: 0.0, 16: 0.0}, mean=0.0)
    """
    shape = tuple(first_NCHW.shape)
    if tuple(second_NCHW.shape) != shape or len(shape) != 4 or not shape[0] or min(shape[2:]) < PATCH:
        raise DataError(
            f"A pyramid distance got pictures {shape} and {tuple(second_NCHW.shape)}; it needs the same (pictures, "
            f"channels, height, width) with sides of at least {PATCH} pixels for both."
        )
    for pictures in (first_NCHW, second_NCHW):
        if not torch.isfinite(pictures).all():
            raise DataError("A pyramid distance got NaN or infinite pixels; look at the pictures.")
    levels: dict[int, float] = {}
    both = (_levels(first_NCHW, patches, seed), _levels(second_NCHW, patches, seed))
    for level, (side, patches_a_MF) in enumerate(both[0]):
        patches_b_MF = next(both[1])[1]
        directions_UF = unit_directions(directions, patches_a_MF.shape[1], mix(seed, "pyramid directions", level))
        levels[side] = SCALE * _sliced(patches_a_MF, patches_b_MF, directions_UF)
    return PyramidDistance(levels, sum(levels.values()) / len(levels))


def laplacian(images_NCHW: Tensor) -> list[Tensor]:
    """The pyramid, finest first; the last level is what is left after blurring and halving (Burt & Adelson 1983)."""
    levels, images = [], images_NCHW
    while all(side % 2 == 0 and side // 2 >= SMALLEST_SIDE for side in images.shape[2:]):
        coarse = _filtered(images)[..., ::2, ::2]
        spread = torch.zeros_like(images)
        spread[..., ::2, ::2] = 4.0 * coarse
        levels.append(images - _filtered(spread))
        images = coarse
    return [*levels, images]


def _filtered(images_NCHW: Tensor) -> Tensor:
    """5 x 5 binomial filter with mirrored borders."""
    channels = images_NCHW.shape[1]
    line = torch.tensor(BINOMIAL) / sum(BINOMIAL)
    padded = functional.pad(images_NCHW, (2, 2, 2, 2), mode="reflect")
    rows = functional.conv2d(padded, line.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return functional.conv2d(rows, line.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def _levels(images_NCHW: Tensor, patches: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(longer side, normalised patches_MF float32) of every level."""
    blocks = [laplacian(block.detach().cpu().float()) for block in images_NCHW.split(BLOCK_PICTURES)]
    for level in range(len(blocks[0])):
        generator = torch.Generator().manual_seed(mix(seed, "pyramid patches", level))
        found_MCF = torch.cat([_patches(block[level], patches, generator) for block in blocks])
        std_C, mean_C = torch.std_mean(found_MCF, dim=(0, 2), correction=0, keepdim=True)
        blank_C = std_C <= ROUNDING * images_NCHW.abs().max()  # what is left of flat pictures is no texture
        normal_MCF = ((found_MCF - mean_C) / std_C).masked_fill(blank_C, 0.0)
        yield max(blocks[0][level].shape[2:]), normal_MCF.flatten(1)


def _patches(images_BCHW: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """patches_MCF: `patches` random squares of every picture."""
    count, channels, height, width = images_BCHW.shape
    top = torch.randint(height - PATCH + 1, (count, patches, 1, 1), generator=generator)
    left = torch.randint(width - PATCH + 1, (count, patches, 1, 1), generator=generator)
    offset = torch.arange(PATCH)
    pixel_BMF = ((top + offset[:, None]) * width + left + offset).flatten(2)
    index_BCX = pixel_BMF.flatten(1)[:, None].expand(-1, channels, -1)
    taken = images_BCHW.flatten(2).gather(2, index_BCX).view(count, channels, patches, PATCH**2)
    return taken.transpose(1, 2).flatten(0, 1)


def _sliced(first_MF: Tensor, second_MF: Tensor, directions_UF: Tensor) -> float:
    total = 0.0
    for block_BF in directions_UF.split(max(1, BLOCK_ELEMENTS // len(first_MF))):
        a, b = (ascending(block_BF @ patches_MF.T) for patches_MF in (first_MF, second_MF))
        total += float((a - b).abs_().sum(dtype=torch.float64)) / len(first_MF)
    return total / len(directions_UF)
