"""Networks that grow while they train: generator and discriminator of the progressive GAN, its schedule, its pictures.

Karras et al. 2018 (arXiv:1710.10196). All layers exist from the start. A level says how many of them are in use: at an
integer s pictures have the size base * 2^s; at s - 1 + alpha, with 0 < alpha < 1, the layers of stage s are fading in,

  generator      (1 - alpha) up(rgb_{s-1}(x_{s-1})) + alpha rgb_s(x_s)
  discriminator  (1 - alpha) in_{s-1}(down(y)) + alpha block_s(in_s(y))
  real pictures  (1 - alpha) up(down(y)) + alpha y

where up repeats every pixel and down takes the mean of four. Layers not in use get no gradient at all, so an optimizer
that remembers begins with them when they begin. Convolutions have equalised learning rates, the generator normalises
every pixel's vector, the discriminator sees the minibatch deviation.

Channels: `width` next to the full picture, doubled at each halving, at most `widest`. Parameters of generator and
discriminator that grow from 4 pixels, with a z of 512 and 3 channels: 32 pixels (512) 20,719,628 and 20,726,785; 64
pixels (256) 22,490,383 and 22,498,049; 256 pixels (64) 23,044,309 and 23,052,353; 1024 pixels (16) 23,079,115 and
23,087,249. Below the size it grows from a network has no layers that make or take pictures.

Shapes: B pictures, Z latent dimensions, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from torch.utils.weak import WeakTensorKeyDictionary

from imagekiln.errors import RecipeError
from imagekiln.nets.dcgan import halvings
from imagekiln.nets.equalized import (
    ACTIVATION_GAIN,
    Blur,
    EqualConv2d,
    EqualLinear,
    class_shares,
    leaky,
    minibatch_stddev,
    pixel_norm,
)

TAPS = (1, 2, 1)
"""The smoothing filter of the discriminator, where it has one."""


# -- growing ----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The stages of a network that grows: channels of each, coarsest first, the coarsest size, where it starts."""

    channels: list[int]
    base: tuple[int, int]
    first: int

    @property
    def last(self) -> int:
        """The stage that makes full pictures."""
        return len(self.channels) - 1


def plan(image_shape: tuple[int, int, int], width: int, widest: int, grow_from: int = 4) -> Plan:
    """The stages of networks for pictures of this shape.

    grow_from: the training starts at the coarsest stage with at least this height; the picture's own = no growing.
    Raises `RecipeError` for an impossible size.

    >>> plan((3, 64, 64), 16, 64), plan((1, 28, 28), 8, 64, grow_from=8).first
    (Plan(channels=[64, 64, 64, 32, 16], base=(4, 4), first=0), 1)
    """
    _, height, side = image_shape
    try:
        last, base = halvings(image_shape)
    except RecipeError:
        raise RecipeError(
            f"Networks that grow cannot draw pictures of {height} x {side} pixels: height and width must be 4, 5, 6 or "
            "7 doubled equally often. Set data.size to one of 8, 16, 28, 32, 48, 64, 96, 128, 256."
        ) from None
    channels = [min(widest, width * 2**level) for level in reversed(range(last + 1))]
    return Plan(channels, base, next((stage for stage in range(last) if base[0] << stage >= grow_from), last))


def level_at(fraction: float, first: int, last: int, growing: float, fade: float) -> float:
    """The level of a network after a share of a run.

    The part `growing` of the run is divided evenly among the stages to come: a network trains as it is for the share
    1 - fade of a stage's time, and fades the next stage in for the rest; then all of it trains. The paper's 600
    thousand pictures of each are fade = 0.5.

    >>> [level_at(share / 8, first=0, last=2, growing=0.5, fade=0.5) for share in range(6)]
    [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    >>> level_at(7 / 32, first=0, last=2, growing=0.5, fade=0.5)
    0.75
    """
    if fraction >= growing or first == last:
        return float(last)
    stages = fraction / growing * (last - first)
    done = math.floor(stages)
    alpha = (stages - done - (1 - fade)) / fade if fade else 0.0
    return first + done + min(1.0, max(0.0, alpha))


def held(level: Tensor) -> float:
    """The level in a network's buffer; read from its device only if it was written to since it was last read.

    >>> level = torch.tensor(0.0)
    >>> held(level), held(level.fill_(1.5))
    (0.0, 1.5)
    """
    version, value = _read.get(level, (-1, 0.0))
    if version != level._version:
        value = float(level)
        _read[level] = level._version, value
    return value


def hold(level: Tensor, value: float) -> None:
    """Write the level of a network into its buffer, so that nobody has to read it."""
    level.fill_(value)
    _read[level] = level._version, float(np.float32(value))  # rounded as the buffer rounds it


