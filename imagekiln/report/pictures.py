"""Pictures inside the page: files of a run as data URIs, made smaller where they would make the page heavy."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from imagekiln.report.drawing import data_uri


@dataclass(frozen=True)
class Picture:
    """A picture ready for an `img` tag: data URI, size in pixels, and what it shows."""

    source: str
    width: int
    height: int
    shows: str


def embed(path: Path, shows: str, width: int, most_bytes: int) -> Picture | None:
    """The file as it is where it has at most `most_bytes`, else as WebP at most `width` pixels wide.

    None where there is no such file, or it is no picture.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if len(data) <= most_bytes:
                return Picture(data_uri("png", data), picture.width, picture.height, shows)
            share = min(1.0, width / picture.width)
            size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
            small = picture.convert("RGBA" if picture.mode in ("RGBA", "LA") else "RGB").resize(size)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return Picture(data_uri("webp", buffer.getvalue()), *size, shows)
