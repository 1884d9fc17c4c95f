"""DCGAN: the convolutional generator and discriminator of Radford, Metz and Chintala (2016).

Transposed and strided 4x4 convolutions, batch normalisation, and normal initialisation of standard deviation 0.02. The
sizes and the `state_dict` keys are those of the DCGAN in pytorch/examples: at 64 pixels, 3 channels and a z of 100 the
networks have 3,576,704 and 2,765,568 parameters. With kernels of 5 and a width of 128 they are those of the paper's own
code, which normalises every unit of the first layer by itself: 18,885,760 and 17,232,768. At 32 pixels and a z of 128
these, with biases and a discriminator without normalisation, are the convolutional networks of Gulrajani et al. 2017
(arXiv:1704.00028): 5,179,907 and 4,114,689. Besides the papers: any size base * 2^k with base 4 to 7, class labels
(embedding beside z in the generator, projection in the discriminator: Miyato and Koyama 2018), and a discriminator that
answers logits, so that every adversarial loss can be used with it.

Shapes: B pictures, Z latent dimensions, C channels, H rows, W columns, F features.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor, cat, nn

from imagekiln.errors import RecipeError
from imagekiln.nets.labels import LabelEmbedding
from imagekiln.nets.stabilizers import MinibatchDiscrimination

Kernel = Literal[4, 5]
"""Height and width of the convolutions that double or halve."""

LABEL_WIDTH = 32
"""Dimensions a label takes beside z."""


def halvings(image_shape: tuple[int, int, int]) -> tuple[int, tuple[int, int]]:
    """How often pictures of this shape are halved, and the height and width they then have.

    `RecipeError` names the nearest possible sizes when height and width are not base * 2^k with bases of 4 to 7.

    >>> halvings((3, 64, 64)), halvings((1, 28, 28))
    ((4, (4, 4)), (2, (7, 7)))
    """
    _, height, width = image_shape
    for count in range(1, 12):
        bases = height >> count, width >> count
        exact = (bases[0] << count, bases[1] << count) == (height, width)
        if exact and all(4 <= base <= 7 for base in bases):
            return count, bases
    possible = sorted(base << count for base in range(4, 8) for count in range(1, 12))
    near = {side: sorted(possible, key=lambda size: abs(size - side))[:2] for side in (height, width)}
    mend = " and ".join(f"{min(sizes)} or {max(sizes)} for {side}" for side, sizes in near.items() if side not in sizes)
    raise RecipeError(
        f"A DCGAN cannot draw pictures of {height} x {width} pixels: height and width must be 4, 5, 6 or 7 doubled "
        f"equally often. Possible near by: {mend or f'squares of {height} or {width}'}. Set data.size to one of these."
    )


class Generator(nn.Module):
    """From latent vectors to pictures.

    z_dim: latent dimensions Z. image_shape: (C, H, W). width: channels before the last layer, doubled at each halving
    of the picture. num_classes: 0 for a generator without labels. kernel: 4, or 5 as above. bias: whether linear layers
    and convolutions have one. Raises `RecipeError` for an impossible size.

    >>> import torch
    >>> Generator(100, (3, 32, 32))(torch.randn(2, 100)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        z_dim: int,
        image_shape: tuple[int, int, int],
        width: int = 64,
        num_classes: int = 0,
        *,
        kernel: Kernel = 4,
        bias: bool = False,
    ) -> None:
        super().__init__()
        count, base = halvings(image_shape)
        self.labels = LabelEmbedding(num_classes, LABEL_WIDTH) if num_classes else None
        channels = [width << level for level in reversed(range(count))]
        inputs = z_dim + (LABEL_WIDTH if num_classes else 0)
        if kernel == 4:
            layers = [nn.ConvTranspose2d(inputs, channels[0], base, bias=bias), *_norm_relu(channels[0])]
        else:
            units = channels[0] * math.prod(base)
            layers = [nn.Flatten(), nn.Linear(inputs, units, bias=bias), nn.BatchNorm1d(units), nn.ReLU()]
            layers.append(nn.Unflatten(1, (channels[0], *base)))
        for before, after in pairwise(channels):
            layers += [_double(before, after, kernel, bias), *_norm_relu(after)]
        self.main = nn.Sequential(*layers, _double(channels[-1], image_shape[0], kernel, bias), nn.Tanh())
        self.apply(_initialise)

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """images_BCHW in [-1, 1] from standard normal z_BZ. labels_B: int64, -1 = anything; None = all of them -1."""
        if self.labels is not None:
            z_BZ = cat([z_BZ, self.labels(labels_B, len(z_BZ))], dim=1)
        return self.main(z_BZ[:, :, None, None])


class Discriminator(nn.Module):
    """From pictures to one logit each: positive for "real".

    normalised: False leaves out batch normalisation, so that no picture influences another's logit and gradients can be
    penalised. minibatch_kernels: numbers about the rest of the batch that the last layer sees as well
    (`MinibatchDiscrimination`), 0 for none; not together with penalties. Other arguments as for `Generator`.

    >>> import torch
    >>> Discriminator((3, 32, 32), num_classes=10)(torch.zeros(2, 3, 32, 32), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int = 64,
        num_classes: int = 0,
        *,
        kernel: Kernel = 4,
        bias: bool = False,
        normalised: bool = True,
        minibatch_kernels: int = 0,
    ) -> None:
        super().__init__()
        count, base = halvings(image_shape)
        channels = [width << level for level in range(count)]
        layers = [_halve(image_shape[0], width, kernel, bias), nn.LeakyReLU(0.2)]
        for before, after in pairwise(channels):
            norm = [nn.BatchNorm2d(after)] if normalised else []
            layers += [_halve(before, after, kernel, bias), *norm, nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, base, bias=bias))
        self.labels = LabelEmbedding(num_classes, channels[-1]) if num_classes else None
        self.minibatch = None
        if minibatch_kernels:
            self.minibatch = MinibatchDiscrimination(channels[-1] * math.prod(base), minibatch_kernels)
            self.nearness = nn.Linear(minibatch_kernels, 1, bias=False)
        self.apply(_initialise)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B as for the generator."""
        features_BCHW = self.main[:-1](images_BCHW)
        logits_B = self.main[-1](features_BCHW).flatten()
        if self.labels is not None:
            logits_B = logits_B + (self.labels(labels_B, len(logits_B)) * features_BCHW.sum(dim=(2, 3))).sum(dim=1)
        if self.minibatch is not None:
            logits_B = logits_B + self.nearness(self.minibatch.nearness(features_BCHW.flatten(1))).flatten()
        return logits_B

    def features(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """features_BF, of which the logit (but for minibatch discrimination) is a linear function: the last maps and,
        with labels, the summands of the projection. Arguments as for `forward`."""
        features_BCHW = self.main[:-1](images_BCHW)
        if self.labels is None:
            return features_BCHW.flatten(1)
        label_BC = self.labels(labels_B, len(features_BCHW))
        return cat([features_BCHW.flatten(1), label_BC * features_BCHW.sum(dim=(2, 3))], dim=1)


def _norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU()


def _double(before: int, after: int, kernel: Kernel, bias: bool) -> nn.Module:
    return nn.ConvTranspose2d(before, after, kernel, 2, (kernel - 1) // 2, output_padding=kernel % 2, bias=bias)


def _halve(before: int, after: int, kernel: Kernel, bias: bool) -> nn.Module:
    return nn.Conv2d(before, after, kernel, 2, (kernel - 1) // 2, bias=bias)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
