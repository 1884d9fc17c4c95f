"""Pictures of a set inside the page: single ones, sheets of many, and a map of the set made of its own pictures.

Shapes: N pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from imagekiln.report.drawing import data_uri
from imagekiln.report.pictures import Picture

LARGEST = 96
"""Side in pixels of a picture in the page; larger ones are made smaller."""

SMALLEST_LOSSY = 48
"""Smaller pictures are stored as they are: their single pixels are seen."""

GAP = 2
MAP_COLUMNS, MAP_ROWS, MAP_SIDE = 22, 14, 48
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def single(image_CHW: np.ndarray, shows: str) -> Picture:
    """One uint8 picture."""
    return _encoded(_small(image_CHW, LARGEST), shows)


def sheet(images: Sequence[np.ndarray | None], columns: int, shows: str) -> Picture:
    """Pictures row by row on a transparent sheet; None leaves its place empty."""
    tiles = [None if image is None else _small(image, LARGEST) for image in images]
    width = max((tile.width for tile in tiles if tile is not None), default=1)
    height = max((tile.height for tile in tiles if tile is not None), default=1)
    rows = -(-len(tiles) // columns)
    paper = Image.new("RGBA", (columns * (width + GAP) - GAP, max(1, rows * (height + GAP) - GAP)), (0, 0, 0, 0))
    for place, tile in enumerate(tiles):
        if tile is not None:
            paper.paste(tile.convert("RGBA"), (place % columns * (width + GAP), place // columns * (height + GAP)))
    return _encoded(paper, shows)


def atlas(coordinates_N2: np.ndarray, images_NCHW: np.ndarray, rows: np.ndarray, shows: str) -> Picture:
    """A map: the plane in cells, and in every cell that has pictures the one nearest to its middle.

    coordinates_N2: of the pictures at these rows of the array. Far outliers stand at the border.
    """
    low, high = np.percentile(coordinates_N2, [0.5, 99.5], axis=0)
    # One scale for both directions would leave most of the map empty; places, not distances, are read from it.
    place_N2 = ((coordinates_N2 - low) / np.maximum(high - low, 1e-9)).clip(0, 1 - 1e-6) * (MAP_COLUMNS, MAP_ROWS)
    cell_N2 = place_N2.astype(np.int64)
    off_N = ((place_N2 - cell_N2 - 0.5) ** 2).sum(1)
    paper = Image.new("RGBA", (MAP_COLUMNS * MAP_SIDE, MAP_ROWS * MAP_SIDE), (0, 0, 0, 0))
    taken: set[tuple[int, int]] = set()
    for index in np.argsort(off_N, kind="stable"):
        x, y = (int(value) for value in cell_N2[index])
        if (x, y) not in taken:
            taken.add((x, y))
            tile = _small(images_NCHW[rows[index]], MAP_SIDE - 2, grow=True)
            corner = (x * MAP_SIDE + (MAP_SIDE - tile.width) // 2, (MAP_ROWS - 1 - y) * MAP_SIDE + 1)
            paper.paste(tile.convert("RGBA"), corner)
    return _encoded(paper, shows)


def _small(image_CHW: np.ndarray, side: int, grow: bool = False) -> Image.Image:
    """As it is where its longer side has at most `side` pixels, else made smaller; grow: or larger, without blur."""
    channels, height, width = image_CHW.shape
    pixels_HWC = np.ascontiguousarray(np.asarray(image_CHW).transpose(1, 2, 0))
    picture = Image.fromarray(pixels_HWC[:, :, 0] if channels == 1 else pixels_HWC, _MODES[channels])
    share = side / max(height, width)
    if share == 1 or (share > 1 and not grow):
        return picture
    method = Image.Resampling.NEAREST if share >= 2 else Image.Resampling.LANCZOS
    return picture.resize((max(1, round(width * share)), max(1, round(height * share))), method)


def _encoded(picture: Image.Image, shows: str) -> Picture:
    """PNG for small pictures, whose pixels are seen, WebP for the others."""
    buffer = io.BytesIO()
    lossy = min(picture.size) >= SMALLEST_LOSSY
    picture.save(buffer, "WEBP", quality=88, method=3) if lossy else picture.save(buffer, "PNG")
    return Picture(data_uri("webp" if lossy else "png", buffer.getvalue()), *picture.size, shows)
