"""Feature networks of evaluation: the weight-free random convolutions, and extraction with any network.

`RandomConv` needs no weights file and no training: fixed random convolutions see colours, edges, textures and their
arrangement at several scales, enough for gross errors and mode loss, weak on meaning. Numbers on it are written
"FD[randconv-v1]", never "FID", and are comparable only where the hash of the weights agrees.

Shapes: B images, C channels, H rows, W columns, N pictures, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from imagekiln.core import mix
from imagekiln.errors import DataError, UsageError

SMALLEST_SIDE = 8
WIDTHS = (16, 32)
MAX_SCALES = 3
GRID = 2**-12
"""Weights are multiples of this: what differs between two machines' linear algebra is rounded away, so hashes agree."""


@runtime_checkable
class FeatureNetwork(Protocol):
    """Anything that turns images_BCHW float32 in [-1, 1] into features_BD."""

    def features(self, images_BCHW: Tensor) -> Tensor: ...


class RandomConv(nn.Module):
    """Fixed random convolutions: the same weights for the same number of channels, on every machine.

    At the picture's size, a half and a quarter of it (while at least 8 pixels are left): two 3x3 convolutions with
    orthogonal weights and ReLU, a pooling between them, then mean and standard deviation over the map of each; D = 96
    features a scale. Raises UsageError for sides under 8 pixels.

    >>> network = RandomConv((3, 32, 32))
    >>> network.name, network.num_features, network.features(torch.zeros(2, 3, 32, 32)).shape
    ('randconv-v1', 288, torch.Size([2, 288]))
    """

    name = "randconv-v1"

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        side = min(height, width)
        if channels < 1 or side < SMALLEST_SIDE:
            raise UsageError(
                f"RandomConv got image_shape {tuple(image_shape)}; it needs (channels, height, width) with sides of at "
                f"least {SMALLEST_SIDE}: measure at a larger size."
            )
        self.image_shape = tuple(image_shape)
        self.scales = nn.ModuleList(
            nn.ModuleList(
                _random_convolution(a, b, mix(self.name, channels, scale, layer))
                for layer, (a, b) in enumerate(zip((channels, *WIDTHS), WIDTHS, strict=False))
            )
            for scale in range(MAX_SCALES)
            if side >> scale >= SMALLEST_SIDE
        )
        self.num_features = 2 * sum(WIDTHS) * len(self.scales)
        self.eval().requires_grad_(False)

    @property
    def hash(self) -> str:
        """sha256 of the weights."""
        return weights_hash(self)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """features_BD float32 of images_BCHW float32 in [-1, 1]."""
        found = []
        for scale, convolutions in enumerate(self.scales):
            x_BCHW = functional.avg_pool2d(images_BCHW, 2**scale) if scale else images_BCHW
            for layer, convolution in enumerate(convolutions.children()):
                x_BCHW = functional.relu(convolution(functional.avg_pool2d(x_BCHW, 2) if layer else x_BCHW))
                found += [x_BCHW.mean((2, 3)), x_BCHW.std((2, 3), correction=0)]
        return torch.cat(found, dim=1)

    forward = features


def extract(network: FeatureNetwork, batches: Iterable[Tensor]) -> Tensor:
    """features_ND float32 on the CPU of all pictures, without gradients, in evaluation mode.

    network: a module with `features`; its mode is put back afterwards.
    batches: images_BCHW float32 in [-1, 1], any batch sizes; moved to the network's device.

    Raises DataError for pictures of another dtype or range, or none at all.
    """
    module = network if isinstance(network, nn.Module) else nn.Module()
    was_training = module.training
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    rows = []
    module.eval()
    try:
        with torch.inference_mode():
            for images_BCHW in batches:
                _require_images(images_BCHW)
                rows.append(network.features(images_BCHW.to(device)).float().cpu())
    finally:
        module.train(was_training)
    if not rows:
        raise DataError("There are no pictures to extract features from: give at least one batch.")
    return torch.cat(rows).clone()


def weights_hash(network: nn.Module) -> str:
    """sha256 of names, shapes, dtypes and values of all weights and buffers, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _require_images(images_BCHW: Tensor) -> None:
    if images_BCHW.ndim != 4 or images_BCHW.dtype != torch.float32:
        raise DataError(
            f"Feature extraction got a batch of shape {tuple(images_BCHW.shape)} and dtype {images_BCHW.dtype}; it "
            "needs float32 (pictures, channels, height, width) in [-1, 1]: convert uint8 by x / 127.5 - 1."
        )
    if images_BCHW.numel() and float(images_BCHW.abs().max()) > 1.5:
        raise DataError(
            f"Feature extraction got pixels up to {float(images_BCHW.abs().max()):g}; it needs the range [-1, 1]: "
            "scale the pictures first."
        )


def _random_convolution(channels_in: int, channels: int, seed: int) -> nn.Conv2d:
    """A 3x3 convolution with orthogonal weights of gain sqrt(2) (Saxe et al. 2014) and small random biases."""
    generator = torch.Generator().manual_seed(seed)
    convolution = nn.utils.skip_init(  # the usual initialization would draw from the caller's random numbers
        nn.Conv2d, channels_in, channels, 3, padding=1, padding_mode="replicate"
    )
    weight = torch.empty(channels, channels_in * 9, dtype=torch.float64)
    nn.init.orthogonal_(weight, gain=2**0.5, generator=generator)
    bias = 0.2 * torch.randn(channels, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        convolution.weight.copy_(((weight / GRID).round() * GRID).view_as(convolution.weight))
        convolution.bias.copy_((bias / GRID).round() * GRID)
    return convolution
