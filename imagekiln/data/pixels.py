"""Files to pixels: every picture decoded once, by several threads, in order, and kept on disk at one size.

Pixels are first written as RGBA, one picture after the other, because how many channels the set needs is known only
when all pictures have been seen; then they become `images.npy`, and `buckets.npy` where proportions are kept.

Shapes: N pictures, H rows, W columns, C channels, A red, green, blue, alpha, P = H W,
T = `survey.THUMB` rows and columns.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from imagekiln.config import Fit
from imagekiln.data import buckets, decode
from imagekiln.data.scan import Found, Picture
from imagekiln.errors import DataError, UsageError

COMMON_SIZE = 256
"""`size = 0` keeps the pictures' own size when they all share it and no side is longer than this."""
CHOSEN_SIZE = 64
"""Otherwise it takes the median short side, rounded down to a multiple of 8, but no more than this."""

THREADS = max(1, min(8, os.cpu_count() or 1))
_CHUNK_BYTES = 2**24

ProgressFn = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Shaping(Protocol):
    """What is said about the pixels of a set: fields of `DataConfig` and of `PrepareConfig`."""

    @property
    def size(self) -> int: ...

    @property
    def channels(self) -> Literal[0, 1, 3, 4]: ...

    @property
    def fit(self) -> Fit: ...

    @property
    def background(self) -> str: ...

    @property
    def buckets(self) -> bool: ...


class Seen(NamedTuple):
    """One usable picture: pixels_HWA uint8; where proportions are kept, its shape and shaped_PA uint8 in that; where it
    was measured, `survey.MEASURES` and thumb_TT3 uint8."""

    pixels_HWA: np.ndarray
    notes: frozenset[str]
    shape: buckets.Shape | None = None
    shaped_PA: np.ndarray | None = None
    measured: np.void | None = None
    thumb: np.ndarray | None = None


def see(
    found: Found, picture: Picture, shape: tuple[int, int], shaping: Shaping, measure: bool, repair: bool = False
) -> Seen | str:
    """Decode one picture and bring it to (H, W); the reason as a string where it cannot be used."""
    try:
        file = found.files.open(picture.name)
        opened = decode.open_noted(file, name=picture.name, short_side=max(shape), repair=repair)
        pixels_HWA = decode.fit(opened.image, shape, shaping.fit, shaping.background, channels=4)
        own = shaped_PA = measured = thumb = None
        if shaping.buckets:
            own = buckets.nearest(buckets.shapes(shape[0]), opened.height, opened.width)
            fitted_HWA = decode.fit(opened.image, own, shaping.fit, shaping.background, channels=4)
            shaped_PA = buckets.flattened(fitted_HWA, shape[0] * shape[1])
        if measure:
            from imagekiln.data import measures

            measured, thumb = measures.measure(opened.image, (opened.height, opened.width))
    except decode.Unusable as error:
        return str(error)
    alpha = set() if (pixels_HWA[..., 3] == 255).all() else {"alpha"}
    red, green, blue = (pixels_HWA[..., channel] for channel in range(3))
    grey = {"grey"} if (red == green).all() and (red == blue).all() else set()
    return Seen(pixels_HWA, opened.notes | alpha | grey, own, shaped_PA, measured, thumb)


class Raw(contextlib.ExitStack):
    """Files in a folder that pixels are written to before it is known how many channels they need."""

    def __init__(self, folder: Path, shaping: Shaping) -> None:
        super().__init__()
        self._images = self.enter_context((folder / "images.raw").open("wb"))
        self._buckets = self.enter_context((folder / "buckets.raw").open("wb")) if shaping.buckets else None

    def add(self, seen: Seen) -> None:
        """Write the pixels of the next picture."""
        self._images.write(seen.pixels_HWA.tobytes())
        if self._buckets is not None and seen.shaped_PA is not None:
            self._buckets.write(seen.shaped_PA.tobytes())


