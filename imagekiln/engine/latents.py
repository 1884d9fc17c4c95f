"""Between pictures: walks through the noise or the styles of a model, and tables of mixed styles.

A walk goes from picture to picture and back to the first. Its noise is spherically interpolated (Shoemake 1985; for
generators White 2016, arXiv:1609.04468): on a straight line between two normal vectors of many dimensions the middle is
too short by a factor of about 1 / sqrt(2), which is no noise the model ever saw. With a and b of lengths |a|, |b| and
the angle Omega between them,

    slerp(a, b; t) = ((1 - t) |a| + t |b|) (sin((1 - t) Omega) a / |a| + sin(t Omega) b / |b|) / sin(Omega).

Families with styles go on a straight line from style to style instead, and are spherical in the noise of their layers:
in the space of styles straight lines are the natural ones (Karras et al. 2019, arXiv:1812.04948, section 4.1).

Shapes: B pictures, N values of noise, L places a style enters, Z dimensions of a style, A and B pictures that give
coarse and fine styles, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from imagekiln.core import Condition, Family, seeded_noise
from imagekiln.engine.generate import Wish, asked_for, in_parts, pictured
from imagekiln.errors import UsageError

MAX_FRAMES = 2000
"""Frames of a walk: more are a film, and an animated PNG of it is larger than anybody wants."""

MAX_CELLS = 4096
"""Pictures of a table."""


@runtime_checkable
class StyleSpace(Protocol):
    """What a family with styles has besides `sample`, which equals `from_styles(styles(...), noise)`, clamped."""

    def styles(self, noise: Tensor, condition: Condition, options: Any = None) -> Tensor:
        """styles_BLZ, one a place from coarse to fine, truncated if the options say so."""
        ...

    def from_styles(self, styles: Tensor, noise: Tensor) -> Tensor:
        """images_BCHW of styles_BLZ and of noise as for `sample`, differentiable in both; may be outside [-1, 1]."""
        ...


def slerp(first_BX: Tensor, second_BX: Tensor, share_B: Tensor) -> Tensor:
    """Vectors on the way from the first to the second, (B, *X) of the same dtype; see the top of this file.

    share_B: 0 = the first and 1 = the second, to the bit. Equal or opposite directions have no one great
    circle through them: there it is the straight line.

    >>> slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([0.5])).div(3).square()
    tensor([[0.5000, 0.5000]])
    """
    a_BN, b_BN = first_BX.flatten(1).double(), second_BX.flatten(1).double()
    share_B1 = share_B.double()[:, None].to(a_BN.device)
    lengths_B1, other_B1 = (x_BN.norm(dim=1, keepdim=True).clamp(min=1e-300) for x_BN in (a_BN, b_BN))
    cosine_B1 = ((a_BN / lengths_B1) * (b_BN / other_B1)).sum(1, keepdim=True).clamp(-1, 1)
    angle_B1 = cosine_B1.acos()
    length_B1 = (1 - share_B1) * lengths_B1 + share_B1 * other_B1
    arc_BN = (
        torch.sin((1 - share_B1) * angle_B1) * (a_BN / lengths_B1) + torch.sin(share_B1 * angle_B1) * b_BN / other_B1
    )
    round_BN = length_B1 * arc_BN / angle_B1.sin().clamp(min=1e-300)
    straight_BN = (1 - share_B1) * a_BN + share_B1 * b_BN
    x_BN = torch.where(angle_B1.sin() > 1e-6, round_BN, straight_BN).to(first_BX.dtype)
    x_BN = torch.where(share_B1 == 0, first_BX.flatten(1), torch.where(share_B1 == 1, second_BX.flatten(1), x_BN))
    return x_BN.view_as(first_BX)


# -- walks ------------------------------------------------------------------------------------------------------------


def require_walk(family: Family, frames: int, labels: Sequence[Wish]) -> None:
    """Whether a walk through pictures of these labels, `frames` from each to the next, can be drawn.

    Raises:
        UsageError: too few or too many pictures or frames, or labels between which there is nothing.
    """
    if frames < 2:
        raise UsageError(f"--interpolate {frames}: expected 2 or more frames from a picture to the next.")
    if len(labels) < 2:
        raise UsageError(f"--interpolate: a walk goes through at least 2 pictures, and -n is {len(labels)}.")
    if frames * len(labels) > MAX_FRAMES:
        raise UsageError(
            f"--interpolate {frames} with -n {len(labels)} is {frames * len(labels)} frames; "
            f"at most {MAX_FRAMES} are drawn. Lower one of them."
        )
    kinds, option = ("prompts", "--prompt") if isinstance(labels[0], str) else ("classes", "--label")
    if (
        len(set(labels)) > 1
        and (family.num_classes or isinstance(labels[0], str))
        and not isinstance(family, StyleSpace)
    ):
        raise UsageError(
            f"--interpolate: this model draws nothing between two {kinds}. Choose one with {option}, for all pictures."
        )


def walk(
    family: Family,
    keys: Tensor,
    seeds: Sequence[int],
    labels: Sequence[Wish],
    frames: int,
    options: Any = None,
    batch: int = 64,
) -> Tensor:
    """A closed walk: (len(keys) * frames, C, H, W) uint8 on the CPU; frame i * frames is key i, to the bit.

    keys: the pictures of these seeds and labels, as `draw` gives them. Other arguments as for `draw`.
    """
    where, count = next(family.parameters()).device, len(seeds)
    noise_KX = seeded_noise(seeds, family.noise_shape())
    legs = [(leg, step / frames) for leg in range(count) for step in range(1, frames)]

    def part(some: slice) -> Tensor:
        start = torch.tensor([leg for leg, _ in legs[some]])
        share_B = torch.tensor([share for _, share in legs[some]])
        end = (start + 1) % count
        noise = slerp(noise_KX[start], noise_KX[end], share_B).to(where)
        if not isinstance(family, StyleSpace):
            return pictured(family, noise, asked_for(family, [labels[leg] for leg in start.tolist()]), options)
        first, second = (_styled(family, seeds, labels, rows.tolist(), options)[1] for rows in (start, end))
        return family.from_styles(first.lerp(second, share_B.to(first)[:, None, None]), noise)

    between = torch.cat(list(in_parts(part, len(legs), batch)))
    return torch.cat([keys[:, None], between.unflatten(0, (count, frames - 1))], dim=1).flatten(0, 1)


# -- mixing -----------------------------------------------------------------------------------------------------------


def require_styles(family: Family, rows: int, columns: int, crossover: int | None) -> int:
    """How many places take the coarse style in a table of rows x columns pictures: as asked for, or half of them.

    Raises:
        UsageError: the family has no styles, or not so many places; or the table is too large.
    """
    if not isinstance(family, StyleSpace):
        raise UsageError(f"--mix: a {family.config.name} model has no styles that could be mixed.")
    if rows * columns > MAX_CELLS:
        raise UsageError(f"--mix {columns} with -n {rows} is {rows * columns} pictures; at most {MAX_CELLS} are drawn.")
    with torch.inference_mode():
        places = _styled(family, [0], [0], [0], None)[1].shape[1]
    if crossover is None:
        return places // 2
    if not 1 <= crossover < places:
        raise UsageError(
            f"--crossover {crossover}: this model has {places} places for styles; expected 1 to {places - 1}."
        )
    return crossover


def mixed(
    family: Family,
    seeds: Sequence[int],
    labels: Sequence[Wish],
    rows: int,
    crossover: int,
    options: Any = None,
    batch: int = 64,
) -> Tensor:
    """Pictures (A, B, C, H, W) uint8 on the CPU with the coarse styles of one picture and the fine ones of another.

    seeds, labels: of the pictures, the first `rows` of which give coarse styles, and the others fine ones.
    crossover: places that take the coarse style. The noise of the layers comes with it, so a picture mixed with itself
        stays itself.

    Raises:
        UsageError: the family has no styles.
    """
    require_styles(family, rows, len(seeds) - rows, crossover)
    pairs = [(row, column) for row in range(rows) for column in range(rows, len(seeds))]

    def part(some: slice) -> Tensor:
        (noise, coarse_BLZ), (_, fine_BLZ) = (
            _styled(family, seeds, labels, chosen, options) for chosen in zip(*pairs[some], strict=True)
        )
        styles_BLZ = torch.cat([coarse_BLZ[:, :crossover], fine_BLZ[:, crossover:]], dim=1)
        return family.from_styles(styles_BLZ, noise)  # type: ignore[operator]  # required above

    return torch.cat(list(in_parts(part, len(pairs), batch))).unflatten(0, (rows, -1))


def _styled(
    family: Any, seeds: Sequence[int], labels: Sequence[Wish], rows: Sequence[int], options: Any
) -> tuple[Tensor, Tensor]:
    """Noise and styles of some of the pictures of these seeds and labels."""
    noise_BX = seeded_noise([seeds[row] for row in rows], family.noise_shape()).to(next(family.parameters()).device)
    return noise_BX, family.styles(noise_BX, asked_for(family, [labels[row] for row in rows]), options)
