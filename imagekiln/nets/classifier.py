"""A small residual classifier for pictures of 8 to 64 pixels; its penultimate layer is the feature space of evaluation.

A ResNet (He et al. 2016, arXiv 1512.03385) in the order conv, norm, activation: a 3x3 stem, then one residual stage a
halving until the map's shorter side is 4 to 7 pixels, the mean over the map, a linear head. The norm is BatchNorm:
`eval()` makes each picture's features independent of its batch; features are never to be taken in
training mode.

Shapes: B images, C channels, H rows, W columns, K classes, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from imagekiln.errors import UsageError

SMALLEST_SIDE = 8
LAST_MAP = 7
"""A stage halves the map until its shorter side is at most this."""


class Residual(nn.Module):
    """Halve the map by max pooling, widen it, then x + two 3x3 convolutions of it."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.widen_norm = nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> (B, channels, ceil(H / 2), ceil(W / 2))."""
        x_BCHW = functional.max_pool2d(x_BCHW, 2, ceil_mode=True)
        x_BCHW = functional.relu(self.widen_norm(self.widen(x_BCHW)))
        h_BCHW = functional.relu(self.first_norm(self.first(x_BCHW)))
        return x_BCHW + functional.relu(self.second_norm(self.second(h_BCHW)))


class Classifier(nn.Module):
    """Logits and features of pictures.

    image_shape: (channels, height, width) of the pictures; any channels, sides of at least 8.
    num_classes: K, at least 2.
    width: channels of the stem; D = 4 * width features.

    Raises UsageError for a shape or a number of classes it cannot work with.

    >>> net = Classifier((3, 32, 32), num_classes=10, width=8).eval()
    >>> images = torch.zeros(2, 3, 32, 32)
    >>> net(images).shape, net.features(images).shape
    (torch.Size([2, 10]), torch.Size([2, 32]))
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 32) -> None:
        super().__init__()
        channels, height, width_px = image_shape
        if min(height, width_px) < SMALLEST_SIDE or channels < 1:
            raise UsageError(
                f"Classifier got image_shape {tuple(image_shape)}; it needs (channels, height, width) "
                f"with sides of at least {SMALLEST_SIDE}: prepare the pictures at a larger size."
            )
        if num_classes < 2 or width < 1:
            raise UsageError(f"Classifier got num_classes {num_classes} and width {width}; it needs at least 2 and 1.")
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.num_features = 4 * width
        stages: list[int] = []
        side = min(height, width_px)
        while side > LAST_MAP:
            side, stages = (side + 1) // 2, [*stages, min(width * 2 ** (len(stages) + 1), self.num_features)]
        stages[-1] = self.num_features
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(*(Residual(a, b) for a, b in zip([width, *stages[:-1]], stages, strict=True)))
        self.head = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, images_BCHW: Tensor) -> Tensor:
        """features_BD float32 of images_BCHW float32 in [-1, 1]: the input of the linear head, non-negative."""
        x_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        x_BCHW = self.stages(functional.relu(self.stem_norm(self.stem(x_BCHW))))
        return x_BCHW.float().mean((2, 3))

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """What the stem and every stage make of pictures, finest first; the last one's mean is `features`."""
        x_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        found = [functional.relu(self.stem_norm(self.stem(x_BCHW)))]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """logits_BK of images_BCHW float32 in [-1, 1]."""
        return self.head(self.features(images_BCHW))
