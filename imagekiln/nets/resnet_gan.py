"""Residual generator and critic of WGAN-GP and SNGAN, for pictures of any size base * 2^k.

Gulrajani et al. 2017 (arXiv:1704.00028, appendix F) and Miyato et al. 2018 (arXiv:1802.05957, appendix B.4), whose
networks are the same but for width, pooling and spectral normalisation. Labels: conditional batch normalisation in the
generator, projection in the critic (Miyato & Koyama 2018, arXiv:1802.05637). Two plans, chosen by size:

  up to 32 pixels   every block has `width` channels; the critic halves twice at most and has four blocks
  above             a pyramid: `width` channels next to the picture, doubled at each halving, at most 16 * width

Parameters of generator and critic with 3 channels and a z of 128: WGAN-GP at 32 pixels (both widths 128) 1,204,483 and
1,053,825, with ten classes and a critic that names them 1,218,307 and 1,055,115; SNGAN at 32 (widths 256 and 128)
4,276,739 and 1,053,825; at 64 (both 64) 12,220,675 and 10,141,441. A label for "anything" adds one row to every label
table and is not counted.

Shapes: B pictures, Z latent dimensions, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, relu
from torch.nn.utils.parametrizations import spectral_norm

from imagekiln.errors import RecipeError
from imagekiln.nets.dcgan import halvings
from imagekiln.nets.labels import LabelEmbedding

LARGEST_FLAT = 32
"""Pictures up to this side get blocks of one width, larger ones a pyramid."""

WIDEST = 16
"""Channels of a pyramid's deepest blocks, in units of `width`."""

FLAT_BLOCKS = 4
"""Blocks of a critic of one width."""

SMALLEST_HALVED = 6
"""A pyramid's critic halves maps whose shorter side is at least this."""

RESIDUAL_GAIN = 2**0.5


class ConditionalNorm(nn.Module):
    """Batch normalisation whose gain and bias are those of the label; without classes a plain `BatchNorm2d`."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not num_classes)
        self.labels = LabelEmbedding(num_classes, 2 * channels) if num_classes else None
        if self.labels is not None:
            nn.init.ones_(self.labels.table.weight[:, :channels])
            nn.init.zeros_(self.labels.table.weight[:, channels:])

    def forward(self, x_BCHW: Tensor, labels_B: Tensor | None) -> Tensor:
        """x_BCHW, normalised, scaled and shifted."""
        x_BCHW = self.norm(x_BCHW)
        if self.labels is None:
            return x_BCHW
        gain_BC, bias_BC = self.labels(labels_B, len(x_BCHW)).chunk(2, dim=1)
        return x_BCHW * gain_BC[:, :, None, None] + bias_BC[:, :, None, None]


class Grow(nn.Module):
    """A generator's block: norm, ReLU, doubling, 3x3, norm, ReLU, 3x3, beside a doubled 1x1.

    bias: whether the first 3x3 has one, although a norm follows it.
    """

    def __init__(self, before: int, after: int, num_classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.first_norm = ConditionalNorm(before, num_classes)
        self.first = convolution(before, after, bias=bias)
        self.second_norm = ConditionalNorm(after, num_classes)
        self.second = convolution(after, after)
        self.shortcut = convolution(before, after, kernel=1, gain=1.0)

    def forward(self, x_BCHW: Tensor, labels_B: Tensor | None) -> Tensor:
        """x_BCHW -> (B, after, 2 H, 2 W)."""
        h_BCHW = self.first(_double(relu(self.first_norm(x_BCHW, labels_B))))
        h_BCHW = self.second(relu(self.second_norm(h_BCHW, labels_B)))
        return h_BCHW + _double(self.shortcut(x_BCHW))  # a 1x1 convolution and a doubling commute, and this is cheaper


class Shrink(nn.Module):
    """A critic's block: ReLU, 3x3, ReLU, 3x3 and, if it halves, mean pooling, beside a pooled 1x1 where sizes differ.

    first: the block that sees the picture: no ReLU before it, and its inner width is `after` instead of `before`.
    """

    def __init__(self, before: int, after: int, *, halve: bool, spectral: bool, first: bool = False) -> None:
        super().__init__()
        inner = after if first else before
        self.starts, self.halve = first, halve
        self.first = convolution(before, inner, spectral=spectral)
        self.second = convolution(inner, after, spectral=spectral)
        same = before == after and not halve
        self.shortcut = None if same else convolution(before, after, kernel=1, gain=1.0, spectral=spectral)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> (B, after, H, W), or half the height and width."""
        h_BCHW = self.second(relu(self.first(x_BCHW if self.starts else relu(x_BCHW))))
        if self.halve:
            x_BCHW, h_BCHW = avg_pool2d(x_BCHW, 2), avg_pool2d(h_BCHW, 2)
        return h_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW))


