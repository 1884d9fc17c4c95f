"""VGG-16 without its classifier: the published network in whose maps pictures are compared.

Simonyan & Zisserman 2015 (arXiv:1409.1556, table 1, column D): five blocks of two or three 3x3 convolutions with ReLU,
the map halved by a maximum between blocks. LPIPS (Zhang et al. 2018, arXiv:1801.03924) compares what the blocks end
with (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3), brings pictures to the mean and spread of ImageNet before, and
weighs channels by what it learned from people's judgements. Weights have torchvision's names, those of LPIPS the names
of its package; one file may hold both.

Shapes: B pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from imagekiln.errors import UsageError

LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Places of each block's convolutions in torchvision's `features`, which counts ReLUs and maxima too."""

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of each block as published."""

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and spread of ImageNet's red, green and blue in [-1, 1], as LPIPS rounds them."""

_WANTED = re.compile(r"features\.|lin\d\.model\.1\.weight$")


class Vgg16(nn.Module):
    """Maps of pictures.

    image_shape: (channels, height, width) of the pictures; grey ones are seen as RGB, and other sizes are taken too.
    widths: channels of each block. weighted: with room for `channel_weights`, which are 0 until they are loaded.

    Raises `UsageError` for pictures of other channels.

    >>> net = Vgg16((1, 32, 32), widths=(4, 4, 8, 8, 8))
    >>> [tuple(each.shape) for each in net.maps(torch.zeros(2, 1, 32, 32))][::2]
    [(2, 4, 32, 32), (2, 8, 8, 8), (2, 8, 2, 2)]
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, image_shape: Sequence[int], widths: Sequence[int] = WIDTHS, weighted: bool = False) -> None:
        super().__init__()
        if image_shape[0] not in (1, 3):
            raise UsageError(f"VGG-16 sees grey and RGB pictures, and these have {image_shape[0]} channels.")
        self.image_shape = tuple(image_shape)
        self.features = nn.ModuleDict()
        channels = 3
        for places, width in zip(LAYERS, widths, strict=True):
            for place in places:
                self.features[str(place)] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
        self.lin = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in widths if weighted)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    @classmethod
    def load(cls, path: Path, image_shape: Sequence[int]) -> Vgg16:
        """The network of a safetensors file, as wide as the weights in it, for pictures of this shape.

        Read are "features.0.weight" to "features.28.bias" and, where they are there, "lin0.model.1.weight" to
        "lin4.model.1.weight" of LPIPS.

        Raises:
            UsageError: the file cannot be read or holds something else; or as for the class.
        """
        tensors = _read(path)
        found = {key: tuple(value.shape) for key, value in tensors.items()}
        firsts = [f"features.{places[0]}.weight" for places in LAYERS]
        for key in firsts:
            if len(found.get(key, ())) != 4 or not found[key][0]:
                raise _other(path, key, found.get(key))
        network = cls(image_shape, [found[key][0] for key in firsts], weighted="lin0.model.1.weight" in found)
        own = {_published(key): value for key, value in network.state_dict().items()}
        for key in sorted({*own, *found}):
            if key not in own or own[key].shape != found.get(key):
                raise _other(path, key, found.get(key))
            own[key].copy_(tensors[key])
        return network

    @property
    def channel_weights(self) -> list[Tensor] | None:
        """What LPIPS weighs the channels of each map with, each (1, C, 1, 1); None where the file has nothing."""
        return list(self.lin) or None

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """What the blocks make of images_BCHW in [-1, 1], finest first; fewer than five where nothing is left to halve.
        Differentiable by the pictures."""
        x_BCHW = (images_BCHW.expand(-1, 3, -1, -1) - self.shift) / self.scale
        found: list[Tensor] = []
        for places in LAYERS:
            if found and min(x_BCHW.shape[2:]) < 2:
                break
            x_BCHW = functional.max_pool2d(x_BCHW, 2) if found else x_BCHW
            for place in places:
                x_BCHW = functional.relu(self.features[str(place)](x_BCHW))
            found.append(x_BCHW)
        return found


def _read(path: Path) -> dict[str, Tensor]:
    """A file's weights of convolutions and of LPIPS, in float32."""
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if _WANTED.match(name)]  # noqa: SIM118  not a dict
            return {name: file.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read as safetensors ({error}). A pickle (.pth) is converted once, with "
            "safetensors.torch.save_file(torch.load('vgg16.pth', weights_only=True), 'vgg16.safetensors')."
        ) from None


def _published(key: str) -> str:
    """The name that a weight of ours has in published files."""
    return re.sub(r"^lin\.(\d)$", r"lin\1.model.1.weight", key)


def _other(path: Path, key: str, shape: Sequence[int] | None) -> UsageError:
    what = "missing" if shape is None else f"there with the shape {tuple(shape)}"
    return UsageError(
        f"{path} holds no VGG-16 under torchvision's names: {key} is {what}. Name a file of torchvision's vgg16 "
        "without batch normalisation."
    )
