"""Fully connected generator and discriminator, the networks of the first GAN.

Goodfellow et al. 2014 (arXiv:1406.2661, section 5), with labels as in Mirza & Osindero 2014 (arXiv:1411.1784): an
embedding beside the input of either network. Two hidden layers each; leaky ReLU stands where the paper has maxout with
dropout, and tanh gives pictures in [-1, 1].

Shapes: B pictures, Z latent dimensions, C channels, H rows, W columns, F features.
"""

from __future__ import annotations

from math import prod

from torch import Tensor, cat, nn

from imagekiln.nets.labels import LabelEmbedding
from imagekiln.nets.stabilizers import MinibatchDiscrimination

LABEL_WIDTH = 32
"""Dimensions a label takes beside the input."""


class Generator(nn.Module):
    """From latent vectors to pictures of any size.

    z_dim: latent dimensions Z. image_shape: (C, H, W). width: units of a hidden layer. num_classes: 0 for a generator
    without labels.

    >>> import torch
    >>> Generator(100, (1, 28, 28))(torch.randn(2, 100)).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(self, z_dim: int, image_shape: tuple[int, int, int], width: int = 256, num_classes: int = 0) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.labels = LabelEmbedding(num_classes, LABEL_WIDTH) if num_classes else None
        self.main = _three_layers(z_dim + (LABEL_WIDTH if num_classes else 0), width, prod(image_shape), slope=0.0)

    def forward(self, z_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """images_BCHW in [-1, 1] from standard normal z_BZ. labels_B: int64, -1 = anything; None = all of them -1."""
        if self.labels is not None:
            z_BZ = cat([z_BZ, self.labels(labels_B, len(z_BZ))], dim=1)
        return self.main(z_BZ).tanh().view(len(z_BZ), *self.image_shape)


class Discriminator(nn.Module):
    """From pictures to one logit each: positive for "real".

    minibatch_kernels: numbers about the rest of the batch that the last layer sees (`MinibatchDiscrimination`); 0 for
    none, so that no picture influences another's logit. Other arguments as for `Generator`.

    >>> import torch
    >>> Discriminator((1, 28, 28), num_classes=10)(torch.zeros(2, 1, 28, 28), torch.tensor([7, -1])).shape
    torch.Size([2])
    """

    def __init__(
        self, image_shape: tuple[int, int, int], width: int = 256, num_classes: int = 0, *, minibatch_kernels: int = 0
    ) -> None:
        super().__init__()
        self.labels = LabelEmbedding(num_classes, LABEL_WIDTH) if num_classes else None
        inputs = prod(image_shape) + (LABEL_WIDTH if num_classes else 0)
        self.main = _three_layers(inputs, width, 1, slope=0.2, more=minibatch_kernels)
        self.minibatch = MinibatchDiscrimination(width, minibatch_kernels) if minibatch_kernels else None

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """logits_B. images_BCHW in [-1, 1]; labels_B as for the generator."""
        features_BF = self.features(images_BCHW, labels_B)
        if self.minibatch is not None:
            features_BF = self.minibatch(features_BF)
        return self.main[-1](features_BF).flatten()

    def features(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """features_BF of the last hidden layer. Arguments as for `forward`."""
        inputs_BD = images_BCHW.flatten(1)
        if self.labels is not None:
            inputs_BD = cat([inputs_BD, self.labels(labels_B, len(inputs_BD))], dim=1)
        return self.main[:-1](inputs_BD)


def _three_layers(inputs: int, width: int, outputs: int, slope: float, more: int = 0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(slope),
        nn.Linear(width, width),
        nn.LeakyReLU(slope),
        nn.Linear(width + more, outputs),
    )
