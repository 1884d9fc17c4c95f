"""All frames of animations and all pages of files, each as a picture of its own: what `--frames all` asks for.

Frame 7 of `a.gif` is the picture `a.gif#0007`, counted from 0, with the label, the caption and the side of its file.
A frame can only be had after those before it, so the frames of a file are decoded together when the first one is asked
for, into a temporary file (`archives.Spool`), and read from there. At most `MOST_FRAMES` are read from one file, and
`MOST_PIXELS` in all of them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from imagekiln.data import decode
from imagekiln.data.archives import Spool, read_member
from imagekiln.data.decode import Unusable
from imagekiln.data.files import Files
from imagekiln.data.found import Found, listed
from imagekiln.data.parquet import Group, Shelf

MOST_FRAMES = 1000
MOST_PIXELS = 10**9

_FRAME = re.compile(r"(.+)#\d{4,}", re.DOTALL)


class FrameFiles:
    """Files of which some stand for several pictures. num_frames: how many, by name."""

    def __init__(self, files: Files, num_frames: Mapping[str, int]) -> None:
        self.where, self.left_out, self.ignored = files.where, files.left_out, files.ignored
        self._files, self._num_frames, self._shelf = files, dict(num_frames), Shelf()
        self._frames = {frame: (file, n) for file in num_frames for n, frame in enumerate(self.names(file))}
        self.entries = files.entries | {frame: files.entries[file] for frame, (file, _) in self._frames.items()}

    def names(self, file: str) -> list[str]:
        """What the pictures of a file are called."""
        return [f"{file}#{number:04d}" for number in range(self._num_frames[file])]

    def open(self, name: str) -> Path | BinaryIO:
        if name not in self._frames:
            return self._files.open(name)
        file, number = self._frames[name]
        group = self._shelf.get((Path(file), 0), lambda: self._decoded(file))
        place = group.places[number]
        if isinstance(place, str):
            raise Unusable(place)
        return io.BytesIO(group.spool.read(*place))

    def read(self, name: str, limit: int) -> bytes:
        return read_member(self, name, limit) if name in self._frames else self._files.read(name, limit)

    def _decoded(self, file: str) -> Group:
        spool, places, num_pixels = Spool(), list[tuple[int, int] | str](), 0
        why = "its file has more pixels than are read of one"
        try:
            frames = decode.open_frames(self._files.open(file))
            while len(places) < self._num_frames[file] and num_pixels < MOST_PIXELS:
                stream, frame = io.BytesIO(), next(frames)
                num_pixels += frame.width * frame.height
                frame.save(stream, "PNG", compress_level=1)
                places.append(spool.add([stream.getvalue()]))
        except Unusable as error:
            why = str(error)
        return Group(spool, [*places, *[why] * (self._num_frames[file] - len(places))])


def expand(found: Found) -> None:
    """Put the frames of every file that has several in its place. Files that cannot be read stay as they are."""
    num_frames: dict[str, int] = {}
    cut: list[str] = []
    for picture in found.pictures:
        try:
            count = decode.num_frames(found.files.open(picture.name), MOST_FRAMES + 1)
        except Unusable:
            continue
        if count > 1:
            num_frames[picture.name] = min(count, MOST_FRAMES)
            cut += [picture.name] * (count > MOST_FRAMES)
    if not num_frames:
        return
    files = FrameFiles(found.files, num_frames)
    pictures = []
    for picture in found.pictures:
        names = files.names(picture.name) if picture.name in num_frames else [picture.name]
        pictures += [replace(picture, name=name) for name in names]
    found.files, found.pictures = files, pictures
    found.notices.append(
        f"{len(num_frames):,} files hold several frames or pages, {sum(num_frames.values()):,} pictures in all; "
        "those of one file stay on one side."
    )
    if cut:
        found.notices.append(f"Only the first {MOST_FRAMES:,} frames are read of {listed(cut)}.")


def neighbours(names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of places of frames of one file, so that all of one file are joined.

    >>> list(neighbours(["a.gif#0000", "b.png", "a.gif#0001", "a.gif#0002"]))
    [(0, 2), (2, 3)]
    """
    last: dict[str, int] = {}
    for place, name in enumerate(names):
        if match := _FRAME.fullmatch(name):
            if match[1] in last:
                yield last[match[1]], place
            last[match[1]] = place
