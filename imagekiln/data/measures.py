"""Numbers of one picture for the checks: size, light, entropy, sharpness, a small copy, and perceptual hashes of many.

Sharpness compares the energy of the finest details with that of details two and four times as large, at a fixed
working size:

    sharpness = E_1 / max(E_2, E_4 / 3),   E_1 = sum (Y - b_1 Y)^2,   E_2 = sum (b_1 Y - b_2 b_1 Y)^2,   ...

with Y the luma and b_k the binomial filter [1 2 1]/4 in both directions, taps k pixels apart (the "a trous" wavelet,
Holschneider et al. 1989). Photographs have about as much energy in every octave of frequencies (their power falls as
1/f^2, Field 1987), so the ratio is near 1 whatever is shown, and because it is a ratio of energies, backgrounds without
detail count for nothing. A blur of one working pixel takes it below 0.3. E_4 is there for strong blurs, of which only
the noise of JPEG is left in E_1 and E_2 alike.

The perceptual hash is the DCT hash of imagededup 0.3 (`PHash`): of a grey picture X of
32 x 32 pixels

    D = C X C^T,   C_kn = cos(pi k (2 n + 1) / 64),   k < 8,   bit = D >= median of D without D_00

read row by row (row = vertical frequency), the first bit the highest: `f"{hash:016x}"` is imagededup's string. Their
DCT is 4 times ours, which changes no bit. ImageHash takes `D > median of D with D_00`, which differs in the one bit of
the median itself, so no hash can be equal to both; `median_with_mean` chooses. A mirrored picture has D with the sign
of every odd column turned.

Shapes: N pictures, H rows, W columns, T = `survey.THUMB` rows and columns.
"""

from __future__ import annotations

import mmap

import numpy as np
from PIL import Image

from imagekiln.data.survey import MEASURES, THUMB

WORKING_SIDE = 64
"""Short side in pixels that light, entropy and sharpness are measured at; smaller pictures at their own size."""

_LEVELS = np.arange(256) / 255
_LEAST_ENERGY = 0.01  # squared grey levels a pixel: details weaker than rounding have no sharpness
_BLOCK = 1024
_LOW = 8
_TIE = 1e-6  # of grey levels summed over 1024 pixels: far above rounding, far below any real difference


