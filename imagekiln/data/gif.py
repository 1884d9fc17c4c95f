"""How many frames a GIF has, counted along its blocks: nothing is decoded, and counting stops where it is told to."""

from __future__ import annotations

import os
from typing import BinaryIO

_FRAME, _EXTENSION, _END = 0x2C, 0x21, 0x3B


def num_frames(stream: BinaryIO, most: int) -> int:
    """Frames of a GIF (CompuServe, GIF89a), counted up to `most`. Where the file is cut, counting ends.

    >>> import io
    >>> num_frames(io.BytesIO(b"GIF89a" + bytes(7) + 2 * (b"," + bytes(9) + b"\\2\\1x\\0") + b";"), 9)
    2
    """

    def skip(num_bytes: int) -> None:
        stream.seek(num_bytes, os.SEEK_CUR)

    def skip_table(flags: int) -> None:
        skip(3 * 2 ** ((flags & 7) + 1) if flags & 128 else 0)

    def skip_blocks() -> None:
        while size := stream.read(1)[0]:
            skip(size)

    count = 0
    stream.seek(10)
    try:
        skip_table(stream.read(3)[0])
        while count < most and (kind := stream.read(1)[0]) != _END:
            if kind == _FRAME:
                skip_table(stream.read(9)[8])
                skip(1)
                count += 1
            elif kind == _EXTENSION:
                skip(1)
            if kind in (_FRAME, _EXTENSION):
                skip_blocks()
    except IndexError:  # the file is over
        pass
    return count
