"""Batches for training as a pure function of (seed, images seen): resume is exact because there is nothing to restore.

Picture number p of a run is entry p mod n of the permutation of epoch p div n, and the permutation depends on
(seed, epoch) alone. Whether it is mirrored, and what else is done to it, depends on (seed, p) alone. Where pictures
have several shapes, the order is that of `imagekiln.data.buckets`.

Shapes: B pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from imagekiln.core import Batch, Source, sent
from imagekiln.data.augment import words
from imagekiln.data.buckets import BucketOrder, shuffled
from imagekiln.errors import DataError

Augment = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Changes images_BCHW, the first of which has this position: (changed images_BCHW, what was done as augment_BA)."""


Text = Callable[[Sequence[int], int, int], Tensor]
"""What is told about the pictures of these indices, one row each, by the run's seed and the first one's position."""


class Loader:
    """Endless shuffled batches of a source.

    batch: pictures a batch; a source with fewer pictures repeats them.
    flip: mirror half of the pictures left to right. It is not told to anyone: a mirrored picture is as good.
    augment: what else is done to the pictures, after that.
    stretch: pictures of one shape that follow each other where the source has several; 0 = a batch.

    Raises `DataError` when the source is empty.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch: int,
        device: torch.device | str = "cpu",
        flip: bool = False,
        augment: Augment | None = None,
        stretch: int = 0,
    ) -> None:
        if not len(source):
            raise DataError("There are no pictures to train on.")
        self.source, self.seed, self.size, self.device, self.flip = source, seed, batch, torch.device(device), flip
        self.augment = augment
        self.text: Text | None = None
        self._permutations: dict[int, np.ndarray] = {}
        shapes_N2 = getattr(source, "shapes_N2", None)
        self._buckets = None if shapes_N2 is None else BucketOrder(shapes_N2, seed, stretch or batch)

    def order(self, position: int, count: int) -> np.ndarray:
        """Which pictures come at positions `position .. position + count - 1` of the run: int64 indices."""
        if self._buckets is not None:
            return self._buckets.order(position, count)
        positions = np.arange(position, position + count, dtype=np.int64)
        epochs, places = np.divmod(positions, len(self.source))
        indices = np.empty(count, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[places[here]]
        return indices

    def batch(self, position: int) -> Batch:
        """The batch that starts after `position` pictures: images_BCHW float32 in [-1, 1], on the device."""
        indices = self.order(position, self.size).tolist()
        read = self.source.read(indices)
        text = read.text if self.text is None else self.text(indices, self.seed, position)
        images_BCHW, augment_BA = to_float(sent(read.images, self.device)), None
        if self.flip:
            mirrored_B = sent(torch.from_numpy(self._mirrored(position)), self.device)
            images_BCHW = torch.where(mirrored_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)
        if self.augment is not None:
            images_BCHW, augment_BA = self.augment(images_BCHW, position)
        return Batch(images_BCHW, read.labels, text, augment_BA).to(self.device)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = shuffled(len(self.source), self.seed, "order", epoch)
        return self._permutations[epoch]

    def _mirrored(self, position: int) -> np.ndarray:
        """One fair coin a position: the top bit of `words`."""
        mirrored: np.ndarray = words(self.seed, "flip", position, self.size) >> np.uint64(63) == 1
        return mirrored


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 as float32 in [-1, 1]; what is floating point already, such as latents, stays as it is.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
    [-1.0, 1.0]
    """
    return images if images.is_floating_point() else images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float pixels in [-1, 1] as uint8 0..255, rounded; values outside are clamped. Exact inverse of `to_float`.

    >>> to_uint8(torch.tensor([-1.5, -1.0, 1.0, 9.0])).tolist()
    [0, 0, 255, 255]
    """
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