def measure(image: Image.Image, size: tuple[int, int] | None = None) -> tuple[np.void, np.ndarray]:
    """One entry of `MEASURES`, its hashes still 0 (see `add_hashes`), and the small copy thumb_TT3 uint8.

    image: upright, 8-bit sRGB, mode L, LA, RGB or RGBA, as `decode.open_safely` gives it; transparent pixels are laid
        on white.
    size: (height, width) of the picture in the file, where `image` was decoded at a half, a quarter or an eighth.

    >>> entry, thumb = measure(Image.new("L", (90, 60), 51))
    >>> int(entry["height"]), int(entry["width"]), round(float(entry["brightness"]), 3), thumb.shape
    (60, 90, 0.2, (32, 32, 3))
    """
    entry = np.zeros(1, MEASURES)[0]
    entry["height"], entry["width"] = size or (image.height, image.width)
    width, height = float(image.width), float(image.height)
    if (times := min(image.size) // (2 * WORKING_SIDE)) > 1:
        image, width, height = image.reduce(times), width / times, height / times  # the last pixels may be cut ones
    scale = min(1.0, WORKING_SIDE / min(width, height))
    inner, whole = (round(width * scale), round(height * scale)), (0, 0, width, height)
    if image.mode not in ("L", "RGB"):
        image, whole = _on_white(image.resize(inner, Image.Resampling.LANCZOS, box=whole)), (0, 0, *inner)
    luma_HW = np.asarray(image.convert("L").resize(inner, Image.Resampling.LANCZOS, box=whole))
    thumb = image.resize((THUMB, THUMB), Image.Resampling.LANCZOS, box=whole, reducing_gap=2.0)
    shares = np.bincount(luma_HW.ravel(), minlength=256) / luma_HW.size
    brightness = float(shares @ _LEVELS)
    entry["brightness"], entry["contrast"] = brightness, np.sqrt(shares @ (_LEVELS - brightness) ** 2)
    shares = shares[shares > 0]
    entry["entropy"] = abs(float(shares @ np.log2(shares)))
    entry["sharpness"] = sharpness(luma_HW)
    return entry, np.asarray(thumb.convert("RGB"))


def sharpness(luma_HW: np.ndarray) -> float:
    """Energy of the finest details over that of larger ones; 0 where there are none.

    luma_HW: any real dtype on the scale 0..255, sides of at least 2 pixels.

    >>> checkers = 255.0 * (np.indices((16, 16)).sum(0) % 2)
    >>> sharpness(checkers) > 100, sharpness(np.zeros((16, 16)))
    (True, 0.0)
    """
    smooth, energies = luma_HW.astype(np.float32), []
    for step in (1, 2, 4):
        smoother = _binomial(smooth, min(step, *(side - 1 for side in luma_HW.shape)))
        details, smooth = smooth - smoother, smoother
        energies.append(float(np.vdot(details, details)) / luma_HW.size)
    if sum(energies) < _LEAST_ENERGY:
        return 0.0
    return energies[0] / max(energies[1], energies[2] / 3, _LEAST_ENERGY)


def grey(thumbs_NTT3: np.ndarray) -> np.ndarray:
    """Luma (ITU-R 601, as Pillow's mode L) of small copies: (N, T, T) uint8."""
    red, green, blue = (thumbs_NTT3[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def perceptual_hashes(grey_N3232: np.ndarray, *, mirrored: bool = False, median_with_mean: bool = False) -> np.ndarray:
    """The 64-bit DCT hashes of grey pictures: (N,) uint64.

    grey_N3232: any real dtype.
    mirrored: of the pictures mirrored left to right.
    median_with_mean: ImageHash's rule instead of imagededup's.

    Coefficients closer to the median than rounding count as equal to it, so that the hash of a flat or symmetric
    picture does not depend on the order of additions.

    >>> ramp = np.add.outer(np.arange(32), 2 * np.arange(32))
    >>> both = perceptual_hashes(np.stack([ramp, ramp[:, ::-1]]))
    >>> bool((perceptual_hashes(ramp[None], mirrored=True) == both[1]).all()), both[0] == both[1]
    (True, np.False_)
    """
    hashes = np.empty(len(grey_N3232), np.uint64)
    cosines_K32 = np.cos(np.pi / 64 * np.outer(np.arange(_LOW), 2 * np.arange(THUMB) + 1))
    for start in range(0, len(grey_N3232), _BLOCK):
        block = grey_N3232[start : start + _BLOCK].astype(np.float64)
        columns_N8T = (block.reshape(-1, THUMB) @ cosines_K32.T).reshape(-1, THUMB, _LOW).transpose(0, 2, 1)
        D = (columns_N8T.reshape(-1, THUMB) @ cosines_K32.T).reshape(-1, _LOW, _LOW).transpose(0, 2, 1)
        if mirrored:
            D = D * np.where(np.arange(_LOW) % 2, -1.0, 1.0)
        D = D.reshape(-1, _LOW * _LOW)
        if median_with_mean:
            bits = np.median(D, axis=1, keepdims=True) + _TIE < D
        else:
            bits = np.partition(D[:, 1:], 31, axis=1)[:, 31:32] - _TIE <= D
        hashes[start : start + _BLOCK] = np.packbits(bits, axis=1).view(">u8")[:, 0]
    return hashes


def add_hashes(measured_N: np.ndarray, thumbs_NTT3: np.ndarray) -> None:
    """Fill in the fields `hash` and `mirrored`, reading the small copies in blocks."""
    for start in range(0, len(measured_N), _BLOCK):
        part = slice(start, start + _BLOCK)
        luma = grey(small_copies(thumbs_NTT3, np.arange(start, min(start + _BLOCK, len(measured_N)))))
        measured_N["hash"][part] = perceptual_hashes(luma)
        measured_N["mirrored"][part] = perceptual_hashes(luma, mirrored=True)


def small_copies(thumbs_NTT3: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy of some rows of an array, read from its file where it is mapped from disk: pages of the mapping that were
    touched, and their neighbours, would count as this process's memory as long as the array is open."""
    if not (isinstance(thumbs_NTT3, np.memmap) and isinstance(thumbs_NTT3.base, mmap.mmap) and thumbs_NTT3.filename):
        return np.array(thumbs_NTT3[rows])
    if not thumbs_NTT3.flags.c_contiguous or not len(rows):
        return np.array(thumbs_NTT3[rows])
    out = np.empty((len(rows), *thumbs_NTT3.shape[1:]), thumbs_NTT3.dtype)
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)  # neighbours are read together
    with open(thumbs_NTT3.filename, "rb", buffering=0) as file:
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            file.seek(thumbs_NTT3.offset + int(rows[start]) * out[0].nbytes)
            if file.readinto(out[start:end].reshape(-1).view(np.uint8).data) != out[start:end].nbytes:
                raise OSError(f"{thumbs_NTT3.filename} is shorter than it was")
    return out


def averaged(thumbs_NTT3: np.ndarray, side: int) -> np.ndarray:
    """Small copies, uint8, averaged to `side` x `side` pixels, a divisor of T: (N, side, side, 3) float32, 0..255.

    >>> averaged(np.arange(0, 96, 3, dtype=np.uint8)[:, None, None] * np.ones((1, 32, 32, 3), np.uint8), 2)[0, :, 0, 0]
    array([22.5, 70.5], dtype=float32)
    """
    step = THUMB // side
    rows = thumbs_NTT3.reshape(-1, side, step, THUMB * 3).sum(2, dtype=np.uint32)
    return rows.reshape(-1, side, side, step, 3).sum(3, dtype=np.uint32).astype(np.float32) / step**2


def release(mapped: np.ndarray) -> None:
    """Let go of the pages of an array mapped from disk, read or written; what was written stays written."""
    if isinstance(mapped.base, mmap.mmap) and hasattr(mapped.base, "madvise"):  # not on Windows
        mapped.base.madvise(mmap.MADV_DONTNEED)


def _on_white(image: Image.Image) -> Image.Image:
    """Mode L or RGB."""
    if image.mode in ("L", "RGB"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _binomial(luma_HW: np.ndarray, step: int) -> np.ndarray:
    """[1 2 1]/4 down and across, taps `step` pixels apart, the border reflected."""
    return _binomial_down(_binomial_down(luma_HW, step).T, step).T


def _binomial_down(luma_HW: np.ndarray, step: int) -> np.ndarray:
    smooth = luma_HW * np.float32(0.5)
    quarter = luma_HW * np.float32(0.25)
    smooth[step:] += quarter[:-step]
    smooth[:-step] += quarter[step:]
    smooth[:step] += quarter[step:0:-1]
    smooth[-step:] += quarter[-2 : -2 - step : -1]
    return smooth
