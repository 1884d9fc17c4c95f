"""A loader that reads the coming batches in threads, and an order of pictures that is kind to slow disks.

What comes is what `Loader` gives, bit for bit and in order, for any number of readers: threads only fetch early what a
pure function of (seed, position) says. There is no state to restore, so a run goes on exactly from any position.

Shapes: B pictures, N of them in the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from imagekiln.core import Batch, Source, mix
from imagekiln.data.loader import Augment, Loader

DEPTH = 2
WINDOW = 16


class Ahead(Loader):
    """`Loader` with `readers` threads that read the next `DEPTH` batches while this one is learned from.

    readers: 0 reads when asked, in the calling thread. The source must allow reading from several threads.
    block: 0 is the order of `Loader`; otherwise that of `block_order`, which keeps neighbours near each other.

    A position that was not expected (a roll-back, another phase) is read when asked for, and read ahead from there.

    >>> from imagekiln.data.source import MemmapSource, Table
    >>> images, labels = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), np.zeros(50, np.int64)
    >>> source = MemmapSource(Table(images, labels, (), [""] * 50, [""] * 50), np.arange(50))
    >>> plain, ahead = Loader(source, seed=1, batch=8), Ahead(source, seed=1, batch=8, readers=2)
    >>> all(torch.equal(plain.batch(p).images, ahead.batch(p).images) for p in (40, 48, 56, 8))
    True
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch: int,
        device: torch.device | str = "cpu",
        flip: bool = False,
        augment: Augment | None = None,
        readers: int = 2,
        block: int = 0,
    ) -> None:
        self._readers = _Readers(source, readers)
        super().__init__(self._readers, seed, batch, device, flip, augment)
        self.block = block

    def batch(self, position: int) -> Batch:
        """The batch that starts after `position` pictures: images_BCHW float32 in [-1, 1], on the device."""
        if self._readers.count:
            coming = range(position, position + (DEPTH + 1) * self.size, self.size)
            self._readers.expect([tuple(self.order(start, self.size).tolist()) for start in coming])
        return super().batch(position)

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.block:
            return super()._permutation(epoch)
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = block_order(self.seed, epoch, len(self.source), self.block)
        return self._permutations[epoch]


class _Readers:
    """A source whose reading may begin before it is asked for. Only the reading itself is done by the threads."""

    def __init__(self, source: Source, readers: int) -> None:
        self.image_shape, self.num_classes = source.image_shape, source.num_classes
        self.class_names, self.fingerprint = source.class_names, source.fingerprint
        self._source, self.count = source, readers
        self._pool = ThreadPoolExecutor(readers, "imagekiln-reader") if readers else None
        self._begun: dict[tuple[int, ...], list[Future[Batch]]] = {}

    def __len__(self) -> int:
        return len(self._source)

    def expect(self, batches: Sequence[tuple[int, ...]]) -> None:
        """Begin to read these, the first one first, and forget what is not among them."""
        if self._pool is None:
            return
        for indices in self._begun.keys() - set(batches):
            for future in self._begun.pop(indices):
                future.cancel()
        for indices in batches:
            if indices not in self._begun:
                step = -(-len(indices) // self.count)
                parts = [indices[start : start + step] for start in range(0, len(indices), step)]
                self._begun[indices] = [self._pool.submit(self._source.read, part) for part in parts]

    def read(self, indices: Sequence[int]) -> Batch:
        begun = self._begun.get(tuple(indices))
        if begun is None:
            return self._source.read(indices)
        parts = [future.result() for future in begun]
        joined = [None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True)]
        return Batch._make(joined)


def block_order(seed: int, epoch: int, count: int, block: int, window: int = WINDOW) -> np.ndarray:
    """A permutation of `count` pictures that reads them nearly from front to back of a few places: int64 indices.

    Blocks of `block` neighbours are shuffled, every `window` blocks that follow each other in that order are thrown
    together, and their pictures are shuffled. So a stretch of `window * block` pictures touches `window` blocks only,
    each of which is needed in no other stretch. A pure function of its arguments, like the order of `Loader`.

    >>> block_order(0, 0, 10, 2, 2).tolist()
    [1, 4, 5, 0, 9, 3, 8, 2, 7, 6]
    """
    num_blocks = -(-count // block)
    words = np.random.PCG64(mix(seed, "blocks", epoch)).random_raw(num_blocks + count)
    rank = np.empty(num_blocks, np.int64)
    rank[np.argsort(words[:num_blocks], kind="stable")] = np.arange(num_blocks)
    return np.lexsort((words[num_blocks:], np.repeat(rank // window, block)[:count]))
