"""Pictures as arrays: every file is opened, checked, turned upright and brought to 8-bit sRGB here and nowhere else.

`open_safely` is the only caller of `PIL.Image.open`. It reads an allow-list of formats, decides about size before a
pixel is decoded, decodes the whole file (a cut file is refused, never filled with grey), and drops all metadata, so
nothing of EXIF or GPS can reach an output. Of an animation or a multi-page file it takes the first frame; `open_frames`
takes them all.

Shapes: H rows, W columns, C channels, A the four channels red, green, blue, alpha.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import posixpath
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from imagekiln.config import Fit
from imagekiln.data import gif, mend
from imagekiln.data.window import best_shift
from imagekiln.errors import DataError, ImagekilnError, UsageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 100_000_000
"""Largest picture that is decoded. It is our own limit, checked on the header, and never a mere warning."""
MIN_SIDE = 4
MAX_ASPECT = 20

_ONE_AT_A_TIME = 16_000_000  # pictures above this many pixels are decoded one by one: eight threads must not hold 8 GB
_opening, _large = threading.Lock(), threading.Lock()
_ORIENTATION = 0x0112
_WHITE_IS_ZERO = 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SPANS = {  # which span of the upright picture becomes its columns, and which its rows
    Image.Transpose.FLIP_LEFT_RIGHT: ("end-x", "start-y"),
    Image.Transpose.ROTATE_180: ("end-x", "end-y"),
    Image.Transpose.FLIP_TOP_BOTTOM: ("start-x", "end-y"),
    Image.Transpose.TRANSPOSE: ("start-y", "start-x"),
    Image.Transpose.ROTATE_270: ("end-y", "start-x"),
    Image.Transpose.TRANSVERSE: ("end-y", "end-x"),
    Image.Transpose.ROTATE_90: ("start-y", "end-x"),
}
_SIDEWAYS = {turn for turn, spans in _SPANS.items() if spans[0].endswith("y")}
_ENDINGS = {
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
}
_GPS = 0x8825
_EXTENT = "extent"
_GAP = 3.0  # pictures are averaged over blocks of pixels first, as long as they stay this many times too large


class Unusable(Exception):
    """A file that is not a usable picture; the text is the plain reason, such as `truncated` or `empty file`."""


class Opened(NamedTuple):
    """A decoded picture, what was noticed on the way, and height and width of the upright picture in the file.

    notes: some of "turned" (by EXIF), "place" (EXIF says where it was taken), "profile" (an ICC profile other than
    sRGB), "cmyk", "deep" (more than 8 bits a channel), "frames" (several; the first is taken), "extension" (named as
    another format than it is), "repaired" (a truncated JPEG without the rows that are not there; see `data.mend`).
    """

    image: Image.Image
    notes: frozenset[str]
    height: int
    width: int


def open_safely(file: Path | BinaryIO, *, max_pixels: int = MAX_PIXELS, short_side: int = 0) -> Image.Image:
    """The picture in a file: upright, 8-bit sRGB, mode L, LA, RGB or RGBA, fully decoded, without metadata.

    file: a path, or a seekable binary stream.
    short_side: a JPEG may be decoded at a half, a quarter or an eighth as long as its short side keeps twice this many
        pixels; 0 decodes at full size. Which part of the result is the picture then says `extent`.

    Raises `Unusable` with a plain reason for everything that is not a whole, sane picture.
    """
    return open_noted(file, max_pixels=max_pixels, short_side=short_side).image


def open_noted(
    file: Path | BinaryIO, *, name: str = "", max_pixels: int = MAX_PIXELS, short_side: int = 0, repair: bool = False
) -> Opened:
    """Like `open_safely`, with what was noticed.

    name: the file's own, to compare its ending with the content. repair: take a truncated JPEG if most of it is there.
    """
    with _reasons(file) as stream:
        image = _identify(stream, max_pixels)
        with _large if image.width * image.height > _ONE_AT_A_TIME else nullcontext():
            if image.format == "PNG":
                image.verify()  # Pillow's decoder skips the checksums of the pixel data; only this reads them
                image = _identify(stream, max_pixels)
            whole, frames = image.size, _has_frames(image)
            if short_side:
                image.draft(None, (2 * short_side, 2 * short_side))
            num_rows = 0
            try:
                image.load()
            except OSError as error:
                if not (repair and image.format == "JPEG" and "truncated" in str(error)):
                    raise
                image, num_rows = _mended(stream, max_pixels)
            turn = _TURNS.get(_orientation(image))  # after load: Pillow turns some TIFFs itself while loading
            notes, box = _notes(image, name) | frames, _covered(whole, image.size)
            notes |= frozenset() if turn is None else {"turned"}
            image = _eight_bit_srgb(image)
            if num_rows:
                image, notes = image.crop((0, 0, image.width, num_rows)), notes | {"repaired"}
                whole, box = image.size, (0, 0, *image.size)
            if turn is not None:
                box, image = _turned(box, image.size, turn), image.transpose(turn)
            image.info.clear()
            if box != (0, 0, *image.size):
                image.info[_EXTENT] = box
            sideways = turn in _SIDEWAYS
            return Opened(image, notes, whole[0] if sideways else whole[1], whole[1] if sideways else whole[0])


def extent(image: Image.Image) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the picture inside `image`, in its pixels.

    A JPEG decoded at an eighth of 1,001 pixels has 126, the last of which is mostly padding: the picture ends at
    125.125. Whoever resizes the whole 126 moves everything by up to a pixel (30 dB instead of 50).
    """
    return image.info.get(_EXTENT, (0, 0, *image.size))


