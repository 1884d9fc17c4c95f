"""Plain convolutional generator and discriminator, deeper than DCGAN's: 3x3 convolutions between the strided ones.

The "standard CNN" of Miyato et al. 2018 (arXiv:1802.05957, table 3), which many comparisons of losses and norms use,
with spectral normalisation in the discriminator, or batch normalisation as they do. Labels: conditional batch
normalisation and projection (Miyato & Koyama 2018, arXiv:1802.05637). Parameters of generator and discriminator with 3
channels, a z of 128 and widths of 64 at 32 pixels: 3,812,355 and 2,931,009, of these 2,816 batch normalisation's. What
differs from the table: the discriminator sums its last map over places, so that it answers for any size.

Shapes: B pictures, Z latent dimensions, C channels, H rows, W columns.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

from imagekiln.nets.labels import LabelEmbedding
from imagekiln.nets.resnet_gan import ConditionalNorm, doublings

WIDEST = 8
"""Channels of the coarsest maps, in units of `width`."""

SLOPE = 0.1


class Generator(nn.Module):
    """From latent vectors to pictures: a linear layer, 4x4 convolutions that double, a 3x3 one.

    z_dim: latent dimensions Z. image_shape: (C, H, W). width: channels next to the picture, doubled at each halving, at
    most `WIDEST` times. num_classes: 0 for a generator without labels. Raises `RecipeError` for an impossible size.

    >>> import torch
    >>> Generator(128, (3, 32, 32), width=8)(torch.randn(2, 128)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, z_dim: int, image_shape: tuple[int, int, int], width: int, num_classes: int = 0) -> None:
        super().__init__()
        count, self.base = doublings(image_shape)
        channels = widths(width, count)[::-1]
        self.project = nn.Linear(z_dim, channels[0] * self.base[0] * self.base[1])
        self.ups = nn.ModuleList(nn.ConvTranspose2d(before, after, 4, 2, 1) for before, after in pairwise(channels))
        self.norms = nn.ModuleList(ConditionalNorm(after, num_classes) for after in channels[1:])
        self.last = nn.Conv2d(channels[-1], image_shape[0], 3, padding=1)
        for layer in (self.project, *self.ups, self.last):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """images_BCHW in [-1, 1] from standard normal z_BZ. labels_B: int64, -1 = anything; None = all of them -1."""
        x_BCHW = self.project(z_BZ).view(len(z_BZ), -1, *self.base)
        for up, norm in zip(self.ups, self.norms, strict=True):
            x_BCHW = relu(norm(up(x_BCHW), labels_B))
        return self.last(x_BCHW).tanh()


class Discriminator(nn.Module):
    """From pictures to one logit each, positive for "real": a 3x3 and a halving 4x4 convolution at each size.

    spectral: divide every weight by its largest singular value (algorithm 1), so that no picture influences another's
    logit; False = batch normalisation. Other arguments as for `Generator`.

    >>> import torch
    >>> critic = Discriminator((3, 32, 32), width=8, num_classes=10)
    >>> critic(torch.zeros(2, 3, 32, 32), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(
        self, image_shape: tuple[int, int, int], width: int, num_classes: int = 0, *, spectral: bool = True
    ) -> None:
        super().__init__()
        count, _ = doublings(image_shape)
        *halved, last = widths(width, count)
        convs = []
        for before, after in pairwise([image_shape[0], *halved]):
            convs += [nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 4, 2, 1)]
        convs.append(nn.Conv2d(halved[-1], last, 3, padding=1))
        self.head = nn.Linear(last, 1)
        self.labels = LabelEmbedding(num_classes, last) if num_classes else None
        table = [] if self.labels is None else [self.labels.table]
        for layer in (*convs, self.head, *table):
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            if spectral:
                spectral_norm(layer)
        for layer in (*convs, self.head):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        norms = [nn.Identity() if spectral else nn.BatchNorm2d(conv.out_channels) for conv in convs]
        self.blocks = nn.Sequential(
            *(nn.Sequential(conv, norm, nn.LeakyReLU(SLOPE)) for conv, norm in zip(convs, norms, strict=True))
        )

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B as for the generator."""
        features_BC = self.blocks(images_BCHW).sum((2, 3))
        logits_B = self.head(features_BC).flatten()
        if self.labels is not None:
            logits_B = logits_B + (self.labels(labels_B, len(features_BC)) * features_BC).sum(dim=1)
        return logits_B


def widths(width: int, count: int) -> list[int]:
    """Channels of the picture's size and of every halving of it, `count` in all.

    >>> widths(64, 4)
    [64, 128, 256, 512, 512]
    """
    return [width * min(WIDEST, 2**level) for level in range(count + 1)]
