"""Pictures of pictures: grids, rows of classes, animations, files.

Shapes: B pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

import io
import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from imagekiln.config import Fit
from imagekiln.core import Source
from imagekiln.data.decode import Unusable, fit, open_safely
from imagekiln.engine.run import write_whole
from imagekiln.errors import DataError

GRID_SIDE = 1024
FRAME_SIDE = 256
"""Pixels up to which the frames of an animation are enlarged."""
LETTERS = 8, 16
"""Smallest and largest size of the names beside a grid, in pixels."""
NAME_LETTERS = 24
"""Letters of such a name, or of a line of a prompt, at most."""
LINE_HEIGHT = 1.25
"""Height of a line over the size of its letters."""
PART_OF_SHEET = 64
"""Letters of prompts are so small a part of a wide sheet: they are read where it is shown narrower."""


def read(path: Path, image_shape: tuple[int, ...], how: Fit = "crop", background: str = "white") -> Tensor:
    """A picture from outside at a model's size: uint8 (C, H, W). how, background: as `data.decode.fit` takes them.

    Raises:
        DataError: it cannot be used.
    """
    channels, height, width = image_shape
    if not path.exists():
        raise DataError(f"{path} does not exist. Give one picture, such as a PNG or JPEG file.")
    try:
        image = open_safely(path)
    except Unusable as error:
        raise DataError(f"{path} cannot be used: {error}. Give one picture, such as a PNG or JPEG file.") from None
    pixels_HWC = fit(image, (height, width), how, background, channels)  # type: ignore[arg-type]
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()


def to_picture(image_CHW: Tensor) -> Image.Image:
    """One picture, uint8 with 1, 3 or 4 channels, as a Pillow image."""
    array = np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy())
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def columns_for(count: int, num_classes: int) -> int:
    """Columns of a grid: one a class where the classes fit, else nearly square."""
    return num_classes if 2 <= num_classes <= 16 else max(1, math.isqrt(count))


def write_all(
    folder: Path, batches: Iterable[Tensor], kept: int, total: int, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Path], Tensor]:
    """Write pictures as 000000.png, 000001.png, ... and return their files and at least the first `kept` of them.

    batches: images_BCHW uint8 on the CPU, at least one. progress: told how many of `total` are written.
    """
    paths: list[Path] = []
    first: list[Tensor] = []
    for images in batches:
        for image in images:
            paths.append(folder / f"{len(paths):06d}.png")
            write(to_picture(image), paths[-1])
        if sum(map(len, first)) < kept:
            first.append(images)
        if progress is not None:
            progress(len(paths), total)
    return paths, torch.cat(first)


def grid(images_BCHW: Tensor, columns: int, zoom: int = 0) -> Image.Image:
    """Pictures side by side, small ones enlarged by a whole factor so that a person sees the pixels as they are.

    zoom: the factor; 0 chooses one.
    """
    count, channels, height, width = images_BCHW.shape
    rows = math.ceil(count / columns)
    zoom = zoom or _zoom(GRID_SIDE, rows * height, columns * width)
    gap = 1
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images_BCHW.permute(0, 2, 3, 1).numpy()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return _enlarged(Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet), zoom)


def class_rows(images_BCHW: Tensor, labels: Sequence[int], names: Sequence[str]) -> Image.Image:
    """A row a class, in the order of the classes, with its name before it; rows may be of different lengths.

    labels: of every picture. A name that cannot be written with the letters at hand is replaced by its number.

    >>> class_rows(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), [1, 0, 1], ["cat", "dog"]).mode
    'L'
    """
    shown = sorted(set(labels))
    of_class = [[index for index, label in enumerate(labels) if label == one] for one in shown]
    columns = max(map(len, of_class))
    nothing = torch.full_like(images_BCHW[:1], 255)
    rows = [torch.cat([images_BCHW[found], nothing.expand(columns - len(found), -1, -1, -1)]) for found in of_class]
    sheet = grid(torch.cat(rows), columns)
    letters = min(LETTERS[1], max(LETTERS[0], sheet.height // len(shown) - 2))
    titles = ["any" if one < 0 else _written(names[one] if one < len(names) else "", str(one)) for one in shown]
    return _titled(sheet, titles, letters)


def prompt_rows(images_BCHW: Tensor, prompts: Sequence[str]) -> Image.Image:
    """A row a prompt, which stands before it, in several lines and cut where it is longer than its row is high.

    images_BCHW: those of the first prompt, then as many of the second. A prompt that cannot be written with the letters
    at hand is replaced by its number from 1.

    >>> prompt_rows(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), ["a cat", "a dog"]).height
    136
    """
    sheet = grid(images_BCHW, len(images_BCHW) // len(prompts))
    pitch = sheet.height // len(prompts)
    letters = min(max(LETTERS[1], sheet.width // PART_OF_SHEET), max(LETTERS[0], pitch - 2))
    texts = [_written(" ".join(prompt.split()), f"prompt {place}", None) for place, prompt in enumerate(prompts, 1)]
    lines = max(1, int(pitch / (LINE_HEIGHT * letters)))
    told = [textwrap.fill(text, NAME_LETTERS, max_lines=lines, placeholder=" …") for text in texts]
    return _titled(sheet, told, letters)


def _titled(sheet: Image.Image, titles: Sequence[str], letters: int) -> Image.Image:
    """A sheet with titles before its rows, in letters of so many pixels."""
    font = ImageFont.load_default(letters)
    margin = math.ceil(max(font.getlength(line) for title in titles for line in title.split("\n"))) + 8
    picture = Image.new(sheet.mode, (margin + sheet.width, sheet.height), "white")
    picture.paste(sheet, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, title in enumerate(titles):
        draw.text((4, (row + 0.5) * sheet.height / len(titles)), title, fill="black", font=font, anchor="lm")
    return picture


def table(corner_rows: Tensor, corner_columns: Tensor, cells: Tensor) -> Image.Image:
    """A table of pictures (A, B, C, H, W) with pictures before its rows (A, C, H, W) and above its columns (B, ...)."""
    head = torch.cat([torch.full_like(corner_columns[:1], 255), corner_columns])
    body = torch.cat([corner_rows[:, None], cells], dim=1)
    return grid(torch.cat([head, body.flatten(0, 1)]), 1 + len(corner_columns))


def animation(images_BCHW: Tensor, fps: float) -> bytes:
    """An animated PNG that begins anew for ever, enlarged by `frame_zoom`.

    Frames that equal the one before are kept as one that is shown longer.

    >>> b"acTL" in animation(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1), fps=20)
    True
    """
    zoom = frame_zoom(images_BCHW)
    first, *rest = (_enlarged(to_picture(image), zoom) for image in images_BCHW)
    buffer = io.BytesIO()
    first.save(buffer, "PNG", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    return buffer.getvalue()


def frame_zoom(images_BCHW: Tensor) -> int:
    """The factor by which frames are enlarged in an animation and its strip."""
    return _zoom(FRAME_SIDE, *images_BCHW.shape[2:])


def encode(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    write_whole(path, encode(picture))


def _zoom(most: int, height: int, width: int) -> int:
    """The largest whole factor, up to 8, with which neither side gets longer than `most`."""
    return max(1, min(8, most // max(height, width)))


def _enlarged(picture: Image.Image, zoom: int) -> Image.Image:
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def _written(name: str, instead: str, most: int | None = NAME_LETTERS) -> str:
    """A name, or so many letters of it, without accents; something else where the built-in font lacks a letter."""
    apart = unicodedata.normalize("NFKD", name)
    plain = "".join(letter for letter in apart if letter.isprintable() and not unicodedata.combining(letter))[:most]
    font = ImageFont.load_default(LETTERS[1])
    missing = bytes(font.getmask("\uffff"))  # what it draws for any letter that it lacks
    known = all(bytes(font.getmask(letter)) != missing for letter in set(plain))
    return plain if plain.strip() and known else instead


def of_labels(source: Source, labels: Sequence[int]) -> Tensor:
    """Pictures of a source with these labels, each another one while there are any; the first ones without labels.

    labels: as `engine.generate.labels_for` gives them. Returns images_NCHW uint8. No other picture is read.
    """
    known_N = getattr(source, "labels_N", None)
    if known_N is None:
        return source.read(range(min(len(source), len(labels)))).images
    free = {label: iter((known_N == label).nonzero().flatten().tolist()) for label in set(labels)}
    return source.read([next(free[label], place % len(source)) for place, label in enumerate(labels)]).images
