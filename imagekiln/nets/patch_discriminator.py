"""PatchGAN: a discriminator that says of every patch of a picture whether it is real.

Isola et al. 2017 (arXiv:1611.07004, appendix 6.1.2): strided 4x4 convolutions with leaky ReLU, channels doubled up to
eight times, two convolutions of stride 1 at the end, batch normalisation on all but the first and the last, weights
from N(0, 0.02). Two strided layers see patches of 34 pixels (663,361 parameters at a width of 64 and 3 channels), three
see 70 (2,765,633). Without normalisation weights are He's: a batch of real pictures and one of others, each normalised
by its own numbers, have lost a part of what tells them apart, as contrast.

Shapes: B pictures, C channels, H rows, W columns, h and w rows and columns of patches.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from imagekiln.errors import UsageError
from imagekiln.nets.layers import prefers_channels_last

WIDEST = 8
"""Most channels over those of the first layer."""

SLOPE = 0.2
"""Of the leaky ReLU, below zero."""


class PatchDiscriminator(nn.Module):
    """Logits of patches, positive for real.

    channels: C. width: channels of the first layer. layers: strided convolutions. normalised: as in the paper.

    >>> net = PatchDiscriminator(3, width=16, layers=2)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1, 6, 6])
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 3, normalised: bool = True) -> None:
        super().__init__()
        self.smallest_side = smallest_side(layers)
        sizes = [width * min(2**level, WIDEST) for level in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for level, (before, after) in enumerate(pairwise(sizes), 1):
            stride = 2 if level < layers else 1
            norm = [nn.BatchNorm2d(after)] if normalised else []
            stack += [nn.Conv2d(before, after, 4, stride, 1, bias=not normalised), *norm, nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*stack, nn.Conv2d(sizes[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and normalised:
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, SLOPE)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """logits_B1hw of pictures in [-1, 1]. Raises UsageError for pictures without a single patch."""
        if min(images_BCHW.shape[2:]) < self.smallest_side:
            rows, columns = images_BCHW.shape[2:]
            raise UsageError(
                f"PatchDiscriminator got pictures of {rows} x {columns}; expected sides of at least "
                f"{self.smallest_side}. Use fewer layers."
            )
        if prefers_channels_last(images_BCHW):
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return self.layers(images_BCHW)


def smallest_side(layers: int) -> int:
    """Height and width at which there is one patch: two convolutions of stride 1 take one pixel each.

    >>> smallest_side(2), smallest_side(3)
    (12, 24)
    """
    return 3 * 2**layers
