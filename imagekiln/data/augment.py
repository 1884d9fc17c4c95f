"""What is done to which training picture: numbers that are functions of (seed, position in the run) alone.

Each change is made to a share p of the pictures, independently of the others, and its strength is even between the
configured largest one to either side. The numbers are one counter-based stream a kind: value k of a stream is
SplitMix64 (Steele, Lea, Flood 2014) of (seed, kind, k) with k the position of the picture, so they do not depend on the
batch, on what was asked before, or on the device. What they do to pixels is computed by the function the `Loader` gets,
because the maths lies in `nets.augmentation`, which this room does not know.

Zeros mean that nothing is done, in the table of changes and in what a network is told about it
(Karras et al. 2022, arXiv:2206.00364, appendix F.2). Angles are turned against the clock, in degrees, so that 90 is 90.

Shapes: B pictures, A columns of `config.AUGMENT_LABELS`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from imagekiln.config import AUGMENT_LABELS, DataAugmentConfig
from imagekiln.core import mix

CHANGES = np.dtype(
    [
        ("across", np.bool_),  # mirrored left to right
        ("down", np.bool_),  # mirrored top to bottom
        ("degrees", np.float64),  # turned, after mirroring
        ("octaves", np.float64),  # 1 = twice as large
        ("rows", np.int64),  # shifted down, after turning, in pixels
        ("columns", np.int64),  # shifted to the right
        ("brightness", np.float64),  # added, pixels being in [-1, 1]
        ("contrast", np.float64),  # octaves
        ("saturation", np.float64),  # octaves
        ("hue", np.float64),  # degrees
        ("cut_height", np.int64),  # of a grey box, in pixels
        ("cut_width", np.int64),
        ("cut_row", np.int64),  # of its middle
        ("cut_column", np.int64),
    ]
)
"""What is done to one picture; zeros where nothing is."""


def words(seed: int, kind: str, position: int, count: int) -> np.ndarray:
    """64 random bits for each of the positions `position .. position + count - 1`: uint64.

    >>> bool((words(0, "flip", 2, 3) == words(0, "flip", 0, 5)[2:]).all())
    True
    """
    with np.errstate(over="ignore"):
        state = np.arange(position, position + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += np.uint64(mix(seed, kind))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def uniform(seed: int, kind: str, position: int, count: int) -> np.ndarray:
    """Even numbers in [0, 1), one a position: float64.

    >>> uniform(0, "share", 10**12, 3).round(3).tolist()
    [0.636, 0.173, 0.416]
    """
    bits = (words(seed, kind, position, count) >> np.uint64(11)).astype(np.float64)
    return bits / 2.0**53


def draw(config: DataAugmentConfig, seed: int, position: int, count: int, size: tuple[int, int]) -> np.ndarray:
    """What is done to the pictures at `position .. position + count - 1` of a run: (B,) of `CHANGES`.

    size: height and width of the pictures.

    >>> changes = draw(DataAugmentConfig(p=0.5, rotate=10), seed=0, position=0, count=4, size=(32, 32))
    >>> changes["degrees"].round(1).tolist(), changes["rows"].tolist()
    ([0.0, 0.0, 7.1, 0.0], [0, 0, 0, 0])
    """
    made = np.zeros(count, CHANGES)

    def even(kind: str) -> np.ndarray:
        return 2 * uniform(seed, f"augment {kind}", position, count) - 1

    def coin(kind: str) -> np.ndarray:
        return uniform(seed, f"augment {kind}?", position, count) < config.p

    for field, kinds in (("across", ("horizontal", "both")), ("down", ("vertical", "both"))):
        if config.flip in kinds:
            made[field] = coin(field)
    if config.shift:
        shifted = coin("shift")
        for field, length in zip(("rows", "columns"), size, strict=True):
            made[field] = np.where(shifted, np.rint(even(field) * config.shift * length), 0)
    strengths = {
        "degrees": config.rotate,
        "octaves": math.log2(1 + config.scale),
        "brightness": config.color,
        "contrast": math.log2(1 + config.color),
        "saturation": math.log2(1 + config.color),
        "hue": config.hue,
    }
    for field, largest in strengths.items():
        if largest:
            made[field] = np.where(coin(field), even(field) * largest, 0)
    if config.cutout:
        cut = coin("cut")
        for side, middle, length in zip(("height", "width"), ("row", "column"), size, strict=True):
            made[f"cut_{side}"] = np.where(cut, max(1, round(config.cutout * length)), 0)
            place = uniform(seed, f"augment cut {middle}", position, count) * length
            made[f"cut_{middle}"] = np.where(cut, place.astype(np.int64), 0)
    return made


def labels(changes: np.ndarray, size: tuple[int, int]) -> Tensor:
    """What a network is told about the changes: augment_BA float32 in the columns of `config.AUGMENT_LABELS`.

    Every column is about 1 for a strong change, in fixed units, so that the same numbers always mean the same; turns
    are told as (cos - 1, sin), which are zero where nothing is turned and close where angles are.

    >>> labels(np.zeros(1, CHANGES), (8, 8)).any().item()
    False
    """
    height, width = size
    angle_B, hue_B = np.radians(changes["degrees"]), np.radians(changes["hue"])
    cut_B = changes["cut_height"] > 0
    columns = {
        "across": changes["across"],
        "down": changes["down"],
        "shift_down": changes["rows"] * 8 / height,
        "shift_right": changes["columns"] * 8 / width,
        "turn_cos": np.cos(angle_B) - 1,
        "turn_sin": np.sin(angle_B),
        "scale": changes["octaves"] * 4,
        "brightness": changes["brightness"] * 4,
        "contrast": changes["contrast"] * 2,
        "saturation": changes["saturation"] * 2,
        "hue_cos": np.cos(hue_B) - 1,
        "hue_sin": np.sin(hue_B),
        "cut": cut_B,
        "cut_down": np.where(cut_B, (2 * changes["cut_row"] + 1) / height - 1, 0),
        "cut_right": np.where(cut_B, (2 * changes["cut_column"] + 1) / width - 1, 0),
    }
    return torch.from_numpy(np.stack([columns[name] for name in AUGMENT_LABELS], axis=1).astype(np.float32))
