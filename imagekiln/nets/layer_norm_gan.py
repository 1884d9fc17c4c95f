"""Residual generator and critic of WGAN-GP for 64 pixels: a pyramid, with layer normalisation in the critic.

Gulrajani et al. 2017 (arXiv:1704.00028): batch normalisation makes pictures of a batch depend on each other, which a
penalty on every picture's own gradient does not allow; layer normalisation (Ba et al. 2016, arXiv:1607.06450) does not.
`width` channels next to the picture, doubled at each halving, at most 8 * width. Convolutions in front of a norm have
no bias. Parameters of generator and critic at 64 pixels with 3 channels, a z of 128 and widths of 64: 8,540,483 and
7,488,001. What differs from the paper's code: its layer normalisation has a gain and an offset for every channel, 3,840
parameters more. Labels: conditional batch normalisation and projection (Miyato & Koyama 2018, arXiv:1802.05637).

Shapes: B pictures, Z latent dimensions, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, layer_norm, relu

from imagekiln.nets import resnet_gan
from imagekiln.nets.labels import LabelEmbedding
from imagekiln.nets.resnet_gan import convolution, doublings

WIDEST = 8
"""Channels of the coarsest maps, in units of `width`."""


class Shrink(nn.Module):
    """A critic's block: norm, ReLU, 3x3, norm, ReLU, 3x3, mean pooling, beside a pooled 1x1."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = convolution(before, before, bias=False)
        self.second = convolution(before, after)
        self.shortcut = convolution(before, after, kernel=1, gain=1.0)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> (B, after, H / 2, W / 2)."""
        h_BCHW = self.second(_norm_relu(self.first(_norm_relu(x_BCHW))))
        return avg_pool2d(h_BCHW, 2) + self.shortcut(avg_pool2d(x_BCHW, 2))


class Generator(resnet_gan.Generator):
    """From latent vectors to pictures.

    z_dim: latent dimensions Z. image_shape: (C, H, W). width: channels next to the picture. num_classes: 0 for a
    generator without labels. Raises `RecipeError` for an impossible size.

    >>> import torch
    >>> Generator(128, (3, 64, 64), width=4)(torch.randn(2, 128)).shape
    torch.Size([2, 3, 64, 64])
    """

    def __init__(self, z_dim: int, image_shape: tuple[int, int, int], width: int, num_classes: int = 0) -> None:
        channels = _widths(width, doublings(image_shape)[0])[::-1]
        super().__init__(z_dim, image_shape, width, num_classes, channels=channels, bias=False)


class Discriminator(nn.Module):
    """From pictures to one logit each: positive for "real". No picture influences another's, so it can be penalised.

    Arguments as for `Generator`.

    >>> import torch
    >>> Discriminator((3, 64, 64), width=4, num_classes=10)(torch.zeros(2, 3, 64, 64), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int, num_classes: int = 0) -> None:
        super().__init__()
        count, base = doublings(image_shape)
        channels = _widths(width, count)
        self.stem = convolution(image_shape[0], width, gain=1.0)
        self.blocks = nn.Sequential(*(Shrink(before, after) for before, after in pairwise(channels)))
        self.head = nn.Linear(channels[-1] * math.prod(base), 1)
        self.labels = LabelEmbedding(num_classes, channels[-1]) if num_classes else None
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if self.labels is not None:
            nn.init.xavier_uniform_(self.labels.table.weight)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B as for the generator."""
        map_BCHW = self.blocks(self.stem(images_BCHW))
        logits_B = self.head(map_BCHW.flatten(1)).flatten()
        if self.labels is not None:
            logits_B = logits_B + (self.labels(labels_B, len(map_BCHW)) * map_BCHW.mean((2, 3))).sum(dim=1)
        return logits_B


def _widths(width: int, count: int) -> list[int]:
    """Channels of the picture's map and of those that are halved once, twice and so on."""
    return [width * min(WIDEST, 2**level) for level in range(count + 1)]


def _norm_relu(x_BCHW: Tensor) -> Tensor:
    return relu(layer_norm(x_BCHW, x_BCHW.shape[1:]))