def open_own(path: Path) -> Image.Image:
    """A picture this program wrote itself, such as a preview, read as carefully. Raises `DataError`."""
    try:
        return open_safely(path)
    except Unusable as error:
        raise DataError(f"{path} cannot be read: {error}.") from None


def probe(file: Path | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of the upright picture, from its header alone. Raises `Unusable`."""
    with _reasons(file) as stream:
        image = _identify(stream, max_pixels)
        sideways = image.format != "TIFF" and _orientation(image) >= 5  # Pillow reports a TIFF's size upright
        return (image.width, image.height) if sideways else (image.height, image.width)


def num_frames(file: Path | BinaryIO, most: int) -> int:
    """How many frames or pages a file has, counted up to `most`, no pixel being decoded; 1 where it cannot be read.

    It is what the file says: frames may turn out to be damaged.
    """
    try:
        with _reasons(file) as stream:
            image = _identify(stream, MAX_PIXELS)
            if image.format == "GIF":
                return max(1, gif.num_frames(stream, most))
            if image.format != "TIFF":
                return max(1, min(most, int(getattr(image, "n_frames", 1))))
            for number in range(1, most):
                try:
                    image.seek(number)
                except Exception:  # the last page, or one that is damaged: what lies behind it cannot be found
                    return number
            return most
    except Unusable:
        return 1


def open_frames(file: Path | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Frame by frame, each as `open_safely` gives the first one; the frames of an animation as they are seen.

    Raises `Unusable` for the first frame that cannot be decoded, or is none: ask for no more than there are.
    """
    with _reasons(file) as stream:
        image = _identify(stream, max_pixels)
        if image.format == "PNG":
            image.verify()
            image = _identify(stream, max_pixels)
        for number in itertools.count():
            image.seek(number)
            _judge_size(image, max_pixels)
            image.load()
            turn, frame = _TURNS.get(_orientation(image)), _eight_bit_srgb(image)
            frame = frame if turn is None else frame.transpose(turn)
            frame.info.clear()
            yield frame


def fit(
    image: Image.Image,
    size: tuple[int, int],
    how: Fit = "crop",
    background: str = "white",
    channels: Literal[1, 3, 4] = 3,
) -> np.ndarray:
    """The picture at another size, antialiased (Lanczos): pixels_HWC uint8.

    size: (height, width). how: `crop` keeps the centre, `smart` the part with most edges (see
        `data.window`), `pad` everything.
    background: colour behind transparent pixels and padding; with `channels=4` both stay transparent instead.

    >>> fit(Image.new("RGB", (40, 20), "red"), (8, 8), "pad")[[0, 4], 4].tolist()
    [[255, 255, 255], [255, 0, 0]]
    """
    height, width = size
    left, top, right, bottom = extent(image)
    scale = (min if how == "pad" else max)(height / (bottom - top), width / (right - left))
    if how != "pad":
        inner = (width, height)
        aside, above = max(0.0, (right - left - width / scale) / 2), max(0.0, (bottom - top - height / scale) / 2)
        window = (width / scale, height / scale)
        shift = best_shift(image, (left, top, right, bottom), window) if how == "smart" else 0.0
        across, down = shift * aside, shift * above
        box = (
            max(left, left + aside + across),
            max(top, top + above + down),
            min(right, right - aside + across),
            min(bottom, bottom - above + down),
        )
    else:
        inner = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
        box = (left, top, right, bottom)
    resized_HWA = _resized(image, inner, box)
    if inner == (width, height):
        return flatten(resized_HWA, channels, colour(background))
    pixels_HWA = np.zeros((height, width, 4), np.uint8)
    top, left = (height - inner[1]) // 2, (width - inner[0]) // 2
    pixels_HWA[top : top + inner[1], left : left + inner[0]] = resized_HWA
    return flatten(pixels_HWA, channels, colour(background))


def _resized(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """The part of a picture inside a box at another size, (width, height): pixels_HWA uint8."""
    resized = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=_GAP)
    pixels_HWA = np.array(resized.convert("RGBA"))
    pixels_HWA[pixels_HWA[..., 3] == 0] = 0  # nobody sees the colour there, so nobody may learn it
    return pixels_HWA


def flatten(pixels_HWA: np.ndarray, channels: int, background: tuple[int, int, int]) -> np.ndarray:
    """Pixels with alpha as 1 (luma, ITU-R 601), 3 (on the background) or 4 channels: (..., H, W, C) uint8."""
    if channels == 4:
        return pixels_HWA
    rgb, alpha = pixels_HWA[..., :3], pixels_HWA[..., 3:]
    if not (alpha == 255).all():
        cover, behind = alpha.astype(np.uint16), np.array(background, np.uint16)
        rgb = ((rgb * cover + behind * (255 - cover) + 127) // 255).astype(np.uint8)
    if channels == 3:
        return rgb
    luma = rgb.astype(np.uint32) @ np.array([[19595], [38470], [7471]], np.uint32)
    return ((luma + 32768) >> 16).astype(np.uint8)


def colour(name: str) -> tuple[int, int, int]:
    """Red, green, blue of a colour name or `#rrggbb`. Raises `UsageError`."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise UsageError(f"data.background = {name!r} is no colour. Give a name such as white, or #rrggbb.") from None


@contextmanager
def _reasons(file: Path | BinaryIO) -> Iterator[BinaryIO]:
    """Open the file if need be, and turn whatever a decoder throws into `Unusable` with a plain reason."""
    stream: BinaryIO | None = None
    try:
        if isinstance(file, Path) and not stat.S_ISREG(os.stat(file).st_mode):
            raise Unusable("not a regular file")
        stream = file.open("rb") if isinstance(file, Path) else file
        yield stream
    except (Unusable, ImagekilnError):
        raise
    except PermissionError:
        raise Unusable("permission denied") from None
    except FileNotFoundError:
        raise Unusable("no such file") from None
    except MemoryError:
        raise Unusable("too large for the memory") from None
    except Exception as error:  # decoders throw anything: SyntaxError, struct.error, IndexError, OverflowError, ...
        raise Unusable(_reason(stream, error)) from None
    finally:
        if stream is not None and isinstance(file, Path):
            stream.close()


def _identify(stream: BinaryIO, max_pixels: int) -> Image.Image:
    """Read the header and judge the size, before anything large is allocated."""
    stream.seek(0)
    # Pillow's own limit is a module variable that warns at once and refuses at twice: ours replaces it for this call.
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            image = Image.open(stream, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            found = re.search(r"\((\d+) pixels\)", str(error))
            raise Unusable(f"too large ({int(found[1]) / 1e6:.0f} MP)" if found else "too large") from None
        finally:
            Image.MAX_IMAGE_PIXELS = before
    if image.format == "MPO":  # a JPEG of a phone: what lies behind the picture is a map of depth or gain, no frame
        stream.seek(0)
        image = JpegImageFile(stream)
    _judge_size(image, max_pixels)
    return image


def _judge_size(image: Image.Image, max_pixels: int) -> None:
    short, long = sorted(image.size)
    if short * long > max_pixels:
        raise Unusable(f"too large ({short * long / 1e6:.0f} MP)")
    if short < MIN_SIDE:
        raise Unusable(f"{image.width}x{image.height} is below the smallest size ({MIN_SIDE}x{MIN_SIDE})")
    if long > MAX_ASPECT * short:
        raise Unusable(f"{image.width}x{image.height} is narrower than 1:{MAX_ASPECT}")


def _mended(stream: BinaryIO, max_pixels: int) -> tuple[Image.Image, int]:
    """A truncated JPEG, decoded, and how many of its rows are there. Raises `Unusable` where they are too few."""
    stream.seek(0)
    image, num_rows = mend.decoded(stream.read(), lambda whole: _identify(whole, max_pixels))
    if num_rows < mend.LEAST_SHARE * image.height:
        raise Unusable("truncated")
    return image, num_rows


def _has_frames(image: Image.Image) -> frozenset[str]:
    """{"frames"} for an animation or a file of several pages; asked before loading, because a GIF seeks for it."""
    try:
        return frozenset({"frames"} if getattr(image, "is_animated", False) else ())
    except Exception:  # a damaged second frame is no concern of the first
        return frozenset()


def _notes(image: Image.Image, name: str) -> frozenset[str]:
    """The notes of `Opened` that a loaded picture can tell."""
    found: set[str] = set()
    try:
        found |= {"place"} if image.getexif().get_ifd(_GPS) else set()
    except Exception:  # broken EXIF says nothing
        found -= {"place"}
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and _transform(profile, image.mode.removesuffix("A")) is not None:
        found.add("profile")
    found |= {"cmyk"} if image.mode == "CMYK" else set()
    found |= {"deep"} if image.mode.startswith("I") or image.mode == "F" else set()
    ending = _ENDINGS.get(posixpath.splitext(name)[1].lower())
    return frozenset(found | ({"extension"} if ending is not None and ending != image.format else set()))


def _covered(whole: tuple[int, int], decoded: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture decoded at 1 / k of its size that the file's own pixels cover."""
    if decoded == whole:
        return (0, 0, *whole)
    k = max(whole) / max(decoded)
    k = 2 ** round(math.log2(k))  # libjpeg rounds the sides up, so the ratio is a little below the power of two
    return (0, 0, min(decoded[0], whole[0] / k), min(decoded[1], whole[1] / k))


def _turned(
    box: tuple[float, float, float, float], size: tuple[int, int], turn: Image.Transpose
) -> tuple[float, float, float, float]:
    """Where a box that starts at the upper left of a picture of this size lies after the turn."""
    (_, _, right, bottom), (width, height) = box, size
    spans = {"start-x": (0.0, right), "end-x": (width - right, width)}
    spans |= {"start-y": (0.0, bottom), "end-y": (height - bottom, height)}
    across, down = _SPANS[turn]
    (left, right), (top, bottom) = spans[across], spans[down]
    return (left, top, right, bottom)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _eight_bit_srgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow knows as L, LA, RGB or RGBA in sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_grey(image)
    if "transparency" in image.info or image.mode in ("PA", "RGBa"):
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    elif image.mode in ("1", "La"):
        image = image.convert({"1": "L", "La": "LA"}[image.mode])
    elif image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode.removesuffix("A")) if isinstance(profile, bytes) else None
    if transform is None:
        return image.convert("RGB") if image.mode == "CMYK" else image.copy()
    if image.mode not in ("LA", "RGBA"):
        converted = transform.apply(image)
    else:
        converted = transform.apply(image.convert(image.mode.removesuffix("A")))
        converted.putalpha(image.getchannel("A"))
    return converted.convert(image.mode) if image.mode in ("L", "LA") else converted


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled from its full range and never clipped: 0..65535, 0..4095 for TIFFs of 12 bits,
    or 0..1 for floats. Of such TIFFs Pillow neither scales 12 bits nor turns what is white at 0."""
    pixels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise Unusable("pixels that are not finite numbers")
        if pixels.min() < 0 or pixels.max() > 1:
            raise Unusable("float pixels outside 0..1 (HDR)")
    elif pixels.min() < 0 or pixels.max() > 65535:
        raise Unusable("32-bit pixels")
    else:
        pixels = pixels / (4095 if tags.get(BITSPERSAMPLE) == (12,) else 65535)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        pixels = 1 - pixels
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from an ICC profile to sRGB; None where the pixels are sRGB already or the profile makes no sense."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, mode, "RGB", renderingIntent=intent, flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


_NOT_PICTURES = (
    (rb"^\s*(<!doctype html|<html|<head|<body)", "not an image (HTML)"),
    (rb"^\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg", "SVG is not read; convert it to PNG"),
    (rb"^....ftyp(avif|avis)", "AVIF is not read; convert it to JPEG or PNG"),
    (rb"^....ftyp(hei|hev|mif|msf)", "HEIC is not read; convert it to JPEG or PNG"),
    (rb"^%PDF", "not an image (PDF)"),
    (rb"^8BPS", "PSD is not read; convert it to PNG"),
    (rb"^PK\x03\x04", "not an image (zip)"),
    (rb"^(\xff\xd8|\x89PNG|GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP)", "damaged"),
    (rb"^[\t\n\r\x20-\x7e]+$", "not an image (text)"),
)


def _reason(stream: BinaryIO | None, error: Exception) -> str:
    """What a person would call it."""
    if stream is None:
        return str(getattr(error, "strerror", None) or error)
    stream.seek(0, os.SEEK_END)
    num_bytes = stream.tell()
    stream.seek(0)
    head = stream.read(512).removeprefix(b"\xef\xbb\xbf")
    if num_bytes == 0:
        return "empty file"
    if head.startswith(b"RIFF") and len(head) >= 8 and struct.unpack("<I", head[4:8])[0] + 8 > num_bytes:
        return "truncated"
    if isinstance(error, UnidentifiedImageError):
        flags = re.IGNORECASE | re.DOTALL
        return next((reason for pattern, reason in _NOT_PICTURES if re.match(pattern, head, flags)), "not an image")
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "truncated"
    return "damaged (wrong checksum)" if "checksum" in str(error) else "damaged"
