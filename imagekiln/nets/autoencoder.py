"""Autoencoder networks: convolutions around one latent vector (VAE) or around a grid of vectors (VQ-VAE).

The residual ones of the VAE (Kingma and Welling 2014) have the layers of later autoencoders: group normalisation and
SiLU, one residual block a resolution, strided convolutions down and nearest-neighbour upsampling with convolutions up
(Odena et al. 2016: no checkerboard). Any height and width will do: sides are halved, rounding up, until none is longer
than 4. The convolutional ones are those of PyTorch-VAE (Subramanian 2020), where many kinds of VAE are compared:
strided 3x3 convolutions, batch normalisation and leaky ReLU down to sides of 2, transposed convolutions up. At 64
pixels, 3 channels, a width of 32 and a z of 128 encoder and decoder have 3,937,635 parameters together.

Those of the VQ-VAE are van den Oord's (2017, section 4.1): strided 4x4 convolutions and residual blocks with ReLU, no
norm; at a width of 128, 3 channels and codes of 64 the encoder has 372,416 parameters, the decoder 290,307. At a width
of 256 with six wide blocks they have the sizes of PyTorch-VAE's, 9,712,707 with a book of 512, but not its leaky ReLU.

Shapes: B pictures, Z latent dimensions, D dimensions of a code, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, cat, nn
from torch.nn.functional import leaky_relu, relu

from imagekiln.errors import RecipeError
from imagekiln.nets.labels import LabelEmbedding
from imagekiln.nets.layers import group_norm_silu, upsample_nearest

LABEL_WIDTH = 32
"""Dimensions a label takes beside z in the decoder."""

LOGVAR_RANGE = (-20.0, 10.0)
"""Log-variances are kept in here, so that a bad batch early in a run cannot overflow the loss."""


def pyramid(
    image_shape: tuple[int, int, int], width: int, *, smallest: int = 4, widest: int = 4
) -> list[tuple[int, int, int]]:
    """(channels, height, width) of the features after every halving, down to sides of `smallest` at most.

    Channels are doubled at each halving, at most to `widest` times `width`.

    >>> pyramid((1, 28, 28), 32)
    [(32, 14, 14), (64, 7, 7), (128, 4, 4)]
    """
    _, rows, columns = image_shape
    shapes: list[tuple[int, int, int]] = []
    while not shapes or max(rows, columns) > smallest:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        shapes.append((width * min(2 ** len(shapes), widest), rows, columns))
    return shapes


class VaeEncoder(nn.Module):
    """From pictures to the mean and log-variance of a Gaussian over z.

    image_shape: (C, H, W). width: channels at half resolution, up to 4 times as many below. z_dim: latent dimensions Z.
    num_classes: 0 for an encoder without labels.

    >>> import torch
    >>> mean_BZ, logvar_BZ = VaeEncoder((1, 28, 28), width=32, z_dim=16)(torch.zeros(2, 1, 28, 28))
    >>> mean_BZ.shape, logvar_BZ.shape
    (torch.Size([2, 16]), torch.Size([2, 16]))
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int, z_dim: int, num_classes: int = 0) -> None:
        super().__init__()
        shapes = pyramid(image_shape, width)
        channels = [shape[0] for shape in shapes]
        self.stem = nn.Conv2d(image_shape[0], width, 5, stride=2, padding=2)
        self.labels = LabelEmbedding(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(_Residual(count) for count in channels)
        self.downs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(channels)
        )
        self.norm = _norm(channels[-1])
        self.head = nn.Linear(math.prod(shapes[-1]), 2 * z_dim)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mean_BZ, logvar_BZ). images_BCHW in [-1, 1]; labels_B: int64, -1 = unknown; None = all of them unknown."""
        x_BCHW = self.stem(images_BCHW)
        if self.labels is not None:
            x_BCHW = x_BCHW + self.labels(labels_B, len(x_BCHW))[:, :, None, None]
        x_BCHW = self.blocks[0](x_BCHW)
        for down, block in zip(self.downs, self.blocks[1:], strict=True):
            x_BCHW = block(down(x_BCHW))
        return _posterior(self.head(group_norm_silu(x_BCHW, self.norm).flatten(1)))


class _Decoder(nn.Module):
    """What decoders begin with: z, and beside it what the label says, becomes the coarsest map."""

    def __init__(self, start: tuple[int, ...], z_dim: int, num_classes: int) -> None:
        super().__init__()
        self.start = start
        self.labels = LabelEmbedding(num_classes, LABEL_WIDTH) if num_classes else None
        self.stem = nn.Linear(z_dim + (LABEL_WIDTH if num_classes else 0), math.prod(start))

    def coarsest(self, z_BZ: Tensor, labels_B: Tensor | None) -> Tensor:
        """(B, *start)."""
        if self.labels is not None:
            z_BZ = cat([z_BZ, self.labels(labels_B, len(z_BZ))], dim=1)
        return self.stem(z_BZ).unflatten(1, self.start)


class VaeDecoder(_Decoder):
    """From z to the mean picture: the encoder in reverse. Arguments as for `VaeEncoder`.

    >>> import torch
    >>> VaeDecoder((1, 28, 28), width=32, z_dim=16)(torch.randn(2, 16)).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int, z_dim: int, num_classes: int = 0) -> None:
        shapes = pyramid(image_shape, width)[::-1]
        super().__init__(shapes[0], z_dim, num_classes)
        channels = [*(shape[0] for shape in shapes), max(width // 2, 8)]
        self.sizes = [*(shape[1:] for shape in shapes[1:]), image_shape[1:]]
        self.blocks = nn.ModuleList(_Residual(count) for count in channels[:-1])
        self.ups = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(channels))
        self.norm = _norm(channels[-1])
        self.head = nn.Conv2d(channels[-1], image_shape[0], 3, padding=1)

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """images_BCHW in [-1, 1]: the mean of the Gaussian over pictures. labels_B as for the encoder."""
        x_BCHW = self.coarsest(z_BZ, labels_B)
        for block, up, size in zip(self.blocks, self.ups, self.sizes, strict=True):
            x_BCHW = up(upsample_nearest(block(x_BCHW), size))
        return self.head(group_norm_silu(x_BCHW, self.norm)).tanh()


class ConvEncoder(nn.Module):
    """`VaeEncoder` without residuals: strided 3x3 convolutions. `width` is doubled at each halving up to 16 times.

    >>> import torch
    >>> mean_BZ, logvar_BZ = ConvEncoder((3, 28, 28), width=8, z_dim=16)(torch.zeros(2, 3, 28, 28))
    >>> mean_BZ.shape, logvar_BZ.shape
    (torch.Size([2, 16]), torch.Size([2, 16]))
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int, z_dim: int, num_classes: int = 0) -> None:
        super().__init__()
        shapes = _conv_pyramid(image_shape, width)
        channels = [image_shape[0], *(shape[0] for shape in shapes)]
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, 2, 1) for before, after in pairwise(channels))
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in channels[1:])
        self.labels = LabelEmbedding(num_classes, width) if num_classes else None
        self.head = nn.Linear(math.prod(shapes[-1]), 2 * z_dim)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mean_BZ, logvar_BZ). images_BCHW in [-1, 1]; labels_B: int64, -1 = unknown; None = all of them unknown."""
        x_BCHW = images_BCHW
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x_BCHW = conv(x_BCHW)
            if level == 0 and self.labels is not None:
                x_BCHW = x_BCHW + self.labels(labels_B, len(x_BCHW))[:, :, None, None]
            x_BCHW = leaky_relu(norm(x_BCHW))
        return _posterior(self.head(x_BCHW.flatten(1)))


class ConvDecoder(_Decoder):
    """From z to the mean picture: `ConvEncoder` in reverse, with one more convolution at the end.

    >>> import torch
    >>> ConvDecoder((3, 28, 28), width=8, z_dim=16)(torch.randn(2, 16)).shape
    torch.Size([2, 3, 28, 28])
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int, z_dim: int, num_classes: int = 0) -> None:
        shapes = _conv_pyramid(image_shape, width)[::-1]
        super().__init__(shapes[0], z_dim, num_classes)
        channels = [*(shape[0] for shape in shapes), width]
        sizes = [*(shape[1:] for shape in shapes), image_shape[1:]]
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=_missing(*around))
            for (before, after), around in zip(pairwise(channels), pairwise(sizes), strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in channels[1:])
        self.head = nn.Conv2d(width, image_shape[0], 3, padding=1)

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """images_BCHW in [-1, 1]: the mean of the Gaussian over pictures. labels_B as for the encoder."""
        x_BCHW = self.coarsest(z_BZ, labels_B)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BCHW = leaky_relu(norm(conv(x_BCHW)))
        return self.head(x_BCHW).tanh()


class GridEncoder(nn.Module):
    """From pictures to a grid of vectors, 2^halvings times coarser.

    image_shape: (C, H, W). width: channels of the grid before the last layer. code_dim: dimensions D of a vector.
    blocks: residual blocks. wide: they have `width` channels inside instead of a quarter of it, and no biases.
    Raises `RecipeError` for pictures that cannot be halved so often.

    >>> import torch
    >>> GridEncoder((1, 28, 28), width=32, code_dim=8)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 8, 7, 7])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        code_dim: int,
        halvings: int = 2,
        *,
        blocks: int = 2,
        wide: bool = False,
    ) -> None:
        super().__init__()
        grid_shape(image_shape, halvings)
        channels = [image_shape[0], *_grid_channels(width, halvings)]
        self.downs = nn.ModuleList(nn.Conv2d(before, after, 4, 2, 1) for before, after in pairwise(channels))
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Relu2(width, wide) for _ in range(blocks)))
        self.head = nn.Conv2d(width, code_dim, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """z_BDHW. images_BCHW in [-1, 1]."""
        x_BCHW = images_BCHW
        for down in self.downs:
            x_BCHW = relu(down(x_BCHW))
        return self.head(relu(self.blocks(self.middle(x_BCHW))))


class GridDecoder(nn.Module):
    """From a grid of vectors to pictures: `GridEncoder` in reverse, with the same arguments.

    >>> import torch
    >>> GridDecoder((1, 28, 28), width=32, code_dim=8)(torch.zeros(2, 8, 7, 7)).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        code_dim: int,
        halvings: int = 2,
        *,
        blocks: int = 2,
        wide: bool = False,
    ) -> None:
        super().__init__()
        channels = [*_grid_channels(width, halvings)[::-1], image_shape[0]]
        self.stem = nn.Conv2d(code_dim, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Relu2(width, wide) for _ in range(blocks)))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(before, after, 4, 2, 1) for before, after in pairwise(channels))

    def forward(self, z_BDHW: Tensor) -> Tensor:
        """images_BCHW, about in [-1, 1] but not bounded."""
        x_BCHW = self.blocks(self.stem(z_BDHW))
        for up in self.ups:
            x_BCHW = up(relu(x_BCHW))
        return x_BCHW


def _posterior(numbers_BM: Tensor) -> tuple[Tensor, Tensor]:
    """(mean_BZ, logvar_BZ) of twice as many numbers, M = 2 Z."""
    mean_BZ, logvar_BZ = numbers_BM.chunk(2, dim=1)
    return mean_BZ, logvar_BZ.clamp(*LOGVAR_RANGE)


def _conv_pyramid(image_shape: tuple[int, int, int], width: int) -> list[tuple[int, int, int]]:
    return pyramid(image_shape, width, smallest=2, widest=16)


def _missing(before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns by which a doubled map of 2 n - 1 is too small: 0 or 1."""
    return after[0] - 2 * before[0] + 1, after[1] - 2 * before[1] + 1


def grid_shape(image_shape: tuple[int, int, int], halvings: int) -> tuple[int, int]:
    """Rows and columns of the grid; `RecipeError` where a side is not a multiple of 2^halvings.

    >>> grid_shape((3, 64, 32), 2)
    (16, 8)
    """
    _, height, width = image_shape
    factor = 2**halvings
    if height % factor or width % factor:
        near = sorted({max(factor, side // factor * factor) for side in (height, width)})
        raise RecipeError(
            f"Pictures of {height} x {width} pixels cannot be halved {halvings} times: both sides must be multiples of "
            f"{factor}. Set data.size, for example to {near[-1]}, or lower family.halvings."
        )
    return height // factor, width // factor


def _grid_channels(width: int, halvings: int) -> list[int]:
    """Channels after every halving: half of them after the first, where the maps are largest."""
    return [width // 2 if level == 0 and halvings > 1 else width for level in range(halvings)]


class _Relu2(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), a quarter of the width inside, or all of it and no biases."""

    def __init__(self, channels: int, wide: bool) -> None:
        super().__init__()
        inner = channels if wide else max(1, channels // 4)
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=not wide)
        self.conv2 = nn.Conv2d(inner, channels, 1, bias=not wide)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv2(relu(self.conv1(relu(x_BCHW))))


class _Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the identity at initialisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden_BCHW = self.conv1(group_norm_silu(x_BCHW, self.norm1))
        return x_BCHW + self.conv2(group_norm_silu(hidden_BCHW, self.norm2))


def _norm(channels: int) -> nn.GroupNorm:
    """In groups of two channels at least: alone, a channel would lose what a label adds to all of it."""
    groups = math.gcd(8, channels)
    return nn.GroupNorm(groups if groups < channels else max(1, groups // 2), channels)
