"""The resizing filters that metrics are defined with, by name: another filter is another metric.

How a picture is brought to a network's size moves a Frechet distance by more than most models differ (G. Parmar, R.
Zhang, J.-Y. Zhu, On Aliased Resizing and Surprising Subtleties in GAN Evaluation, arXiv:2104.11222). With n pixels
resized to m, the output pixel i stands at the input position s and mixes the pixels around it:

    tf1-bilinear         s = i n / m, triangle of radius 1 pixel: what TensorFlow 1 calls resize_bilinear
    torch-bilinear       s = (i + 1/2) n / m - 1/2, triangle of radius 1 pixel, no antialiasing
    antialias-bilinear   the same s, triangle of radius max(1, n / m)
    pil-bicubic          the same s, cubic (a = -1/2) of radius 2 max(1, n / m), in float32, clipped to 0..255

Every filter is linear and separable: out = R x C^T with one matrix for the rows and one for the columns.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from imagekiln.errors import DataError, UsageError, did_you_mean

FILTERS = ("tf1-bilinear", "torch-bilinear", "antialias-bilinear", "pil-bicubic")


def resize(images_BCHW: Tensor, side: int | tuple[int, int], name: str, *, quantise: bool = False) -> Tensor:
    """Pictures at another size: float32 of (B, C, *side), in the scale of what came in.

    images_BCHW: uint8, or float pixels in the scale 0..255 (only `pil-bicubic` clips, so for the other filters the
        scale does not matter).
    side: height and width, or both as one number.
    quantise: round the result to the levels 0..255, as writing it to a picture file would; else nothing is rounded.

    Raises UsageError for an unknown filter or side, DataError for something that is no batch of pictures.

    >>> resize(torch.tensor([[[[0, 8]]]], dtype=torch.uint8), (1, 4), "tf1-bilinear").flatten().tolist()
    [0.0, 4.0, 8.0, 8.0]
    >>> resize(torch.tensor([[[[0, 8]]]], dtype=torch.uint8), (1, 4), "torch-bilinear").flatten().tolist()
    [0.0, 2.0, 6.0, 8.0]
    """
    height, width = (side, side) if isinstance(side, int) else side
    if name not in FILTERS:
        raise UsageError(f"There is no resizing filter {name!r}. {did_you_mean(name, FILTERS)}")
    if height < 1 or width < 1:
        raise UsageError(f"resize got the size {height}x{width}; height and width are at least 1.")
    if images_BCHW.ndim != 4 or 0 in images_BCHW.shape[1:]:
        raise DataError(f"resize got shape {tuple(images_BCHW.shape)}; it needs (pictures, channels, height, width).")
    images = images_BCHW.float()
    if name == "tf1-bilinear":
        resized = _tf1_bilinear(images, height, width)
    elif name == "pil-bicubic":
        resized = _pil_bicubic(images, height, width)
    else:
        antialias = name == "antialias-bilinear"
        resized = functional.interpolate(
            images, (height, width), mode="bilinear", align_corners=False, antialias=antialias
        )
    return resized.round().clamp(0, 255) if quantise else resized


def _tf1_bilinear(images_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Columns first, as the original does, then rows."""
    left, right, weight = _tf1_taps(images_BCHW.shape[3], width, images_BCHW.device)
    above, below, weight_H = _tf1_taps(images_BCHW.shape[2], height, images_BCHW.device)
    rows = torch.lerp(images_BCHW[..., left], images_BCHW[..., right], weight)
    return torch.lerp(rows[:, :, above], rows[:, :, below], weight_H[:, None])


def _tf1_taps(size: int, new_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper neighbour of each new pixel, and the upper one's weight. Positions are float32, as in the
    original: where i n / m is a whole number, float32 decides on which side of it the pixel falls."""
    position = torch.arange(new_size, dtype=torch.float32) * np.float32(np.float32(size) / np.float32(new_size)).item()
    lower = position.floor().long().clamp(max=size - 1)
    upper = (lower + 1).clamp(max=size - 1)
    return lower.to(device), upper.to(device), (position - lower).to(device)


def _pil_bicubic(images_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Channel by channel in Pillow's float mode, so nothing is rounded between and after the two passes."""
    planes = images_BCHW.detach().cpu().contiguous().flatten(0, 1).numpy()
    resized = [np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
    out = np.stack(resized) if resized else np.empty((0, height, width), np.float32)
    shaped = torch.from_numpy(out).view(*images_BCHW.shape[:2], height, width)
    return shaped.clamp_(0, 255).to(images_BCHW.device)
