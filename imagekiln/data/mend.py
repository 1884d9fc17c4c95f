"""Truncated JPEG files: which rows are there, found by decoding them with other ends.

A JPEG is a sequence of blocks, row by row, so what is cut off is missing below. A decoder fills what is missing with
grey and does not tell from where on. Here the file is ended twice: where it ends, and with its last bytes replaced by
others, which mean something else. Up to the first row in which the two pictures differ, the pixels come from what is in
the file. Rows below are never used. Progressive files, which go over the rows several times, are not mended.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import BinaryIO

from PIL import Image, ImageChops

LEAST_SHARE = 0.9
"""Of the rows, that have to be there for a truncated picture to be used."""

_END = b"\xff\xd9"
_START = b"\xff\xda"  # of the coded pixels
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")  # numbered from 0 to 7 over and over
_OTHER = b"\xfe" + bytes((37 * n + 11) % 251 for n in range(512))  # no 0xFF in it, which would begin a mark
_MARGIN = 64  # bytes that are replaced: the last block may end in them, and what is cut of it may mean nothing


def decoded(raw: bytes, opened: Callable[[BinaryIO], Image.Image]) -> tuple[Image.Image, int]:
    """The picture of a truncated JPEG, loaded, and how many of its rows are there, from the top.

    opened: reads the header of a stream. Raises what it raises, and `OSError` where nothing can be decoded.

    >>> stream = io.BytesIO()
    >>> Image.linear_gradient("L").save(stream, "JPEG", quality=100)
    >>> raw = stream.getvalue()
    >>> decoded(raw[:-2], Image.open)[1], decoded(raw[: len(raw) // 2], Image.open)[1] < 200
    (256, True)
    """
    raw = raw.rstrip(b"\xff")
    image = opened(io.BytesIO(raw + _END))
    image.load()
    start = raw.rfind(_START)
    if "progressive" in image.info or raw[start + 4] != len(image.getbands()):  # rows are spread over several scans
        return image, 0
    start += 2 + int.from_bytes(raw[start + 2 : start + 4])
    num_rows = image.height
    for margin in (0, _MARGIN):  # with nothing replaced: is more than the end mark missing?
        kept = raw[: max(start, len(raw) - margin)].rstrip(b"\xff")
        other = opened(io.BytesIO(kept + _other(kept) + _END))
        differing = ImageChops.difference(image, other).getbbox()
        if differing is None:
            break
        num_rows = differing[1]
    return image, num_rows


def _other(raw: bytes) -> bytes:
    """What a decoder takes for further blocks, also where it waits for the next restart mark."""
    marks = _RESTART.findall(raw, max(0, raw.rfind(_START)))
    number = marks[-1][0] - 0xD0 + 1 if marks else 0
    return b"".join(_OTHER + bytes([0xFF, 0xD0 + (number + n) % 8]) for n in range(8))