def kept(shape: tuple[int, ...], shaping: Shaping) -> dict[str, tuple[int, ...]]:
    """The arrays of a packed folder by name, with their shapes, of which the first is (N, C, H, W).

    >>> from imagekiln.config import DataConfig
    >>> kept((9, 3, 64, 64), DataConfig(buckets=True))
    {'images': (9, 3, 64, 64), 'buckets': (9, 3, 1, 4096)}
    """
    total, channels, height, width = shape
    return {"images": shape} | ({"buckets": (total, channels, 1, height * width)} if shaping.buckets else {})


def require_size(shaping: Shaping) -> None:
    """Raises `UsageError` where proportions are to be kept and no size says how large the shapes are."""
    if shaping.buckets and (not shaping.size or shaping.size % buckets.PARTS):
        raise UsageError(
            f"buckets: the shapes have about as many pixels as a square of this size, and size is {shaping.size}. Set "
            f"it to a multiple of {buckets.PARTS}."
        )


@contextlib.contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """A pool of `THREADS` threads that decode, and hand over to each other ten times as often as is usual.

    Each computes for milliseconds outside of the interpreter, then for a part of one inside. Who comes back from
    outside waits for up to the switch interval, 5 ms by default: a core was idle for a tenth of the time.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            yield pool
    finally:
        sys.setswitchinterval(before)


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """(item, result) in order, with only a few results waiting at any time; leaving early cancels the rest."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 4 * THREADS:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def chosen_shape(found: Found, pool: ThreadPoolExecutor, notices: list[str]) -> tuple[int, int]:
    """Height and width for `size = 0`: see `COMMON_SIZE` and `CHOSEN_SIZE`."""

    def probe(picture: Picture) -> tuple[int, int] | None:
        try:
            return decode.probe(found.files.open(picture.name))
        except decode.Unusable:
            return None

    shapes = [shape for _, shape in in_order(pool, probe, found.pictures) if shape is not None]
    if len(set(shapes)) == 1 and max(shapes[0]) <= COMMON_SIZE:
        return shapes[0]
    side = int(statistics.median(min(shape) for shape in shapes)) if shapes else CHOSEN_SIZE
    side = max(8, min(CHOSEN_SIZE, side // 8 * 8))
    if shapes:
        notices.append(f"The pictures are brought to {side}x{side} pixels; set data.size for another size.")
    return side, side


def chosen_channels(notes: Sequence[frozenset[str]], notices: list[str]) -> Literal[1, 3]:
    """1 where every picture is grey, else 3. Transparency is kept only when the user asks for 4 channels."""
    total = len(notes)
    num_transparent, num_grey = (sum(note in of for of in notes) for note in ("alpha", "grey"))
    if num_transparent > total / 20:
        notices.append(
            f"{num_transparent:,} of {total:,} pictures have transparent parts, which were laid on "
            "data.background; data.channels=4 keeps them."
        )
    if num_grey == total and not num_transparent:
        return 1
    if num_grey and num_grey < total:
        notices.append(f"{num_grey:,} of {total:,} pictures are grey among coloured ones.")
    return 3


def write_images(raw: Path, target: Path, shape: tuple[int, ...], background: str) -> None:
    """Turn the RGBA pixels of `raw` into an .npy array of uint8 and this shape, (N, C, H, W), and remove `raw`."""
    total, channels, height, width = shape
    colour = decode.colour(background)
    with raw.open("rb") as source, target.open("wb") as stream:  # mapped files would count as this process's memory
        head = {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))}
        np.lib.format.write_array_header_1_0(stream, head)
        chunk = max(1, _CHUNK_BYTES // (height * width * 4))
        for start in range(0, total, chunk):
            count = min(chunk, total - start)
            rgba = np.frombuffer(source.read(count * height * width * 4), np.uint8).reshape(count, height, width, 4)
            stream.write(decode.flatten(rgba, channels, colour).transpose(0, 3, 1, 2).tobytes())
    raw.unlink()


def none_usable(where: Path, reasons: Sequence[str]) -> DataError:
    """The error for a set of which nothing is left."""
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common(3))
    return DataError(f"None of the {len(reasons):,} pictures in {where} can be used: {counts}.")
