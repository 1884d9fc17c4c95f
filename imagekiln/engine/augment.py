"""Changes of training pictures: the numbers of `data.augment` put into the batched maths of `nets.augmentation`.

Mirroring, quarter turns and whole-pixel shifts pick pixels, so they are exact. Only what is left of a turn after the
nearest quarter, and scaling, resample, with the filter of ADA. A picture that nothing is done to is not touched: only
the changed ones are computed. What comes out is cut to [-1, 1]. Beyond a border is the mirrored picture; a box that is
cut out is grey; of RGBA, A is moved with the rest and keeps its values.

Shapes: B pictures, C channels, H rows, W columns, A numbers a picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from imagekiln.config import DataAugmentConfig, DataConfig
from imagekiln.core import Source, sent
from imagekiln.data import Loader
from imagekiln.data.ahead import Ahead
from imagekiln.data.augment import draw, labels
from imagekiln.data.loader import Augment as Change
from imagekiln.data.shards import ShardSource
from imagekiln.engine.codec import Codec, Latents
from imagekiln.engine.inputs import Told
from imagekiln.nets import augmentation

READERS = 2
"""Threads that read ahead from shards: they hide waiting for the disk or the network, and change no batch."""


def loader(
    data: DataConfig, source: Source, seed: int, batch: int, device: torch.device | str, stretch: int = 0
) -> Loader:
    """The batches that training sees: a pure function of (settings, source, seed, position).

    Behind a codec pictures are changed first, and encoded then.

    stretch: pictures of a whole step, which have one shape (`imagekiln.data.buckets`); 0 = a batch.

    Raises `DataError` when the source is empty.
    """
    changed: Change | None = Augment(data.augment, seed) if data.augment.changes else None
    told, inner = (source, source.source) if isinstance(source, Told) else (None, source)
    if changed is not None and isinstance(inner, Latents):
        changed, inner = _encoding(changed, inner.codec), inner.pictures
    flip = data.flip and not isinstance(inner, Latents)  # mirrored pictures have latents of their own
    if isinstance(inner, ShardSource):
        made: Loader = Ahead(inner, seed, batch, device, flip, changed, readers=READERS)
    else:
        made = Loader(inner, seed, batch, device, flip, changed, stretch)
    made.text = told.text if told else None
    return made


def _encoding(change: Change, codec: Codec) -> Change:
    """The latents of changed pictures: other ones every time, so that none are kept."""

    def encoded(images_BCHW: Tensor, position: int) -> tuple[Tensor, Tensor]:
        changed_BCHW, told_BA = change(images_BCHW, position)
        return codec.encode(changed_BCHW), told_BA

    return encoded


class Augment:
    """Changes the pictures of a batch, each as its position in the run says, and tells what was done.

    >>> augment = Augment(DataAugmentConfig(p=1, flip="horizontal"), seed=0)
    >>> images, told = augment(torch.tensor([[[[-1.0, 0.0, 1.0]]]]), 0)
    >>> images.flatten().tolist(), told[0, :2].tolist()
    ([1.0, 0.0, -1.0], [1.0, 0.0])
    """

    def __init__(self, config: DataAugmentConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(self, images_BCHW: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """images_BCHW float32 in [-1, 1] from `position` on: (changed images_BCHW, augment_BA float32)."""
        size = images_BCHW.shape[2], images_BCHW.shape[3]
        changes = draw(self.config, self.seed, position, len(images_BCHW), size)
        return apply(images_BCHW, changes), sent(labels(changes, size), images_BCHW.device)


@torch.no_grad()
def apply(images_BCHW: Tensor, changes: np.ndarray) -> Tensor:
    """Pictures with these changes: mirrored, turned and scaled, shifted, recolored, cut, in this order.

    images_BCHW: float32 in [-1, 1], and so is the answer; the input is left as it is. changes: (B,) of
    `data.augment.CHANGES`.
    """
    quarters_B, rest_B = _quarters(changes["degrees"], square=images_BCHW.shape[2] == images_BCHW.shape[3])
    resampled_B = (rest_B != 0) | (changes["octaves"] != 0)
    moved_B = (changes["rows"] != 0) | (changes["columns"] != 0)
    turned_B = changes["across"] | changes["down"] | (quarters_B != 0)
    blitted_B = turned_B | (moved_B & ~resampled_B)
    colored_B = np.any([changes[name] != 0 for name in ("brightness", "contrast", "saturation", "hue")], axis=0)

    def blitted(part: Tensor, rows: np.ndarray) -> Tensor:
        # top to bottom is left to right and half a turn
        flip = changes["across"][rows] ^ changes["down"][rows]
        turns = quarters_B[rows] + 2 * changes["down"][rows]
        shifts = (np.where(resampled_B, 0, changes[name])[rows] for name in ("rows", "columns"))
        return augmentation.blit(part, *(_to(part, value) for value in (flip, turns, *shifts)))

    def resampled(part: Tensor, rows: np.ndarray) -> Tensor:
        angle_B, smaller_B = np.radians(rest_B[rows]), np.exp2(-changes["octaves"][rows])
        inverse_B22 = augmentation.rotation(_real(part, angle_B)) * _real(part, smaller_B)[:, None, None]
        shift_B2 = np.stack([changes["columns"][rows], changes["rows"][rows]], axis=1)
        return augmentation.warp(part, inverse_B22, _real(part, shift_B2)).clamp(-1, 1)

    def recolored(part: Tensor, rows: np.ndarray) -> Tensor:
        contrast, saturation = np.exp2(changes["contrast"][rows]), np.exp2(changes["saturation"][rows])
        hue = np.radians(changes["hue"][rows])
        values = (_real(part, value) for value in (changes["brightness"][rows], contrast, hue, saturation))
        brightness_B, contrast_B, hue_B, saturation_B = values
        upright_B = torch.zeros_like(hue_B, dtype=torch.bool)
        rgb_BCHW = augmentation.recolor(part[:, :3], brightness_B, contrast_B, upright_B, hue_B, saturation_B)
        return torch.cat([rgb_BCHW.clamp(-1, 1), part[:, 3:]], dim=1)

    def cut(part: Tensor, rows: np.ndarray) -> Tensor:
        box = int(changes["cut_height"].max()), int(changes["cut_width"].max())
        row_B, column_B = (_to(part, changes[name][rows]) for name in ("cut_row", "cut_column"))
        return torch.cat([augmentation.cutout(part[:, :3], row_B, column_B, box), part[:, 3:]], dim=1)

    images_BCHW = _where(blitted_B, blitted, images_BCHW)
    images_BCHW = _where(resampled_B, resampled, images_BCHW)
    images_BCHW = _where(colored_B, recolored, images_BCHW)
    return _where(changes["cut_height"] > 0, cut, images_BCHW)


def _where(chosen_B: np.ndarray, change: Callable[[Tensor, np.ndarray], Tensor], images_BCHW: Tensor) -> Tensor:
    """The pictures with a change made to the chosen ones."""
    rows = np.flatnonzero(chosen_B)
    if not len(rows):
        return images_BCHW
    index = _to(images_BCHW, rows)
    return images_BCHW.index_copy(0, index, change(images_BCHW.index_select(0, index), rows))


def _quarters(degrees_B: np.ndarray, square: bool) -> tuple[np.ndarray, np.ndarray]:
    """(quarter turns, degrees that are left); pictures that are not square are turned by halves."""
    step = 1 if square else 2
    quarters_B = step * np.rint(degrees_B / (90 * step)).astype(np.int64)
    return quarters_B, degrees_B - 90 * quarters_B


def _to(images: Tensor, values: np.ndarray) -> Tensor:
    return sent(torch.from_numpy(values), images.device)


def _real(images: Tensor, values: np.ndarray) -> Tensor:
    return sent(torch.from_numpy(values.astype(np.float32)), images.device)