_read = WeakTensorKeyDictionary()


def stage_at(level: float) -> tuple[int, float]:
    """The finest stage in use, and its share alpha in (0, 1].

    >>> stage_at(2.0), stage_at(2.25)
    ((2, 1.0), (3, 0.25))
    """
    stage = math.ceil(level)
    return stage, 1 + level - stage


def shrunk(images_BCHW: Tensor, level: float, last: int) -> Tensor:
    """Pictures as networks of this level see them: halved `last` - stage times, and mixed with one halving more.

    >>> shrunk(torch.arange(4.0).view(1, 1, 2, 2), level=0.5, last=1).flatten().tolist()
    [0.75, 1.25, 1.75, 2.25]
    """
    stage, alpha = stage_at(level)
    if stage < last:
        images_BCHW = avg_pool2d(images_BCHW, 2 ** (last - stage))
    return images_BCHW if alpha == 1 else doubled(avg_pool2d(images_BCHW, 2)).lerp(images_BCHW, alpha)


def doubled(x_BCHW: Tensor) -> Tensor:
    """(B, C, 2 H, 2 W): every pixel twice in both directions."""
    return interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


def enlarged(images_BCHW: Tensor, image_shape: Sequence[int]) -> Tensor:
    """Pictures of any level in full size, pixels repeated.

    >>> enlarged(torch.zeros(1, 3, 4, 4), (3, 32, 32)).shape
    torch.Size([1, 3, 32, 32])
    """
    return interpolate(images_BCHW, size=list(image_shape[1:]), mode="nearest")


# -- networks ---------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A layer of the generator: 3x3 convolution, after doubling if so, leaky ReLU, pixel norm.

    >>> Normed(4, 6, up=True)(torch.randn(2, 4, 5, 5)).square().mean(1).allclose(torch.ones(2, 10, 10))
    True
    """

    def __init__(self, before: int, after: int, *, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.convolve = EqualConv2d(before, after, 3, gain=ACTIVATION_GAIN)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, after, H, W), or twice the height and width."""
        return _normed(self.convolve(doubled(x_BCHW) if self.up else x_BCHW))


class Generator(nn.Module):
    """From latent vectors to pictures of the size of a level.

    z_dim: length of z, which is taken for its direction alone. width, widest, grow_from: see above. num_classes: 0 for
    a generator without labels; a label's learned vector, as long as z, stands beside it. `level`: what has been grown,
    a buffer for whoever trains it to set. Raises `RecipeError` for an impossible size.

    >>> net = Generator(16, (3, 28, 28), width=4, widest=8)
    >>> net(torch.randn(2, 16), level=0.5).shape, net(torch.randn(2, 16), level=2).shape
    (torch.Size([2, 3, 14, 14]), torch.Size([2, 3, 28, 28]))
    """

    level: Tensor

    def __init__(
        self,
        z_dim: int,
        image_shape: tuple[int, int, int],
        width: int,
        widest: int = 512,
        num_classes: int = 0,
        grow_from: int = 4,
    ) -> None:
        super().__init__()
        self.plan = plan(image_shape, width, widest, grow_from)
        channels, (height, side), first = self.plan
        self.num_classes = num_classes
        self.register_buffer("level", torch.tensor(float(first)))
        self.labels = _label_table(num_classes, z_dim)
        inputs = z_dim * (2 if num_classes else 1)
        self.spread = EqualLinear(inputs, channels[0] * height * side, bias_start=None, gain=ACTIVATION_GAIN / 4)
        self.spread_bias = nn.Parameter(torch.zeros(channels[0]))
        self.blocks = nn.ModuleList([nn.Sequential(Normed(channels[0], channels[0]))])
        for before, after in pairwise(channels):
            self.blocks.append(nn.Sequential(Normed(before, after, up=True), Normed(after, after)))
        self.pictures = nn.ModuleList(EqualConv2d(count, image_shape[0], 1) for count in channels[first:])

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None, *, level: float) -> Tensor:
        """images_BCHW, around [-1, 1]. labels_B: int64, -1 = anything; None = all of them -1."""
        stage, alpha = stage_at(level)
        x_BCHW = previous_BCHW = self._begin(z_BZ, labels_B)
        for block in self.blocks[: stage + 1]:
            previous_BCHW, x_BCHW = x_BCHW, block(x_BCHW)
        picture_BCHW = self._picture(x_BCHW, stage, z_BZ)
        if alpha == 1:
            return picture_BCHW
        return doubled(self._picture(previous_BCHW, stage - 1, z_BZ)).lerp(picture_BCHW, alpha)

    def _begin(self, z_BZ: Tensor, labels_B: Tensor | None) -> Tensor:
        """The coarsest map before its convolution."""
        x_BZ = pixel_norm(z_BZ)
        if self.labels is not None:
            label_BZ = self.labels(class_shares(labels_B, self.num_classes, len(z_BZ), like=self.labels.weight))
            x_BZ = torch.cat([x_BZ, pixel_norm(label_BZ.to(x_BZ.dtype))], dim=1)
        x_BCHW = self.spread(x_BZ).unflatten(1, (len(self.spread_bias), *self.plan.base))
        return _normed(x_BCHW + self.spread_bias.to(x_BCHW.dtype)[:, None, None])

    def _picture(self, x_BCHW: Tensor, stage: int, like: Tensor) -> Tensor:
        return self.pictures[stage - self.plan.first](x_BCHW).to(like.dtype)