class Generator(nn.Module):
    """From latent vectors to pictures.

    z_dim: latent dimensions Z. image_shape: (C, H, W). width: channels of the blocks, or of the one next to the picture
    (see above). num_classes: 0 for a generator without labels. channels: of the maps, coarsest first, instead of those
    that `width` gives. bias: as for `Grow`. Raises `RecipeError` for an impossible size.

    >>> import torch
    >>> Generator(128, (3, 32, 32), width=16)(torch.randn(2, 128)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        z_dim: int,
        image_shape: tuple[int, int, int],
        width: int,
        num_classes: int = 0,
        *,
        channels: Sequence[int] = (),
        bias: bool = True,
    ) -> None:
        super().__init__()
        count, self.base = doublings(image_shape)
        channels = channels or [block_channels(image_shape, width, level) for level in reversed(range(count + 1))]
        self.project = nn.Linear(z_dim, channels[0] * self.base[0] * self.base[1])
        self.blocks = nn.ModuleList(Grow(before, after, num_classes, bias=bias) for before, after in pairwise(channels))
        self.last_norm = nn.BatchNorm2d(channels[-1])
        self.last = convolution(channels[-1], image_shape[0], gain=1.0)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """images_BCHW in [-1, 1] from standard normal z_BZ. labels_B: int64, -1 = anything; None = all of them -1."""
        x_BCHW = self.project(z_BZ).view(len(z_BZ), -1, *self.base)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, labels_B)
        return self.last(relu(self.last_norm(x_BCHW))).tanh()


class Discriminator(nn.Module):
    """From pictures to one logit each: positive for "real". No picture influences another's, so it can be penalised.

    spectral: divide every weight by its largest singular value, one power iteration a forward pass in training mode
    (Miyato et al. 2018, algorithm 1); the iteration's vectors are buffers, so a stopped training continues exactly.
    pool: how the last map becomes features, "sum" (SNGAN) or "mean" (WGAN-GP). classifier: it is not told classes, it
    names them (`classify`). Other arguments as for `Generator`.

    >>> import torch
    >>> critic = Discriminator((3, 32, 32), width=16, num_classes=10, spectral=True)
    >>> critic(torch.zeros(2, 3, 32, 32), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        num_classes: int = 0,
        *,
        spectral: bool = False,
        pool: Literal["sum", "mean"] = "sum",
        classifier: bool = False,
    ) -> None:
        super().__init__()
        self.pool = pool
        plan = critic_plan(image_shape, width)
        self.blocks = nn.Sequential(
            *(
                Shrink(before, after, halve=halve, spectral=spectral, first=index == 0)
                for index, (before, after, halve) in enumerate(plan)
            )
        )
        features = plan[-1][1]
        self.head = nn.Linear(features, 1)
        self.labels = LabelEmbedding(num_classes, features) if num_classes and not classifier else None
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if self.labels is not None:
            nn.init.xavier_uniform_(self.labels.table.weight)
        if classifier:
            self.classes = nn.Linear(features, num_classes)
            nn.init.xavier_uniform_(self.classes.weight)
            nn.init.zeros_(self.classes.bias)
        if spectral:
            spectral_norm(self.head)
            if self.labels is not None:
                spectral_norm(self.labels.table)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B as for the generator."""
        features_BC = self._features(images_BCHW)
        logits_B = self.head(features_BC).flatten()
        if self.labels is not None:
            logits_B = logits_B + (self.labels(labels_B, len(features_BC)) * features_BC).sum(dim=1)
        return logits_B

    def classify(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """logits_B, and logits_BK of the classes, of a discriminator with a classifier (Odena et al. 2017, AC-GAN)."""
        features_BC = self._features(images_BCHW)
        return self.head(features_BC).flatten(), self.classes(features_BC)

    def _features(self, images_BCHW: Tensor) -> Tensor:
        map_BCHW = relu(self.blocks(images_BCHW))
        return map_BCHW.sum((2, 3)) if self.pool == "sum" else map_BCHW.mean((2, 3))


def doublings(image_shape: tuple[int, int, int]) -> tuple[int, tuple[int, int]]:
    try:
        return halvings(image_shape)
    except RecipeError:
        _, height, width = image_shape
        raise RecipeError(
            f"This GAN cannot draw pictures of {height} x {width} pixels: height and width must be 4, 5, 6 or 7 "
            "doubled equally often. Set data.size to one of 8, 16, 28, 32, 48, 64, 96, 128."
        ) from None


def block_channels(image_shape: tuple[int, int, int], width: int, level: int) -> int:
    """Channels of a map that is the picture halved `level` times."""
    flat = max(image_shape[1:]) <= LARGEST_FLAT
    return width if flat else width * min(WIDEST, 2**level)


def critic_plan(image_shape: tuple[int, int, int], width: int) -> list[tuple[int, int, bool]]:
    """Channels before and after every block, and whether it halves."""
    count, _ = doublings(image_shape)
    if max(image_shape[1:]) <= LARGEST_FLAT:
        halves = [level < min(2, count) for level in range(FLAT_BLOCKS)]
    else:
        side, halves = min(image_shape[1:]), []
        while side >= SMALLEST_HALVED:
            side, halves = side // 2, [*halves, True]
        halves.append(False)
    channels = [image_shape[0], *(block_channels(image_shape, width, level) for level in range(len(halves)))]
    return [(before, after, halve) for (before, after), halve in zip(pairwise(channels), halves, strict=True)]


def convolution(
    before: int, after: int, *, kernel: int = 3, gain: float = RESIDUAL_GAIN, bias: bool = True, spectral: bool = False
) -> nn.Module:
    """A convolution that keeps the size, with Xavier's initial weights times a gain."""
    conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=bias)
    nn.init.xavier_uniform_(conv.weight, gain)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return spectral_norm(conv) if spectral else conv


def _double(x_BCHW: Tensor) -> Tensor:
    return interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
