"""Pictures of pictures: grids, files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from imagekiln.engine.run import write_whole

GRID_SIDE = 1024


def to_picture(image_CHW: Tensor) -> Image.Image:
    """One picture, uint8 with 1, 3 or 4 channels, as a Pillow image."""
    array = np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy())
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def columns_for(count: int, num_classes: int) -> int:
    """Columns of a grid: one a class where the classes fit, else nearly square."""
    return num_classes if 2 <= num_classes <= 16 else max(1, math.isqrt(count))


def grid(images_BCHW: Tensor, columns: int) -> Image.Image:
    """Pictures side by side, small ones enlarged by a whole factor so that a person sees the pixels as they are."""
    count, channels, height, width = images_BCHW.shape
    rows = math.ceil(count / columns)
    zoom = max(1, min(8, GRID_SIDE // max(rows * height, columns * width)))
    gap = 1
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images_BCHW.permute(0, 2, 3, 1).numpy()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def encode(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    write_whole(path, encode(picture))