class Halving(nn.Module):
    """A block of the discriminator: two 3x3 convolutions, and the mean of four pixels; smoothed before if so."""

    def __init__(self, before: int, after: int, *, blur: bool = False) -> None:
        super().__init__()
        self.first = EqualConv2d(before, before, 3, gain=ACTIVATION_GAIN)
        self.second = EqualConv2d(before, after, 3, gain=ACTIVATION_GAIN)
        self.blur = Blur(TAPS) if blur else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> (B, after, H / 2, W / 2)."""
        x_BCHW = leaky(self.first(x_BCHW), gain=1)
        if self.blur is None:
            return avg_pool2d(leaky(self.second(x_BCHW), gain=1), 2)
        return leaky(avg_pool2d(self.second(self.blur(x_BCHW)), 2), gain=1)


class Discriminator(nn.Module):
    """From pictures of the size of a level to one logit each: larger for "real".

    stddev_group: pictures that are compared in the minibatch deviation. blur: smooth before halving, as StyleGAN does
    (arXiv:1812.04948, appendix C). num_classes: labels enter by a projection (Miyato & Koyama 2018, arXiv:1802.05637).
    Other arguments as for `Generator`.

    >>> critic = Discriminator((3, 32, 32), width=4, widest=16, num_classes=10)
    >>> critic(torch.zeros(2, 3, 16, 16), torch.tensor([7, -1]), level=1.25).shape
    torch.Size([2])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        widest: int = 512,
        num_classes: int = 0,
        grow_from: int = 4,
        *,
        stddev_group: int = 4,
        blur: bool = False,
    ) -> None:
        super().__init__()
        self.plan = plan(image_shape, width, widest, grow_from)
        channels, (height, side), first = self.plan
        self.num_classes, self.stddev_group = num_classes, stddev_group
        self.pictures = nn.ModuleList(
            EqualConv2d(image_shape[0], count, 1, gain=ACTIVATION_GAIN) for count in channels[first:]
        )
        self.blocks = nn.ModuleList(Halving(fine, coarse, blur=blur) for coarse, fine in pairwise(channels))
        deepest = channels[0]
        self.last = EqualConv2d(deepest + 1, deepest, 3, gain=ACTIVATION_GAIN)
        self.features = EqualLinear(deepest * height * side, deepest, gain=ACTIVATION_GAIN)
        self.head = EqualLinear(deepest, 1)
        self.labels = _label_table(num_classes, deepest)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None, *, level: float) -> Tensor:
        """logits_B. images_BCHW in [-1, 1], of the level's size; labels_B as for the generator."""
        stage, alpha = stage_at(level)
        x_BCHW = self._enter(images_BCHW, stage)
        for index in range(stage, 0, -1):
            x_BCHW = self.blocks[index - 1](x_BCHW)
            if index == stage and alpha < 1:
                x_BCHW = self._enter(avg_pool2d(images_BCHW, 2), stage - 1).lerp(x_BCHW, alpha)
        x_BCHW = leaky(self.last(minibatch_stddev(x_BCHW, self.stddev_group)), gain=1)
        features_BC = leaky(self.features(x_BCHW.flatten(1)), gain=1)
        logits_B = self.head(features_BC).flatten()
        if self.labels is None:
            return logits_B
        label_BC = self.labels(class_shares(labels_B, self.num_classes, len(logits_B), like=self.labels.weight))
        return logits_B + (features_BC * label_BC).sum(1) / math.sqrt(label_BC.shape[1])

    def _enter(self, images_BCHW: Tensor, stage: int) -> Tensor:
        return leaky(self.pictures[stage - self.plan.first](images_BCHW), gain=1)


def _normed(x_BCHW: Tensor) -> Tensor:
    return pixel_norm(leaky(x_BCHW, gain=1))


def _label_table(num_classes: int, width: int) -> EqualLinear | None:
    """Vectors of unit variance for labels, for rows of `class_shares`; None without labels."""
    return EqualLinear(num_classes, width, bias_start=None, gain=math.sqrt(num_classes)) if num_classes else None
