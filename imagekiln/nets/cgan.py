"""Conditional GAN networks: DCGAN-sized convolutions that are told the class, by concatenation or by projection.

Two ways of telling. "concatenation" (Mirza & Osindero 2014, arXiv:1411.1784): a one-hot label beside z, and as extra
planes beside the picture. "projection" (Miyato & Koyama 2018, arXiv:1802.05637): batch normalisation in the generator
has a gain and a bias for every class, and the critic adds the inner product of a class vector with its features.

The layers are Radford's (2016) 4x4 convolutions; the critic has no batch normalisation, so no picture influences
another one's logit, and may have spectral normalisation instead.

Shapes: B pictures, Z latent dimensions, K classes, C channels, H rows, W columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, one_hot, relu
from torch.nn.utils.parametrizations import spectral_norm

from imagekiln.nets.dcgan import halvings
from imagekiln.nets.labels import LabelEmbedding
from imagekiln.nets.resnet_gan import ConditionalNorm

Conditioning = Literal["projection", "concatenation"]


class Generator(nn.Module):
    """From latent vectors and labels to pictures.

    z_dim: latent dimensions Z. image_shape: (C, H, W). width: channels before the last layer, doubled at each halving
    of the picture. num_classes: K, at least 1. Raises `RecipeError` for an impossible size.

    >>> Generator(100, (1, 28, 28), 16, num_classes=10)(torch.randn(2, 100), torch.tensor([3, 9])).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        z_dim: int,
        image_shape: tuple[int, int, int],
        width: int,
        num_classes: int,
        conditioning: Conditioning = "projection",
    ) -> None:
        super().__init__()
        count, self.base = halvings(image_shape)
        self.num_classes, self.concatenates = num_classes, conditioning == "concatenation"
        channels = [width << level for level in reversed(range(count))]
        inputs = z_dim + (num_classes if self.concatenates else 0)
        tables = 0 if self.concatenates else num_classes
        self.first = nn.ConvTranspose2d(inputs, channels[0], self.base, bias=False)
        self.norms = nn.ModuleList(ConditionalNorm(channel, tables) for channel in channels)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False) for before, after in pairwise(channels)
        )
        self.last = nn.ConvTranspose2d(channels[-1], image_shape[0], 4, 2, 1)
        for layer in (self.first, *self.ups, self.last):
            nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, z_BZ: Tensor, labels_B: Tensor) -> Tensor:
        """images_BCHW in [-1, 1] from standard normal z_BZ and labels_B, int64 in [0, num_classes)."""
        if self.concatenates:
            z_BZ = torch.cat([z_BZ, one_hot(labels_B, self.num_classes).to(z_BZ)], dim=1)
        x_BCHW = self.first(z_BZ[:, :, None, None])
        for norm, up in zip(self.norms, [*self.ups, self.last], strict=True):
            x_BCHW = up(relu(norm(x_BCHW, labels_B)))
        return x_BCHW.tanh()


class Discriminator(nn.Module):
    """From pictures and labels to one logit each: positive for "real, and of this class".

    spectral: divide every weight by its largest singular value (Miyato et al. 2018, arXiv:1802.05957). Other arguments
    as for `Generator`.

    >>> critic = Discriminator((1, 28, 28), 16, num_classes=10)
    >>> critic(torch.zeros(2, 1, 28, 28), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        num_classes: int,
        conditioning: Conditioning = "projection",
        *,
        spectral: bool = True,
    ) -> None:
        super().__init__()
        count, base = halvings(image_shape)
        self.num_classes, self.concatenates = num_classes, conditioning == "concatenation"
        channels = [width << level for level in range(count)]
        inputs = image_shape[0] + (num_classes + 1 if self.concatenates else 0)  # one plane for "nobody knows"
        self.downs = nn.ModuleList(nn.Conv2d(before, after, 4, 2, 1) for before, after in pairwise([inputs, *channels]))
        self.head = nn.Conv2d(channels[-1], 1, base)
        self.labels = None if self.concatenates else LabelEmbedding(num_classes, channels[-1])
        for layer in (*self.downs, self.head):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.labels is not None:
            nn.init.xavier_uniform_(self.labels.table.weight)
        if spectral:
            for layer in (*self.downs, self.head, *([] if self.labels is None else [self.labels.table])):
                spectral_norm(layer)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B: int64 in [-1, num_classes), -1 = nobody knows."""
        x_BCHW = images_BCHW
        if self.concatenates:
            known_B = torch.where(labels_B < 0, self.num_classes, labels_B)
            planes_BK = one_hot(known_B, self.num_classes + 1).to(x_BCHW)
            planes_BKHW = planes_BK[:, :, None, None].expand(-1, -1, *x_BCHW.shape[2:])
            x_BCHW = torch.cat([x_BCHW, planes_BKHW], dim=1)
        for down in self.downs:
            x_BCHW = leaky_relu(down(x_BCHW), 0.2)
        logits_B = self.head(x_BCHW).flatten()
        if self.labels is not None:
            features_BC = x_BCHW.sum(dim=(2, 3))
            logits_B = logits_B + (self.labels(labels_B, len(logits_B)) * features_BC).sum(dim=1)
        return logits_B
